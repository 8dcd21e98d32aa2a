"""Tiny hosts of every family, with all parameters disturbed; golden cases; one seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from evovit.models.lv_vit import LVViT

torch.set_num_threads(
    1
)  # tiny tensors: a second thread costs more than it brings, and workers share the cores
GOLDEN = Path(__file__).parent / "golden"
SIZE = 32  # pixels of a tiny image: 4 x 4 patches
TINY: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}


def disturb(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Add noise to every parameter, so that zero- or one-initialised parts matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale * (0.3 if p.ndim > 1 else 1.0))
    return model


def _vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(**(TINY | options))


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "vit": _vit,
    "vit_avg": lambda: _vit(global_pool="avg"),
    "deit_distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TINY),
    "deit3": lambda: _vit(init_values=1e-6, no_embed_class=True),
    "dinov2_reg": lambda: _vit(init_values=1e-5, reg_tokens=4, no_embed_class=True),
    "clip": lambda: _vit(pre_norm=True),
    "siglip": lambda: _vit(class_token=False, global_pool="map"),
    "qk_norm": lambda: _vit(qk_norm=True, scale_attn_norm=True),
    "post_norm": lambda: _vit(block_fn=ResPostBlock, init_values=0.1),
    "parallel_things": lambda: _vit(block_fn=ParallelThingsBlock, init_values=0.1),
    "parallel_scaling": lambda: _vit(block_fn=ParallelScalingBlock, init_values=0.1),
    "eva02": lambda: Eva(
        **TINY, use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, init_values=0.1
    ),
    "dinov3": lambda: timm.create_model("vit_small_patch16_dinov3", **(TINY | {"embed_dim": 64})),
    "beit": lambda: Beit(**TINY, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    "relpos": lambda: VisionTransformerRelPos(**TINY, init_values=0.1),
    "lv_vit": lambda: LVViT(**TINY),
}


EVERYDAY = ("dense", "evo_vit", "evit", "tome")  # traced in the default lane and on every host


def traced(cases: list[Any], everyday: tuple[str, ...] = EVERYDAY) -> list[Any]:
    """Return cases (method, ...) of a test that traces, which takes seconds; all but a few are slow."""
    return [case if case[0] in everyday else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def covering(method: str, host: str) -> pytest.MarkDecorator:
    """Return the lane of a test that traces a method on a host.

    The slow lane has every method on two hosts of another kind each, and two methods on every host, so that
    each block and each method is traced; the rest of the product is in the full lane.
    """
    kept = method in ("evo_vit", "tome") or host in ("eva02", "lv_vit")
    return pytest.mark.slow if kept else pytest.mark.full


def pairs(methods: list[str]) -> list[Any]:
    """Return each method with each host; in the default lane a few methods on all hosts, all on a few."""
    return [
        (method, host)
        if method in EVERYDAY or host in ("vit_avg", "siglip")
        else pytest.param(method, host, marks=pytest.mark.slow)
        for method in methods
        for host in HOSTS
    ]


def make_host(name: str) -> nn.Module:
    """Return a tiny disturbed host, in evaluation mode."""
    torch.manual_seed(0)
    return disturb(HOSTS[name]()).eval()


def pictures(count: int = 2, size: int = SIZE, seed: int = 0) -> Tensor:
    """Return random images (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


class Golden:
    """One file of reference numbers: the official state dict and its cases."""

    def __init__(self, name: str) -> None:
        self.side = json.loads((GOLDEN / f"{name}.json").read_text())
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.inputs: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        own = {k.removeprefix("official."): v for k, v in self.tensors.items() if k.startswith("official.")}
        return own | {new: own[old] for new, old in self.side["state_dict_aliases"].items()}

    def case(self, name: str) -> dict[str, Any]:
        return next(case for case in self.side["cases"] if case["name"] == name)

    def images(self, case: dict[str, Any]) -> Tensor:
        where = case["input"]
        stored = load_file(GOLDEN / where["file"])[where["tensor"]]
        return stored[slice(*where["slice"])].float()

    def out(self, case: dict[str, Any], name: str) -> Tensor:
        return self.tensors[f"out.{case['name']}.{name}"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=30, help="kills of each kind in tests/run/test_torture.py")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--kills"))


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
