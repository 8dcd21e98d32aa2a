"""Evo-LeViT: slow-fast token evolution on hosts of several stages (Xu et al., AAAI 2022, LeViT as released).

A selection holds to the end of the host's own stage; before the host down-samples, all tokens are back in
raster order. The trade-off of the global class attention (eq. 4) is learnt, one scalar per attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from evovit.backbones.base import BackboneSpec, Block, Probe, Stage
from evovit.backbones.timm_levit_blocks import LevitEntry, even_cells
from evovit.errors import EvoViTError, check_choice
from evovit.methods import register
from evovit.methods.base import Method, Ranking
from evovit.methods.selection import check_selection, patch_score, shift_score
from evovit.ops.score import running_score
from evovit.ops.slow_fast import Waiting, bring_back, num_awake, score_awake, set_aside
from evovit.options import Number, Ratio, Share, option
from evovit.schedule import KeepSchedule
from evovit.tokens import QKV, Tokens

Mode = Literal["stage", "layer"]
Selection = Literal["global", "class", "column_mean", "key_norm", "probe", "shift"]


@register("evo_levit")
class EvoLeViT(Method):
    """Slow-fast token evolution within each stage of the host; nothing is dropped."""

    keeps_grid = True
    crosses_stages = True
    needs_class_token = False  # `selection` decides
    keep_all: ClassVar = {"keep_ratio": 1.0}
    example: ClassVar = {"start_block": 1}

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Options of Evo-LeViT; the defaults are the released ones."""

        keep_ratio: Ratio | tuple[Ratio, ...] = option(
            0.5, "share of a stage's patch tokens kept; a list has one per block"
        )
        start_block: Number = option(2, "first reducing block, counted from 0 through all stages")
        mode: Mode = option(
            "stage", "select once per stage, by its first ratio; layer: select before every block"
        )
        learn_trade_off: bool = option(True, "learn alpha of eq. 4, one scalar per attention")
        trade_off: Share = option(0.5, "alpha of eq. 4, the weight of the OLD score, where it is not learnt")
        fast_update: bool = option(
            True, "update placeholders by a representative token (eq. 5 to 7); false: they stay unchanged"
        )
        selection: Selection = option(
            "global",
            "class attention with history; class: without; the others are for hosts without a class token",
        )
        switch_at: Share | None = option(
            None, "share of the training in layer mode with a fixed `trade_off`, then stage mode; paper: 2/3"
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        check_selection(config.selection, spec, ("shift",))
        self.plan(config)
        self.firsts = (0, *accumulate(spec.depths))[:-1]  # the first block of each stage
        self.learn_tradeoff = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in range(spec.depth))
        self.enter_tradeoff = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in self.firsts[1:])
        self.mode, self.learns = config.mode, config.learn_trade_off

    def plan(self, config: Config) -> None:
        self.schedule = KeepSchedule.from_block(self.spec.depth, config.keep_ratio, config.start_block)

    @property
    def mode(self) -> Mode:
        """When tokens are selected; may be set at any time."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        check_choice("mode", value, get_args(Mode))
        self._mode = value

    def begin(self, tokens: Tokens, stages: Sequence[Stage]) -> Tokens:
        if not all(stage.enter is None or isinstance(stage.enter, LevitEntry) for stage in stages):
            raise EvoViTError("Evo-LeViT needs a host that down-samples by attention, as LeViT does.")
        if self.training:  # a trade-off on which no selection depends gets a gradient too, zero
            lists = (self.learn_tradeoff, self.enter_tradeoff)  # replicas have no `parameters()`
            every = [own[i] for own in lists for i in range(len(own))]
            idle = torch.stack([p.sum() for p in every]).sum() * 0.0
            tokens = tokens.with_x(tokens.x + idle.to(tokens.x.dtype))
        return tokens.change(carry=Waiting())

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        number = block.number
        if self.selects(number):
            tokens = bring_back(tokens)
            keep = self.schedule.count(number, tokens.num_cells)
            if keep is not None:
                tokens = set_aside(tokens, tokens.carry.score, keep, self.config.fast_update)
        attended, qkv = block.attend(tokens)
        if not self.is_read(number):
            return block.ffn(attended)
        trade_off = self.old_weight(self.learn_tradeoff[number])
        if self.config.selection == "shift":
            after = block.ffn(attended)
            new = shift_score(attended, after, num_awake(attended.carry))
            return score_awake(after, new if self.config.fast_update else new.detach(), trade_off)
        return block.ffn(score_awake(attended, self.measure(qkv, tokens, block.probe), trade_off))

    def enter_stage(self, stage: Stage, tokens: Tokens) -> Tokens:
        if not isinstance(stage.enter, LevitEntry):
            return tokens
        tokens, number = bring_back(tokens), stage.blocks[0].number
        grid, old = tokens.grid, tokens.carry.score
        tokens, qkv = stage.enter.attend(tokens)
        if not self.is_read(number - 1):
            return tokens.change(carry=Waiting())
        stride = stage.enter.stride
        shift = self.config.selection == "shift"  # of the last FFN: between the stages there is none
        new = even_cells(old if shift else self.measure(qkv, tokens), grid, stride)
        trade_off = self.old_weight(self.enter_tradeoff[self.firsts.index(number) - 1])
        score = running_score(even_cells(old, grid, stride), new, trade_off)
        total = old.sum(-1, keepdim=True)  # stays what it was, so that old and new scores compare
        return tokens.change(carry=Waiting(score * (total / score.sum(-1, keepdim=True))))

    def finish(self, tokens: Tokens) -> Tokens:
        return bring_back(tokens)

    def selects(self, number: int) -> bool:
        """Tell whether tokens are selected anew before block `number`."""
        first = max(start for start in self.firsts if start <= number)
        return self.mode == "layer" or number == max(first, self.config.start_block)

    def ranking(self, block: Block, tokens: Tokens) -> Ranking | None:
        if not self.selects(block.number) or self.schedule.ratios[block.number] == 1:
            return None
        tokens = bring_back(tokens)
        return Ranking(tokens.carry.score, tokens.index)

    def is_read(self, number: int) -> bool:
        """Tell whether a later selection reads the score of block `number`."""
        later = range(number + 1, self.spec.depth)
        return any(self.selects(n) and self.schedule.ratios[n] < 1 for n in later)

    def measure(self, qkv: QKV, tokens: Tokens, probe: Probe | None = None) -> Tensor:
        """Return the score of each awake token, (B, K) float32; a gradient flows where it weighs tokens."""
        score = patch_score(self.config.selection, qkv, tokens, probe, num_awake(tokens.carry))
        return score if self.config.fast_update else score.detach()

    def old_weight(self, learnt: Tensor) -> Tensor | float:
        """Return alpha of eq. 4; sigmoid(`learnt`) is the weight of the new score, as released."""
        if self.config.selection != "global":
            return 0.0
        return (-learnt.float()).sigmoid() if self.learns else self.config.trade_off

    def current_config(self) -> Any:
        return replace(super().current_config(), mode=self.mode, learn_trade_off=self.learns)

    def set_progress(self, fraction: float) -> None:
        if self.config.switch_at is not None:
            late = fraction >= self.config.switch_at
            self.mode = "stage" if late else "layer"
            self.learns = self.config.learn_trade_off and late
