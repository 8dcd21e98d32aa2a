"""`evovit eval`: runs and timm models on images, dense and reduced."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import evovit
from evovit import cli
from evovit.errors import EvoViTError
from evovit.recipe.reading import LIBRARY
from evovit.runtime.world import join_world
from evovit.train.tested import places_of, saved_model
from tests.run.processes import train_here
from tests.run.test_every_method import recipe_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of plain pictures."""
    root = tmp_path_factory.mktemp("images") / "val"
    for i, name in enumerate(("blue", "red")):
        (root / name).mkdir(parents=True)
        for k in range(3):
            colour = (255 * i, 0, 255 * (1 - i))
            Image.new("RGB", (40, 32 + k), colour).save(root / name / f"{k}.png")
    return root


def tell(*arguments: str) -> None:
    cli.main(["eval", *arguments])


def test_a_dense_run_is_tested_reduced_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_here(recipe_for(None), tmp_path / "dense")
    capsys.readouterr()
    tell(str(tmp_path / "dense"), "--method", "evo_vit:start_block=1,keep_ratio=0.3", "tome:r=[3,3]")
    dense, evo, tome = capsys.readouterr().out.splitlines()[1:]
    assert dense.startswith("  dense: top-1 ") and "20 images" in dense
    assert evo.startswith("  evo_vit:start_block=1,keep_ratio=0.3: top-1 ") and "(" in evo
    work = [float(line.split(" GMACs")[0].split()[-1]) for line in (dense, evo, tome)]
    assert work[1] < work[0] and work[2] < work[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--device", "x"), "run.device is 'x'; allowed is auto, cpu or cuda"),
        (("--workers", "-1"), "data.workers is -1; allowed is a whole number from 0 to 256"),
        (("--workers", "1"), "data.workers is given, but has no effect on digits"),
    ],
)
def test_flags_count_for_a_run_too(
    words: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.toml").write_text((LIBRARY / "digits" / "dense.toml").read_text())
    with pytest.raises(SystemExit):
        tell(str(tmp_path), *words)
    assert told in capsys.readouterr().err


def test_a_timm_model_with_a_file_of_weights_is_tested_on_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("test_vit", num_classes=2)
    with torch.no_grad():
        model.head.bias[0], model.head.bias[1] = 1e4, -1e4  # all are blue
    torch.save({"model": model.state_dict()}, tmp_path / "fine.pth")
    words = ("--weights", str(tmp_path / "fine.pth"), "--images", str(folder), "--workers", "0")
    tell("test_vit", *words, "--method", "tome:r=4")
    head, dense, tome = capsys.readouterr().out.splitlines()
    assert head.startswith("test_vit, ")
    assert "top-1 50.00 %" in dense and "6 images, 0 unreadable" in dense
    assert "top-1 50.00 % (+0.00 ± 0.00)" in tome


def test_a_saved_model_is_tested_on_images_prepared_as_it_tells(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model("test_vit", num_classes=2).eval()
    model.pretrained_cfg |= {
        "mean": (0.0,) * 3,
        "std": (0.1,) * 3,
        "interpolation": "nearest",
        "crop_mode": "squash",
    }
    evovit.save_reduced(evovit.reduce_tokens(model, "tome", r=4), tmp_path)
    images = saved_model(str(tmp_path), folder, ["data.workers=0", "run.device=cpu"]).images
    with join_world("cpu") as world:
        (pixels, labels), *_ = images.test(world)
    assert (
        pixels[labels == 0][:, 2].min() == 10 and pixels[labels == 0][:, :2].abs().max() == 0
    )  # blue is 1 / 0.1
    tell(str(tmp_path), "--images", str(folder), "--workers", "0", "--method", "evit:blocks=[1]")
    head, trained, _, evit = capsys.readouterr().out.splitlines()
    assert head == f"{tmp_path}:" and trained.startswith("  as trained: top-1") and "evit" in evit
    with pytest.raises(SystemExit):
        tell(str(tmp_path), "--images", str(folder), "--pretrained")
    assert "has weights of its own" in capsys.readouterr().err


def test_folders_named_as_imagenets_classes_find_their_places() -> None:
    model = timm.create_model("test_vit", num_classes=1000)
    places = places_of(["n01440764", "n02102040", "n03888257"], model)
    assert places is not None and places.tolist() == [0, 217, 701]
    assert places_of(["x"] * 1000, model) is None
    with pytest.raises(EvoViTError, match="The images have 2 classes and the model 1000"):
        places_of(["blue", "red"], model)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("test_vit",), "give --images FOLDER"),
        (("test_vit", "--images", "."), "Give either --weights FILE or --pretrained"),
        (("test_vitt", "--images", ".", "--pretrained"), "Did you mean 'test_vit"),
        (("nowhere/run", "--images", ".", "--pretrained"), "timm does not know"),
        (("test_vit", "--images", ".", "--weights", "no.pth"), "There is no checkpoint file 'no.pth'"),
        (("a" * 5000,), "which is not a path"),
    ],
)
def test_what_is_missing_is_one_sentence(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        tell(*words)
    told = capsys.readouterr().err
    assert exit_.value.code == 2 and sentence in told and told.count("\n") == 1
