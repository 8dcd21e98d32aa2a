"""Counted work equals the published table, and what each method adds or saves equals its formula."""

from __future__ import annotations

import pytest
import timm
import torch

import evovit
from evovit.macs import gmacs

TABLE = [  # dense and Evo-ViT at keep 0.5 from block 4, GMACs
    ("deit_tiny_patch16_224", 224, 1.254, 0.818),
    ("deit_small_patch16_224", 224, 4.599, 3.033),
    ("deit_base_patch16_224", 224, 17.564, 11.658),
    ("deit_small_patch16_224", 384, 15.50, 9.88),
    ("deit_base_patch16_384", 384, 55.48, 36.11),
]


@pytest.mark.parametrize(("name", "size", "dense", "reduced"), TABLE)
@pytest.mark.parametrize("mode", ["stage", "layer"])
def test_macs_equal_the_published_table(
    name: str, size: int, dense: float, reduced: float, mode: str
) -> None:
    with torch.device("meta"):
        host = timm.create_model(name, img_size=size, global_pool="avg")
    evo = evovit.reduce_tokens(host, "evo_vit", mode=mode, fast_update=False)
    for model, expected in ((host, dense), (evo, reduced)):
        assert gmacs(model, (3, size, size)) == pytest.approx(expected, rel=5e-3)


def test_the_representative_token_costs_one_row_and_its_weighted_sum() -> None:
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224")
    paper, released = (
        evovit.reduce_tokens(host, "evo_vit", fast_update=fast, last_block="all") for fast in (True, False)
    )
    per_row = 12 * 384**2 + 2 * 384 * (100 + 99)
    extra = (gmacs(paper, (3, 224, 224)) - gmacs(released, (3, 224, 224))) * 1e9
    assert extra == pytest.approx(8 * per_row + 2 * 196 * 384, rel=1e-6)  # once a stage: eq. 5


def test_named_models_carry_the_published_work_and_size() -> None:
    for name, work, parameters in (
        ("evo_deit_tiny_patch16_224", 0.818, 5.91),
        ("evo_deit_small_patch16_224", 3.033, 22.44),
        ("evo_deit_base_patch16_224", 11.658, 87.34),
        ("evo_deit_small_patch16_384", 9.88, 22.58),
        ("evo_deit_base_patch16_384", 36.11, 87.63),
    ):
        with torch.device("meta"):
            model = evovit.create_model(name)
        size = int(name[-3:])
        assert gmacs(model, (3, size, size)) == pytest.approx(work, rel=5e-3)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.006)


def test_a_methods_own_layers_count_where_they_run() -> None:
    """DynamicViT's predictors: four layers, each over the patches present before its block."""
    with torch.device("meta"):
        host = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
        dense = gmacs(host, (3, 224, 224))
        model = evovit.reduce_tokens(host, "dynamic_vit", blocks=(2,), keep_ratio=0.5, last_block="all")
    blocks = sum(12 * rows * 192**2 + 2 * rows**2 * 192 for rows in (197, 197, 99, 99))
    predictor = 196 * (192 * 192 + 192 * 96 + 96 * 48 + 48 * 2)
    whole = 4 * (12 * 197 * 192**2 + 2 * 197**2 * 192)
    assert gmacs(model, (3, 224, 224)) - dense == pytest.approx((blocks + predictor - whole) / 1e9, rel=1e-6)


def test_queries_and_values_of_idle_rows_are_not_projected() -> None:
    with torch.device("meta"):
        host = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
        dense = gmacs(host, (3, 224, 224))
        model = evovit.reduce_tokens(host, "idle_vit", start_block=3, keep_ratio=0.5, last_block="all")
    rows, width = 99, 192
    idle = (1 + 197) * width**2 + 11 * rows * width**2 + 2 * rows**2 * width  # class query and all keys first
    whole = 12 * 197 * width**2 + 2 * 197**2 * width
    assert gmacs(model, (3, 224, 224)) - dense == pytest.approx((idle - whole) / 1e9, rel=1e-6)


@pytest.mark.parametrize("reduced", [False, True])
def test_counting_leaves_the_model_as_it_was(reduced: bool) -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=4)
    if reduced:
        model = evovit.reduce_tokens(model, "dynamic_vit", blocks=(2,))
    next(module for name, module in model.named_modules() if name.endswith("blocks.1")).eval()
    modes = {name: module.training for name, module in model.named_modules()}
    gmacs(model, (3, 224, 224))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
