"""Recipes from TOML: reading, overrides, complete checks with the nearest key, and the text of every knob."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

from evovit.errors import EvoViTError
from evovit.methods import describe_options, find_method, list_methods
from evovit.run.recipe import DENSE, TABLES, Recipe

WORDS = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}
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
HOW_ONLY = ("run.batch_per_device", "data.workers", "run.checkpoint_every", "run.log_to", "run.device")


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a TOML file.
        overrides: each `table.key=value`, the value as in TOML; what is no TOML value is taken as text.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvoViTError(f"The recipe {str(path)!r} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EvoViTError(f"The recipe {str(path)!r} is not valid TOML: {error}.") from error
    for override in overrides:
        _override(tables, override)
    return parse_recipe(tables)


def parse_recipe(tables: dict[str, Any]) -> Recipe:
    """Build a recipe from plain tables; raises `EvoViTError` for a wrong key, type or value."""
    for name in tables:
        if name not in TABLES:
            raise EvoViTError(f"A recipe has no table [{name}]; {_nearest(name, TABLES)}")
    recipe = Recipe(**{name: _table(name, tables.get(name, {})) for name in TABLES})
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
    if goal.teacher and not taught and not _method_learns_from_teacher(recipe):
        raise EvoViTError("objective.teacher is given, but nothing is learnt from it; set distillation.")
    if goal.teacher_weights and not goal.teacher:
        raise EvoViTError("objective.teacher_weights is given without objective.teacher; give both.")
    if data.token_labels and (not goal.token_label_weight or data.mixup or data.cutmix):
        raise EvoViTError(
            "data.token_labels needs objective.token_label_weight, and neither data.mixup nor data.cutmix."
        )
    if goal.mix_token and (data.mixup or data.cutmix):
        raise EvoViTError(
            "objective.mix_token takes the place of data.mixup and data.cutmix; leave these out."
        )
    if goal.token_distillation and recipe.method.name == DENSE:
        raise EvoViTError("objective.token_distillation is for a token reduction, but method.name is 'none'.")
    late = run.reduce_from_epoch + run.reduce_ramp_epochs
    if late and recipe.method.name == DENSE:
        raise EvoViTError(
            "run.reduce_from_epoch and reduce_ramp_epochs need a method, and method.name is 'none'."
        )
    if late > run.epochs:
        raise EvoViTError(
            f"run.reduce_from_epoch + reduce_ramp_epochs is {late}; "
            f"allowed is up to run.epochs, {run.epochs}."
        )
    if recipe.model.pretrained and recipe.model.weights:
        raise EvoViTError("model.pretrained and model.weights both say where to start; give one.")


def _method_learns_from_teacher(recipe: Recipe) -> bool:
    name = recipe.method.name
    return name != DENSE and find_method(name).learns_from_teacher


def _table(name: str, content: Any) -> Any:
    if not isinstance(content, dict):
        raise EvoViTError(f"{name} is {content!r}; it is a table: [{name}].")
    kind = TABLES[name]
    known = {f.name: f for f in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key in known and (key != "options" or name == "model"):
            values[key] = _typed(f"{name}.{key}", value, get_type_hints(kind)[key])
        elif name == "method":
            values.setdefault("options", {})[key] = value
        else:
            raise EvoViTError(f"{name} has no key {key!r}; {_nearest(key, known)}")
    for key, f in known.items():
        if key not in values and f.default is MISSING and f.default_factory is MISSING:
            raise EvoViTError(f"{name}.{key} is missing; it is {f.metadata['meaning']}.")
    return kind(**values)


def _typed(path: str, value: Any, kind: Any) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if kind not in WORDS:
        if isinstance(value, dict):
            return value
        raise EvoViTError(f"{path} is {value!r}; it is a table.")
    if type(value) is not kind:
        raise EvoViTError(f"{path} is {value!r}; allowed is {WORDS[kind]}.")
    return value


def _override(tables: dict[str, Any], text: str) -> None:
    path, equals, written = text.partition("=")
    *place, key = [part.strip() for part in path.split(".")]
    if not equals or not place:
        raise EvoViTError(
            f"--set {text!r} is not of the form table.key=value, such as method.keep_ratio=0.5."
        )
    try:
        value = tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        value = written.strip()
    for part in place:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise EvoViTError(f"--set {text!r}: {part} is not a table.")
    tables[key] = value


def _nearest(key: str, known: Iterable[str]) -> str:
    names = [name for name in known if name != "options"]
    near = difflib.get_close_matches(key, names, 1)
    return f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(names)}."


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Say where two recipes would train differently, `key: old, now new` each."""
    before, now = dict(old.knobs()), dict(new.knobs())
    paths = [path for path in {**before, **now} if path not in HOW_ONLY]
    return [
        f"{path}: {before.get(path)!r}, now {now.get(path)!r}"
        for path in paths
        if before.get(path) != now.get(path)
    ]


def describe_knobs() -> str:
    """Return every knob with default, range and meaning, a line each."""
    lines = []
    for name, kind in TABLES.items():
        lines += ["", f"[{name}]  {(kind.__doc__ or '').splitlines()[0]}"]
        for f in fields(kind):
            if not f.metadata:
                more = "a table of further arguments of timm's create_model" if name == "model" else ""
                lines += [f"  options = {{}}  {more}"] if more else []
                continue
            default = "..." if f.default is MISSING else _toml_word(f.default)
            allowed = " | ".join(f.metadata["allowed"])
            lines.append(
                f"  {f.name} = {default}  {allowed + ': ' if allowed else ''}{f.metadata['meaning']}"
            )
        if name == "method":
            for method in list_methods():
                lines += ["", f"  with name = {method!r}:"]
                for option, default, meaning in describe_options(find_method(method)):
                    lines.append(f"    {option} = {_toml_word(default)}  {meaning}")
    return "\n".join(lines)


def _toml_word(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f'"{value}"'
        if isinstance(value, str)
        else str(value)
    )
