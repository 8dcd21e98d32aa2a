"""Quickstart: one tiny run through the real path, and the sentences for wrong arguments."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from evovit import cli
from evovit.checkpoints.reduced import load_reduced
from evovit.commands.quickstart import quickstart
from evovit.data.digits import digit_scenes
from evovit.data.images import TEST_SEED
from evovit.errors import EvoViTError
from evovit.models.small_vit import ConvStem
from evovit.recipe.reading import differences
from evovit.report.quickstart import Result, chosen_scenes
from evovit.study import digit_recipes

KEYS = (
    *("model", "method", "keep_ratio", "top1", "gmacs", "images_per_second", "train_seconds", "parameters"),
    *("device", "dtype", "batch_size"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    quickstart(out, epochs=1, scenes_per_epoch=32, test_scenes=20, speed_rounds=2, device="cpu")
    return out


def test_results_are_rows_with_the_agreed_keys(folder: Path) -> None:
    rows = json.loads((folder / "results.json").read_text())
    assert [tuple(row) for row in rows] == [KEYS, KEYS]
    assert tuple(Result.__dataclass_fields__) == KEYS
    dense, evo = rows
    assert (dense["method"], evo["method"]) == ("dense", "evo_vit")
    assert (dense["keep_ratio"], evo["keep_ratio"]) == (1.0, 0.5)
    assert evo["gmacs"] <= 0.70 * dense["gmacs"]
    assert dense["parameters"] == evo["parameters"]
    assert all(0 <= row["top1"] <= 100 and row["images_per_second"] > 0 for row in rows)


def test_the_report_is_one_file_that_fetches_nothing(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    bare = re.sub('base64,[^"]*', "", html)
    assert "http" not in bare and html.count("src=") == html.count('src="data:image/jpeg;base64,') > 10
    assert "<script" not in html and "<link" not in html


def test_pictures_are_written_and_nothing_temporary_stays(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"dense", "evo_vit", "results.json", "report.html", "kept_patches.png"}
    assert (folder / "kept_patches.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_a_few_different_digits_and_only_blocks_that_select(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    digits = re.findall(r"<h3>digit (\d): (?:both answer|dense answers)", html)
    assert len(digits) == 4 and len({*digits}) >= 3
    shown = re.findall(r"<figcaption>(blocks \d to \d)<span>(\d+) of 64 patches", html)
    assert {name for name, _ in shown} <= {"blocks 2 to 4", "blocks 5 to 7", "blocks 2 to 7"}
    assert {kept for _, kept in shown} == {"32"} and len(shown) >= 6  # of four scenes and two photographs
    assert html.count("<span>the score it ranks by") == html.count("<span>what the model sees") == 6
    assert html.count("<figcaption>") == len(shown) + 12


def test_the_page_says_how_sure_it_is_and_what_to_do_next(folder: Path) -> None:
    html, (dense, evo) = (
        (folder / "report.html").read_text(),
        json.loads((folder / "results.json").read_text()),
    )
    error = (dense["top1"] / 100 * (1 - dense["top1"] / 100) / 20) ** 0.5
    assert f"{dense['top1']:.2f} ± {100 * error:.2f} %" in html and "trained once, with seed 0" in html
    widths = [float(width) for width in re.findall(r'class="fill s\d" style="width: ([\d.]+)%"', html)]
    assert widths[:2] == pytest.approx([dense["top1"], evo["top1"]], abs=0.01)  # from 0 to 100, no cut axis
    assert widths[2:4] == pytest.approx([100, 100 * evo["gmacs"] / dense["gmacs"]], abs=0.01)
    assert "Other machines give other figures." in html and html.count("<pre>") == 3


def test_the_last_scene_shown_is_one_where_the_models_differ() -> None:
    scenes = digit_scenes("test", 12, seed=TEST_SEED)
    ours = torch.ones(12).bool()
    theirs = ours.clone()
    theirs[[5, 9]] = False
    chosen = chosen_scenes(scenes, ours, theirs)
    assert chosen[-1] == 5 and len({*chosen}) == 4
    assert len({*chosen_scenes(scenes, ours, ours)}) == 4


def test_both_models_are_trained_alike_but_for_the_method() -> None:
    data, run = {"source": "digits", "batch_size": 32}, {"epochs": 10, "seed": 3}
    dense, evo = digit_recipes(0.5, data, run).values()
    assert {text.split(":")[0].split(".")[0] for text in differences(dense, evo)} == {"method"}


def test_a_second_call_trains_nothing_anew(folder: Path) -> None:
    before = {name: (folder / name / "steps.jsonl").read_bytes() for name in ("dense", "evo_vit")}
    results = json.loads((folder / "results.json").read_text())
    quickstart(folder, epochs=1, scenes_per_epoch=32, test_scenes=20, speed_rounds=2, device="cpu")
    assert {name: (folder / name / "steps.jsonl").read_bytes() for name in before} == before
    again = json.loads((folder / "results.json").read_text())
    assert [row["top1"] for row in again] == [row["top1"] for row in results]


def test_the_recorded_accuracy_is_that_of_the_saved_weights(folder: Path) -> None:
    row = json.loads((folder / "results.json").read_text())[1]
    evo = load_reduced(folder / "evo_vit" / "model")
    scenes = digit_scenes("test", 20, seed=TEST_SEED)
    with torch.no_grad():
        assert 100 * int((evo(scenes.images).argmax(1) == scenes.labels).sum()) / 20 == row["top1"]


def test_the_stem_gives_a_token_per_patch() -> None:
    assert ConvStem(48, 6, 3, 32)(torch.randn(2, 3, 48, 48)).shape == (2, 64, 32)


@pytest.mark.parametrize(
    "bad",
    [
        {"keep_ratio": 0.0},
        {"keep_ratio": 1.5},
        {"epochs": 0},
        {"test_scenes": 0},
        {"speed_rounds": 0},
        {"device": "tpu"},
    ],
)
def test_wrong_arguments_are_refused_before_any_training(bad: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(EvoViTError, match=r"allowed|above 0"):
        quickstart(tmp_path / "new", **bad)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_file_as_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EvoViTError, match="give another"):
            quickstart(out)


def test_the_command_line_says_it_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evovit", "quickstart", "--keep-ratio", "0"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("evovit: keep_ratio is 0")
