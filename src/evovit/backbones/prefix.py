"""The last block where the head reads prefix tokens only: what is not read after it is not computed.

The prefix attends to all tokens, so keys and values are those of all; queries, mixed values, projection and
FFN are those of the prefix rows. The logits are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evovit.backbones.base import Mix, Stage
from evovit.backbones.wrapped import WrappedBlock
from evovit.ops.select import keep_leading, leading_queries
from evovit.tokens import QKV, Tokens


def with_prefix_block(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages with a `PrefixBlock` in place of the last block."""
    *before, last = stages
    return [*before, Stage(last.enter, [*last.blocks[:-1], PrefixBlock(last.blocks[-1])])]


class PrefixBlock(WrappedBlock):
    """A view of a block after whose attention the prefix tokens alone are left (`num_patches` is 0).

    `qkv` and `scoring_qkv` stay of all rows: a method may choose by them who takes part.
    """

    def leading_qkv(self, tokens: Tokens, count: int) -> QKV:
        return self.block.leading_qkv(tokens, tokens.num_prefix)

    def attend(
        self, tokens: Tokens, bias: Tensor | None = None, asking: int | None = None
    ) -> tuple[Tokens, QKV]:
        return self.block.attend(tokens, bias, tokens.num_prefix)

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        if mix is not None:  # it may ask for as many queries as keys
            return keep_leading(self.block.attention(tokens, qkv, bias, mix), tokens.num_prefix)
        count = tokens.num_prefix
        bias = None if bias is None else bias[..., :count, :]
        return self.block.attention(keep_leading(tokens, count), leading_queries(qkv, count), bias)

    def ffn(self, tokens: Tokens) -> Tokens:
        return self.block.ffn(keep_leading(tokens, tokens.num_prefix))
