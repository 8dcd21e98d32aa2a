"""Accuracy of a model on test images, shared out over processes, each image counted once; `evovit eval`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import nn

from evovit.errors import EvoViTError
from evovit.model import ReducedViT
from evovit.run.build import build_model, check_model, fit
from evovit.run.config import read_recipe
from evovit.run.datasets import Images, open_images
from evovit.run.recipe import Recipe
from evovit.run.state import read_weights
from evovit.run.world import World, join_world

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Accuracy(NamedTuple):
    """Shares of the test images in percent."""

    top1: float
    top5: float  # top-n where there are n < 5 classes
    images: int


def autocast(recipe: Recipe, device: torch.device) -> Any:
    """Return the context in which forwards of a recipe run."""
    kind = PRECISIONS.get(recipe.run.precision)
    return nullcontext() if kind is None else torch.autocast(device.type, kind)


@torch.inference_mode()
def evaluate(model: nn.Module, images: Images, recipe: Recipe, world: World) -> Accuracy:
    """Return the accuracy of a model in evaluation mode; leaves it in training mode if it was."""
    training = model.training
    model.eval()
    first = best = seen = 0
    for batch, labels in images.test(world):
        with autocast(recipe, world.device):
            logits = model(batch.to(world.device))
        top = logits.float().topk(min(5, logits.shape[1]), dim=1).indices.cpu() == labels[:, None]
        first, best, seen = first + int(top[:, 0].sum()), best + int(top.sum()), seen + labels.shape[0]
    model.train(training)
    total = world.sum([first, best, seen])
    return Accuracy(100 * total[0] / total[2], 100 * total[1] / total[2], int(total[2]))


def eval_command(
    run: Path,
    /,
    weights: Literal["last", "best", "ema"] = "last",
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Test the weights of a run; under torchrun the test images are shared out.

    Args:
        run: folder of a run of `evovit train`.
        weights: of the last checkpoint, of the one with the best test so far, or their moving average.
        set: table.key=value, as for train: other data, another keep ratio, another precision.
    """
    if not (run / "recipe.toml").is_file():
        raise EvoViTError(
            f"There is no {str(run / 'recipe.toml')!r}; give the folder of a run of `evovit train`."
        )
    recipe = read_recipe(run / "recipe.toml", set)
    with join_world(recipe.run.device) as world:
        images, model = open_run(recipe)
        fit(model, read_weights(run, weights), f"The checkpoint of {str(run)!r}")
        if isinstance(model, ReducedViT):
            model.method.set_progress(1.0)
        accuracy = evaluate(model.to(world.device), images, recipe, world)
        if world.is_main:
            print(
                f"{run}, {weights} weights: top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} %, "
                f"{accuracy.images} images, {len(images.unreadable)} unreadable"
            )


def open_run(recipe: Recipe) -> tuple[Images, nn.Module]:
    """Check a recipe to the end without taking memory, then open its data and build its model."""
    images = open_images(recipe, *check_model(recipe))
    if recipe.model.num_classes not in (0, images.num_classes):
        raise EvoViTError(
            f"model.num_classes is {recipe.model.num_classes}, but {recipe.data.source} has "
            f"{images.num_classes} classes; set it to that, or to 0."
        )
    return images, build_model(recipe, images.num_classes)
