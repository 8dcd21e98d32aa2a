"""The sandwich rule: what an update runs, its losses, and that it resumes to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import evovit
from evovit.errors import EvoViTError
from evovit.recipe.reading import read_recipe
from evovit.recipe.tables import ObjectiveTable, RunTable
from evovit.runtime.world import join_world
from evovit.train import tested as testing
from evovit.train.build import check_recipe
from evovit.train.objective import Looked, Objective
from evovit.train.sandwich import Sandwich, other_budgets
from tests.conftest import make_host, pictures
from tests.run.processes import finish, losses, outcome, small, start, start_world, train_here

BUDGETS = "run.budgets=[1.0, 0.7, 0.5, 0.3]"


def test_an_update_runs_the_smallest_and_a_random_one() -> None:
    run = RunTable(epochs=1, budgets=(0.5, 1.0, 0.3, 0.7))
    drawn = [other_budgets(run, update) for update in range(60)]
    assert all(each[0] == 0.3 for each in drawn)
    assert {each[1] for each in drawn} == {0.7, 0.5}
    assert drawn == [other_budgets(run, update) for update in range(60)]


def test_alternating_updates_run_one() -> None:
    run = RunTable(epochs=1, budgets=(1.0, 0.7, 0.5), sandwich="alternate")
    assert all(other_budgets(run, update) == (0.5,) for update in range(0, 10, 2))
    assert all(other_budgets(run, update) == (0.7,) for update in range(1, 10, 2))


def test_two_budgets_run_the_smaller_once() -> None:
    assert other_budgets(RunTable(epochs=1, budgets=(1.0, 0.5)), 3) == (0.5,)


def test_losses_are_those_of_the_largest_and_divergences_from_it() -> None:
    model = evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,), budgets=(1.0, 0.5)).train()
    images, targets = pictures(), torch.tensor([1, 3])
    terms = Sandwich(Objective(model, ObjectiveTable()))(images, targets, (0.5,))
    full = evovit.reduce_tokens(model.model, "evit", blocks=(1,), keep_ratio=1.0).train()(images)
    half = evovit.reduce_tokens(model.model, "evit", blocks=(1,), keep_ratio=0.5).train()(images)
    p, q = full.detach().softmax(1), half.detach().softmax(1)
    naive = sum(float(p[i, c] * (p[i, c].log() - q[i, c].log())) for i in range(2) for c in range(5)) / 2
    assert terms["class_at_0.5"].item() == pytest.approx(naive, rel=1e-3)
    assert torch.allclose(terms["class"], torch.nn.functional.cross_entropy(full, targets))
    assert model.budget == 1.0


def test_no_gradient_reaches_the_largest_through_the_others() -> None:
    model = evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,), budgets=(1.0, 0.5)).train()
    sandwich, held = Sandwich(Objective(model, ObjectiveTable())), []
    look = sandwich.look

    def watched(images: Tensor, targets: Tensor) -> Looked:
        held.append(look(images, targets))
        held[0].heads["class"].retain_grad()
        return held[0]

    sandwich.look = watched
    terms = sandwich(pictures(), torch.tensor([1, 3]), (0.5,))
    terms["class_at_0.5"].backward(retain_graph=True)
    assert held[0].heads["class"].grad is None
    terms["class"].backward()
    assert held[0].heads["class"].grad is not None


def test_a_run_trains_tests_and_resumes_every_budget(tmp_path: Path) -> None:
    recipe = small(tmp_path, BUDGETS)
    train_here(recipe, tmp_path / "whole")
    child = start(recipe, tmp_path / "killed")
    steps = tmp_path / "killed" / "steps.jsonl"
    while child.exitcode is None and not steps.exists():
        child.join(0.01)
    child.kill()
    finish(child)
    assert finish(start(recipe, tmp_path / "killed")) == [0]
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "killed")
    epochs = (tmp_path / "whole" / "epochs.jsonl").read_text()
    assert all(f'"top1_at_{budget:g}"' in epochs for budget in (0.7, 0.5, 0.3))
    tested = testing.run_model(tmp_path / "whole", "last", None, ())
    with join_world("cpu") as world:
        lines = list(testing.test_lines(tested, (), world))
    assert [line.split(":")[0].strip() for line in lines[1:]][:4] == [
        f"as trained, budget {budget:g}" for budget in (1, 0.7, 0.5, 0.3)
    ]
    model = evovit.load_reduced(tmp_path / "whole" / "model", tested.model.model)
    assert model.budgets == (1.0, 0.7, 0.5, 0.3)


def test_compiled_it_has_the_same_losses(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,), budgets=(1.0, 0.7, 0.5)).train()
    images, targets = pictures(), torch.tensor([1, 3])
    sandwich = Sandwich(Objective(model, ObjectiveTable()))
    plain = sandwich(images, targets, (0.5, 0.7))
    sandwich.look = torch.compile(sandwich.look, backend="eager")  # type: ignore[method-assign]
    sandwich.follow = torch.compile(sandwich.follow, backend="eager")  # type: ignore[method-assign]
    again = sandwich(images, targets, (0.5, 0.7))
    assert all(torch.allclose(plain[name], again[name], atol=1e-5) for name in plain)


@pytest.mark.parametrize(
    "other",
    [
        "run.reduce_from_epoch=1",
        "run.activation_checkpointing=true",
        "method.name=dense",
        "data.mixup=0,objective.mix_token=true,objective.token_label_weight=1",
    ],
)
def test_what_does_not_go_together_is_one_sentence(tmp_path: Path, other: str) -> None:
    with pytest.raises(EvoViTError, match=r"run\.budgets cannot be combined with"):
        recipe = small(tmp_path, BUDGETS)
        path = tmp_path / "again.toml"
        text = recipe.to_toml()
        if other == "method.name=dense":
            text = text.partition("[method]")[0] + "[data]" + text.partition("[data]")[2]
            other = "run.seed=0"
        path.write_text(text)
        check_recipe(read_recipe(path, other.split(",")))


@pytest.mark.slow
def test_two_processes_learn_every_budget(tmp_path: Path) -> None:
    recipe = small(tmp_path, BUDGETS, "model.drop_path=0", "data.mixup=0", "run.epochs=2")
    train_here(recipe, tmp_path / "one")
    assert set(finish(*start_world(recipe, tmp_path / "two", 2))) == {0}
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) and two[0] == pytest.approx(one[0], rel=1e-4)
