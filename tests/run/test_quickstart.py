"""Quickstart: one tiny run through the real path, and the sentences for wrong arguments."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from evovit import cli
from evovit.checkpoints.reduced import load_reduced
from evovit.commands.quickstart import quickstart
from evovit.data.digits import digit_scenes
from evovit.data.images import TEST_SEED
from evovit.errors import EvoViTError
from evovit.models.small_vit import ConvStem, small_vit
from evovit.recipe.reading import differences
from evovit.report.quickstart import Result
from evovit.study import digit_recipes
from evovit.visualize import draw_kept

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
    assert "http" not in re.sub('base64,[^"]*', "", html) and "src=" in html
    assert html.count('src="data:image/png;base64,') == html.count("src=") == 2
    assert "<script" not in html and "<link" not in html


def test_pictures_are_written_and_nothing_temporary_stays(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    runs = {"dense", "evo_vit"}
    assert names == runs | {"results.json", "report.html", "accuracy_speed.png", "kept_patches.png"}
    assert (folder / "kept_patches.png").read_bytes().startswith(b"\x89PNG")


def test_both_models_are_trained_alike_but_for_the_method() -> None:
    data, run = {"source": "digits", "batch_size": 32}, {"epochs": 10, "seed": 3}
    dense, evo = digit_recipes(0.5, data, run).values()
    assert {text.split(":")[0].split(".")[0] for text in differences(dense, evo)} == {"method"}


def test_a_second_call_trains_nothing_anew_and_its_pictures_show_different_digits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def noted(images: Any, kept: Any, boxes: Any, titles: list[str]) -> Any:
        seen.extend(titles)
        return draw_kept(images, kept, boxes, titles)

    monkeypatch.setattr("evovit.report.quickstart.draw_kept", noted)
    before = {name: (folder / name / "steps.jsonl").read_bytes() for name in ("dense", "evo_vit")}
    results = json.loads((folder / "results.json").read_text())
    quickstart(folder, epochs=1, scenes_per_epoch=32, test_scenes=20, speed_rounds=2, device="cpu")
    assert {name: (folder / name / "steps.jsonl").read_bytes() for name in before} == before
    again = json.loads((folder / "results.json").read_text())
    assert [row["top1"] for row in again] == [row["top1"] for row in results]
    digits = digit_scenes("test", 20, seed=TEST_SEED).labels.unique().tolist()
    assert len(seen) == 10 and {*seen} == {f"digit {digit}" for digit in digits}


def test_the_recorded_accuracy_is_that_of_the_saved_weights(folder: Path) -> None:
    row = json.loads((folder / "results.json").read_text())[1]
    evo = load_reduced(folder / "evo_vit" / "model", small_vit(seed=0)).eval()
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
        with pytest.raises(EvoViTError, match="give a folder"):
            quickstart(out)


def test_the_command_line_says_it_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evovit", "quickstart", "--keep-ratio", "0"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("evovit: keep_ratio is 0")
