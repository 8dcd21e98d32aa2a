"""Evo-ViT: slow-fast token evolution (Xu et al., AAAI 2022), on flat hosts.

Global class attention (eq. 3, 4) picks the informative tokens for the full update; the placeholders wait, or
take the residuals of a representative token (eq. 5-7). The rows of tables 3 and 4 are options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

from annotated_types import Ge, Le
from torch import Tensor

from evovit.backbones.base import BackboneSpec, Block, Stage, last_qkv
from evovit.errors import EvoViTError, check_choice, check_count
from evovit.methods import register
from evovit.methods.base import ClassTokenHead, Method, Ranking, ScheduledConfig, require_class_token
from evovit.methods.selection import check_selection, patch_score, shift_score
from evovit.ops.score import class_attention, random_score
from evovit.ops.slow_fast import Waiting, bring_back, num_awake, score_awake, set_aside
from evovit.options import Count, Number, Ratio, Share, option
from evovit.schedule import KeepSchedule, per_block
from evovit.tokens import Tokens

Mode = Literal["stage", "layer"]
Selection = Literal["global", "class", "last_class", "column_mean", "key_norm", "probe", "shift", "random"]
UNRATED = ("last_class", "random")  # selections that no block contributes to


@register("evo_vit")
class EvoViT(Method):
    """Slow-fast token evolution: informative tokens get the full update, others a fast one; all stay."""

    keeps_grid = True
    needs_class_token = False  # `selection` decides
    keep_all: ClassVar = {"keep_ratio": 1.0}
    example: ClassVar = {"start_block": 1, "stage_length": 2}

    @dataclass(frozen=True, kw_only=True)
    class Config(ScheduledConfig):
        """Options of Evo-ViT; the defaults are the paper's."""

        keep_ratio: Ratio | tuple[Ratio, ...] = option(
            0.5, "share of patch tokens kept; a number applies from start_block on, a list has one per block"
        )
        start_block: Number = option(4, "first reducing block, counted from 0")
        stage_length: Count = option(
            4, "in stage mode: blocks that share one selection, by the ratio of the first of them"
        )
        mode: Mode = option("stage", "stage selects once for stage_length blocks, layer before every block")
        trade_off: Share | tuple[Share, ...] = option(
            0.5, "alpha of eq. 4, the weight of the OLD score; a list has one per block"
        )
        fast_update: bool = option(
            True, "update placeholders by a representative token (eq. 5 to 7); false: they stay unchanged"
        )
        multiple_of: Annotated[int, Ge(1), Le(256)] = option(
            1, "round the rows of a reduced block to a multiple (at least half of the kept); 8: tensor cores"
        )
        selection: Selection = option(
            "global",
            "what ranks the tokens; global: class attention with history (eq. 4), class: without (eq. 3)",
        )
        preserve: bool = option(
            True, "keep the placeholders; false: they are dropped (table 3, naive selection)"
        )
        rejoin_last: bool = option(
            True, "placeholders rejoin for the head; false: it sees only the others (`prunecls` as released)"
        )
        assisted_head: bool = option(False, "a second head on the class token for the training loss (eq. 8)")
        switch_at: Share | None = option(
            None, "share of the training in layer mode, then stage mode (paper: 2/3)"
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        check_selection(config.selection, spec, ("shift", "random"))
        if config.fast_update and not config.preserve:
            raise EvoViTError("fast_update updates the placeholders that preserve=False drops; turn one off.")
        if config.assisted_head:
            require_class_token(spec, "assisted_head=True", "assisted_head=False")
        check_count("stage_length", config.stage_length, 1, spec.depth)
        self.keeps_grid = config.preserve and config.rejoin_last
        rows = math.prod(spec.grid) + spec.num_prefix
        check_count("multiple_of", config.multiple_of, 1, rows, "rows of an unreduced block")
        trade_off = per_block(config.trade_off, spec.depth, "trade_off")
        self.old_weights = trade_off if config.selection == "global" else (0.0,) * spec.depth
        self.class_head = ClassTokenHead(spec) if config.assisted_head else None
        self.mode = config.mode
        self.plan(config)

    def plan(self, config: Config) -> None:
        depth, multiple = self.spec.depth, config.multiple_of
        if config.keep_per_block is not None:
            whole = math.prod(self.spec.grid)
            schedule = KeepSchedule.from_counts(depth, config.keep_per_block, whole)
            self.schedule = replace(schedule, multiple_of=multiple)
        else:
            start = config.start_block
            self.schedule = KeepSchedule.from_block(depth, config.keep_ratio, start, multiple)

    @property
    def mode(self) -> Mode:
        """When tokens are selected; may be set at any time."""
        return self._mode

    @mode.setter
    def mode(self, value: Mode) -> None:
        check_choice("mode", value, get_args(Mode))
        self._mode = value

    @property
    def length(self) -> int:
        """Blocks that one selection holds for."""
        return 1 if self.mode == "layer" else self.config.stage_length

    def begin(self, tokens: Tokens, stages: Sequence[Stage]) -> Tokens:
        twice = self.config.selection == "last_class"  # table 4, "via twice inference"
        score = class_attention(last_qkv(stages, tokens), tokens.num_prefix) if twice else None
        return tokens.change(carry=Waiting(score))

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        if self.schedule.starts_stage(block.number, self.length):
            tokens = self.split(self.join(tokens), block.number)
        attended, qkv = block.attend(tokens)
        if not self.is_read(block.number):
            return block.ffn(attended)
        awake = num_awake(attended.carry)
        if self.config.selection == "shift":
            after = block.ffn(attended)
            return self.rate(after, shift_score(attended, after, awake), block.number)
        new = patch_score(self.config.selection, qkv, tokens, block.probe, awake)
        return block.ffn(self.rate(attended, new, block.number))

    def split(self, tokens: Tokens, number: int) -> Tokens:
        """Let the informative tokens and the representative one go on; the placeholders wait."""
        keep = self.schedule.count(number, tokens.num_cells, tokens.num_prefix + self.config.fast_update)
        if keep is None or keep >= tokens.num_patches:
            return tokens
        return set_aside(tokens, self.score(tokens, number), keep, self.config.fast_update)

    def score(self, tokens: Tokens, number: int) -> Tensor:
        """Return what the informative tokens of block `number` are selected by, (B, N) float32."""
        if self.config.selection == "random":
            return random_score(tokens.index, None if self.training else number)
        return tokens.carry.score  # type: ignore[no-any-return]

    def ranking(self, block: Block, tokens: Tokens) -> Ranking | None:
        number = block.number
        if self.schedule.ratios[number] == 1 or not self.schedule.starts_stage(number, self.length):
            return None
        tokens = self.join(tokens)
        return Ranking(self.score(tokens, number), tokens.index)

    def is_read(self, number: int) -> bool:
        """Tell whether a later selection reads the score of block `number`."""
        rated = self.config.selection not in UNRATED
        return rated and self.schedule.reads_score(number, self.length, self.old_weights)

    def rate(self, tokens: Tokens, new: Tensor, number: int) -> Tokens:
        """Evolve the score of the tokens that took part (eq. 4); `new` (B, K) float32 is this block's."""
        new = new if self.config.fast_update else new.detach()  # it weighs tokens (eq. 5), or only ranks them
        return score_awake(tokens, new, self.old_weights[number])

    def join(self, tokens: Tokens) -> Tokens:
        """End a stage: placeholders take the representative token's change (eq. 7); all in raster order."""
        state = tokens.carry
        if state.split is None or not self.config.preserve:
            return tokens.change(carry=Waiting(state.score if state.split is None else state.awake))
        return bring_back(tokens)

    def finish(self, tokens: Tokens) -> Tokens:
        if self.config.rejoin_last or tokens.carry.split is None:
            return self.join(tokens)
        count = tokens.carry.awake.shape[1]
        return tokens.change(x=tokens.x[:, : tokens.num_prefix + count], index=tokens.index[:, :count])

    def current_config(self) -> Any:
        return replace(super().current_config(), mode=self.mode)

    def set_progress(self, fraction: float) -> None:
        if self.config.switch_at is not None:
            self.mode = "layer" if fraction < self.config.switch_at else "stage"
