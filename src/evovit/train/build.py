"""From a recipe to model, teacher and optimisers; to check a recipe, its model is built without memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from evovit.data.digits import MEAN, NUM_CLASSES, STD
from evovit.data.images import Images
from evovit.data.pictures import open_images
from evovit.errors import EvoViTError, nearest, shown
from evovit.hosts import create_host
from evovit.methods import DENSE
from evovit.model import ReducedViT, backbone_of, reduce_tokens
from evovit.recipe.reading import read_recipe
from evovit.recipe.tables import Recipe
from evovit.runtime.files import as_path, check_fit, read_state_dict
from evovit.runtime.seeds import seed_for
from evovit.train.objective import Objective
from evovit.train.optimizers import build_optimizers
from evovit.train.state import read_weights

CHANNELS = 3
Colours = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel


def build_model(recipe: Recipe, num_classes: int, *, weights: bool = True) -> nn.Module:
    """Build the recipe's model for a number of classes; equal seeds give equal first weights.

    Args:
        weights: also load `model.weights` or the published ones, if the recipe asks for them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(recipe.run.seed, "weights"))
        host = create_host(
            recipe.model.name,
            host_options(recipe, num_classes),
            pretrained=weights and recipe.model.pretrained,
            what="model.name",
            seed=recipe.run.seed,
        )
        if weights and recipe.model.weights:
            fit(host, read_state_dict(recipe.model.weights), f"model.weights, {recipe.model.weights!r},")
        freeze(host, recipe.optimizer.frozen.split())
        check_budgets_of(recipe)
        if recipe.method.name == DENSE:
            return host
        budgets = recipe.run.budgets
        model = reduce_tokens(host, recipe.method.name, budgets=budgets, **recipe.method.options)
    if recipe.run.reduce_from_epoch or recipe.run.reduce_ramp_epochs:
        model.method.set_reduction(1.0)  # refuses a method that cannot
    return model


def check_budgets_of(recipe: Recipe) -> None:
    """Raise `EvoViTError` where a recipe says what several budgets in one update do not allow."""
    run, goal = recipe.run, recipe.objective
    others = {
        "method.name dense": recipe.method.name == DENSE,
        "run.reduce_from_epoch": run.reduce_from_epoch,
        "run.reduce_ramp_epochs": run.reduce_ramp_epochs,
        "run.activation_checkpointing": run.activation_checkpointing,
        "objective.token_label_weight": goal.token_label_weight,
        "objective.mix_token": goal.mix_token,
    }
    for name, given in others.items():
        if run.budgets and given:
            raise EvoViTError(f"run.budgets cannot be combined with {name}; leave one out.")


def host_options(recipe: Recipe, num_classes: int) -> dict[str, Any]:
    """Return the arguments with which a recipe creates its host."""
    table = recipe.model
    if "num_classes" in table.options:
        raise EvoViTError("model.options has num_classes, which is set elsewhere: use model.num_classes.")
    drop_path = {"drop_path_rate": table.drop_path} if table.drop_path else {}
    return {"num_classes": num_classes} | table.options | drop_path


def freeze(host: nn.Module, names: Sequence[str]) -> None:
    """Take parameters of the host, named as it names them, out of the training."""
    own = dict(host.named_parameters())
    for name in names:
        if name not in own:
            raise EvoViTError(
                f"optimizer.frozen names {name!r}, which the network does not have.{nearest(name, own)}"
            )
        own[name].requires_grad_(False)


def check_recipe(recipe: Recipe) -> tuple[int, Colours]:
    """Build model, teacher and losses on the meta device, where they take no memory, to check a recipe.

    Returns:
        the side of the images in pixels; mean and standard deviation of their colours.
    """
    classes = recipe.model.num_classes or NUM_CLASSES
    if recipe.model.weights and not as_path(recipe.model.weights, "model.weights").is_file():
        raise EvoViTError(f"model.weights: there is no file {shown(Path(recipe.model.weights))}.")
    with torch.device("meta"):
        model = build_model(recipe, classes, weights=False)
        build_objective(recipe, model, classes, weights=False)
        build_optimizers(recipe, model)
    channels, grid = backbone_of(model).image_shape[0], backbone_of(model).spec.grid
    if channels != CHANNELS:
        raise EvoViTError(
            f"The model is for images of {channels} channels; only colours, {CHANNELS}, are read."
        )
    cells = recipe.data.token_label_grid
    if recipe.data.token_labels and grid != (cells, cells):
        raise EvoViTError(
            f"data.token_label_grid is {cells}, but the model has {grid[0]} x {grid[1]} patches; set it so."
        )
    return image_side(model), colours_of(recipe, model)


def image_side(model: nn.Module) -> int:
    """Return the side of the square images a model was built for, in pixels."""
    height, width = backbone_of(model).image_shape[1:]
    if height != width:
        raise EvoViTError(
            f"The model is for images of {height} x {width} pixels; only squares can be trained."
        )
    return height


def colours_of(recipe: Recipe, model: nn.Module) -> Colours:
    """Return mean and standard deviation by which the images of a recipe are normalised."""
    if recipe.data.source == "digits":
        return (MEAN,) * 3, (STD,) * 3
    return colours_in(getattr(model, "pretrained_cfg", None) or {})


def preprocessing_in(recipe: Recipe, host: nn.Module, images: Images) -> dict[str, Any]:
    """Return how the test images of a recipe are prepared, a table of `hosts.preprocessing`."""
    mean, std = colours_of(recipe, host)
    return {
        "input_size": list(backbone_of(host).image_shape),
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bicubic",
        "crop_pct": recipe.data.crop_pct,
        "crop_mode": "center",
        "class_names": list(images.class_names),
    }


def colours_in(cfg: Any) -> Colours:
    """Return mean and standard deviation of a `pretrained_cfg`, which may be a stranger's."""
    found = cfg.get("mean", IMAGENET_DEFAULT_MEAN), cfg.get("std", IMAGENET_DEFAULT_STD)
    try:
        mean, std = (tuple(float(value) for value in values) for values in found)
        if not len(mean) == len(std) == CHANNELS or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError
    except (TypeError, ValueError):
        raise EvoViTError(
            f"mean and std of the pretrained_cfg are {shown(found)}; give {CHANNELS} numbers each, std above "
            "0."
        ) from None
    return mean, std


def build_objective(recipe: Recipe, model: nn.Module, num_classes: int, *, weights: bool = True) -> Objective:
    """Join a model with its teacher and losses; without `weights` theirs, or the teacher, may be left out."""
    goal = recipe.objective
    weights_at = goal.teacher_weights and as_path(goal.teacher_weights, "objective.teacher_weights")
    if weights_at and not weights_at.is_file():
        raise EvoViTError(f"objective.teacher_weights: there is no file {shown(weights_at)}.")
    if not goal.teacher:
        if weights and isinstance(model, ReducedViT) and model.method.needs_teacher:
            raise EvoViTError(
                f"{recipe.method.name} as configured learns from a teacher and there is none; set "
                "objective.teacher, or the method's token_weight to 0."
            )
        return Objective(model, goal)
    if as_path(Path(goal.teacher) / "recipe.toml", "objective.teacher").is_file():
        taught = read_recipe(Path(goal.teacher) / "recipe.toml")
        teacher = build_model(taught, num_classes, weights=False)
        if weights:
            fit(teacher, read_weights(Path(goal.teacher), "best"), f"The teacher {goal.teacher!r}")
        theirs = colours_of(taught, teacher)
    else:
        download = weights and not goal.teacher_weights
        teacher = create_host(
            goal.teacher, {"num_classes": num_classes}, pretrained=download, what="objective.teacher"
        )
        if weights and goal.teacher_weights:
            fit(
                teacher,
                read_state_dict(goal.teacher_weights),
                f"objective.teacher, {goal.teacher_weights!r},",
            )
        theirs = colours_in(teacher.pretrained_cfg)
    (mean, std), (other_mean, other_std) = (
        [torch.tensor(part, device="cpu") for part in colours]
        for colours in (colours_of(recipe, model), theirs)
    )
    return Objective(model, goal, teacher, (std / other_std, (mean - other_mean) / other_std))


def fit(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load a state dict or say in a sentence why it does not fit."""
    check_fit(module, state, what)
    module.load_state_dict(state)


def open_images_of(recipe: Recipe) -> Images:
    """Check a recipe to the end without taking memory, then open its data."""
    images = open_images(recipe, *check_recipe(recipe))
    if recipe.model.num_classes not in (0, images.num_classes):
        raise EvoViTError(
            f"model.num_classes is {recipe.model.num_classes}, but {recipe.data.source} has "
            f"{images.num_classes} classes; set it to that, or to 0."
        )
    return images


def open_run(recipe: Recipe) -> tuple[Images, nn.Module]:
    """Check a recipe, open its data and build its model."""
    images = open_images_of(recipe)
    return images, build_model(recipe, images.num_classes)
