"""Accuracy of a model on test images, shared out over processes, each image counted once; `evovit eval`."""

from __future__ import annotations

from collections.abc import Sequence
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
    right: Tensor  # (images of this process,) bool, in the order of `Images.test`: the first guess is right


class Paired(NamedTuple):
    """Top-1 of one model against another's on the same images."""

    difference: float  # percentage points
    error: float  # its standard error, from the images on which the two differ
    won: int  # images that the first alone gets right
    lost: int


def paired(ours: Tensor, theirs: Tensor, world: World | None = None) -> Paired:
    """Compare two models on the same images, image by image (McNemar).

    Args:
        ours, theirs: (images of this process,) bool, `Accuracy.right` of each.
        world: the processes that share the images; None: this one has all.
    """
    counts = [float((ours & ~theirs).sum()), float((theirs & ~ours).sum()), float(len(ours))]
    won, lost, images = counts if world is None else world.sum(counts)
    difference = (won - lost) / images
    variance = max(0.0, (won + lost) / images - difference**2) / images
    return Paired(100 * difference, 100 * variance**0.5, int(won), int(lost))


def paired_over_runs(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[float, float]:
    """Compare two models on the same images over several trainings of each, seed by seed.

    Args:
        ours, theirs: (images,) bool for each training, `Accuracy.right` of one process.

    Returns:
        The mean difference in percentage points and its standard error. An image counts once, with its mean
        over the trainings, which share it; how other trainings would differ is not in the error.
    """
    won = (torch.stack([*ours]).float() - torch.stack([*theirs]).float()).mean(0).double()
    return 100 * won.mean().item(), 100 * (won.var(correction=0) / len(won)).sqrt().item()


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
    best = seen = 0
    right = []
    with evaluating(model):
        for batch, labels in images.test(world):
            with autocast(recipe, world.device):
                logits = logits_of(model(batch.to(world.device)))
            labels = labels if places is None else places[labels]
            top = logits.float().topk(min(5, logits.shape[1]), dim=1).indices.cpu() == labels[:, None]
            right.append(top[:, 0])
            best, seen = best + int(top.sum()), seen + labels.shape[0]
    first = torch.cat(right) if right else torch.zeros(0, dtype=torch.bool)
    total = world.sum([int(first.sum()), best, seen])
    return Accuracy(100 * total[0] / total[2], 100 * total[1] / total[2], int(total[2]), first)
