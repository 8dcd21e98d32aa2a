"""Keep some patch tokens and drop the others: the plain baselines every comparison needs.

Top-K by class attention, random and evenly spaced, with the counts of EViT or DynamicViT. Nothing is fused.
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
    require_class_token,
    schedule_at_blocks,
)
from evovit.ops.score import attention_column_mean, class_attention, random_score
from evovit.ops.select import even_rows, keep_rows, split_top
from evovit.options import Number, Ratio, option
from evovit.tokens import QKV, Tokens

Selection = Literal["class", "column_mean", "random", "even"]


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
            0.7, "r: r, r^2, ... of all patches; a list has one per reducing block"
        )
        blocks: tuple[Number, ...] = option(
            (3, 6, 9), "that reduce, between attention and FFN; counted from 0"
        )
        selection: Selection = option("class", "top attention from the class token or from all; or plain")

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        if config.selection == "class":
            require_class_token(spec, "selection='class'", "'column_mean', 'random' or 'even'")
        self.plan(config)

    def plan(self, config: Config) -> None:
        self.schedule, self.reducing = schedule_at_blocks(config, self.spec)

    def ratios_now(self) -> tuple[float, ...]:
        return tuple(self.schedule.ratios[number] for number in self.reducing)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        tokens, qkv = block.attend(tokens)
        keep = self.schedule.count(block.number, tokens.num_cells)
        if keep is not None and keep < tokens.num_patches:
            tokens = keep_rows(tokens, self.rows(tokens, qkv, keep, block.number))
        return block.ffn(tokens)

    def rows(self, tokens: Tokens, qkv: QKV, keep: int, number: int) -> Tensor:
        """Return who stays, (B, keep) int64 ascending; random draws afresh in training alone."""
        if self.config.selection == "even":
            return even_rows(tokens.index, keep)
        return split_top(self.score(tokens, qkv, number), keep).rows

    def score(self, tokens: Tokens, qkv: QKV, number: int) -> Tensor:
        """Return what tokens are ranked by, (B, N) float32; evenly spaced ones are not."""
        if self.config.selection == "random":
            return random_score(tokens.index, None if self.training else number)
        measure = class_attention if self.config.selection == "class" else attention_column_mean
        return measure(qkv, tokens.num_prefix)

    def ranking(self, block: Block, tokens: Tokens) -> Ranking | None:
        if self.schedule.ratios[block.number] == 1 or self.config.selection == "even":
            return None
        return Ranking(self.score(tokens, block.qkv(tokens), block.number), tokens.index)
