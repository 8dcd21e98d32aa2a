"""ToMe: merge similar tokens in every block, with or without training (Bolya et al., ICLR 2023).

Between attention and FFN, bipartite soft matching on the block's keys picks the pairs that merge into their
size-weighted mean (section 3); attention counts a merged token as often as the patches in it (eq. 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from evovit.backbones.base import BackboneSpec, Block
from evovit.errors import EvoViTError
from evovit.methods import register
from evovit.methods.base import ScheduledConfig, falling
from evovit.methods.merging import CountedMerging
from evovit.ops.merge import match_tokens
from evovit.options import option
from evovit.schedule import KeepSchedule
from evovit.tokens import Tokens


@register("tome")
class ToMe(CountedMerging):
    """Token merging: the most similar patch tokens of each block become one."""

    example: ClassVar = {"r": 3}
    bounded = True

    @dataclass(frozen=True, kw_only=True)
    class Config(CountedMerging.Config, ScheduledConfig):
        """Options of ToMe."""

        proportional_attention: bool = option(
            True,
            "attention counts a token once per patch in it; false suits MAE models not trained with ToMe",
        )

    def plan(self, config: Config) -> None:
        if config.keep_per_block is None:
            super().plan(config)
        else:
            self.removed = merged_per_block(config.keep_per_block, self.spec)

    def current_config(self) -> Any:
        config = super().current_config()
        return config if self.reduction == 1 else replace(config, keep_per_block=None)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        tokens, qkv = block.attend(tokens, self.size_bias(tokens))
        removed = min(self.removed[block.number], tokens.num_patches // 2)
        return block.ffn(self.merge(tokens, qkv.k, removed) if removed > 0 else tokens)

    def merge(self, tokens: Tokens, keys: Tensor, removed: int) -> Tokens:
        """Merge `removed` patch tokens into others.

        Rows alternate between the two sets from the first prefix token on, as in the paper, where the class
        token is the first row; prefix tokens themselves neither propose nor receive.

        Args:
            keys: (B, H, P + N, D), of this block.
        """
        metric = keys[:, :, tokens.num_prefix :].mean(1)
        return self.merge_by(tokens, match_tokens(metric, removed, first=tokens.num_prefix % 2))


def merged_per_block(counts: Sequence[int], spec: BackboneSpec) -> tuple[int, ...]:
    """Return how many tokens each block merges into others, from what each keeps."""
    KeepSchedule.from_counts(spec.depth, counts, math.prod(spec.grid))  # refuses what is no schedule
    falling(counts)
    removed = tuple(before - after for before, after in pairwise((counts[0], *counts)))
    for number, each in enumerate(removed):
        if each > counts[number - 1] // 2 and number:
            raise EvoViTError(
                f"keep_per_block falls from {counts[number - 1]} to {counts[number]} at block {number}; "
                "a block merges at most half of its tokens: spread it over more blocks."
            )
    return removed
