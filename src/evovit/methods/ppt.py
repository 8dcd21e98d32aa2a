"""PPT: at a few blocks each image has tokens pruned or pooled, whichever suits it (Wu et al., 2023).

Between attention and FFN every patch token is scored by class attention times the length of its value
(arXiv 2310.01812). Where the scores of an image differ much the tokens of lowest score are dropped, else
similar tokens are merged as in ToMe. Either leaves as many, so that a batch stays one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from evovit.backbones.base import BackboneSpec, Block
from evovit.methods import register
from evovit.methods.base import check_blocks, require_class_token
from evovit.methods.merging import CountedMerging
from evovit.ops.merge import drop_where, match_tokens
from evovit.ops.score import attention_column_mean, class_attention, with_bias
from evovit.ops.select import descending
from evovit.options import Number, Weight, option
from evovit.tokens import QKV, Tokens

Selection = Literal["class", "column_mean"]
SCORES = {"class": class_attention, "column_mean": attention_column_mean}


@register("ppt")
class PPT(CountedMerging):
    """Token pruning and pooling: per image, drop the tokens of lowest score or merge the similar ones."""

    needs_class_token = False  # `selection` decides
    example: ClassVar = {"r": 4, "blocks": (1, 2), "threshold": 1e-3}

    @dataclass(frozen=True, kw_only=True)
    class Config(CountedMerging.Config):
        """Options of PPT; the defaults are those of the released code off the shelf."""

        blocks: tuple[Number, ...] = option((3, 6, 9), "that reduce, counted from 0")
        r: Number | tuple[Number, ...] = option(
            50, "tokens removed by each of `blocks`; a list has one each, in their order"
        )
        threshold: Weight = option(
            7e-5, "an image whose scores vary less is pooled; 0: none is, 1: all; 6e-5 suits fine-tuning"
        )
        relative: bool = option(
            False, "threshold is of variance * N^2, N tokens present, for any image size; 2.69 is 7e-5 at 196"
        )
        selection: Selection = option("class", "column_mean is for hosts without class token")

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        if config.selection == "class":
            require_class_token(spec, "selection='class'", "'column_mean'")
        check_blocks(config.blocks, spec.depth)

    def count(self, number: int, present: int) -> int:
        """Return how many of the patch tokens present block `number` removes."""
        if number not in self.config.blocks:
            return 0
        place: int = self.config.blocks.index(number)
        return min(self.removed[place], present // 2)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        bias = self.size_bias(tokens)
        tokens, qkv = block.attend(tokens, bias)
        removed = self.count(block.number, tokens.num_patches)
        return block.ffn(self.reduce(tokens, with_bias(qkv, bias), removed) if removed > 0 else tokens)

    def reduce(self, tokens: Tokens, qkv: QKV, removed: int) -> Tokens:
        """Prune or pool each image.

        Those that stay after pruning are in falling order of their scores, as in the released code: a later
        pooling takes turns in this order. Without proportional attention sizes are forgotten, as there.
        """
        score = self.score(qkv, tokens.num_prefix)
        metric = qkv.k[:, :, tokens.num_prefix :].mean(1)
        match = match_tokens(metric, removed, first=tokens.num_prefix % 2)
        reduced = self.merge_by(tokens, drop_where(match, ~self.pools(score), descending(score)))
        return reduced if self.config.proportional_attention else reduced.change(size=None)

    @torch.no_grad()
    def score(self, qkv: QKV, num_prefix: int) -> Tensor:
        """Return attention times the length of the value, (B, N) float32; the scores of an image sum to 1."""
        attention = SCORES[self.config.selection](qkv, num_prefix)
        values = qkv.v[:, :, num_prefix:].float()
        score = attention * values.square().sum((1, 3)).sqrt()  # heads side by side
        return score / score.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)

    def pools(self, score: Tensor) -> Tensor:
        """Tell which images are pooled, (B, 1) bool: those whose scores vary less than the threshold."""
        num = score.shape[1]
        spread = (score - score.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / max(1, num - 1)
        limit: float = self.config.threshold / (num**2 if self.config.relative else 1)
        return spread < limit

    def finish(self, tokens: Tokens) -> Tokens:
        """Give every grid cell its token where all images were pooled; else leave the tokens as they are."""
        always_pools = self.config.threshold >= 1 and not self.config.relative
        return super().finish(tokens) if always_pools else tokens
