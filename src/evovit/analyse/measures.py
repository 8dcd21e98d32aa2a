"""The numbers of figures 4 and 5 over many images, and the maps of figures 2 and 5 over a few."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evovit.analyse.similarity import correlation_with_mean, jaccard, linear_cka
from evovit.analyse.watch import Seen, watch
from evovit.backbones.base import evaluating
from evovit.errors import EvoViTError, shown
from evovit.methods import DENSE
from evovit.model import ReducedViT, reduce_tokens
from evovit.ops.score import running_score
from evovit.ops.select import split_top
from evovit.visualize import on_cells

MODES = ("stage", "layer")
TRADE_OFF = 0.5  # alpha of eq. 4, the paper's
LEAST = 32  # images: the CKA of fewer says nothing


class BlockMeasures(NamedTuple):
    """What one block does, mean over the images. CKA is with the final class token, after the block."""

    number: int
    kept: float  # share of the cells whose token goes on
    correlation: float  # of a token's query with the mean query, mean over tokens
    variance: float  # of the same over tokens
    cka: float | None  # of the mean patch token; None: no class token, or too few images
    cka_informative: float | None  # of the mean informative token; None also where tokens have no places
    cka_placeholder: float | None  # of the mean of all others
    cka_by_chance: float | None  # of the mean patch token with the class tokens of other images


class Measures(NamedTuple):
    """What a model does on many images."""

    images: int
    blocks: list[BlockMeasures]
    informative: Tensor  # (images, blocks, cells of the first grid) bool; empty where tokens have no places
    jaccard: Tensor  # (blocks, blocks), of the informative tokens of each two blocks, mean over images


class Views(NamedTuple):
    """What a model looks at in a few images."""

    attention: list[Tensor]  # of each block (B, rows, columns) float32, NaN for a cell without a token
    scores: dict[int, Tensor]  # what the method ranked by, by block, likewise
    kept: Tensor  # (B, blocks, rows, columns) bool, on the first grid
    informative: Tensor  # the same; where a block keeps all, the better half by global class attention


@dataclass
class _Column:
    """What is gathered of one block, a part for each batch."""

    means: list[Tensor] = field(default_factory=list)  # (B, C) each
    informative: list[Tensor] = field(default_factory=list)
    placeholder: list[Tensor] = field(default_factory=list)
    correlations: list[Tensor] = field(default_factory=list)  # (B,) each
    variances: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    sets: list[Tensor] = field(default_factory=list)  # (B, cells of the first grid)


def as_reduced(model: nn.Module) -> ReducedViT:
    """Return a model that can be watched: itself, or a host with nothing reduced."""
    return model if isinstance(model, ReducedViT) else reduce_tokens(model, DENSE)


def measure(model: nn.Module, images: Tensor, batch: int = 32) -> Measures:
    """Measure a model block by block (Evo-ViT, figures 4 and 5; docs/analysis.md).

    The informative tokens of a block are those that it keeps; where it keeps all, the better half by the
    global class attention up to this block (eq. 4, alpha 0.5; without class token by the column mean).

    Args:
        model: a host, or what `reduce_tokens` returns; evaluated, whatever its mode.
        images: (n, channels, height, width), prepared as the model takes them.
        batch: images at a time.
    """
    reduced, device = as_reduced(model), next(model.parameters()).device
    check_images(images)
    columns: list[_Column] = []
    finals: list[Tensor] = []
    has_final = reduced.method.spec.has_class_token and len(images) >= LEAST
    with torch.no_grad(), evaluating(reduced):
        for part in torch.split(images, batch):
            first, score = None, None
            for place, seen in enumerate(watch(reduced, part.to(device))):
                first = first or seen.grid
                score = evolved(score, seen)
                if place == len(columns):
                    columns.append(_Column())
                gather(columns[place], seen, informative(seen, score), first)
                last = seen.prefix
            if has_final:
                finals.append(last[:, 0].cpu())
    final = torch.cat(finals) if finals else None
    sets = torch.stack([torch.cat(column.sets) for column in columns], 1)
    blocks = [summary(number, column, final) for number, column in enumerate(columns)]
    return Measures(len(images), blocks, sets, jaccard(sets, sets))


def look(model: nn.Module, images: Tensor) -> Views:
    """Return the maps of a few images; arguments as of `measure`."""
    reduced, device = as_reduced(model), next(model.parameters()).device
    check_images(images)
    attention, scores, kept, chosen = list[Tensor](), dict[int, Tensor](), list[Tensor](), list[Tensor]()
    first, score = None, None
    with torch.no_grad(), evaluating(reduced):
        for seen in watch(reduced, images.to(device)):
            first = first or seen.grid
            score = evolved(score, seen)
            attention.append(seen.attention.unflatten(1, seen.grid).cpu())  # type: ignore[no-untyped-call]
            if seen.score is not None:
                scores[seen.number] = seen.score.unflatten(1, seen.grid).cpu()  # type: ignore[no-untyped-call]
            for masks, cells in ((kept, seen.kept), (chosen, informative(seen, score))):
                masks.append(on_first(cells, seen.grid, first).cpu())
    return Views(attention, scores, torch.stack(kept, 1), torch.stack(chosen, 1))


def check_images(images: Tensor) -> None:
    """Raise `EvoViTError` unless there is an image."""
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        given = tuple(images.shape) if isinstance(images, Tensor) else images
        raise EvoViTError(f"images is {shown(given)}; give a tensor (n, channels, height, width), n >= 1.")


def evolved(old: Tensor | None, seen: Seen) -> Tensor:
    """Return the global class attention (eq. 4), (B, cells); a cell without a token keeps its own."""
    new = seen.attention
    if old is None or old.shape != new.shape:  # a coarser stage begins anew
        return new.nan_to_num(0.0)
    return old.where(new.isnan(), running_score(old, new, TRADE_OFF))


def informative(seen: Seen, score: Tensor) -> Tensor:
    """Return which cells are informative, (B, cells) bool: those kept, or the better half where all are."""
    half = split_top(score, max(1, score.shape[1] // 2)).kept
    return half.where(seen.kept.all(1, keepdim=True), seen.kept)


def on_first(cells: Tensor, grid: tuple[int, int], first: tuple[int, int]) -> Tensor:
    """Return (B, cells) of a grid as (B, rows, columns) of the first stage's."""
    return on_cells(cells.unflatten(1, grid), first)  # type: ignore[no-untyped-call]


def gather(column: _Column, seen: Seen, chosen: Tensor, first: tuple[int, int]) -> None:
    """Add a batch to what is known of a block."""
    column.means.append(seen.patches.float().mean(1).cpu())
    if seen.kept.any():
        for means, cells in ((column.informative, chosen), (column.placeholder, ~chosen)):
            means.append(mean_of(seen.patches, cells).cpu())
    each = correlation_with_mean(seen.queries, seen.present | ~seen.present.any(1, keepdim=True))
    column.correlations.append(each.mean.cpu())
    column.variances.append(each.variance.cpu())
    column.kept.append(seen.kept.float().mean(1).cpu())
    column.sets.append(on_first(chosen, seen.grid, first).flatten(1).cpu())


def mean_of(patches: Tensor, cells: Tensor) -> Tensor:
    """Return the mean of the chosen patch tokens, (B, C) float32; zero where none is chosen.

    Args:
        patches: (B, cells, C).
        cells: (B, cells) bool.
    """
    weight = cells.float()
    total = (weight[:, None] @ patches.float())[:, 0]
    return total / weight.sum(1, keepdim=True).clamp_min(1)


def summary(number: int, column: _Column, final: Tensor | None) -> BlockMeasures:
    """Return the measures of one block.

    Args:
        final: (n, C) class token after the last block; None: no CKA.
    """
    means = torch.cat(column.means)
    alike = [torch.cat(parts) if parts else None for parts in (column.informative, column.placeholder)]
    every, kept, others = (
        None if final is None or x is None else linear_cka(x, final) for x in (means, *alike)
    )
    chance = None
    if final is not None:
        order = torch.randperm(len(final), generator=torch.Generator().manual_seed(0))
        chance = linear_cka(means, final[order])
    return BlockMeasures(
        number,
        float(torch.cat(column.kept).mean()),
        float(torch.cat(column.correlations).mean()),
        float(torch.cat(column.variances).mean()),
        every,
        kept,
        others,
        chance,
    )


@contextmanager
def in_mode(model: ReducedViT, mode: str) -> Iterator[None]:
    """Let Evo-ViT select by stages or in every layer; its own mode comes back."""
    method: Any = model.method
    before = method.mode
    method.mode = mode
    try:
        yield
    finally:
        method.mode = before


def other_mode(model: nn.Module) -> str | None:
    """Return the mode of Evo-ViT that a model is not in; None: its method has no such modes."""
    own = getattr(model.method, "mode", None) if isinstance(model, ReducedViT) else None
    return MODES[1 - MODES.index(own)] if own in MODES else None
