"""One model at several keep ratios: switching, compiled code, statistics of batch norms, saving."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.utils import counters

import evovit
from evovit.errors import EvoViTError
from tests.backbones.test_timm_levit import SMALL, alive
from tests.conftest import make_host, pictures

BUDGETS = (1.0, 0.7, 0.5, 0.3)
METHODS = {
    "evo_vit": {"start_block": 1, "stage_length": 2},
    "evit": {"blocks": (1,)},
    "keep": {"blocks": (1, 2)},
    "idle_vit": {"start_block": 1, "group_length": 2},
    "dynamic_vit": {"blocks": (1, 3)},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_is_the_method_at_that_keep_ratio(method: str) -> None:
    host, images = make_host("vit").eval(), pictures()
    model = evovit.reduce_tokens(host, method, budgets=BUDGETS, **METHODS[method]).eval()
    assert model.budget == 1.0 and model.budgets == BUDGETS
    for budget in (0.5, 0.3, 1.0, 0.7, 0.5):
        model.budget = budget
        fresh = evovit.reduce_tokens(host, method, keep_ratio=budget, **METHODS[method]).eval()
        fresh.method.load_state_dict(model.method.state_dict())
        assert torch.equal(model(images), fresh(images))


def test_a_budget_of_tome_is_the_share_left_at_the_end() -> None:
    model = evovit.reduce_tokens(make_host("vit"), "tome", budgets=(1.0, 0.5)).eval()
    assert model.run(pictures()).tokens.num_patches == 16
    model.budget = 0.5
    assert model.run(pictures()).tokens.num_patches == 8


def test_without_a_list_any_budget_may_be_set_and_taken_back() -> None:
    model = evovit.reduce_tokens(make_host("vit"), "evit", keep_ratio=0.7, blocks=(1,)).eval()
    own = model(pictures())
    model.budget = 0.3
    assert not torch.equal(model(pictures()), own)
    model.budget = None
    assert torch.equal(model(pictures()), own)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_switching_compiles_nothing_after_warming(backend: str) -> None:
    torch.compiler.reset()
    model = evovit.reduce_tokens(make_host("vit"), "evo_vit", budgets=BUDGETS, **METHODS["evo_vit"]).eval()
    quick = torch.compile(model, fullgraph=True, backend=backend)
    images = torch.zeros(2, 3, 32, 32)
    with torch.inference_mode():
        model.warm_budgets(images, quick)
    assert model.budget == 1.0
    counters.clear()
    with torch.inference_mode():
        for budget in (0.3, 1.0, 0.5, 0.7, 0.3, 0.5):
            model.budget = budget
            assert torch.allclose(quick(images), model(images), atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 0 and not counters["recompiles"]


def test_a_model_compiled_in_place_warms_itself() -> None:
    torch.compiler.reset()
    model = evovit.reduce_tokens(make_host("vit"), "evit", budgets=(1.0, 0.5), blocks=(1,)).eval()
    model.compile(backend="eager", fullgraph=True)
    images = torch.zeros(1, 3, 32, 32)
    with torch.inference_mode():
        model.warm_budgets()
        counters.clear()
        model.budget = 0.5
        model(images)
    assert counters["stats"]["unique_graphs"] == 0


def with_batch_norm() -> nn.Module:
    return alive(timm.create_model("levit_128s", **SMALL))


def test_batch_norms_keep_statistics_of_each_budget() -> None:
    model = evovit.reduce_tokens(
        with_batch_norm(), "evo_levit", budgets=(1.0, 0.5), start_block=1, selection="column_mean"
    ).train()
    images = [pictures(size=64), pictures(size=64) * 3 + 1]
    first = {name: value.clone() for name, value in model.model.state_dict().items() if "running" in name}
    alone = copy.deepcopy(model)
    for turn in range(4):
        model.budget = (1.0, 0.5)[turn % 2]
        model(images[turn % 2])
    model.budget = 0.5
    half = {name: value.clone() for name, value in model.model.state_dict().items() if name in first}
    model.budget = 1.0
    full = {name: value for name, value in model.model.state_dict().items() if name in first}
    for _ in range(2):  # as if there were no other budget
        alone(images[0])
    same = alone.model.state_dict()
    assert all(torch.equal(full[name], same[name]) for name in first)
    assert any(not torch.equal(half[name], full[name]) for name in first)
    assert any(not torch.equal(first[name], full[name]) for name in first)


def test_a_save_remembers_budgets_statistics_and_the_one_in_force(tmp_path: Path) -> None:
    model = evovit.reduce_tokens(make_host("vit"), "evo_vit", budgets=BUDGETS, **METHODS["evo_vit"]).eval()
    model.budget = 0.5
    evovit.save_reduced(model, tmp_path)
    again = evovit.load_reduced(tmp_path, make_host("vit")).eval()
    assert again.budgets == BUDGETS and again.budget == 0.5
    for budget in BUDGETS:
        model.budget = again.budget = budget
        assert torch.equal(model(pictures()), again(pictures()))


def test_a_save_keeps_statistics_of_every_budget(tmp_path: Path) -> None:
    options = {"start_block": 1, "selection": "column_mean"}
    model = evovit.reduce_tokens(with_batch_norm(), "evo_levit", budgets=(1.0, 0.5), **options).train()
    for budget in (0.5, 1.0):
        model.budget = budget
        model(pictures(size=64))
    model.eval()
    evovit.save_reduced(model, tmp_path)
    again = evovit.load_reduced(tmp_path, with_batch_norm()).eval()
    for budget in (0.5, 1.0, 0.5):
        model.budget = again.budget = budget
        assert torch.equal(model(pictures(size=64)), again(pictures(size=64)))


@pytest.mark.parametrize(
    "budgets",
    ["0.5", 0.5, (0.5, 0.5), (0.0, 0.5), (1.5,), ("a",), (True,), tuple(i / 20 for i in range(1, 20))],
)
def test_wrong_budgets_are_one_sentence(budgets: object) -> None:
    with pytest.raises(EvoViTError, match="budgets"):
        evovit.reduce_tokens(make_host("vit"), "evo_vit", budgets=budgets, start_block=1)


def test_what_has_no_budget_says_so() -> None:
    host = make_host("vit")
    with pytest.raises(EvoViTError, match="no keep ratio"):
        evovit.reduce_tokens(host, "dense", budgets=(1.0, 0.5))
    with pytest.raises(EvoViTError, match="keep_per_block"):
        evovit.reduce_tokens(host, "evit", keep_per_block=(16, 8, 8, 8), budgets=(1.0, 0.5))
    model = evovit.reduce_tokens(host, "evit", blocks=(1,), budgets=(1.0, 0.5))
    with pytest.raises(EvoViTError, match="budget is 0.4"):
        model.budget = 0.4
