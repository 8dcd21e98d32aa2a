"""The latency table: time of the two halves of a block, and of the last block, at a grid of row counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evovit.backbones import adapt
from evovit.backbones.base import Block
from evovit.backbones.prefix import with_prefix_block
from evovit.model import reduce_tokens
from evovit.tokens import Tokens
from evovit.tuning.clock import Clock, median

PARTS = ("attention", "ffn", "last")
COPIES = 4  # of a part in one timed step, so that its call weighs little


class BlockPart(nn.Module):
    """A half of the host's middle block, or its last block as a reduced model runs it, on given rows."""

    def __init__(self, host: nn.Module, part: str, rows: int, narrow: bool) -> None:
        super().__init__()
        self.host, self.part, self.rows, self.narrow = host, part, rows, narrow

    def block(self, images: Tensor) -> tuple[Block, Tokens]:
        """Return the block and the embedded tokens, cut to the rows."""
        backbone = adapt(self.host)
        tokens = backbone.embed(images)
        stages = backbone.stages()
        stages = with_prefix_block(stages) if self.narrow and self.part == "last" else stages
        number = backbone.spec.depth - 1 if self.part == "last" else backbone.spec.depth // 2
        block = next(block for stage in stages for block in stage.blocks if block.number == number)
        kept = self.rows - tokens.num_prefix
        return block, tokens.change(x=tokens.x[:, : self.rows], index=tokens.index[:, :kept])

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean of the tokens after the part, run several times over."""
        block, tokens = self.block(images)
        if self.part == "last":
            return block(tokens).x.mean(1)
        for _ in range(COPIES):
            tokens = block.attend(tokens)[0] if self.part == "attention" else block.ffn(tokens)
        return tokens.x.mean(1)


class Embedding(nn.Module):
    """What every part's step does beside the part."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean of the embedded tokens."""
        return adapt(self.host).embed(images).x.mean(1)


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of each part of a block by rows, and of what a reduced model does beside its blocks."""

    rows: tuple[int, ...]  # rising
    ms: dict[str, tuple[float, ...]]  # of each part, at `rows`
    noise: dict[str, tuple[float, ...]]  # spread of these times, relative
    depth: int
    dense_ms: float  # the host itself
    plain_ms: float  # the host in a wrapper that reduces nothing

    def at(self, part: str, rows: Any) -> Any:
        """Return the time of a part at any number of rows, between the measured ones on a line."""
        return np.interp(rows, self.rows, self.ms[part])

    @property
    def rest_ms(self) -> float:
        """Time of embedding, norm and head: what is left of the whole model beside its blocks."""
        whole = self.rows[-1]
        middle = self.at("attention", whole) + self.at("ffn", whole)
        return float(self.plain_ms - (self.depth - 1) * middle - self.at("last", whole))

    def predict(self, attention: Sequence[int], ffn: Sequence[int]) -> float:
        """Return the milliseconds of a model whose blocks work on these rows."""
        middle = sum(self.at("attention", attention[:-1])) + sum(self.at("ffn", ffn[:-1]))
        return float(self.rest_ms + middle + self.at("last", attention[-1]))


def measure_latency(
    host: nn.Module,
    images: Tensor,
    rows: Sequence[int],
    clock: Clock,
    rounds: int,
    log: Callable[[str], None],
) -> LatencyTable:
    """Measure the table, all entries in turn.

    Args:
        images: one batch as the model takes it.
        rows: rising; the last is that of the dense model.
    """
    backbone = adapt(host)
    narrow = not backbone.head_reads_patches
    models: dict[str, nn.Module] = {"dense": host, "plain": reduce_tokens(host, "dense", verify=False)}
    models["embedding"] = Embedding(host)
    models |= {f"{part} {count}": BlockPart(host, part, count, narrow) for part in PARTS for count in rows}
    log(f"latency table: {len(PARTS)} parts at {len(rows)} row counts, {clock.name()}")
    times = clock.times(models, dict.fromkeys(models, images), rounds)
    base = median(times["embedding"])
    ms, noise = dict[str, tuple[float, ...]](), dict[str, tuple[float, ...]]()
    for part in PARTS:
        copies = 1 if part == "last" else COPIES
        found = [times[f"{part} {count}"] for count in rows]
        ms[part] = tuple(max(0.0, median(each) - base) / copies for each in found)
        noise[part] = tuple(spread(each) for each in found)
    return LatencyTable(
        tuple(rows), ms, noise, backbone.spec.depth, median(times["dense"]), median(times["plain"])
    )


def spread(times: Sequence[float]) -> float:
    """Return the median absolute deviation over the median."""
    middle = median(times)
    return median([abs(time - middle) for time in times]) / middle


def row_grid(num_prefix: int, num_patches: int) -> list[int]:
    """Return row counts on the steps of the latency staircase, the whole last; multiples of 16, 8 or 4."""
    whole = num_prefix + num_patches
    step = 16 if num_patches >= 128 else 8 if num_patches >= 48 else 4
    step = step * max(1, round(num_patches / step / 16))
    below = [count for count in range(step, whole, step) if count > num_prefix + 1]
    return [*below, whole]


def blank(host: nn.Module, batch: int) -> Tensor:
    """Return random images as a host takes them, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((batch, *adapt(host).image_shape), generator=generator)
