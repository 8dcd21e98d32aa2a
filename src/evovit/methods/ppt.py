"""PPT: at a few blocks each image has tokens pruned or pooled, whichever suits it (Wu et al., 2023).

Between attention and FFN every patch token is scored by class attention times the length of its value
(arXiv 2310.01812). Where the scores of an image differ much the tokens of lowest score are dropped, else
similar tokens are merged as in ToMe. Both leave the same number, so that a batch stays one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from evovit.backbones.base import BackboneSpec, Block, Probe
from evovit.methods import register
from evovit.methods.base import Ranking, check_blocks
from evovit.methods.merging import CountedMerging
from evovit.methods.selection import check_selection, patch_score
from evovit.ops.merge import drop_where, match_tokens
from evovit.ops.score import with_bias
from evovit.ops.select import descending
from evovit.options import Number, Weight, option
from evovit.tokens import QKV, Tokens

Selection = Literal["class", "column_mean", "key_norm", "probe"]


@register("ppt")
class PPT(CountedMerging):
    """Token pruning and pooling: per image, drop the tokens of lowest score or merge the similar ones."""

    needs_class_token = False  # `selection` decides
    example: ClassVar = {"r": 4, "blocks": (1, 2), "threshold": 1e-3}

    @dataclass(frozen=True, kw_only=True)
    class Config(CountedMerging.Config):
        """Options of PPT; the defaults are those of the released code off the shelf."""

        blocks: tuple[Number, ...] = option((3, 6, 9), "blocks that reduce, counted from 0")
        r: Number | tuple[Number, ...] = option(
            50, "tokens removed by each of `blocks`; a list has one each, in their order"
        )
        threshold: Weight = option(
            7e-5,
            "images of lower score variance are pooled, others pruned; 0: none, 1: all; 6e-5: fine-tuning",
        )
        relative: bool = option(
            False,
            "threshold is for variance * N^2, N tokens present, for any image size; 2.69 is 7e-5 at 196",
        )
        selection: Selection = option(
            "class", "class: attention of the class token; the others are for hosts without one"
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        check_selection(config.selection, spec)
        check_blocks(config.blocks, spec.depth)

    @property
    def steps(self) -> int:
        return len(self.config.blocks)

    def count(self, number: int, present: int) -> int:
        """Return how many of the patch tokens present block `number` removes."""
        if number not in self.config.blocks:
            return 0
        place: int = self.config.blocks.index(number)
        return min(self.removed[place], present // 2)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        bias = self.size_bias(tokens)
        after, qkv = block.attend(tokens, bias)
        removed = self.count(block.number, after.num_patches)
        if removed == 0:
            return block.ffn(after)
        score = self.score(with_bias(qkv, bias), tokens, block.probe)
        return block.ffn(self.reduce(after, qkv.k, score, removed))

    def ranking(self, block: Block, tokens: Tokens) -> Ranking | None:
        if self.config.threshold > 0 or self.count(block.number, tokens.num_patches) == 0:
            return None  # an image that is pooled keeps tokens of any score
        qkv = with_bias(block.qkv(tokens), self.size_bias(tokens))
        return Ranking(self.score(qkv, tokens, block.probe), tokens.index)

    @torch.no_grad()
    def score(self, qkv: QKV, tokens: Tokens, probe: Probe | None = None) -> Tensor:
        """Return attention times the length of the value, (B, N) float32; the scores of an image sum to 1.

        Args:
            qkv: what the block's attention saw of the tokens, sizes among its bias.
            tokens: as the block found them.
            probe: of the block.
        """
        attention = patch_score(self.config.selection, qkv, tokens, probe)
        values = qkv.v[:, :, tokens.num_prefix :].float()
        score = attention * values.square().sum((1, 3)).sqrt()  # heads side by side
        return score / score.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)

    def reduce(self, tokens: Tokens, keys: Tensor, score: Tensor, removed: int) -> Tokens:
        """Prune or pool each image.

        Those that stay after pruning are in falling order of their scores, as in the released code: a later
        pooling takes turns in this order. Without proportional attention sizes are forgotten, as there.

        Args:
            keys: (B, H, P + N, D), of this block.
            score: (B, N).
        """
        metric = keys[:, :, tokens.num_prefix :].mean(1)
        match = match_tokens(metric, removed, first=tokens.num_prefix % 2)
        reduced = self.merge_by(tokens, drop_where(match, ~self.pools(score), descending(score)))
        return reduced if self.config.proportional_attention else reduced.change(size=None)

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
