"""No reduction: the host run through its views, block by block."""

from __future__ import annotations

from dataclasses import dataclass

from evovit.backbones.base import Block
from evovit.methods import register
from evovit.methods.base import Method
from evovit.tokens import Tokens


@register("dense")
class Dense(Method):
    """No reduction: every block runs on every token."""

    keeps_grid = True
    needs_class_token = False
    crosses_stages = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Dense has no options."""

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        return block(tokens)
