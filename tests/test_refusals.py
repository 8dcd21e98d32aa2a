"""What is plainly wrong is refused in one sentence: models, images, shapes, arguments, paths."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import evovit
from evovit.data.dense_labels import read_label_map
from evovit.errors import EvoViTError, check_count, in_one_line, printable, shown
from evovit.runtime.files import as_path, read_json, read_state_dict, write_files
from tests.conftest import TINY, make_host, pictures


def refused(call: Callable[[], Any], word: str | None = None) -> str:
    """Return the sentence of a refusal: one line, of plain letters, not long."""
    with pytest.raises(EvoViTError, match=word) as caught:
        call()
    text = str(caught.value)
    assert 10 < len(text) < 1100 and text.isprintable(), text
    return text


def test_a_sentence_is_one_line_of_plain_letters_whatever_is_in_it() -> None:
    text = str(EvoViTError("a\nb\x1b[31m\u202e\x00\ud800 " + "x" * 9000 + " the end"))
    assert text.startswith(r"a b\x1b[31m\u202e\x00\ud800 xxx") and text.endswith("the end")
    assert text.isprintable() and len(text) < 1100
    assert printable("é 😀") == "é 😀"


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("\n")


@pytest.mark.parametrize("value", [Odd(), 10**5000, "\x1b[2J", Path("x\ny"), ["x" * 900]], ids=range(5))
def test_a_value_is_shown_in_one_line(value: Any) -> None:
    assert shown(value).isprintable() and len(shown(value)) < 120


@pytest.mark.parametrize("value", [2, numpy.int64(2), numpy.array(2), torch.tensor(2)], ids=range(4))
def test_a_count_may_be_of_numpy_or_pytorch(value: Any) -> None:
    assert type(check_count("n", value, 0, 3)) is int


@pytest.mark.parametrize(
    "value",
    [True, 2.0, "2", None, numpy.bool_(True), torch.tensor(True), torch.tensor(2, device="meta"), [2]],
)
def test_what_is_no_count_is_refused(value: Any) -> None:
    refused(lambda: check_count("n", value, 0, 3), "allowed is 0 to 3")


def test_advice_to_unpickle_after_all_is_not_passed_on() -> None:
    error = RuntimeError("(1) In PyTorch 2.6, set `weights_only=False` if you trust the source")
    assert in_one_line(error) == "it holds more than plain tensors, and nothing else is loaded"


@pytest.mark.parametrize("value", [None, 3, b"x", "", "a\x00b", "x" * 5000, "\ud800", ["a"]], ids=range(8))
def test_what_is_no_path_is_refused(value: Any) -> None:
    refused(lambda: as_path(value, "folder"), "folder is")
    refused(lambda: read_state_dict(value))
    refused(lambda: evovit.save_reduced(evovit.reduce_tokens(make_host("vit"), "tome"), value), "folder is")
    refused(lambda: evovit.load_reduced(value, make_host("vit")), "folder is")
    refused(lambda: evovit.train_recipe(value, "x"))


def test_files_are_written_or_one_sentence(tmp_path: Path) -> None:
    write_files(tmp_path / "a" / "b", {"x.txt": "é", "y.png": b"\x00"})
    assert (tmp_path / "a" / "b" / "x.txt").read_text(encoding="utf-8") == "é"
    refused(lambda: write_files(tmp_path / "a" / "b" / "x.txt", {"z": ""}), "cannot be created")
    refused(lambda: write_files(Path("/dev/null/x"), {"z": ""}), "cannot be created")
    (tmp_path / "z").mkdir()
    refused(lambda: write_files(tmp_path, {"z": ""}), "cannot be written")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1", "[" * 100_000, "9" * 5000, "\ud800"], ids=range(8)
)
def test_json_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(lambda: read_json(tmp_path / "a.json", "evovit"), "is damaged or not written by evovit")
    refused(lambda: read_json(tmp_path, "evovit"), "it is not a file")


# models


class Tuple(VisionTransformer):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Named(VisionTransformer):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


class Fails(VisionTransformer):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Any:
        raise LookupError("no\nway")


def without(name: str) -> nn.Module:
    host = make_host("vit")
    delattr(host.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
    return host


def cast(name: str, **how: Any) -> nn.Module:
    host = make_host("vit").requires_grad_(False)
    host.get_submodule(name).to(**how)
    return host


def int8() -> nn.Module:
    host = make_host("vit").requires_grad_(False)
    for p in host.parameters():
        p.data = p.data.to(torch.int8)
    return host


NO_HOSTS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "name": lambda: "vit_tiny_patch16_224",
    "class": lambda: VisionTransformer,
    "state": lambda: make_host("vit").state_dict(),
    "tensor": lambda: torch.zeros(2),
    "identity": nn.Identity,
    "sequence": lambda: nn.Sequential(make_host("vit")),
    "resnet": lambda: timm.create_model("resnet10t"),
    "returns a tuple": lambda: Tuple(**TINY),
    "returns a table": lambda: Named(**TINY),
    "fails": lambda: Fails(**TINY),
    "no block": lambda: VisionTransformer(**(TINY | {"depth": 0})),
    "no patch": lambda: VisionTransformer(**(TINY | {"img_size": 7})),
    "no head": lambda: without("head"),
    "no attention": lambda: without("blocks.0.attn"),
    "int8": int8,
    "half of it": lambda: cast("blocks.1", dtype=torch.float16),
    "half on meta": lambda: cast("blocks.1", device="meta"),
}


@pytest.mark.parametrize("name", NO_HOSTS)
def test_what_is_no_host_is_refused(name: str) -> None:
    refused(lambda: evovit.reduce_tokens(NO_HOSTS[name](), "evit", blocks=(1,)))
    refused(lambda: evovit.check_adapter(NO_HOSTS[name]()))
    refused(lambda: evovit.fuse_batch_norm(NO_HOSTS[name]()))


@pytest.mark.parametrize("name", ["None", "name", "class", "state", "tensor", "identity"])
def test_what_is_no_reduced_model_is_refused(name: str, tmp_path: Path) -> None:
    evovit.save_reduced(evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,)), tmp_path)
    refused(lambda: evovit.load_reduced(tmp_path, NO_HOSTS[name]()))
    refused(lambda: evovit.save_reduced(NO_HOSTS[name](), tmp_path), "what reduce_tokens returns")
    refused(lambda: evovit.kept_patches(NO_HOSTS[name](), pictures()), "what reduce_tokens returns")


def test_a_reduced_model_is_not_reduced_again() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,))
    refused(lambda: evovit.reduce_tokens(reduced, "tome"), "reduced already; wrap its host")


def test_saved_weights_need_a_place(tmp_path: Path) -> None:
    evovit.save_reduced(evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,)), tmp_path)
    refused(lambda: evovit.load_reduced(tmp_path, make_host("vit").to("meta")), "on the meta device")


@pytest.mark.parametrize("tolerance", [None, "x", -1, float("nan"), float("inf"), True, [1]], ids=range(7))
def test_a_tolerance_is_a_finite_number(tolerance: Any) -> None:
    refused(lambda: evovit.check_adapter(make_host("vit"), tolerance), "tolerance is")
    refused(lambda: evovit.fuse_batch_norm(make_host("lv_vit"), tolerance), "tolerance is")


@pytest.mark.parametrize(
    "shape",
    [
        *[(), (3,), (3, 32), (3, 32, 32, 1), (0, 32, 32), (3, -1, 32), (3, 32.0, 32), (1, 32, 32)],
        *[None, 3, "abc", (3, 10**9, 10**9), (True, 32, 32), {3, 32}, (3, float("nan"), 32), (3, 31, 32)],
    ],
    ids=range(16),
)
def test_work_is_counted_on_an_image(shape: Any) -> None:
    refused(lambda: evovit.gmacs(evovit.reduce_tokens(make_host("vit"), "tome", r=2), shape))


def test_work_of_what_does_not_run_is_refused() -> None:
    refused(lambda: evovit.gmacs(nn.Linear(3, 3), (3, 32, 32)), "cannot be counted")
    refused(lambda: evovit.gmacs("x", (3, 32, 32)), "model is 'x'")  # type: ignore[arg-type]


# images


ODD_IMAGES: dict[str, Any] = {
    "none": None,
    "a list": [[1]],
    "NumPy's": numpy.zeros((2, 3, 32, 32), dtype="float32"),
    "one": torch.zeros(3, 32, 32),
    "rank 5": torch.zeros(1, 2, 3, 32, 32),
    "grey": torch.zeros(2, 1, 32, 32),
    "channels last": torch.zeros(2, 32, 32, 3),
    "no pixel": torch.zeros(2, 3, 0, 32),
    "one pixel": torch.zeros(2, 3, 1, 1),
    "too large": torch.zeros(2, 3, 64, 64),
    "too small": torch.zeros(2, 3, 16, 16),
    "bytes": torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    "half": torch.zeros(2, 3, 32, 32, dtype=torch.float16),
    "double": torch.zeros(2, 3, 32, 32, dtype=torch.float64),
    "complex": torch.zeros(2, 3, 32, 32, dtype=torch.complex64),
    "meta": torch.zeros(2, 3, 32, 32, device="meta"),
    "empty": torch.zeros(0, 3, 32, 32),
    "sparse": torch.zeros(2, 3, 32, 32).to_sparse(),
}


@pytest.mark.parametrize("host", ["vit", "eva02", "lv_vit", "dinov3"])
def test_images_that_do_not_suit_the_host_are_refused(host: str) -> None:
    reduced = evovit.reduce_tokens(make_host(host), "tome", r=2)
    for name, images in ODD_IMAGES.items():
        if host == "dinov3" and name in ("too large", "too small"):  # a host for images of any size
            continue
        for call in (reduced, reduced.run, reduced.forward_features, reduced.feature_map):
            text = refused(lambda call=call, images=images: call(images))
            assert "images" in text, name


def test_images_of_another_type_are_taken_under_autocast() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "tome", r=2)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert reduced(pictures().half()).isfinite().all()


@pytest.mark.parametrize("stage", [None, "x", 1.0, True, 1, -2, float("nan"), [0]], ids=range(8))
def test_a_stage_that_is_not_there_is_refused(stage: Any) -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=2)
    refused(lambda: reduced.feature_map(pictures(), stage=stage), "stages count from 0")


# arguments of hosts


@pytest.mark.parametrize("name", ["evo_deit_tiny_patch16_224", "evo_levit_128s", "sit_tiny", "small_vit"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("num_classes", -1), ("num_classes", "x"), ("img_size", 0), ("img_size", "x"), ("img_size", (32,))],
        *[("in_chans", 0), ("depth", -1), ("embed_dim", 0), ("num_heads", -1), ("mlp_ratio", 0), ("foo", 1)],
        *[("drop_path_rate", 2), ("img_size", True), ("num_classes", 2**40), ("mlp_ratio", 10**9)],
    ],
)
def test_arguments_of_a_named_model_are_checked(name: str, key: str, value: Any) -> None:
    refused(lambda: evovit.create_model(name, **{key: value}), key)


@pytest.mark.parametrize("name", [None, 3, ["sit_tiny"], {}, "deit_tiny_patch16_224", "\x00"], ids=range(6))
def test_a_model_is_named_by_a_known_word(name: Any) -> None:
    refused(lambda: evovit.create_model(name), "There is no model")


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("vit_tiny_patch16_224", {"reg_tokens": 10**9}, "reg_tokens is 1000000000; allowed is"),
        ("vit_tiny_patch16_224", {"init_values": []}, "init_values is "),
        ("small_vit.in1k", {}, "small_vit has no weights to choose; leave .in1k out"),
    ],
)
def test_arguments_of_a_host_are_checked(name: str, options: dict[str, Any], told: str) -> None:
    from evovit.hosts import create_host

    refused(lambda: create_host(name, options), told)


# files of tensors


class Unpickled:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


NO_TENSORS: dict[str, Callable[[Path], Any]] = {
    "page": lambda path: path.write_bytes(b"<!DOCTYPE html><html>404"),
    "pointer": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(b"\0" * 1000),
    "archive": lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 50),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"a": Unpickled()})),
    "broken pickle": lambda path: path.write_bytes(b"\x80\x02X\xff\xff\xff\x7fabc"),
    "no stack": lambda path: path.write_bytes(b"\x80\x02e."),
    "code": lambda path: torch.save({"model": Unpickled()}, path),
    "NumPy": lambda path: torch.save(numpy.zeros(3), path),
    "table": lambda path: torch.save({"a": 3}, path),
    "text": lambda path: torch.save("x", path),
    "none": lambda path: torch.save(None, path),
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
def test_files_without_tensors_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads them, and without PyTorch's advice to unpickle them after all."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    NO_TENSORS[kind](path)
    for call in (lambda: read_state_dict(path), lambda: read_label_map(path, 10)):
        assert "weights_only" not in refused(call) and not Path("unpickled").exists()


def label_map(scores: float = 0.5, classes: float = 1) -> Tensor:
    return torch.stack([torch.full((5, 3, 3), scores), torch.full((5, 3, 3), classes)]).half()


NO_LABELS: dict[str, Any] = {
    "flat": label_map().flatten(),
    "three": torch.zeros(3, 5, 3, 3),
    "no best": torch.zeros(2, 0, 3, 3),
    "no rows": torch.zeros(2, 5, 0, 3),
    "negative": label_map(classes=-1),
    "above": label_map(classes=10),
    "half a class": label_map(classes=0.5),
    "odd class": label_map(classes=float("nan")),
    "endless class": label_map(classes=float("inf")),
    "odd score": label_map(scores=float("nan")),
    "complex": label_map().to(torch.complex64),
    "on meta": label_map().to("meta"),
    "sparse": label_map().to_sparse(),
    "stretched": torch.zeros(1).expand(2, 5, 10**5, 10**5),
}


@pytest.mark.parametrize("kind", NO_LABELS)
def test_label_files_that_cannot_be_are_refused(kind: str, tmp_path: Path) -> None:
    torch.save(label_map(), tmp_path / "a.pt")
    assert read_label_map(tmp_path / "a.pt", 10).shape == (10, 3, 3)
    torch.save(NO_LABELS[kind], tmp_path / "a.pt")
    refused(lambda: read_label_map(tmp_path / "a.pt", 10))


def test_numbers_of_scenes_may_be_of_numpy_or_pytorch() -> None:
    plain = evovit.digit_scenes("train", 2, seed=3)
    same = evovit.digit_scenes("train", torch.tensor(2), size=numpy.int64(48), seed=torch.tensor(3))  # type: ignore[arg-type]
    assert torch.equal(plain.images, same.images)
