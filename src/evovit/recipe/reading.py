"""Recipes from TOML: reading, overrides, and checks of what belongs together."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from datetime import date, time
from pathlib import Path
from typing import Any

from evovit.errors import EvoViTError, check_kind, in_one_line, nearest, shown
from evovit.methods import DENSE, find_method, list_methods
from evovit.options import Described, build, describe, is_text, read_assignment
from evovit.recipe.tables import TABLES, Recipe
from evovit.runtime.files import as_path

DEEPEST = 12  # tables in tables
LIBRARY = Path(__file__).parent / "library"  # recipes that come with the package
OLD_DENSE = "none"  # what run folders of version 0.1 call the dense method
PICTURE_KNOBS = (
    "repeats",
    "crop_scale",
    "flip",
    "rand_augment",
    "colour_jitter",
    "erase",
    "token_labels",
    "token_label_grid",
    "crop_pct",
    "workers",
)
DIGIT_KNOBS = ("scenes", "test_scenes", "fragments")
HOW_ONLY = (
    *("run.batch_per_device", "data.workers", "run.checkpoint_every", "run.keep_every", "run.log_to"),
    "run.device",
)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a TOML file.
        overrides: each `table.key=value`, the value as in TOML; what is no TOML value is taken as text.
    """
    path = as_path(path, "The recipe")
    if path.exists() and not path.is_file():  # a folder, or a pipe, which would wait for ever
        raise EvoViTError(f"The recipe {shown(path)} cannot be read: it is not a file.")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvoViTError(f"The recipe {shown(path)} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # also bad UTF-8, numbers of thousands of digits
        told = "it is nested too deep" if isinstance(error, RecursionError) else in_one_line(error)
        raise EvoViTError(f"The recipe {shown(path)} is not valid TOML: {told}.") from error
    return parse_recipe(overridden(tables, overrides))


def parse_recipe(tables: dict[str, Any]) -> Recipe:
    """Build a recipe from plain tables, as a TOML file has them or as Python has.

    Raises:
        EvoViTError: a wrong key, type or value.
    """
    for name in check_kind("The recipe", tables, dict, "tables by name, such as {'run': {'epochs': 10}}"):
        if name not in TABLES:
            there = f"there are {', '.join(TABLES)}"
            raise EvoViTError(f"A recipe has no table [{name}]; {there}.{nearest(name, TABLES)}")
    recipe = Recipe(**{name: _table(name, as_toml(tables.get(name, {}), f"[{name}]")) for name in TABLES})
    check_together(recipe)
    return recipe


def check_together(recipe: Recipe) -> None:
    """Raise `EvoViTError` where two knobs contradict each other or one has no effect."""
    data, goal, run = recipe.data, recipe.objective, recipe.run
    unused, why = (PICTURE_KNOBS, "digits") if data.source == "digits" else (DIGIT_KNOBS, "images")
    for f in fields(data):
        if f.name in unused and getattr(data, f.name) != f.default:
            raise EvoViTError(f"data.{f.name} is given, but has no effect on {why}; leave it out.")
    if data.rand_augment and data.colour_jitter:
        raise EvoViTError("data.colour_jitter has no effect beside data.rand_augment; leave one out.")
    rate = recipe.learning_rate
    cosine = "run.epochs - learning_rate.last_epochs" if rate.last_epochs else "run.epochs"
    if rate.warm_up_epochs >= run.epochs - rate.last_epochs:
        raise EvoViTError(
            f"learning_rate.warm_up_epochs is {rate.warm_up_epochs:g}; allowed is below {cosine}, "
            f"{run.epochs - rate.last_epochs}."
        )
    if run.batch_per_device and data.batch_size % run.batch_per_device:
        raise EvoViTError(
            f"run.batch_per_device is {run.batch_per_device}; allowed is a divisor of data.batch_size, "
            f"{data.batch_size}."
        )
    taught = goal.distillation != "none" or goal.token_distillation > 0
    if taught and not goal.teacher:
        raise EvoViTError("objective.teacher is empty, but there is distillation; give a timm name or a run.")
    if goal.teacher and not taught and not find_method(recipe.method.name).learns_from_teacher:
        raise EvoViTError("objective.teacher is given, but nothing is learnt from it; set distillation.")
    if goal.teacher_weights and not goal.teacher:
        raise EvoViTError("objective.teacher_weights is given without objective.teacher; give both.")
    if data.token_labels and (not goal.token_label_weight or data.mixup or data.cutmix):
        raise EvoViTError(
            "data.token_labels needs objective.token_label_weight, without data.mixup and data.cutmix."
        )
    if goal.mix_token and (data.mixup or data.cutmix):
        raise EvoViTError(
            "objective.mix_token takes the place of data.mixup and data.cutmix; leave these out."
        )
    if goal.token_distillation and recipe.method.name == DENSE:
        raise EvoViTError(
            "objective.token_distillation is for a token reduction, but method.name is 'dense'."
        )
    late = run.reduce_from_epoch + run.reduce_ramp_epochs
    if late and recipe.method.name == DENSE:
        raise EvoViTError(
            "run.reduce_from_epoch and reduce_ramp_epochs need a method, and method.name is 'dense'."
        )
    if late > run.epochs:
        raise EvoViTError(
            f"run.reduce_from_epoch + reduce_ramp_epochs is {late}; "
            f"allowed is up to run.epochs, {run.epochs}."
        )
    if recipe.model.pretrained and recipe.model.weights:
        raise EvoViTError("model.pretrained and model.weights both say where to start; give one.")


def _table(name: str, content: Any) -> Any:
    if not isinstance(content, dict):
        raise EvoViTError(f"{name} is {shown(content)}; give a table, [{name}].")
    if name == "method":
        method = content.get("name", DENSE)
        options = {key: value for key, value in content.items() if key != "name"}
        content = {"name": DENSE if method == OLD_DENSE else method, "options": options}
    check_finite(content.get("options", {}), f"[{name}]")
    return build(TABLES[name], content, f"[{name}]")


def overridden(tables: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Lay `table.key=value` texts over plain tables, in place, and return these."""
    for text in overrides:
        path, value = read_assignment(text, "method.keep_ratio=0.5")
        *place, key = [part.strip() for part in path.split(".")]
        if not place:
            raise EvoViTError(f"{shown(text)} names no table; give table.key=value, such as run.epochs=10.")
        table = tables
        for part in place:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise EvoViTError(f"{shown(text)}: {part} is not a table.")
        table[key] = value
    return tables


def as_toml(value: Any, what: str, depth: int = 0) -> Any:
    """Return a value as a TOML file holds it, so that a recipe equals the one that is read back."""
    if depth > DEEPEST:
        raise EvoViTError(f"{what} is nested more than {DEEPEST} deep; make it flatter.")
    if hasattr(value, "tolist") and not getattr(value, "is_meta", False):  # of NumPy or PyTorch
        value = value.tolist()
    if isinstance(value, str) and not is_text(value):
        raise EvoViTError(f"{what} has {shown(value)}, which cannot be written as text; change it.")
    if isinstance(value, dict):
        return {as_toml(str(key), what): as_toml(item, what, depth + 1) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_toml(item, what, depth + 1) for item in value]
    if value is not None and not isinstance(value, bool | int | float | str | date | time):
        raise EvoViTError(
            f"{what} has {shown(value)}, which a recipe cannot contain; allowed are text, numbers, true, "
            "false, dates, lists and tables."
        )
    return "none" if value is None else value


def check_finite(value: Any, what: str) -> None:
    """Raise `EvoViTError` where a number is not finite: `nan` would not equal itself when read back."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_finite(item, what)
    if isinstance(value, float) and not math.isfinite(value):
        raise EvoViTError(f"{what} has {value}; allowed are finite numbers.")


def check_different(seeds: Sequence[int]) -> None:
    """Raise `EvoViTError` where a seed is given twice."""
    twice = next((seed for i, seed in enumerate(seeds) if seed in seeds[:i]), None)
    if twice is not None:
        raise EvoViTError(f"seeds lists {twice} twice; give each once.")


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Say where two recipes would train differently, `key: old, now new` each."""
    before, now = dict(old.knobs()), dict(new.knobs())
    paths = [path for path in {**before, **now} if path not in HOW_ONLY]
    return [
        f"{path}: {before.get(path)!r}, now {now.get(path)!r}"
        for path in paths
        if before.get(path) != now.get(path)
    ]


def written(recipe: Recipe) -> str:
    """Return a recipe as TOML, or raise `EvoViTError` where that would be read back as another recipe."""
    try:
        text = recipe.to_toml()
        given, read = dict(recipe.knobs()), dict(parse_recipe(tomllib.loads(text)).knobs())
        changed = [key for key in {**given, **read} if given.get(key) != read.get(key)]
    except (TypeError, ValueError, RecursionError) as error:
        raise EvoViTError(f"The recipe cannot be written as TOML: {in_one_line(error)}.") from error
    if changed:
        told = (f"{key} is {shown(given.get(key))}, read back {shown(read.get(key))}" for key in changed[:5])
        raise EvoViTError(
            f"The recipe does not read back as it is written ({'; '.join(told)}); give values that TOML has."
        )
    return text


def describe_recipe() -> dict[str, tuple[str, list[Described]]]:
    """Return by table what it is about and its options, methods' own after `method`."""
    found = {}
    for name, kind in TABLES.items():
        own = [each for each in describe(kind) if name != "method" or each.name != "options"]
        found[name] = ((kind.__doc__ or "").splitlines()[0], own)
        for method in list_methods() if name == "method" else ():
            cls = find_method(method)
            found[f"method, name = {method}"] = ((cls.__doc__ or "").splitlines()[0], describe(cls.Config))
    return found


def list_recipes() -> dict[str, str]:
    """Return the recipes that come with evovit by name, with the first line of each."""
    files = sorted(LIBRARY.rglob("*.toml"), key=lambda path: (len(path.parts), path))
    names = (str(path.relative_to(LIBRARY).with_suffix("")) for path in files)
    return {name: (LIBRARY / f"{name}.toml").read_text().splitlines()[0].strip("# ") for name in names}


def find_recipe(name: str, own_only: bool = False) -> Path:
    """Return the file of a recipe: a path, or the name of one that comes with evovit.

    Args:
        own_only: take no path.
    """
    if not own_only and as_path(name, "The recipe").is_file():
        return Path(name)
    known = list_recipes()
    if name in known:
        return LIBRARY / f"{name}.toml"
    what = "with this name comes with evovit" if own_only else "is there, neither as a file nor with evovit"
    raise EvoViTError(f"No recipe {shown(name)} {what}; evovit recipes lists them.{nearest(name, known)}")


def find_recipes(names: Sequence[str | Path]) -> list[Path]:
    """Return the files of recipes; a folder, also of those that come with evovit, stands for all in it."""
    own = {known.rpartition("/")[0] for known in list_recipes()} - {""}
    found: list[Path] = []
    for name in names:
        place = as_path(name, "The recipe")
        folder = place if place.is_dir() else LIBRARY / name if str(name).rstrip("/") in own else None
        inside = [find_recipe(str(name))] if folder is None else sorted(folder.glob("*.toml"))
        if not inside:
            raise EvoViTError(f"The folder {shown(place)} holds no recipe (*.toml); give another.")
        found += inside
    return found
