"""Trains a recipe in a run folder. Called again with both, it resumes where the run stopped."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from evovit.checkpoints.reduced import save_reduced
from evovit.data.images import Images
from evovit.errors import EvoViTError, check_kind, shown
from evovit.hosts.preprocessing import tell_preprocessing
from evovit.macs import gmacs
from evovit.model import ReducedViT, backbone_of
from evovit.recipe.reading import differences, read_recipe, written
from evovit.recipe.tables import Recipe
from evovit.runtime.environment import environment, source
from evovit.runtime.files import as_path, hold_folder, make_folder, told, write_atomically, write_text
from evovit.runtime.world import World, join_world
from evovit.train import state
from evovit.train.build import open_run, preprocessing_in
from evovit.train.records import say
from evovit.train.trainer import Trainer, accumulation, stop_signal


def train_recipe(
    recipe: Recipe | str | Path, folder: str | Path, console: Console | None = None
) -> nn.Module:
    """Train a recipe in a folder, or resume the run there; return the model at the end.

    Under torchrun, all processes train one model.

    Args:
        recipe: a recipe, or the path of a TOML file.
        folder: of the run, for checkpoints, records and the final weights. No other process may use it at the
            same time.
    """
    return train_in_folder(recipe, folder, console)[0]


def train_in_folder(
    recipe: Recipe | str | Path, folder: str | Path, console: Console | None = None
) -> tuple[nn.Module, bool]:
    """Do what `train_recipe` does; also return whether the training is finished."""
    read = recipe if isinstance(recipe, Recipe) else read_recipe(as_path(recipe, "recipe"))
    place = as_path(folder, "folder")
    if console is not None:
        check_kind("console", console, Console, "one of rich, or none")
    with join_world(read.run.device) as world:
        accumulation(read, world)
        images, model = open_run(read)  # the trainer goes before the world does
        return model, train_model(read, place, world, console or Console(), images, model)


def train_model(
    recipe: Recipe, folder: Path, world: World, console: Console, images: Images, model: nn.Module
) -> bool:
    """Train a model that was built from a recipe, or go on with it, and write its final weights.

    Returns:
        False if SIGTERM stopped it before the end.
    """
    with stop_signal() as stop, hold_folder(folder) if world.is_main else nullcontext():
        if world.is_main:
            prepare_folder(recipe, folder, world, images, model)
        world.wait()
        trainer = Trainer(recipe, images, model, folder, world, console)
        try:
            finished = trainer.fit(stop)
        finally:
            if trainer.records:
                trainer.records.close()
        said = f"stopped and saved after update {trainer.update}"
        if finished:
            settle(model)
            said = f"finished; weights in {folder / 'model'}"
        if world.is_main:
            if finished:
                save_weights(model, folder / "model", recipe, images)
            say(console, f"{folder}: {said}")
    return finished


def settle(model: nn.Module) -> None:
    """Let a method reduce as it does at the end of a training, ramps and switches done."""
    if isinstance(model, ReducedViT):
        model.method.set_progress(1.0)
        if model.method.reduction < 1:
            model.method.set_reduction(1.0)


def prepare_folder(recipe: Recipe, folder: Path, world: World, images: Images, model: nn.Module) -> None:
    """Make the folder of a run, or check that this recipe may go on in it."""
    make_folder(folder)
    path, text = folder / "recipe.toml", written(recipe)
    if path.exists():
        changed = differences(read_recipe(path), recipe)
        if changed:
            raise EvoViTError(
                f"{shown(folder)} holds a run of another recipe ({'; '.join(changed[:5])}); give another "
                "--out, or move it away."
            )
        with told(folder):
            state.clear_folder(folder)
    around = environment(world.device.type) | source() | {"processes": world.size}
    around |= {"num_classes": images.num_classes, "class_names": images.class_names}
    around["gmacs"] = gmacs(model, backbone_of(model).image_shape)
    with told(folder):
        (folder / state.FOLDER).mkdir(exist_ok=True)
        write_text(folder / "environment.json", json.dumps(around, indent=2))
        write_text(path, text)


def save_weights(model: nn.Module, folder: Path, recipe: Recipe, images: Images) -> None:
    """Write the final weights: for `load_reduced` if the model is reduced, else model.safetensors alone."""
    with told(folder):
        if isinstance(model, ReducedViT):
            tell_preprocessing(model.model, preprocessing_in(recipe, model.model, images))
            save_reduced(model, folder)
        else:
            tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
            write_atomically(folder / "model.safetensors", lambda path: save_file(tensors, path))
