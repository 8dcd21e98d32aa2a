"""`evovit train`: from a recipe to a run folder. The same command again goes on where the run stopped."""

from __future__ import annotations

import inspect
import json
import platform
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from evovit.errors import EvoViTError
from evovit.model import ReducedViT
from evovit.run import state
from evovit.run.checkpoint import save_reduced
from evovit.run.config import describe_knobs, differences, read_recipe
from evovit.run.evaluate import open_run
from evovit.run.files import write_atomically
from evovit.run.recipe import Recipe
from evovit.run.trainer import Trainer, accumulation
from evovit.run.world import World, join_world


def train(
    recipe: Annotated[Path, tyro.conf.Positional],
    /,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    out: Path | None = None,
    seeds: tuple[int, ...] = (),
) -> None:
    """Train a recipe; given again, go on where it stopped. Under torchrun all processes train one model.

    Args:
        recipe: a TOML file; the knobs are listed below.
        set: table.key=value, over what the recipe says, such as method.keep_ratio=0.7.
        out: folder of the run; default: runs/RECIPE/seed<run.seed>.
        seeds: train once for each, into OUT/seed<n>.
    """
    read = read_recipe(recipe, set)
    base = out or Path("runs") / recipe.stem
    runs = [(replace(read, run=replace(read.run, seed=seed)), base / f"seed{seed}") for seed in seeds]
    for each, folder in runs or [(read, out or base / f"seed{read.run.seed}")]:
        train_one(each, folder)


_what, _arguments = inspect.cleandoc(train.__doc__ or "").split("\n\nArgs:\n")  # the help shows every knob
train.__doc__ = f"{_what}\n{describe_knobs()}\n\nArgs:\n{_arguments}"


def train_one(recipe: Recipe, folder: Path, console: Console | None = None) -> nn.Module:
    """Train a recipe in a folder, or go on there; return the model as it is then."""
    with join_world(recipe.run.device) as world:
        return _train(recipe, folder, world, console or Console())  # its trainer goes before the world does


def _train(recipe: Recipe, folder: Path, world: World, console: Console) -> nn.Module:
    accumulation(recipe, world)
    images, model = open_run(recipe)
    if world.is_main:
        prepare(recipe, folder, world)
    world.wait()
    trainer = Trainer(recipe, images, model, folder, world, console)
    try:
        finished = trainer.fit()
    finally:
        if trainer.records:
            trainer.records.close()
    if world.is_main:
        if finished:
            export(model, folder / "model")
            console.print(f"{folder}: finished; weights in {folder / 'model'}", soft_wrap=True)
        else:
            console.print(f"{folder}: stopped and saved after update {trainer.update}", soft_wrap=True)
    return model


def prepare(recipe: Recipe, folder: Path, world: World) -> None:
    """Make the folder of a run, or check that this recipe may go on in it."""
    path = folder / "recipe.toml"
    if path.is_file():
        changed = differences(read_recipe(path), recipe)
        if changed:
            raise EvoViTError(
                f"{str(folder)!r} holds a run of another recipe ({'; '.join(changed[:5])}); give another "
                "--out, or move it away."
            )
        state.remove_leftovers(folder)
    try:
        (folder / state.FOLDER).mkdir(parents=True, exist_ok=True)
        around = json.dumps(surroundings(world), indent=2)
        write_atomically(folder / "environment.json", lambda file: file.write_text(around))
        write_atomically(path, lambda file: file.write_text(recipe.to_toml(), encoding="utf-8"))
    except OSError as error:
        raise EvoViTError(f"The folder {str(folder)!r} cannot be written: {error.strerror}.") from error


def surroundings(world: World) -> dict[str, Any]:
    """Return what a run depends on besides its recipe."""
    place = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(place), *arguments]
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    on_cuda = world.device.type == "cuda"
    return {
        "command": sys.argv,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if on_cuda else platform.processor() or platform.machine(),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_changes": git("status", "--porcelain"),
        **{name: version(name) for name in ("evovit", "torch", "timm")},
    }


def export(model: nn.Module, folder: Path) -> None:
    """Write the final weights: for `load_reduced` if the model is reduced, else model.safetensors alone."""
    try:
        if isinstance(model, ReducedViT):
            save_reduced(model, folder)
        else:
            tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
            write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path))
    except OSError as error:
        raise EvoViTError(
            f"{str(folder)!r} cannot be written: {error.strerror}; the checkpoints are whole."
        ) from error
