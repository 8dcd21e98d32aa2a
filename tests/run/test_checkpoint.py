"""Files in and out: official checkpoints, saved models, one sentence for everything wrong with them."""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import evovit
from evovit.checkpoints.reduced import load_reduced, save_reduced
from evovit.runtime.files import read_state_dict, write_atomically
from tests.conftest import GOLDEN, Golden, make_host, pictures


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    return Golden("evo_deit").state_dict()


def test_reads_the_authors_file_layout(official: dict[str, Any], tmp_path: Path) -> None:
    """A .pth with an argparse.Namespace beside the weights, as the official trainer writes."""
    path = tmp_path / "checkpoint.pth"
    prefixed = {f"module.{k}": v for k, v in official.items()}
    torch.save({"model": prefixed, "epoch": 299, "args": argparse.Namespace(lr=5e-4)}, path)
    case = Golden("evo_deit").case("eval_stage_keep0.5")
    model = evovit.load_official("evo_vit", path, num_heads=3)
    with torch.no_grad():
        logits = model(Golden("evo_deit").images(case))
    assert torch.allclose(logits, Golden("evo_deit").out(case, "logits"), atol=1e-5)
    assert model.num_classes == 10 and not model.training


def test_a_mapping_is_unwrapped_as_a_file_is(official: dict[str, Any]) -> None:
    plain = evovit.load_official("evo_vit", official, num_heads=3).state_dict()
    wrapped = {"model": {f"module.{k}": v for k, v in official.items()}, "epoch": 299}
    found = evovit.load_official("evo_vit", wrapped, num_heads=3).state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in found.items())
    with pytest.raises(evovit.EvoViTError, match="has no state dict"):
        evovit.load_official("evo_vit", {"epoch": 299}, num_heads=3)


def test_official_weights_go_without_the_training_head(official: dict[str, Any]) -> None:
    state = {k: v for k, v in official.items() if not k.startswith(("norm_cls", "head_cls"))}
    assert evovit.load_official("evo_vit", state, num_heads=3).method.class_head is None


def save_broken(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.pth"
    if kind == "truncated":
        torch.save({"model": {"a": torch.randn(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "truncated_safetensors":
        path = folder / "cut.safetensors"
        path.write_bytes((GOLDEN / "units_evo.safetensors").read_bytes()[:1000])
    elif kind == "code":
        path.write_bytes(pickle.dumps({"model": print}))
    elif kind == "list":
        torch.save([torch.ones(1)], path)
    elif kind == "empty":
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("missing", "There is no checkpoint file"),
        ("truncated", "cannot be read as a checkpoint"),
        ("truncated_safetensors", "cannot be read as a checkpoint"),
        ("code", "holds more than plain tensors"),
        ("list", "has no state dict"),
        ("empty", "cannot be read as a checkpoint"),
    ],
)
def test_unreadable_files_are_refused_in_one_sentence(kind: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.load_official("evo_vit", save_broken(kind, tmp_path), num_heads=3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "num_heads is None; give the number of attention heads, a divisor of the width 48"),
        ({"num_heads": 5}, "num_heads is 5"),
        ({"num_heads": 3, "img_size": 384}, "has 576 patches, but the checkpoint has 196 positions"),
        ({"num_heads": 3, "keep_ratio": 1.5}, "keep_ratio is 1.5"),
    ],
)
def test_contradicting_options_are_refused(
    official: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.load_official("evo_vit", official, **options)


def test_another_models_checkpoint_is_refused(official: dict[str, Any]) -> None:
    with pytest.raises(evovit.EvoViTError, match="not an official Evo-ViT .* 'qks.0.qk.weight' is missing"):
        evovit.load_official("evo_vit", make_host("vit").state_dict(), num_heads=3)
    with pytest.raises(evovit.EvoViTError, match="incomplete or inconsistent"):
        evovit.load_official(
            "evo_vit", {k: v for k, v in official.items() if k != "norms.3.bias"}, num_heads=3
        )
    with pytest.raises(evovit.EvoViTError, match="no official loader 'tome'; there are"):
        evovit.load_official("tome", official)


def test_a_loaded_model_keeps_the_mode_it_was_saved_in(tmp_path: Path) -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=1, stage_length=2)
    reduced.method.mode = "layer"
    save_reduced(reduced, tmp_path / "model")
    loaded = load_reduced(tmp_path / "model", make_host("vit"))
    assert loaded.method.mode == "layer"
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pictures()), reduced.eval()(pictures()))


def test_saved_host_weights_load_into_the_plain_host(tmp_path: Path) -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=1)
    save_reduced(reduced, tmp_path)
    plain = make_host("vit")
    plain.load_state_dict(read_state_dict(tmp_path / "model.safetensors"))


def test_damaged_folders_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(evovit.EvoViTError, match="give a folder written by save_reduced"):
        load_reduced(tmp_path / "nothing", make_host("vit"))
    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=1)
    save_reduced(reduced, tmp_path / "model")
    with pytest.raises(evovit.EvoViTError, match="does not fit this Eva"):
        load_reduced(tmp_path / "model", make_host("eva02"))
    (tmp_path / "model" / "method.json").write_text('{"method": ')
    with pytest.raises(evovit.EvoViTError, match="is damaged or not written by evovit"):
        load_reduced(tmp_path / "model", make_host("vit"))
    (tmp_path / "file").write_text("")
    with pytest.raises(evovit.EvoViTError, match="is a file; give a folder"):
        save_reduced(reduced, tmp_path / "file")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(2)}, path)

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail)
    assert torch.equal(read_state_dict(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_save_cut_off_anywhere_leaves_the_old_one_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step that changes the folder fails once; never is a mixture of two saves read."""
    images, saved = pictures(), []
    for seed, ratio in ((0, 0.5), (1, 0.3)):
        host = make_host("vit")
        with torch.no_grad():
            host.head.bias += seed
        saved.append(evovit.reduce_tokens(host, start_block=1, keep_ratio=ratio).eval())
    with torch.no_grad():
        old, new = (model(images) for model in saved)
    real, found, steps = Path.replace, list[bool](), 0
    while True:
        folder = tmp_path / str(steps)
        save_reduced(saved[0], folder)
        left = steps

        def replace(path: Path, target: Path) -> Path:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(path, target)

        monkeypatch.setattr(Path, "replace", replace)
        try:
            save_reduced(saved[1], folder)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(Path, "replace", real)
        with torch.no_grad():
            logits = load_reduced(folder, make_host("vit")).eval()(images)
        found.append(torch.equal(logits, new))
        assert found[-1] or torch.equal(logits, old)
        save_reduced(saved[1], folder)
        assert sorted(p.name for p in folder.iterdir()) == [
            "method.json",
            "method.safetensors",
            "model.safetensors",
        ]
        steps += 1
    assert found == [False, False, False, True, True]


def test_a_save_cut_off_after_another_that_was_leaves_the_newest_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is cut off before its files are in their place; the second writes files of the same names."""
    images, real, left = pictures(), Path.replace, 0

    def replace(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(path, target)

    def save(bias: float, steps: int) -> torch.Tensor:
        nonlocal left
        host = make_host("vit")
        with torch.no_grad():
            host.head.bias += bias
        left, reduced = steps, evovit.reduce_tokens(host, start_block=1).eval()
        with contextlib.suppress(KeyboardInterrupt):
            save_reduced(reduced, tmp_path)
        with torch.no_grad():
            return reduced(images)

    monkeypatch.setattr(Path, "replace", replace)
    save(0, 99)
    for steps in (3, 4):
        whole = save(steps, steps)
        save(-1, 2)
        left = 99
        with torch.no_grad():
            assert torch.equal(load_reduced(tmp_path, make_host("vit")).eval()(images), whole)


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which safetensors tells with an error of its own."""

    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.serialize_file", refuse)
    with pytest.raises(evovit.EvoViTError, match="cannot be written .*No space left on device"):
        save_reduced(evovit.reduce_tokens(make_host("vit"), start_block=1), tmp_path / "model")


def test_a_refused_folder_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    save_reduced(evovit.reduce_tokens(make_host("vit"), start_block=1), tmp_path)
    model = make_host("deit3")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(evovit.EvoViTError, match="does not fit this VisionTransformer"):
        load_reduced(tmp_path, model)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")
    with pytest.raises(evovit.EvoViTError, match="missing, cut off or changed"):
        load_reduced(tmp_path, make_host("vit"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_folder_of_the_former_version_is_read(tmp_path: Path) -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), start_block=1).eval()
    save_reduced(reduced, tmp_path)
    content = json.loads((tmp_path / "method.json").read_text())
    del content["files"]
    (tmp_path / "method.json").write_text(json.dumps(content))
    with torch.no_grad():
        found = load_reduced(tmp_path, make_host("vit")).eval()(pictures())
        assert torch.equal(found, reduced(pictures()))


@pytest.mark.parametrize(
    "files",
    [
        {"x": "y"},
        {"model.safetensors": None},
        {"method.safetensors": []},
        {"../x": "y"},
        {"method.safetensors": "0"},
    ],
    ids=str,
)
def test_a_manifest_without_the_checksum_of_a_file_is_refused(files: dict[str, Any], tmp_path: Path) -> None:
    save_reduced(evovit.reduce_tokens(make_host("vit"), start_block=2), tmp_path)
    content = json.loads((tmp_path / "method.json").read_text())
    (tmp_path / "method.json").write_text(json.dumps(content | {"files": files}))
    with pytest.raises(evovit.EvoViTError, match="files is missing or wrong"):
        load_reduced(tmp_path, make_host("vit"))
