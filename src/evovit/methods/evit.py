"""EViT: reorganise tokens between attention and FFN (Liang et al., ICLR 2022).

The class attention of the block ranks its patch tokens; the others are fused into one token, weighted with
their attention, dropped, or squeezed into the kept ones (eTPS, Wei et al., CVPR 2023). No new parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from evovit.backbones.base import BackboneSpec, Block
from evovit.errors import EvoViTError, check_count
from evovit.methods import register
from evovit.methods.base import Method, Ranking, ScheduledConfig, check_blocks, falling
from evovit.methods.selection import check_selection, patch_score, shift_in, shift_score
from evovit.ops.select import split_top
from evovit.ops.squeeze import Temperature, keep_split
from evovit.ops.update import weighted_sum
from evovit.options import Count, Number, Ratio, Share, option
from evovit.schedule import KeepSchedule, per_block
from evovit.tokens import Tokens

Selection = Literal["class", "column_mean", "key_norm", "probe", "shift"]
Rest = Literal["fuse", "drop", "squeeze"]
Counts = Literal["current", "initial"]


@register("evit")
class EViT(Method):
    """Token reorganisation: at a few blocks, keep the attentive tokens and fuse the others into one."""

    needs_class_token = False  # `selection` decides
    keep_all: ClassVar = {"keep_ratio": 1.0}
    example: ClassVar = {"blocks": (1,)}

    @dataclass(frozen=True, kw_only=True)
    class Config(ScheduledConfig):
        """Options of EViT; the defaults are the paper's."""

        keep_ratio: Ratio | tuple[Ratio, ...] = option(
            0.7, "share kept of the patch tokens present; a list has one per reducing block"
        )
        blocks: tuple[Number, ...] = option((3, 6, 9), "blocks that reduce, counted from 0")
        rest: Rest = option(
            "fuse",
            "inattentive tokens are fused into one, dropped, or each merged into the most similar kept one",
        )
        temperature: Temperature = option(
            1.0, "temperature of the cosine similarities that weight squeezed tokens"
        )
        counts: Counts = option(
            "current", "tokens kept: ceil(ratio * present); initial: int(product of ratios * all patches)"
        )
        keep: tuple[Count, ...] | None = option(
            None, "patch tokens left by each reducing block, instead of keep_ratio"
        )
        shrink: tuple[Share, Share] | None = option(
            None, "start and end of the phase in which the ratio falls from 1, as shares of the training"
        )
        selection: Selection = option(
            "class", "class: attention of the class token; the others are for hosts without one"
        )

        @classmethod
        def renamed(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
            """Read `fuse`, true or false, which `rest` was until version 0.1."""
            if not isinstance(options.get("fuse"), bool) or "rest" in options:
                return options
            rest = "fuse" if options["fuse"] else "drop"
            return {name: value for name, value in options.items() if name != "fuse"} | {"rest": rest}

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        check_selection(config.selection, spec, ("shift",))
        if config.keep_per_block is None:
            check_blocks(config.blocks, spec.depth)
        count = len(config.blocks)
        if config.keep is not None and (len(config.keep) != count or config.shrink is not None):
            raise EvoViTError(f"keep is {config.keep!r}; give one count per block in blocks, and no shrink.")
        for keep in config.keep or ():
            check_count("keep", keep, 1, math.prod(spec.grid))
        if config.shrink is not None and not config.shrink[0] < config.shrink[1]:
            raise EvoViTError(f"shrink is {config.shrink!r}; give two rising shares of the training, 0 to 1.")
        if config.keep_per_block is not None and (config.keep is not None or config.shrink is not None):
            raise EvoViTError("keep_per_block excludes keep and shrink; leave these out.")
        self.merges = config.rest == "squeeze"
        self.plan(config)

    def plan(self, config: Config) -> None:
        self.reducing = config.blocks
        count = len(self.reducing)
        self.keep_ratios = per_block(config.keep_ratio, count, "keep_ratio", "reducing blocks")
        self.ratios = self.keep_ratios  # in force now
        if config.keep_per_block is not None:
            counts = config.keep_per_block
            self.schedule = KeepSchedule.from_counts(self.spec.depth, counts, math.prod(self.spec.grid))
            self.reducing = falling(counts)
        elif config.keep is None:
            self.reduce_to(self.keep_ratios)

    def reduce_to(self, ratios: Iterable[float]) -> None:
        """Keep these shares of the tokens present, one per reducing block."""
        self.ratios, initial = tuple(ratios), self.config.counts == "initial"
        shares = accumulate(self.ratios, mul) if initial else self.ratios
        by_block = dict(zip(self.config.blocks, shares, strict=True))
        by_number = tuple(by_block.get(number, 1.0) for number in range(self.spec.depth))
        self.schedule = KeepSchedule(by_number, rounding=math.floor if initial else math.ceil)

    def count(self, number: int, tokens: Tokens) -> int | None:
        """Return how many patch tokens block `number` keeps, the fused one not counted; None for all."""
        if number not in self.reducing:
            return None
        if self.config.keep_per_block is not None:
            keep: int | None = self.schedule.count(number, tokens.num_cells)
        elif self.config.keep is not None:
            keep = self.config.keep[self.config.blocks.index(number)]
        else:
            whole = tokens.num_cells if self.config.counts == "initial" else tokens.num_patches
            keep = self.schedule.count(number, whole)
        return None if keep is None or keep >= tokens.num_patches else keep

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        found = tokens
        tokens, qkv = block.attend(found)
        keep = self.count(block.number, tokens)
        if keep is None:
            return block.ffn(tokens)
        if self.config.selection == "shift":
            after = block.ffn(tokens)
            score = shift_score(tokens, after)
            return self.reorganise(after, score / score.sum(-1, keepdim=True), keep)  # as attention weighs
        score = patch_score(self.config.selection, qkv, found, block.probe)
        return block.ffn(self.reorganise(tokens, score, keep))

    def ranking(self, block: Block, tokens: Tokens) -> Ranking | None:
        if self.count(block.number, tokens) is None:
            return None
        if self.config.selection == "shift":
            return Ranking(shift_in(block, tokens), tokens.index)
        score = patch_score(self.config.selection, block.qkv(tokens), tokens, block.probe)
        return Ranking(score, tokens.index)

    def reorganise(self, tokens: Tokens, score: Tensor, keep: int) -> Tokens:
        """Return prefix, the kept in their order, and the fused token (index -1), if any, last.

        Args:
            score: (B, N) class attention; it weighs the fused token as it stands, as in the official code.
        """
        split = split_top(score, keep)
        kept = keep_split(tokens, split, self.config.rest, self.config.temperature)
        if self.config.rest != "fuse":
            return kept
        x = torch.cat((kept.x, weighted_sum(tokens.patches, score, split.kept)), dim=1)
        return kept.change(x=x, index=nn.functional.pad(kept.index, (0, 1), value=-1))

    def set_progress(self, fraction: float) -> None:
        if self.config.shrink is not None:
            start, end = self.config.shrink
            progress = min(1.0, max(0.0, (fraction - start) / (end - start)))
            ease = (math.cos(math.pi * progress) + 1) / 2  # half a cosine
            self.reduce_to(ratio + (1 - ratio) * ease for ratio in self.keep_ratios)

    def set_reduction(self, share: float) -> None:
        if self.config.shrink is not None:
            raise EvoViTError(
                f"shrink, {self.config.shrink!r}, already lowers EViT's keep ratio over the training, as "
                "run.reduce_from_epoch and reduce_ramp_epochs would; choose one."
            )
        super().set_reduction(share)  # refuses explicit counts
        if self.config.keep_per_block is None:
            self.reduce_to(ratio if share == 1 else 1 - share * (1 - ratio) for ratio in self.keep_ratios)

    def current_config(self) -> Any:
        if self.config.keep_per_block is not None:
            return super().current_config()
        if self.ratios == self.keep_ratios:
            return self.config
        return replace(self.config, keep_ratio=self.ratios, shrink=None)
