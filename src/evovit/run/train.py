"""One training loop for dense and reduced models alike, on digit scenes; and their accuracy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.data import Scenes, digit_scenes
from evovit.errors import EvoViTError
from evovit.model import ReducedViT

EVALUATION_BATCH = 250


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained; two models trained by equal recipes see the same scenes in the same order."""

    epochs: int = 10
    scenes_per_epoch: int = 2048  # each epoch draws its scenes anew
    batch_size: int = 32
    learning_rate: float = 2e-3  # of AdamW, at its peak
    matrix_rate: float = 0.02  # of Muon, at its peak
    weight_decay: float = 0.05
    warm_up: float = 0.08  # share of the steps in which the rate rises from 0; then it falls as a cosine to 0
    clip_norm: float = 1.0  # of the gradient
    num_fragments: int = 4  # of other digits in a scene, from the middle of the training on; few at its start
    image_size: int = 48  # pixels a side
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "scenes_per_epoch", "batch_size"):
            if getattr(self, name) < 1:
                raise EvoViTError(f"{name} is {getattr(self, name)}; allowed is 1 or more.")
        if self.batch_size > self.scenes_per_epoch:
            raise EvoViTError(
                f"batch_size is {self.batch_size}, more than the {self.scenes_per_epoch} scenes of an epoch."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""
        return self.scenes_per_epoch // self.batch_size

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.epochs * self.steps_per_epoch

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, as a share of its peak."""
        rise = max(1, round(self.warm_up * self.steps))
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

    def scenes(self, step: int) -> Scenes:
        """Draw the training scenes of a step, counted from 0."""
        num_fragments = min(self.num_fragments, 2 * (self.num_fragments + 1) * step // self.steps)
        return digit_scenes(
            "train",
            self.batch_size,
            size=self.image_size,
            num_fragments=num_fragments,
            seed=self.seed * 1_000_003 + step,
        )


@dataclass(frozen=True)
class State:
    """Where a training stands after a step."""

    step: int  # steps done
    loss: float  # mean of this epoch so far
    top1: float  # percent of this epoch's training scenes so far


def loss_and_logits(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy over the model's heads, and the logits of the first."""
    if not isinstance(model, ReducedViT):
        logits = model(images)
        return F.cross_entropy(logits, labels), logits
    out = model.run(images)
    heads = [out.logits, *out.extra_logits.values()]
    return torch.stack([F.cross_entropy(head, labels) for head in heads]).mean(), out.logits


def make_optimisers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for everything else.

    Muon orthogonalises each update (Jordan et al., 2024); it learns this task in far fewer steps than AdamW.
    """
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if "blocks." in name and weight.ndim == 2]
    others = [weight for name, weight in named if not ("blocks." in name and weight.ndim == 2)]
    decay = recipe.weight_decay
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=decay),
        torch.optim.AdamW(others, lr=recipe.learning_rate, weight_decay=decay, betas=(0.9, 0.98)),
    ]


def train(model: nn.Module, recipe: Recipe, report: Callable[[State], None] = lambda state: None) -> float:
    """Train a model in place and return the seconds it took.

    Args:
        report: called after each step.
    """
    device = next(model.parameters()).device
    optimisers = make_optimisers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, recipe.rate) for optimiser in optimisers]
    model.train()
    start = time.perf_counter()
    for step in range(recipe.steps):
        if step % recipe.steps_per_epoch == 0:
            loss_sum, correct, seen = 0.0, 0, 0
        if isinstance(model, ReducedViT):
            model.method.set_progress(step / recipe.steps)
        images, labels, *_ = (part.to(device) for part in recipe.scenes(step))
        loss, logits = loss_and_logits(model, images, labels)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
        loss_sum, seen = loss_sum + loss.item() * labels.shape[0], seen + labels.shape[0]
        correct += int((logits.argmax(1) == labels).sum())
        report(State(step + 1, loss_sum / seen, 100 * correct / seen))
    return time.perf_counter() - start


@torch.inference_mode()
def top1(model: nn.Module, scenes: Scenes) -> float:
    """Return the percentage of scenes whose label a model finds, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    found = [
        model(images.to(device)).argmax(1).cpu() for images in torch.split(scenes.images, EVALUATION_BATCH)
    ]
    return 100 * int((torch.cat(found) == scenes.labels).sum()) / scenes.labels.shape[0]
