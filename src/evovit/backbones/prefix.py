"""The last block where the head reads prefix tokens alone: what nobody reads after it is not computed.

The prefix attends to all tokens, so keys and values are those of all; queries, mixed values, projection and
FFN are those of the prefix rows. The logits are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evovit.backbones.base import Block, Mix, Stage
from evovit.ops.select import keep_leading, leading_queries
from evovit.tokens import QKV, Tokens


def with_prefix_block(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages with a `PrefixBlock` in place of the last block."""
    *before, last = stages
    return [*before, Stage(last.enter, [*last.blocks[:-1], PrefixBlock(last.blocks[-1])])]


class PrefixBlock(Block):
    """A view of a block after whose attention the prefix tokens alone are left (`num_patches` is 0)."""

    def __init__(self, block: Block) -> None:
        self.block, self.number, self.probe = block, block.number, block.probe

    def qkv(self, tokens: Tokens) -> QKV:
        return self.block.qkv(tokens)  # of all rows: a method may choose by them who takes part

    def attention_input(self, tokens: Tokens) -> Tensor:
        return self.block.attention_input(tokens)

    def scoring_qkv(self, tokens: Tokens) -> QKV:
        return self.block.scoring_qkv(tokens)

    def qkv_of_rows(self, active: Tokens, scored: QKV, rows: Tensor) -> QKV:
        return self.block.qkv_of_rows(active, scored, rows)

    def queries_keys(self, tokens: Tokens) -> QKV:
        return self.block.queries_keys(tokens)

    def values(self, tokens: Tokens) -> QKV:
        return self.block.values(tokens)

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
