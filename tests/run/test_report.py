"""Pages, tables and plots: they say what was measured, and obey no name that a stranger chose."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from evovit.commands.report import report
from evovit.errors import EvoViTError
from evovit.macs import gmacs
from evovit.model import backbone_of
from evovit.recipe.reading import read_recipe
from evovit.recipe.tables import Recipe
from evovit.report.page import (
    Bar,
    Bars,
    Beside,
    Command,
    Heading,
    Note,
    Paragraph,
    Part,
    Quiet,
    Subheading,
    Tile,
    Tiles,
    drawn,
    jpeg,
    page,
)
from evovit.report.plots import Point, draw_accuracy
from evovit.report.runs import Group, draw_curves
from evovit.report.tables import as_csv, as_markdown, as_printed, speedup_text, spread, table
from evovit.runtime.world import World
from evovit.study import shown_images
from evovit.train.build import build_model
from evovit.visualize import draw_kept, draw_side_by_side
from tests.run.processes import small, train_here

EVIL = '<script>alert("1")</script>&amp;'
TEX = r"$\frac$"  # no formula: matplotlib's parser would raise


class Parsed(HTMLParser):
    """The tags of a page and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def figure() -> Figure:
    found = Figure(figsize=(1, 1))
    found.subplots().plot([1, 2])
    return found


# pages


def test_a_page_shows_every_name_as_it_is_and_makes_no_tag_of_it() -> None:
    cells = table((EVIL, "n"), [[EVIL, "1"], ["b", "2"]], bold=[False, True])
    parts: list[Part] = [
        *(kind(EVIL) for kind in (Paragraph, Note, Quiet, Heading, Subheading)),
        *(cells, drawn(figure(), EVIL), Command(EVIL, EVIL)),
        Beside([Tiles([Tile(jpeg(Image.new("RGB", (2, 2)), EVIL), EVIL, EVIL)])]),
        Bars([(EVIL, [Bar(EVIL, 0.5, EVIL)])]),
    ]
    text = page(EVIL, parts)
    parsed = Parsed(text)
    assert "script" not in {tag for tag, _ in parsed.tags}
    # title and heading, five texts, two cells, a command, a tile, a bar
    assert parsed.text.count(EVIL) == 2 + 5 + 2 + 2 + 2 + 3
    first, second = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert first["alt"] == second["alt"] == EVIL and (first["src"] or "").startswith(
        "data:image/png;base64,iVBOR"
    )
    assert (second["src"] or "").startswith("data:image/jpeg;base64,")
    assert [attributes.get("class") for tag, attributes in parsed.tags if tag == "tr"] == [None, None, "bold"]


def test_bars_begin_at_zero_and_have_whiskers_where_they_are_uncertain() -> None:
    bars = [Bar("sure", 1 / 3, "33 %"), Bar("unsure", 0.5, "50 %", 1, 0.4, 0.65)]
    styles = [a["style"] for _, a in Parsed(page("", [Bars([("", bars)])])).tags if "style" in a]
    assert styles == ["width: 33.33%", "width: 50.00%", "left: 40.00%; width: 25.00%"]


def test_a_page_fetches_nothing_and_fits_a_phone() -> None:
    tags = Parsed(page("title", [drawn(figure(), "what")])).tags
    names = {tag for tag, _ in tags}
    assert not names & {"script", "link", "iframe", "object", "base"}
    assert [tag for tag, attributes in tags if "src" in attributes or "href" in attributes] == ["img"]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags


# tables


def printed(cells: Any) -> str:
    text = io.StringIO()
    Console(file=text, width=120, force_terminal=False).print(as_printed(cells, "title"))
    return text.getvalue()


def test_a_column_without_a_cell_is_left_out_everywhere() -> None:
    cells = table(("run", "peak MB", "ms"), [["a", "", "1.5"], ["b", "", ""]])
    assert cells.columns == ["run", "ms"] and cells.rows == [["a", "1.5"], ["b", ""]]
    for text in (as_markdown(cells), as_csv(cells), printed(cells), page("", [cells])):
        assert "ms" in text and "peak" not in text
    assert table(("run", "ms"), []).columns == ["run", "ms"]


def test_markdown_cells_are_one_cell_and_no_html() -> None:
    lines = as_markdown(table(("run",), [["a|b\n<b>c</b> \\|"]])).splitlines()
    assert lines[2] == r"| a\|b &lt;b&gt;c&lt;/b&gt; \\\| |"


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-x", "@SUM(A1)", "\t=1", " =1", "-1+cmd|x"])
def test_a_csv_cell_is_no_formula(text: str) -> None:
    assert list(csv.reader(io.StringIO(as_csv(table(("run",), [[text]])))))[1] == [f"'{text}"]


@pytest.mark.parametrize("text", ["-1.5", "+0.25", "-0.45 ± 0.10", "-1e-05", "1,234", "a=b", "2 of 2"])
def test_a_csv_number_or_plain_text_stays(text: str) -> None:
    assert list(csv.reader(io.StringIO(as_csv(table(("of dense",), [[text]])))))[1] == [text]


def test_the_terminal_obeys_no_name() -> None:
    text = printed(table(("run", "n"), [["a\x1b[2J\x07[red]b[/red]\n\u202ec", "1"], ["d", "2"]]))
    assert r"a\x1b[2J\x07[red]b[/red] \u202ec" in text and not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)


def test_cells_say_what_numbers_show() -> None:
    assert speedup_text(1.5, 0.01) == "1.50 ± 1.0%" and speedup_text(1.005, 0.01) == "about 1 ± 1.0%"
    assert speedup_text(1.0, None) == "1" and speedup_text(None, None) == ""
    assert spread([]) == "" and spread([1.0]) == "1.00" and spread([1.0, 3.0], "+") == "+2.00 ± 1.41"


# plots


def test_an_accuracy_axis_ends_at_100_and_makes_no_cliff_of_half_a_point() -> None:
    for panel in draw_accuracy([Point("dense", 2.0, 10, [99.9]), Point("evo", 1.0, 15, [99.45])]).axes:
        assert panel.get_ylim() == (90, 100) and panel.get_xlim()[0] == 0
    for panel in draw_accuracy(
        [Point("dense", 2.0, 10, [99.0, 100.0, 95.0]), Point("e", 1.0, 15, [3.0])]
    ).axes:
        assert panel.get_ylim() == (0, 100)
    low, high = draw_accuracy([Point("dense", 2.0, 10, [42.0])]).axes[0].get_ylim()
    assert low < 42 < high < 60 and high - low >= 10


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small(tmp_path)


def curves(recipe: Recipe, epochs: int, name: str = "run") -> Figure:
    run = [{"epoch": i + 1, "loss": 2.0 - 0.1 * i, "top1": 99.9} for i in range(epochs)]
    return draw_curves([Group(name, recipe, 1.0, [run])])


@pytest.mark.parametrize("epochs", [1, 2, 3, 30])
def test_an_epoch_axis_has_whole_numbers_only(recipe: Recipe, epochs: int) -> None:
    for panel in curves(recipe, epochs).axes:
        low, high = panel.get_xlim()
        ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == int(tick) for tick in ticks)
        assert low <= 1 and epochs <= high
    assert curves(recipe, epochs).axes[1].get_ylim() == (90, 100)


def test_a_loss_that_is_not_finite_is_a_gap(recipe: Recipe) -> None:
    run = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": "nan"}, {"epoch": 3, "loss": 1.0}]
    drawn(draw_curves([Group("run", recipe, 1.0, [run])]), "")
    (line,) = draw_curves([Group("run", recipe, 1.0, [run])]).axes[0].lines
    assert [str(value) for value in line.get_ydata()] == ["2.0", "nan", "1.0"]


def test_a_name_is_no_formula_in_any_plot(recipe: Recipe) -> None:
    images, kept = torch.rand(1, 3, 4, 4), {TEX: torch.ones(1, 2, 2).bool()}
    for found in (
        draw_accuracy([Point(TEX, 1.0, 1.0, [50.0]), Point(TEX * 40, 1.0, 1.0, [50.0])]),
        curves(recipe, 2, TEX),
        draw_side_by_side(images, kept, [TEX]),
        draw_kept(images, kept[TEX][:, None], titles=[TEX]),
    ):
        drawn(found, "")  # would raise
    (title, *_) = [panel.get_title() for panel in draw_side_by_side(images, kept, [TEX]).axes]
    assert title == r"\$\frac\$"  # how matplotlib writes a dollar sign


def test_a_legend_covers_no_axis_however_long(recipe: Recipe) -> None:
    names = [f"a method with a long name, number {i}, and options" for i in range(30)]
    found = draw_accuracy([Point(name, 1.0, 1.0, [50.0]) for name in names])
    found.draw_without_rendering()
    (legend,) = found.legends
    box = legend.get_window_extent()
    assert box.x0 >= max(panel.get_window_extent().x1 for panel in found.axes)
    assert box.y0 >= 0 and len(legend.get_texts()) == 30


# pictures


class ByClass:
    """Test images that come class by class, as those of a folder do."""

    class_names, num_classes = ("ant", "bee", "cat"), 3
    read = 0

    def test(self, world: World) -> Any:
        for label in (0, 0, 1, 2, 2):
            self.read += 1
            yield torch.full((4, 3, 2, 2), float(label)), torch.full((4,), label)


def test_pictures_come_from_several_classes_even_if_a_batch_has_one(recipe: Recipe) -> None:
    images = ByClass()
    world = World(0, 1, torch.device("cpu"))
    shown = shown_images(recipe, images, torch.nn.Identity(), world, 6)  # type: ignore[arg-type]
    assert shown.titles == ["ant", "bee", "cat", "ant", "bee", "cat"] and images.read == 4
    assert shown.images[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2] and shown.colours.max() <= 1


# runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    recipe = small(folder, "run.epochs=1", "data.scenes=32", "learning_rate.warm_up_epochs=0")
    train_here(recipe, folder / TEX)
    return folder / TEX


def reported(run: Path, out: Path) -> dict[str, str]:
    report((run,), out=out)
    (row,) = csv.DictReader((out / "report.csv").read_text().splitlines())
    return row


def test_gmacs_are_what_the_run_wrote_down(trained: Path, tmp_path: Path) -> None:
    path = trained / "environment.json"
    written = json.loads(path.read_text())
    row = reported(trained, tmp_path)
    assert row["run"] == TEX and row["GMACs"] == f"{written['gmacs']:.4g}"
    path.write_text(json.dumps(written | {"gmacs": 12.34}))
    assert reported(trained, tmp_path)["GMACs"] == "12.34"
    path.write_text(json.dumps(written))


@pytest.mark.parametrize("left", [{}, {"num_classes": 1000}, None])
def test_a_run_of_the_former_version_is_counted(
    trained: Path, tmp_path: Path, left: dict[str, int] | None
) -> None:
    path = trained / "environment.json"
    before = path.read_text()
    path.unlink()
    if left is not None:
        path.write_text(json.dumps(left))
    found = reported(trained, tmp_path)["GMACs"]
    path.write_text(before)
    model = build_model(
        read_recipe(trained / "recipe.toml"), (left or {}).get("num_classes", 10), weights=False
    )
    assert found == f"{gmacs(model, backbone_of(model).image_shape):.4g}"


def test_a_broken_environment_is_named(trained: Path, tmp_path: Path) -> None:
    path = trained / "environment.json"
    before = path.read_text()
    path.write_text("{")
    with pytest.raises(EvoViTError, match=r"environment\.json"):
        reported(trained, tmp_path)
    path.write_text(before)


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "null", "3", '"x"', "[" * 100_000, '{"gmacs": "x"}', '{"gmacs": null}', '{"gmacs": []}'),
        *('{"gmacs": NaN}', '{"gmacs": -1}', '{"gmacs": 1e999}', '{"gmacs": true}', '{"num_classes": "x"}'),
        *('{"num_classes": -5}', '{"num_classes": 1e9}', '{"gmacs": ' + "9" * 5000 + "}"),
    ],
    ids=range(16),
)
def test_an_odd_environment_is_one_sentence(text: str, trained: Path, tmp_path: Path) -> None:
    path = trained / "environment.json"
    before = path.read_text()
    path.write_text(text)
    try:
        with pytest.raises(EvoViTError) as caught:
            reported(trained, tmp_path)
    finally:
        path.write_text(before)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1100


@pytest.mark.parametrize(
    "change",
    [
        *({"epoch": "x"}, {"epoch": 0}, {"epoch": 1e400}, {"epoch": True}, {"epoch": 10**30}),
        *({"loss": "a"}, {"loss": []}, {"loss": None}, {"train_seconds": "x"}, {"train_seconds": None}),
        *({"train_seconds": -1}, {"train_seconds": float("inf")}, {"top1": None}, {"top1": float("nan")}),
        *({"top1": {}}, {"top1": 1e308}, {"top1": -1}, {"ema_top1": "x"}),
    ],
    ids=str,
)
def test_a_line_that_is_no_epoch_is_one_sentence(
    change: dict[str, Any], trained: Path, tmp_path: Path
) -> None:
    path = trained / "epochs.jsonl"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before.splitlines()[0]) | change))
    try:
        with pytest.raises(EvoViTError, match=r"epochs\.jsonl.* not an epoch of a training; move it away"):
            reported(trained, tmp_path)
    finally:
        path.write_text(before)


def test_a_place_without_a_run_is_named(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(EvoViTError, match="No run is at or below .*nowhere"):
        report((trained, tmp_path / "nowhere"), out=tmp_path)


def test_a_run_whose_name_is_no_text_is_shown(trained: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"a\xff\n")
    shutil.copytree(trained, odd)
    assert reported(odd, tmp_path / "out")["run"] == "a\\udcff "
