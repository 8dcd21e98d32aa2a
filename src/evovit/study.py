"""A study: recipes trained, tested and timed once, side by side. `compare` and `quickstart` are studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from evovit.bench.row import Row
from evovit.bench.setting import Variant
from evovit.bench.timing import in_turn
from evovit.data.images import Images
from evovit.errors import EvoViTError, printable
from evovit.methods import DENSE, find_method
from evovit.model import ReducedViT, backbone_of
from evovit.recipe.reading import check_different, parse_recipe, read_recipe
from evovit.recipe.tables import Recipe
from evovit.runtime.world import World
from evovit.train.build import colours_of, open_run
from evovit.train.evaluate import Accuracy, evaluate
from evovit.train.run import train_model
from evovit.visualize import several_classes

EQUAL = ("data", "run")  # tables that set the budget


@dataclass(frozen=True)
class Contestant:
    """One recipe of a study, once per seed."""

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


class Standing(NamedTuple):
    """How accurate one contestant is."""

    name: str
    method: str  # with its options
    model: nn.Module  # of the last seed, trained, in evaluation mode
    before: list[float]  # top-1 % per seed, as it starts, untrained
    after: list[float]  # top-1 % per seed, after its training
    right: list[Tensor]  # (test images,) bool per seed, after its training


class Shown(NamedTuple):
    """Test images for pictures."""

    images: Tensor  # (n, 3, height, width), normalised, as the models take them
    colours: Tensor  # the same in [0, 1]
    titles: list[str]


def plan(
    paths: Sequence[Path], overrides: Sequence[str], dense: str, seeds: Sequence[int], out: Path
) -> list[Contestant]:
    """Read all recipes for all seeds, dense first; raises `EvoViTError` unless their budgets are equal."""
    if not seeds:
        raise EvoViTError("No seed is given; give at least one.")
    check_different(seeds)
    if len({path.stem for path in paths}) < len(paths):
        raise EvoViTError("Two recipes have the same file name, which also names their folder; rename one.")
    contestants = [
        Contestant(
            printable(path.stem),
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
    start = dense.replace("{seed}", str(seed))
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
    if start and find_method(recipe.method.name).learns_from_teacher:
        return read_recipe(path, [*told, f"objective.teacher={start}"])
    return recipe


def hold(contestant: Contestant, world: World, console: Console) -> Standing:
    """Train every run of a contestant; test each as it starts and after its training."""
    before, after = [], list[Accuracy]()
    for recipe, folder in contestant.runs:
        images, model = open_run(recipe)
        model = model.to(world.device)
        if isinstance(model, ReducedViT):
            model.method.set_progress(1.0)
        before.append(evaluate(model, images, recipe, world).top1)
        if not train_model(recipe, folder, world, console, images, model):
            raise SystemExit  # SIGTERM asked to stop, and this has been said
        after.append(evaluate(model, images, recipe, world))
    method = contestant.recipe.method
    what = str(Variant(method.name, method.options))
    top1, right = [each.top1 for each in after], [each.right for each in after]
    return Standing(contestant.name, what, model.eval(), before, top1, right)


def measure(found: Sequence[Standing], world: World, engine: str, batch: int, rounds: int) -> list[Row]:
    """Time the models in turn; the first is the dense one."""
    shape = backbone_of(found[0].model).image_shape
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(world.device)
    return in_turn({each.name: each.model for each in found}, images, engine, rounds)


def shown_images(recipe: Recipe, images: Images, model: nn.Module, world: World, count: int) -> Shown:
    """Return test images of a recipe, as many classes as possible among them, with their classes' names."""
    chosen, labels = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for batch, more in images.test(world):
        labels = torch.cat([labels, more.cpu()])
        chosen = torch.cat([chosen, batch.cpu()]) if len(chosen) else batch.cpu()
        rows = several_classes(labels, count)
        chosen, labels = chosen[rows], labels[rows]
        if len({*labels.tolist()}) == min(count, images.num_classes):
            break  # folders come class by class, so that one batch may hold one class only
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in colours_of(recipe, model))
    titles = [images.class_names[label] for label in labels.tolist()]
    return Shown(chosen, (chosen * std + mean).clamp(0, 1), titles)


def digit_recipes(keep_ratio: float, data: dict[str, Any], run: dict[str, Any]) -> dict[str, Recipe]:
    """Return the quickstart's recipes of both models, alike but for the method; else as digits/dense.toml."""
    tables = {
        "model": {"name": "small_vit"},
        "data": data,
        "optimizer": {"name": "muon", "beta2": 0.98, "clip_norm": 1.0},
        "learning_rate": {
            **{"base": 2e-3, "muon": 0.02, "reference_batch": data["batch_size"]},
            **{"warm_up_epochs": 0.08 * run["epochs"], "warm_up_start": 0.0, "minimum": 0.0},
        },
        "run": run,
    }
    method = {"name": "evo_vit", "keep_ratio": keep_ratio, "start_block": 2, "stage_length": 3}
    return {"dense": parse_recipe(tables), "evo_vit": parse_recipe(tables | {"method": method})}
