"""The Python interface refuses what is plainly wrong in one sentence; a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import evovit
from evovit.errors import EvoViTError
from tests.conftest import TINY, Golden, make_host, pictures

ODD = [
    *(None, True, "2", "x", "", 0, -1, 2.5, float("nan"), float("inf"), 10**12, -(10**5000), b"a", "a\x00b"),
    *([], {}, [1, 2], object(), torch.zeros(2), numpy.int64(-2), "\ud800", "$\\frac$"),
]


class GivesAnObject(VisionTransformer):
    def forward(self, x: Any) -> Any:
        return {"logits": super().forward(x)}


NO_HOSTS: list[Any] = [
    *(None, "deit", 3, VisionTransformer, nn.Linear(2, 2), nn.Sequential(), GivesAnObject(**TINY)),
    *(nn.DataParallel(make_host("vit")), evovit.reduce_tokens(make_host("vit"), start_block=1)),
]


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(EvoViTError) as caught:
        call()
    text = str(caught.value)
    assert 0 < len(text) < 2500 and "\n" not in text and "\x00" not in text


@pytest.mark.parametrize("model", NO_HOSTS, ids=lambda model: type(model).__name__)
def test_what_is_no_host(model: Any, tmp_path: Path) -> None:
    refused(lambda: evovit.reduce_tokens(model, start_block=1))
    if not isinstance(model, evovit.ReducedViT):
        refused(lambda: evovit.fuse_batch_norm(model))
        refused(lambda: evovit.kept_patches(model, pictures()))
        refused(lambda: evovit.save_reduced(model, tmp_path / "folder"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_odd_arguments(value: Any, tmp_path: Path) -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), start_block=1)
    evovit.save_reduced(reduced, tmp_path / "saved")
    refused(lambda: evovit.reduce_tokens(make_host("vit"), value))
    if not isinstance(value, bool):
        refused(lambda: evovit.reduce_tokens(make_host("vit"), "dense", verify=value))
    refused(lambda: evovit.create_model(value))
    refused(lambda: evovit.load_official(value, {}))
    refused(lambda: evovit.load_official("evit", value))
    refused(lambda: evovit.load_reduced(value, make_host("vit")))
    refused(lambda: evovit.load_reduced(tmp_path / "saved", value))
    refused(lambda: evovit.gmacs(reduced, value))
    refused(lambda: evovit.digit_scenes(value, 2))
    refused(lambda: evovit.train_recipe(value, tmp_path / "run"))
    refused(lambda: reduced(value))
    state = Golden("evit").state_dict()
    for name in ("num_heads", "img_size"):
        if not (name == "img_size" and value is None):
            options: dict[str, Any] = {"num_heads": 3} | {name: value}
            refused(lambda given=options: evovit.load_official("evit", state, **given))


@pytest.mark.parametrize("key", ["num_classes", "img_size", "keep_ratio", "depth", "embed_dim", "patch_size"])
def test_odd_arguments_of_named_models_work_or_are_one_sentence(key: str) -> None:
    for value in ODD:
        if type(value) is int and value >= 10**6:
            continue  # would be a giant model
        try:
            evovit.create_model("evo_deit_tiny_patch16_224", **{key: value})
        except EvoViTError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["evo_deit", "evit", "dynamicvit", "sit", "levit", "evo_levit"])
def test_tensors_of_a_checkpoint_that_do_not_fit(name: str) -> None:
    loader = {"evo_deit": "evo_vit", "dynamicvit": "dynamic_vit"}.get(name, name)
    options = {"key_dim": 16} if "levit" in name else {"num_heads": 3}
    options |= {"skip_lam": 2} if name == "sit" else {}
    state = Golden(name).state_dict()
    for key in list(state)[::7]:
        for change in (torch.tensor(1.0), torch.zeros(7, 3), 3, None):
            other = {k: v for k, v in state.items() if k != key} | ({} if change is None else {key: change})
            try:
                evovit.load_official(loader, other, **options)
            except EvoViTError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("shape", [(3, 32), (3, 0, 0), (1, 32, 32), (3, 33, 32), (3, 32.5, 32), (3, -32, 32)])
def test_work_on_images_that_cannot_be(shape: Any) -> None:
    refused(lambda: evovit.gmacs(make_host("vit"), shape))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 30, 32), (2, 3, 64, 64)])
def test_images_of_another_shape(shape: tuple[int, ...]) -> None:
    for name in ("vit", "eva02"):
        reduced = evovit.reduce_tokens(make_host(name), start_block=1)
        refused(lambda model=reduced: model(torch.zeros(shape)))
        refused(lambda model=reduced: model.feature_map(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *[(name, "img_size", 10**6) for name in ("evo_deit", "evit", "sit", "levit")],
        *[("evit", "num_heads", value) for value in (True, "2", 2.0, -1, 10**9)],
        *[("evo_deit", "drop_path_rate", value) for value in (-1, 2, float("nan"), "x")],
        *[("sit", "skip_lam", value) for value in ("x", -1, float("nan"), object(), [2])],
        *[("sit", "num_heads", value) for value in (True, -1)],
        *[("evo_levit", "key_dim", value) for value in (True, 0, "16", 10**9)],
        *[("evo_levit", "class_heads", value) for value in ("x", 2, [])],
        *[("evo_levit", "fresh_parts", value) for value in ("x", 2, [])],
    ],
)
def test_options_of_an_official_checkpoint(name: str, key: str, value: Any) -> None:
    loader, options = OFFICIAL[name]
    refused(lambda: evovit.load_official(loader, official(name), **(options | {key: value})))


def official(name: str) -> dict[str, torch.Tensor]:
    state = Golden(name).state_dict()
    return {key: state[key] for key in state if key.split(".")[0] not in ("tsm", "rtsm")}


OFFICIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "evo_deit": ("evo_vit", {"num_heads": 3}),
    "evit": ("evit", {"num_heads": 3}),
    "sit": ("lv_vit", {"num_heads": 2, "skip_lam": 2.0}),
    "levit": ("levit", {"key_dim": 16}),
    "evo_levit": ("evo_levit", {"key_dim": 16}),
}
NO_WEIGHTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "not a number": lambda value: value * float("nan"),
    "infinite": lambda value: torch.full_like(value, -float("inf")),
    "complex": lambda value: value.to(torch.complex64),
    "whole numbers": lambda value: value.to(torch.int8),
    "true or false": lambda value: value > 0,
    "on meta": lambda value: value.to("meta"),
    "stretched": lambda value: torch.zeros(1).expand(10**6),
}


@pytest.mark.parametrize("change", NO_WEIGHTS)
@pytest.mark.parametrize("name", OFFICIAL)
def test_values_of_an_official_checkpoint_that_are_no_weights(name: str, change: str) -> None:
    loader, options = OFFICIAL[name]
    state = official(name)
    evovit.load_official(loader, state, **options)
    key = next(key for key, value in state.items() if value.is_floating_point() and value.ndim > 1)
    other = state | {key: NO_WEIGHTS[change](state[key])}
    refused(lambda: evovit.load_official(loader, other, **options))


def test_weights_that_are_not_finite_are_not_put_into_a_model(tmp_path: Path) -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), start_block=1)
    with torch.no_grad():
        reduced.host.head.weight[0, 0] = float("nan")
    evovit.save_reduced(reduced, tmp_path)
    refused(lambda: evovit.load_reduced(tmp_path, make_host("vit")))
