"""A comparison: one start, equal budgets, one report; and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from evovit.commands.compare import compare
from evovit.errors import EvoViTError
from evovit.recipe.reading import read_recipe
from evovit.study import plan
from tests.run.processes import SMALL, train_here

HEAD, REST = SMALL.partition("[method]")[0], SMALL.partition("[data]")[2]
BUDGET = ("run.epochs=2", "data.scenes=32", "run.ema_decay=0", "learning_rate.warm_up_epochs=1")


def write(folder: Path, **methods: str) -> tuple[Path, ...]:
    """Write a recipe for each name with the text of its [method] table."""
    folder.mkdir(exist_ok=True)
    for name, table in methods.items():
        (folder / f"{name}.toml").write_text(f"{HEAD}{table}\n[data]{REST}")
    return tuple(folder / f"{name}.toml" for name in methods)


EVO = '[method]\nname = "evo_vit"\nstart_block = 1\nstage_length = 2'


def test_all_start_from_the_dense_weights_of_their_seed_and_end_in_one_report(tmp_path: Path) -> None:
    recipes = write(tmp_path / "recipes", evo=EVO, dense="", even='[method]\nname = "keep"\nblocks = [1]')
    for seed in (0, 1):
        started = read_recipe(recipes[1], [*BUDGET, f"run.seed={seed}"])
        train_here(started, tmp_path / "dense" / f"seed{seed}")
    out = tmp_path / "out"
    common = {"dense": str(tmp_path / "dense" / "seed{seed}"), "set": BUDGET, "seeds": (0, 1), "out": out}
    compare(recipes, batch=2, rounds=3, **common)  # type: ignore[arg-type]
    weights = [read_recipe(out / "evo" / f"seed{s}" / "recipe.toml").model.weights for s in (0, 1)]
    assert weights == [str(tmp_path / "dense" / f"seed{s}" / "model" / "model.safetensors") for s in (0, 1)]
    rows = list(csv.DictReader((out / "compare.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["dense", "evo", "even"]  # the dense model leads
    assert all("±" in row["top-1 % after"] for row in rows)
    assert rows[0]["of dense"] == "" and rows[0]["speed-up"] == "1"
    assert float(rows[1]["GMACs"]) < float(rows[0]["GMACs"])
    names = {path.name for path in out.iterdir()}
    assert names >= {"compare.md", "compare.csv", "compare.html", "accuracy.png", "kept.png"}
    before = (out / "evo" / "seed0" / "steps.jsonl").read_bytes()
    compare(recipes, batch=2, rounds=3, **common)  # type: ignore[arg-type]
    assert (out / "evo" / "seed0" / "steps.jsonl").read_bytes() == before  # nothing is trained twice


def test_unequal_budgets_are_refused_with_the_knob(tmp_path: Path) -> None:
    recipes = write(tmp_path, dense="", evo=EVO)
    recipes[1].write_text(recipes[1].read_text().replace("epochs = 4", "epochs = 5"))
    with pytest.raises(EvoViTError, match=r"run\.epochs is 4 in dense and 5 in evo"):
        plan(recipes, (), "", (0,), tmp_path)


@pytest.mark.parametrize(("methods", "count"), [({"evo": EVO}, 0), ({"a": "", "b": ""}, 2)])
def test_exactly_one_dense_model_is_needed(methods: dict[str, str], count: int, tmp_path: Path) -> None:
    with pytest.raises(EvoViTError, match="exactly one recipe of the dense model"):
        plan(write(tmp_path, **methods), (), "", (0,), tmp_path)


def test_a_missing_dense_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvoViTError, match="finished run of the dense model"):
        plan(write(tmp_path, dense="", evo=EVO), (), str(tmp_path / "none"), (0,), tmp_path)


def test_a_method_that_learns_from_a_teacher_gets_the_dense_run(tmp_path: Path) -> None:
    idle = '[method]\nname = "idle_vit"\nstart_block = 1'
    recipes = write(tmp_path / "recipes", dense="", idle=idle, evo=EVO)
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "model.safetensors").write_bytes(b"")
    teachers = {c.name: c.recipe.objective.teacher for c in plan(recipes, (), str(run), (0,), tmp_path)}
    assert teachers == {"dense": "", "evo": "", "idle": str(run)}


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EvoViTError, match="one process"):
        compare(write(tmp_path, dense="", evo=EVO))
    assert not torch.distributed.is_initialized()
