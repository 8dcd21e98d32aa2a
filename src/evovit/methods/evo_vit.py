"""Evo-ViT: slow-fast token evolution (Xu et al., AAAI 2022), on flat hosts.

Global class attention (eq. 3 and 4) picks the informative tokens; they get the full update. The others, the
placeholders, wait, or are updated by the residuals of one representative token (eq. 5 to 7). Nothing is dropped.
Rungs of table 3 and rows of table 4 are options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from evovit.backbones.base import BackboneSpec, Block, Stage
from evovit.errors import EvoViTError
from evovit.methods import register
from evovit.methods.base import Method
from evovit.ops.score import attention_column_mean, class_attention, evolve, scattered_score
from evovit.ops.select import Split, put, split_top, take, with_prefix
from evovit.ops.update import representative
from evovit.schedule import KeepSchedule, per_block
from evovit.tokens import QKV, Tokens

Mode = Literal["stage", "layer"]
Selection = Literal["global", "class", "last_class", "column_mean", "random"]


class Waiting(NamedTuple):
    """Evo-ViT's state beside the tokens."""

    score: Tensor | None = None  # (B, N) float32, score of every patch token present, before this stage
    split: Split | None = None  # who is awake while a stage runs; None: all
    awake: Tensor | None = None  # (B, K) float32, score of the awake
    whole: Tensor | None = None  # (B, P + N, C), all tokens as the stage found them
    position: Tensor | None = None  # (B, N), where those stand on the grid
    summary: Tensor | None = None  # (B, 1, C), the representative token as the stage found it


@register("evo_vit")
class EvoViT(Method):
    """Slow-fast token evolution; `mode` may be set between forwards."""

    keeps_grid = True
    needs_class_token = False  # `selection` decides

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Options of Evo-ViT; the defaults are the paper's."""

        keep_ratio: float | tuple[float, ...] = 0.5  # of the patch tokens; a number holds from start_block on
        start_block: int = 4  # first reducing block, counted from 0
        stage_length: int = 4  # blocks per selection in stage mode; the ratio of a stage's first block holds
        mode: Mode = "stage"
        trade_off: float | tuple[float, ...] = 0.5  # alpha of eq. 4, weight of the OLD score, per block
        fast_update: bool = (
            True  # representative token (paper); False: placeholders wait unchanged (released code)
        )
        selection: Selection = "global"  # "class" is eq. 3 without history
        preserve: bool = True  # False: placeholders are dropped (table 3, naive selection)
        rejoin_last: bool = (
            True  # False: the head sees the awake tokens alone (the released code's `prunecls`)
        )
        assisted_head: bool = False  # a second head on the class token for the training loss (eq. 8)
        switch_at: float | None = None  # share of the training in layer mode, then stage mode (paper: 2/3)

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        if config.selection not in get_args(Selection):
            raise EvoViTError(
                f"selection is {config.selection!r}; allowed is one of {', '.join(get_args(Selection))}."
            )
        if config.selection in ("global", "class", "last_class") and not spec.has_class_token:
            raise EvoViTError(
                f"selection={config.selection!r} needs a class token and this host has none; choose "
                "selection='column_mean' (attention received) or 'random'."
            )
        if config.fast_update and not config.preserve:
            raise EvoViTError(
                "fast_update=True updates placeholders that preserve=False drops; set one of the two."
            )
        if config.switch_at is not None and not 0 <= config.switch_at <= 1:
            raise EvoViTError(
                f"switch_at is {config.switch_at}; allowed is a share of the training from 0 to 1."
            )
        self.schedule = KeepSchedule.from_block(
            spec.depth, config.keep_ratio, config.start_block, config.stage_length
        )
        trade_off = per_block(config.trade_off, spec.depth, "trade_off", 0.0, 1.0)
        self.trade_off = trade_off if config.selection == "global" else (0.0,) * spec.depth
        self.mode = config.mode if config.switch_at is None else "layer"
        self.norm_cls = nn.LayerNorm(spec.dims[-1], eps=1e-6) if config.assisted_head else None
        self.head_cls = nn.Linear(spec.dims[-1], spec.num_classes) if config.assisted_head else None

    @property
    def mode(self) -> Mode:
        """`"stage"` selects once per `stage_length` blocks, `"layer"` before every block."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise EvoViTError(f"mode is {mode!r}; allowed is 'stage' or 'layer'.")
        self._mode: Mode = mode

    @property
    def stage_length(self) -> int:
        """Blocks per selection in the present mode."""
        return 1 if self.mode == "layer" else int(self.config.stage_length)

    def begin(self, tokens: Tokens, stages: Sequence[Stage]) -> Tokens:
        if self.config.selection != "last_class":
            return tokens.change(carry=Waiting())
        with torch.no_grad():  # table 4, "last class attention via twice inference"
            dense = tokens
            for block in [block for stage in stages for block in stage.blocks]:
                qkv = block.qkv(dense)
                dense = block.ffn(block.attention(dense, qkv))
        return tokens.change(carry=Waiting(class_attention(qkv, tokens.num_prefix)))

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        if self.schedule.starts_stage(block.number, self.stage_length):
            tokens = self.split(self.join(tokens), block.number)
        tokens, qkv = block.attend(tokens)
        return block.ffn(self.evolve(tokens, qkv, block.number))

    def split(self, tokens: Tokens, number: int) -> Tokens:
        """Let the informative tokens (and the representative one) go on, and the placeholders wait."""
        rows, columns = tokens.grid
        keep = self.schedule.count(number, rows * columns)
        if keep is None or keep >= tokens.num_patches:
            return tokens
        score = tokens.carry.score
        if self.config.selection == "random":
            score = torch.rand_like(tokens.index, dtype=torch.float32) if self.training else None
            score = scattered_score(tokens.index, number) if score is None else score
        split = split_top(score, keep)
        x = take(tokens.x, with_prefix(split.rows, tokens.num_prefix))
        index, summary = take(tokens.index, split.rows), None
        if self.config.fast_update:
            summary = representative(tokens.patches, score, split.kept)
            x, index = torch.cat((x, summary), 1), torch.cat((index, index.new_full((x.shape[0], 1), -1)), 1)
        waiting = Waiting(score, split, take(score, split.rows), tokens.x, tokens.index, summary)
        return tokens.change(x=x, index=index, carry=waiting)

    def evolve(self, tokens: Tokens, qkv: QKV, number: int) -> Tokens:
        """Update the score of the tokens that took part in this block (eq. 4)."""
        if self.config.selection in ("last_class", "random") or not self.schedule.reads_score(
            number, self.stage_length, self.trade_off
        ):
            return tokens
        measure = attention_column_mean if self.config.selection == "column_mean" else class_attention
        new, state = measure(qkv, tokens.num_prefix), tokens.carry
        new = (
            new if self.config.fast_update else new.detach()
        )  # it only ranks tokens, unless it weighs them (eq. 5)
        if state.split is None:
            return tokens.change(carry=Waiting(evolve(state.score, new, self.trade_off[number])))
        new = new[:, : state.awake.shape[1]]  # without the representative token
        return tokens.change(carry=state._replace(awake=evolve(state.awake, new, self.trade_off[number])))

    def join(self, tokens: Tokens) -> Tokens:
        """End a stage: the placeholders get the representative token's change (eq. 7) and rejoin, in raster order."""
        state, num_prefix = tokens.carry, tokens.num_prefix
        if state.split is None:
            return tokens
        count = num_prefix + state.awake.shape[1]
        if not self.config.preserve:
            return tokens.change(carry=Waiting(state.awake))
        whole = state.whole if state.summary is None else state.whole + (tokens.x[:, count:] - state.summary)
        x = put(whole, with_prefix(state.split.rows, num_prefix), tokens.x[:, :count])
        return tokens.change(
            x=x, index=state.position, carry=Waiting(put(state.score, state.split.rows, state.awake))
        )

    def finish(self, tokens: Tokens) -> Tokens:
        if self.config.rejoin_last or tokens.carry.split is None:
            return self.join(tokens)
        count = tokens.carry.awake.shape[1]
        return tokens.change(x=tokens.x[:, : tokens.num_prefix + count], index=tokens.index[:, :count])

    def extra_logits(self, tokens: Tokens) -> dict[str, Tensor]:
        if self.head_cls is None or self.norm_cls is None:
            return {}
        return {"class_token": self.head_cls(self.norm_cls(tokens.x[:, 0]))}

    def reset_classifier(self, num_classes: int) -> None:
        if self.head_cls is not None:
            self.head_cls = nn.Linear(self.head_cls.in_features, num_classes).to(self.head_cls.weight)

    def set_progress(self, fraction: float) -> None:
        if self.config.switch_at is not None:
            self.mode = "layer" if fraction < self.config.switch_at else "stage"
