"""Keep some patch tokens and drop the others: the plain baselines every comparison needs.

Top-K by class attention or another score, random and evenly spaced, with the counts of DynamicViT. The
others are dropped, or squeezed into the kept ones (TPS, Wei et al., CVPR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from evovit.backbones.base import BackboneSpec, Block
from evovit.methods import register
from evovit.methods.base import (
    Method,
    Ranking,
    ScheduledConfig,
    schedule_at_blocks,
)
from evovit.methods.selection import check_selection, patch_score, shift_in, shift_score
from evovit.ops.score import random_score
from evovit.ops.select import Split, split_even, split_top
from evovit.ops.squeeze import Rest, Temperature, keep_split
from evovit.options import Number, Ratio, option
from evovit.tokens import QKV, Tokens

Selection = Literal["class", "column_mean", "key_norm", "probe", "shift", "random", "even"]


@register("keep")
class Keep(Method):
    """Baselines: keep the top, random or evenly spaced patch tokens at a few blocks, drop the others."""

    needs_class_token = False  # `selection` decides
    keep_all: ClassVar = {"keep_ratio": 1.0}
    example: ClassVar = {"blocks": (1, 2)}

    @dataclass(frozen=True, kw_only=True)
    class Config(ScheduledConfig):
        """Options of the baselines."""

        keep_ratio: Ratio | tuple[Ratio, ...] = option(
            0.7, "share of all patches kept: r, r^2, ... for a number r; a list has one per reducing block"
        )
        blocks: tuple[Number, ...] = option(
            (3, 6, 9), "blocks that reduce between attention and FFN (shift: after the FFN), counted from 0"
        )
        selection: Selection = option(
            "class",
            "keep the best by class attention or by a score that needs no class token; or random, even",
        )
        rest: Rest = option(
            "drop", "what becomes of tokens not kept; squeeze merges each into the most similar kept one"
        )
        temperature: Temperature = option(
            1.0, "temperature of the cosine similarities that weight squeezed tokens"
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        check_selection(config.selection, spec, ("shift", "random", "even"))
        self.merges = config.rest == "squeeze"
        self.plan(config)

    def plan(self, config: Config) -> None:
        self.schedule, self.reducing = schedule_at_blocks(config, self.spec)

    def ratios_now(self) -> tuple[float, ...]:
        return tuple(self.schedule.ratios[number] for number in self.reducing)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        found = tokens
        tokens, qkv = block.attend(found)
        keep = self.schedule.count(block.number, tokens.num_cells)
        if keep is None or keep >= tokens.num_patches:
            return block.ffn(tokens)
        if self.config.selection == "shift":
            after = block.ffn(tokens)
            return self.reduce(after, split_top(shift_score(tokens, after), keep))
        return block.ffn(self.reduce(tokens, self.split(block, found, qkv, keep)))

    def reduce(self, tokens: Tokens, split: Split) -> Tokens:
        """Return those who stay; the others are dropped, or squeezed into them."""
        return keep_split(tokens, split, self.config.rest, self.config.temperature)

    def split(self, block: Block, tokens: Tokens, qkv: QKV, keep: int) -> Split:
        """Choose who of those a block found stays."""
        if self.config.selection == "even":
            return split_even(tokens.index, keep)
        return split_top(self.score(block, tokens, qkv), keep)

    def score(self, block: Block, tokens: Tokens, qkv: QKV) -> Tensor:
        """Return what tokens are ranked by, (B, N) float32; random draws afresh in training alone."""
        if self.config.selection == "random":
            return random_score(tokens.index, None if self.training else block.number)
        return patch_score(self.config.selection, qkv, tokens, block.probe)

    def ranking(self, block: Block, tokens: Tokens) -> Ranking | None:
        if self.schedule.ratios[block.number] == 1 or self.config.selection == "even":
            return None
        if self.config.selection == "shift":
            return Ranking(shift_in(block, tokens), tokens.index)
        return Ranking(self.score(block, tokens, block.qkv(tokens)), tokens.index)
