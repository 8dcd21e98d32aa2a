"""Every method trains on the digits: on two processes, and resumed to the bit. From the registry, no list."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import evovit
from evovit.methods import find_method
from evovit.recipe.reading import LIBRARY, parse_recipe, read_recipe
from evovit.recipe.tables import Recipe
from evovit.train import trainer
from tests.run.processes import finish, losses, outcome, start_world, train_here

pytestmark = pytest.mark.slow
METHODS = evovit.list_methods()
DIGITS = LIBRARY / "digits"


def recipe_for(method: str | None, teacher: Path | None = None) -> Recipe:
    """Return a few updates on the digits of a tiny host with the method's example options."""
    tables = {
        "model": {
            "name": "vit_tiny_patch16_224",
            "options": {"img_size": 24, "patch_size": 6, "embed_dim": 32, "depth": 4, "num_heads": 2},
        },
        "data": {"source": "digits", "batch_size": 16, "scenes": 64, "test_scenes": 20},
        "learning_rate": {"base": 1e-3, "reference_batch": 16, "warm_up_epochs": 1},
        "run": {"epochs": 2, "device": "cpu", "checkpoint_every": 1, "ema_decay": 0.9},
    }
    if method is not None:
        cls = find_method(method)
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in cls.example.items()}  # as in TOML
        tables["method"] = {"name": method, **options}
        if cls.learns_from_teacher and teacher is not None:
            tables["objective"] = {"teacher": str(teacher)}
    return parse_recipe(tables)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train_here(recipe_for(None), folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_trains_on_two_processes(method: str, teacher: Path, tmp_path: Path) -> None:
    assert finish(*start_world(recipe_for(method, teacher), tmp_path / "run", 2)) == [0, 0]
    found = losses(tmp_path / "run")
    assert len(found) == 8 and all(map(math.isfinite, found))


@pytest.mark.parametrize("name", ["evo_levit", "levit"])
def test_hosts_of_several_stages_train_on_two_processes(name: str, tmp_path: Path) -> None:
    """No parameter is left without a gradient, in layer mode, at the switch and in stage mode."""
    short = ("data.scenes=64", "data.test_scenes=20", "data.batch_size=16", "run.epochs=3", "run.device=cpu")
    recipe = read_recipe(DIGITS / f"{name}.toml", short)
    assert finish(*start_world(recipe, tmp_path / "run", 2)) == [0, 0]
    found = losses(tmp_path / "run")
    assert len(found) == 12 and all(map(math.isfinite, found))


@pytest.mark.parametrize("method", METHODS)
def test_resumes_to_the_bit(
    method: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, real = recipe_for(method, teacher), trainer.Trainer.step
    train_here(recipe, tmp_path / "whole")

    def step(self: trainer.Trainer, *arguments: object) -> bool:
        if self.update == 5:
            raise KeyboardInterrupt
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer.Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train_here(recipe, tmp_path / "parts")
    monkeypatch.undo()
    assert "going on after update 5 of 8" in train_here(recipe, tmp_path / "parts")
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
