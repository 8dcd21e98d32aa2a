"""A view of a block that passes everything on: what changes one part of a block begins with it."""

from __future__ import annotations

from torch import Tensor

from evovit.backbones.base import Block, Mix
from evovit.tokens import QKV, Tokens


class WrappedBlock(Block):
    """The same as the block in it."""

    def __init__(self, block: Block) -> None:
        self.block, self.number, self.probe = block, block.number, block.probe

    def qkv(self, tokens: Tokens) -> QKV:
        return self.block.qkv(tokens)

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
        return self.block.leading_qkv(tokens, count)

    def attend(
        self, tokens: Tokens, bias: Tensor | None = None, asking: int | None = None
    ) -> tuple[Tokens, QKV]:
        return self.block.attend(tokens, bias, asking)

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        return self.block.attention(tokens, qkv, bias, mix)

    def ffn(self, tokens: Tokens) -> Tokens:
        return self.block.ffn(tokens)
