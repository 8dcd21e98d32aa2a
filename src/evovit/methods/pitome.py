"""PiToMe: merge tokens that are like many others, protect those that are not (Tran et al., NeurIPS 2024).

Between attention and FFN a token's energy measures how many others its key is like. In some blocks only the
2r tokens of highest energy may merge, in the others all, taken in turns by their energy (arXiv 2405.16148).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le
from torch import Tensor

from evovit.backbones.base import BackboneSpec, Block
from evovit.methods import register
from evovit.methods.merging import Merging
from evovit.ops.energy import energy, gaussian_energy, match_in_turns, match_mergeable
from evovit.ops.merge import Match, similarities, unit_rows
from evovit.ops.select import descending
from evovit.options import MOST, Number, Positive, Ratio, Share, Weight, option
from evovit.schedule import per_block, removed_per_block
from evovit.tokens import Tokens

Bipartite = Literal["first_half", "second_half", "always", "never"]
Kernel = Literal["elu", "gaussian"]
Rounding = Literal["down", "up"]
ROUND = {"down": math.floor, "up": math.ceil}


@register("pitome")
class PiToMe(Merging):
    """Merging that protects informative tokens: redundant patch tokens are merged, isolated ones are kept."""

    keep_all: ClassVar = {"keep_ratio": 1.0}
    example: ClassVar = {"keep_ratio": 0.8}

    @dataclass(frozen=True, kw_only=True)
    class Config(Merging.Config):
        """Options of PiToMe."""

        proportional_attention: bool = option(
            True, "attention counts a token once per patch in it; false as in OpenToMe, where no block does"
        )
        keep_ratio: Ratio | tuple[Ratio, ...] = option(
            0.925, "share kept of the tokens that enter a block, prefix included; a list has one per block"
        )
        rounding: Rounding = option("down", "how the number of tokens that keep_ratio leaves is rounded")
        r: Number | tuple[Number, ...] | None = option(
            None, "tokens REMOVED by each block, instead of keep_ratio; a list may end early, the rest is 0"
        )
        inflection: Annotated[float, Ge(-1), Le(1)] = option(
            0.0, "for a number r: -1 removes 2r in the first block, falling to 0 in the last; 1 the reverse"
        )
        total: Number | None = option(
            None, "tokens that all blocks remove; met by changing r of the last, or the first where r falls"
        )
        margin: tuple[Share, Weight] = option(
            (0.75, 0.75),
            "(m, fall): margin m - fall * i / L in block i of L; the authors' own code has 0.9, 0.9",
        )
        alpha: Positive = option(1.0, "most by which a similarity below the margin lowers the energy")
        bipartite: Bipartite = option(
            "first_half",
            "blocks in which all tokens may merge, not only those of high energy; second_half suits MAE",
        )
        kernel: Kernel = option(
            "elu", "kernel of the energy; gaussian, with sources in the upper half of the 2r, is for text"
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        self.plan(config)

    def plan(self, config: Config) -> None:
        self.ratios = per_block(config.keep_ratio, self.spec.depth, "keep_ratio")
        self.removed: tuple[int, ...] | None = None  # by the option r; else the ratios count
        if config.r is not None:
            self.removed = removed_per_block(config.r, config.inflection, self.spec.depth, MOST, config.total)

    def config_at(self, budget: float) -> Any:
        return replace(self.config, keep_ratio=budget, r=None, inflection=0.0, total=None)

    def matches_all(self, number: int) -> bool:
        """Tell whether all tokens may merge in block `number`, not only those of high energy."""
        early = number < math.ceil(self.spec.depth / 2)
        return self.config.bipartite in ("always", "first_half" if early else "second_half")

    def count(self, number: int, tokens: Tokens) -> int:
        """Return how many patch tokens block `number` removes, as many as can be at most."""
        present, whole = tokens.num_patches, tokens.x.shape[1]
        if self.removed is None:
            removed = whole - ROUND[self.config.rounding](whole * self.ratios[number])
        else:
            removed = self.removed[number]
        most = (present + 1) // 2 if self.matches_all(number) and present > 1 else present // 2
        return min(removed, most)

    def margin_of(self, number: int) -> float:
        """Return the similarity from which on another token counts as like, in block `number`."""
        start, fall = self.config.margin
        return float(start - fall * number / self.spec.depth)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        tokens, qkv = block.attend(tokens, self.size_bias(tokens))
        removed = self.count(block.number, tokens)
        if removed > 0:
            tokens = self.merge_by(
                tokens, self.match(qkv.k[:, :, tokens.num_prefix :], removed, block.number)
            )
        return block.ffn(tokens)

    def match(self, keys: Tensor, removed: int, number: int) -> Match:
        """Return who merges in block `number`; in the order in which the released code leaves them.

        Args:
            keys: (B, H, N, D) of the patch tokens.
        """
        unit = unit_rows(keys.mean(1), eps=1e-12)
        similarity = similarities(unit, unit)  # (B, N, N)
        margin, kernel = self.margin_of(number), self.config.kernel
        if kernel == "elu":
            order = descending(energy(similarity, margin, self.config.alpha))
        else:
            order = descending(gaussian_energy(similarity, margin))
        if self.matches_all(number):
            return match_in_turns(similarity, order, removed)
        return match_mergeable(similarity, order, removed, halves=kernel == "gaussian")

    def current_config(self) -> Any:
        if self.reduction == 1:
            return self.config
        if self.removed is None:
            return replace(self.config, keep_ratio=self.ratios)
        return replace(self.config, r=self.removed, inflection=0.0, total=None)

    def set_reduction(self, share: float) -> None:
        self.plan(self.config)
        self.reduction = share
        if self.removed is not None:
            self.removed = tuple(int(share * removed) for removed in self.removed)
        elif share < 1:
            self.ratios = tuple(1 - share * (1 - ratio) for ratio in self.ratios)
