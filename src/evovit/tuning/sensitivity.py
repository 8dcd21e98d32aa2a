"""The sensitivity table: how far outputs move when one block, and all after it, keep fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evovit.backbones.base import evaluating
from evovit.tokens import logits_of

BATCH = 16  # images of one forward


@torch.inference_mode()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs (N, classes or channels) float32 for images in evaluation mode."""
    like = next(p for p in model.parameters() if p.is_floating_point())
    with evaluating(model):
        parts = [
            logits_of(model(part.to(like.device, like.dtype))).float().cpu()
            for part in torch.split(images, BATCH)
        ]
    return torch.cat(parts).flatten(1)


def damage(dense: Tensor, reduced: Tensor, has_head: bool) -> float:
    """Return how far outputs (N, classes) are from the dense model's.

    With a head the mean KL divergence of the classes, in nats; else the mean of the squared distance of
    features over the squared norm.
    """
    if has_head:
        p = dense.double().log_softmax(1)
        return float((p.exp() * (p - reduced.double().log_softmax(1))).sum(1).mean())
    return float(((reduced - dense).square().sum(1) / dense.square().sum(1)).mean())


@dataclass(frozen=True)
class SensitivityTable:
    """Damage of one method where block `blocks[i]` and all after it keep `counts[j]` patch tokens."""

    blocks: tuple[int, ...]  # rising
    counts: tuple[int, ...]  # rising; the last is all patch tokens, where nothing is damaged
    values: tuple[tuple[float, ...], ...]  # (blocks, counts)

    def whole(self, depth: int, counts: Sequence[int]) -> NDArray[np.float64]:
        """Return the damage (depth, len(counts)) of every block and these counts; linear between entries."""
        wide = np.stack([np.interp(counts, self.counts, row) for row in self.values])
        return np.stack([np.interp(range(depth), self.blocks, column) for column in wide.T], axis=1)


def block_grid(depth: int) -> tuple[int, ...]:
    """Return the blocks at which damage is measured: six, from the second to the last."""
    return tuple(sorted({round(float(number)) for number in np.linspace(1, depth - 1, min(6, depth - 1))}))


def count_grid(num_patches: int) -> tuple[int, ...]:
    """Return the counts at which damage is measured, rising, without all."""
    return tuple(sorted({max(1, round(num_patches * share)) for share in (0.08, 0.2, 0.35, 0.5, 0.75)}))
