"""`evovit compare`: methods trained from one dense model under equal budgets, side by side in one report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import tyro
from rich.console import Console

from evovit.errors import EvoViTError, check_count
from evovit.methods import find_method
from evovit.model import ReducedViT, backbone_of
from evovit.run.benchmark import interleave
from evovit.run.build import colours_of, fit
from evovit.run.compare_report import Shown, Standing, write_report
from evovit.run.config import read_recipe
from evovit.run.evaluate import evaluate, open_run
from evovit.run.macs import gmacs
from evovit.run.recipe import DENSE, Recipe
from evovit.run.row import Measured, Row, rows_of
from evovit.run.setting import DENSE as DENSE_VARIANT
from evovit.run.setting import Setting, Variant, check_choice
from evovit.run.state import read_weights
from evovit.run.subject import MODES, Batch, prepare
from evovit.run.train_command import train_one
from evovit.run.world import World, join_world

EQUAL = ("data", "run")  # tables that set the budget
PICTURES = 6  # test images shown


@dataclass(frozen=True)
class Contestant:
    """One recipe of a comparison, once per seed."""

    name: str
    runs: list[tuple[Recipe, Path]]  # and the folder of each

    @property
    def recipe(self) -> Recipe:
        """That of the first seed."""
        return self.runs[0][0]

    @property
    def is_dense(self) -> bool:
        """Tell whether nothing is reduced."""
        return self.recipe.method.name == DENSE


def compare(
    recipes: tuple[Path, ...],
    /,
    dense: str = "",
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    seeds: tuple[int, ...] = (0,),
    out: Path = Path("runs/compare"),
    mode: str = "eager",
    batch: int = 64,
    rounds: int = 40,
) -> None:
    """Train recipes under equal budgets and report accuracy against GMACs and measured speed.

    Given again, it goes on where it stopped. One of the recipes is the dense model's.

    Args:
        recipes: TOML files whose [data] and [run] tables are equal.
        dense: folder of a finished run of the dense model, where all start from and which teaches the
            methods that learn from a teacher; {seed} in it stands for the seed. Empty: as the recipes say.
        set: table.key=value, over what every recipe says.
        seeds: each recipe is trained once for each.
        out: folder of the runs (OUT/RECIPE/seed<n>) and of compare.md, .csv and .html.
        mode: eager or compiled, for the speed.
        batch: images per step of the speed measurement.
        rounds: times each model is timed; all take turns.
    """
    check_choice("mode", mode, MODES)
    check_count("batch", batch, 1, 1_000_000)
    check_count("rounds", rounds, 1, 100_000)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EvoViTError("evovit compare runs in one process; train the recipes under torchrun instead.")
    contestants = plan(recipes, set, dense, seeds, out)
    console = Console()
    for contestant in contestants:
        open_run(contestant.recipe)  # a mistake in the last recipe is told before the first is trained
    for contestant in contestants:
        for recipe, folder in contestant.runs:
            train_one(recipe, folder, console)
    with join_world(contestants[0].recipe.run.device) as world:
        found = [assess(contestant, world) for contestant in contestants]
        rows = measure(found, world, mode, batch, rounds)
        print(write_report(out, found, rows, shown_images(contestants[0].recipe, world)))


def plan(
    paths: Sequence[Path], overrides: Sequence[str], dense: str, seeds: Sequence[int], out: Path
) -> list[Contestant]:
    """Read all recipes for all seeds; raises `EvoViTError` unless their budgets are equal."""
    if not seeds:
        raise EvoViTError("No seed is given; give at least one.")
    if len({path.stem for path in paths}) < len(paths):
        raise EvoViTError("Two recipes have one file name, which names their folder; rename one.")
    contestants = [
        Contestant(
            path.stem,
            [(_recipe(path, overrides, dense, seed), out / path.stem / f"seed{seed}") for seed in seeds],
        )
        for path in paths
    ]
    if sum(contestant.is_dense for contestant in contestants) != 1:
        raise EvoViTError("A comparison needs exactly one recipe of the dense model (no [method] table).")
    first = contestants[0]
    for other in contestants[1:]:
        for table in EQUAL:
            ours, theirs = getattr(first.recipe, table), getattr(other.recipe, table)
            for f in fields(ours):
                if getattr(ours, f.name) != getattr(theirs, f.name):
                    raise EvoViTError(
                        f"The budgets differ: {table}.{f.name} is {getattr(ours, f.name)!r} in {first.name} "
                        f"and {getattr(theirs, f.name)!r} in {other.name}; make them equal, or use --set."
                    )
    return sorted(contestants, key=lambda contestant: not contestant.is_dense)


def _recipe(path: Path, overrides: Sequence[str], dense: str, seed: int) -> Recipe:
    start = dense.format(seed=seed)
    told = [*overrides, f"run.seed={seed}"]
    if start:
        weights = Path(start) / "model" / "model.safetensors"
        if not weights.is_file():
            raise EvoViTError(
                f"dense is {start!r}, where {weights} is missing; give the folder of a finished run of the "
                "dense model."
            )
        told.append(f"model.weights={weights}")
    recipe = read_recipe(path, told)
    name = recipe.method.name
    if start and name != DENSE and find_method(name).learns_from_teacher:
        return read_recipe(path, [*told, f"objective.teacher={start}"])
    return recipe


def assess(contestant: Contestant, world: World) -> Standing:
    """Test each run before its training, as it starts, and after it."""
    before, after = [], []
    for recipe, folder in contestant.runs:
        images, model = open_run(recipe)
        model = model.to(world.device)
        if isinstance(model, ReducedViT):
            model.method.set_progress(1.0)
        before.append(evaluate(model, images, recipe, world).top1)
        fit(model, read_weights(folder, "last"), f"The checkpoint of {str(folder)!r}")
        after.append(evaluate(model, images, recipe, world).top1)
    method = contestant.recipe.method
    what = str(Variant(method.name, method.options)) if method.name != DENSE else DENSE_VARIANT
    return Standing(contestant.name, what, model.eval(), before, after)


def measure(found: Sequence[Standing], world: World, mode: str, batch: int, rounds: int) -> list[Row]:
    """Time the models in turn; the first is the dense one."""
    device = world.device.type
    setting = Setting(model=found[0].name, device=device, batch=batch, modes=(mode,), rounds=rounds)
    shape = backbone_of(found[0].model).image_shape
    torch.compiler.reset()
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(world.device)
    batches = [Batch(images, torch.zeros(batch, dtype=torch.int64, device=world.device))]
    measured = []
    for i, each in enumerate(found):
        subject = prepare(each.model, (mode,), "fp32", batches, False, f"variant_{i}")[0]
        if subject.step is None:
            raise EvoViTError(f"{each.name} cannot be timed in mode {mode}: {subject.skipped}.")
        variant = Variant(each.name if i else DENSE_VARIANT)
        measured.append(Measured(variant, subject, gmacs(each.model, shape), None))
    interleave(measured, setting)
    return rows_of(setting, shape[-1], measured)


def shown_images(recipe: Recipe, world: World) -> Shown:
    """Return the first test images of a recipe."""
    images, model = open_run(recipe)
    batch, labels = next(iter(images.test(world)))
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in colours_of(recipe, model))
    colours = (batch[:PICTURES] * std + mean).clamp(0, 1)
    return Shown(batch[:PICTURES], colours, [f"class {label}" for label in labels[:PICTURES].tolist()])
