"""Counted work equals the published table, by formula and by PyTorch's counter."""

from __future__ import annotations

import pytest
import timm
import torch

import evovit
from evovit.methods import find_method
from evovit.run.macs import gmacs, gmacs_counted

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
        formula, counted = gmacs(model, (3, size, size)), gmacs_counted(model, (3, size, size))
        assert formula == pytest.approx(expected, rel=5e-3)
        assert counted == pytest.approx(formula, rel=2e-3)


def test_the_representative_token_costs_one_row() -> None:
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224")
    paper, released = (evovit.reduce_tokens(host, "evo_vit", fast_update=fast) for fast in (True, False))
    per_row = 12 * 384**2 + 2 * 384 * (100 + 99)
    extra = (gmacs(paper, (3, 224, 224)) - gmacs(released, (3, 224, 224))) * 1e9
    assert extra == pytest.approx(8 * per_row, rel=1e-6)


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


@pytest.mark.parametrize("method", evovit.list_methods())
def test_formula_and_counter_agree_for_every_method(method: str) -> None:
    with torch.device("meta"):
        host = timm.create_model("deit_tiny_patch16_224", depth=4)
    reduced = evovit.reduce_tokens(host.eval(), method, **find_method(method).example)
    assert gmacs(reduced, (3, 224, 224)) == pytest.approx(gmacs_counted(reduced, (3, 224, 224)), rel=0.01)
