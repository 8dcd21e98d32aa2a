"""`evovit analyse`: one command from a model and images to a page; what cannot be shown is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import evovit
from evovit import cli
from evovit.data.photographs import open_photographs
from evovit.train.state import course
from evovit.train.tested import weights_by_epoch
from tests.run.processes import small, train_here

SMALL = ("data.scenes=32", "data.test_scenes=8", "run.checkpoint_every=0", "run.keep_every=1")
PREPARE = {
    "input_size": (3, 32, 32),
    "mean": (0.2, 0.3, 0.4),
    "std": (0.5, 0.5, 0.6),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Evo-ViT, trained for four epochs, the weights of each at hand."""
    path = tmp_path_factory.mktemp("trained")
    train_here(small(path, *SMALL), path / "run")
    return path / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs of two classes, and one that is damaged."""
    root = tmp_path_factory.mktemp("photographs")
    for name, count in (("n01440764", 2), ("house", 1)):
        (root / name).mkdir()
        for k in range(count):
            Image.new("RGB", (40, 36), (80 * k, 90, 200)).save(root / name / f"{k}.png")
    (root / "house" / "broken.jpg").write_bytes(b"none")
    return root


def tell(*words: object) -> None:
    cli.main(["analyse", *map(str, words), "--device", "cpu"])


def test_a_run_on_digits_gives_every_figure(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(run, "digits", "--count", 40, "--pictures", 2, "--out", tmp_path)
    said = capsys.readouterr().out
    assert "CKA of the mean patch token with the final class token goes from" in said
    assert "in layer mode" in said and "in stage mode" in said and "epoch 1" in said
    names = {path.name for path in tmp_path.iterdir()}
    pictures = ("attention", "scores", "cka", "correlation", "kept", "kept_layer", "training", "agreement")
    assert names == {"analysis.html", "analysis.json", *(f"{name}.png" for name in pictures)}
    html = (tmp_path / "analysis.html").read_text()
    assert "http" not in re.sub('base64,[^"]*', "", html) and "<script" not in html
    assert html.count('src="data:image/png;base64,') == html.count("src=") == len(pictures)
    assert [f"Figure {n}" in html for n in ("2", "4a", "4b", "5")] == [True] * 4
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert [block["kept"] for block in found["blocks"]] == [1, 0.5, 0.5, 0.5]
    assert found["num_images"] == 40 and found["mode"] == "stage" and found["other_mode"] == "layer"
    assert list(found["training"]) == [f"epoch {n}" for n in range(1, 5)]
    assert found["training"]["epoch 4"] == 1
    assert found["method"].startswith("evo_vit start_block=1 stage_length=2")


def test_weights_stay_every_so_many_epochs(run: Path, tmp_path: Path) -> None:
    kept = [name for name in course(run / "checkpoints").values() if name.startswith("epoch-")]
    assert len(kept) == 4 and [name for name, _ in weights_by_epoch(run, 2)] == ["epoch 1", "epoch 4"]
    last = weights_by_epoch(run, 9)[-1][1]
    assert all(torch.equal(last[key], value) for key, value in weights_by_epoch(run, 2)[1][1].items())
    (run / "checkpoints/epoch-000000099.safetensors").write_bytes(b"cut off")  # of a killed process
    recipe = small(tmp_path, *SMALL[:3], "run.keep_every=3")
    assert "finished" in train_here(recipe, run)  # another number is no other training, and nothing goes
    assert [name for name in course(run / "checkpoints").values() if name.startswith("epoch-")] == kept
    assert len(list((run / "checkpoints").glob("epoch-*.safetensors"))) == 4


def test_without_keep_every_the_last_two_are_shown(tmp_path: Path) -> None:
    train_here(small(tmp_path, *SMALL[:3], "run.epochs=3"), tmp_path / "run")
    tell(tmp_path / "run", "digits", "--count", 4, "--pictures", 1, "--out", tmp_path / "out")
    told = json.loads((tmp_path / "out/analysis.json").read_text())["training"]
    assert list(told)[-2:] == ["epoch 2", "epoch 3"]


def test_a_timm_model_on_the_two_samples_says_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell("test_vit", "samples", "--out", tmp_path)
    said, html = capsys.readouterr().out, (tmp_path / "analysis.html").read_text()
    assert "test_vit has random weights" in said
    assert "No CKA with the final class token: fewer than 32 images" in said
    assert "Left out: linear CKA over fewer than 32 images" in html and "Nothing is reduced" in html
    assert not (tmp_path / "cka.png").exists() and not (tmp_path / "scores.png").exists()


def test_a_method_may_be_named_for_a_timm_model(folder: Path, tmp_path: Path) -> None:
    tell(
        "test_vit", folder, "--method", "evit:blocks=[1],keep_ratio=0.5", "--blocks", 0, 2, "--out", tmp_path
    )
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert found["method"] == "evit keep_ratio=0.5 blocks=(1,)" and found["num_images"] == 3
    assert found["blocks"][0]["kept"] == 1 and found["blocks"][1]["kept"] == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "scores.png").exists() and found["training"] == {}


def test_a_saved_model_without_class_token_and_without_scores(tmp_path: Path) -> None:
    options: dict[str, Any] = {"img_size": 24, "patch_size": 6, "embed_dim": 32, "depth": 4, "num_heads": 2}
    options |= {"class_token": False, "global_pool": "avg"}
    name = "vit_tiny_patch16_224"
    reduced = evovit.reduce_tokens(timm.create_model(name, **options), "tome", r=3)
    evovit.save_reduced(reduced, tmp_path / "saved", host=name, host_options=options)
    tell(tmp_path / "saved", "digits", "--count", 34, "--out", tmp_path / "out")
    html = (tmp_path / "out/analysis.html").read_text()
    assert "Left out: this model has no class token to compare with." in html
    assert "This method ranks no patches" in html and "attention that each patch receives" in html


def test_a_model_whose_tokens_have_no_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell("test_vit", "digits", "--method", "sit:blocks=[0]", "--count", 33, "--out", tmp_path)
    assert "cannot be compared" in capsys.readouterr().out
    assert "Left out: the tokens of this method have no places." in (tmp_path / "analysis.html").read_text()


def test_titles_are_the_classes(folder: Path) -> None:
    found = open_photographs(str(folder), PREPARE, 9)
    assert found.titles == ["house", "tench", "tench"] and found.images.shape == (3, 3, 32, 32)
    assert open_photographs(str(folder / "house"), PREPARE, 9).titles == ["0"]
    assert open_photographs("samples", PREPARE, 9).titles == ["china", "flower"]


def test_digits_are_normalised_as_the_model_asks() -> None:
    plain = PREPARE | {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    drawn = open_photographs("digits", plain, 3)
    scenes = evovit.digit_scenes("test", 3, size=32, seed=2**40)
    assert torch.allclose(drawn.images, scenes.images) and drawn.titles[0] == f"digit {scenes.labels[0]}"
    colours = scenes.images[:, 1] * 0.25 + 0.5
    other = open_photographs("digits", PREPARE, 3).images[:, 1]
    assert torch.allclose(other, (colours - 0.3) / 0.5, atol=1e-6)


def test_many_photographs_are_taken_from_all_over_the_folder(tmp_path: Path) -> None:
    for number in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    assert open_photographs(str(tmp_path), PREPARE, 4).titles == ["0", "2", "5", "7"]
    assert len(open_photographs(str(tmp_path), PREPARE, 99).titles) == 10


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nothing", "digits"), "model is 'nothing', which timm does not know"),
        (("test_vit", "no/such/folder"), "There is no folder 'no/such/folder'"),
        (("test_vit", "digits", "--blocks", "99"), "blocks is 99; allowed is 0 to"),
        (("test_vit", "digits", "--count", "0"), "count is 0; allowed is 1 to"),
        (("test_vit", "digits", "--pictures", "-1"), "pictures is -1; allowed is 1 to"),
        (("test_vit", "digits", "--checkpoints", "1"), "checkpoints is 1; allowed is 2 to"),
        (("test_vit", "digits", "--method", "evo_vitt"), "There is no method 'evo_vitt'"),
        (
            ("test_vit", "digits", "--weights", "w.pth", "--pretrained"),
            "Give either --weights or --pretrained",
        ),
        (("resnet18", "digits"), "is not a supported host"),
        (("test_vit",), "IMAGES"),
    ],
)
def test_wrong_words_are_one_sentence(
    words: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        tell(*words, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and told in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_model_and_a_reduced_run_with_a_method(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, told in (
        ((tmp_path, "digits"), "is neither the folder of a run nor one that save_reduced wrote"),
        ((run, "digits", "--method", "tome"), "is reduced already; leave --method out"),
    ):
        with pytest.raises(SystemExit) as exit_:
            tell(*words, "--out", tmp_path / "out")
        assert exit_.value.code == 2 and told in capsys.readouterr().err
