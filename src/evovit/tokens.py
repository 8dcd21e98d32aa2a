"""Tokens: the state between two blocks. QKV: what a block's attention saw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The token state between two blocks: P prefix tokens, then N patch tokens.

    Args:
        x: (B, P + N, C).
        index: (B, N) int64, raster position at the stage's start; -1 where a token has no place of its own.
        num_prefix: P, the class, distillation and register tokens; never reduced.
        grid: (rows, columns) of the stage.
        size: (B, N) patches a token stands for; None means one each.
        mask: (B, N) 1 where a token takes part; None means all.
        carry: a NamedTuple of the method's own, for example the tokens that wait in Evo-ViT.
    """

    x: Tensor
    index: Tensor
    num_prefix: int
    grid: tuple[int, int]
    size: Tensor | None = None
    mask: Tensor | None = None
    carry: Any = None

    @property
    def prefix(self) -> Tensor:
        """(B, P, C)."""
        return self.x[:, : self.num_prefix]

    @property
    def patches(self) -> Tensor:
        """(B, N, C)."""
        return self.x[:, self.num_prefix :]

    @property
    def num_patches(self) -> int:
        """N, a Python integer (static shape)."""
        return self.x.shape[1] - self.num_prefix

    @property
    def num_cells(self) -> int:
        """Cells of the grid, the number of patch tokens while all are present."""
        return self.grid[0] * self.grid[1]

    @property
    def taking_part(self) -> Tensor:
        """(B, N) `mask`, float32 ones where it is None."""
        return torch.ones_like(self.index, dtype=torch.float32) if self.mask is None else self.mask

    def with_x(self, x: Tensor) -> Tokens:
        """Return the same tokens with new values, (B, P + N, C)."""
        return replace(self, x=x)

    def change(self, **fields: Any) -> Tokens:
        """Return a copy with the named fields replaced."""
        return replace(self, **fields)


class QKV(NamedTuple):
    """Queries, keys and values of one attention, (B, H, P + N, D), as the host computes them.

    Normalisation and rotary embedding of the host are already in them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None = None  # the host's position bias for these tokens, (1 or B, H, P + N, P + N)
    extra: Tensor | None = None  # (B, P + N, S), what the host projects besides: output gate, parallel FFN
    key_length: Tensor | None = None  # (B, H, P + N) float32, of keys; where a token is several, their mean
    padding: Tensor | None = None  # (B, P + N) bool, rows of padding, which neither query nor are attended to


class Outputs(NamedTuple):
    """What one forward gives."""

    logits: Tensor  # (B, classes)
    tokens: Tokens  # as the last block left them; `method.finish` brings back what waits
    extra_logits: dict[str, Tensor]  # of further heads of host and method, for the training loss
    trace: list[Tokens]  # after each block, if recorded
    features: Tensor  # (B, P + N, C), the normed tokens that the head read
    token_logits: Tensor | None  # (B, N, classes) in training, of a host that classifies every patch token
    class_logits: Tensor | None = None  # (B, classes) beside them, of the class head alone


def logits_of(answer: Any) -> Any:
    """Return the logits of a model's answer: itself, or of an output object of transformers its logits.

    An object without logits gives the first vector (B, ...) that stands for the image.
    """
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        found = getattr(answer, name, None)
        if found is not None:
            return found
    return answer


class Taught(NamedTuple):
    """What a teacher says about a batch."""

    logits: Tensor  # (B, classes)
    features: Tensor | None  # (B, P + N, C), its normed tokens in raster order, if a loss reads them
    trace: tuple[Tensor, ...] = ()  # (B, N, C), its patch tokens after each block, if a loss reads them
    token_logits: Tensor | None = None  # (B, N, classes), if it classifies every patch token
    class_logits: Tensor | None = None  # (B, classes) beside them, of the class head alone
