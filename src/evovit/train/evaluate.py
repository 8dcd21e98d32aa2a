"""Accuracy of a model on test images, shared out over processes, each image counted once; `evovit eval`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evovit.backbones.base import evaluating
from evovit.data.images import Images
from evovit.recipe.tables import Recipe
from evovit.runtime.world import World
from evovit.tokens import logits_of

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
def evaluate(
    model: nn.Module, images: Images, recipe: Recipe, world: World, places: Tensor | None = None
) -> Accuracy:
    """Return the accuracy of a model in evaluation mode; its own modes are as before afterwards.

    Args:
        places: (classes of the images,) the model's class of each; None: the same.
    """
    first = best = seen = 0
    with evaluating(model):
        for batch, labels in images.test(world):
            with autocast(recipe, world.device):
                logits = logits_of(model(batch.to(world.device)))
            labels = labels if places is None else places[labels]
            top = logits.float().topk(min(5, logits.shape[1]), dim=1).indices.cpu() == labels[:, None]
            first, best, seen = first + int(top[:, 0].sum()), best + int(top.sum()), seen + labels.shape[0]
    total = world.sum([first, best, seen])
    return Accuracy(100 * total[0] / total[2], 100 * total[1] / total[2], int(total[2]))
