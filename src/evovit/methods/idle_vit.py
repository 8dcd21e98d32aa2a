"""IdleViT: in each idle block only some patch tokens take part; the others wait (Xu et al., AJCAI 2023).

Before attention, the class token's raw logits in this very block pick who takes part. Idle tokens skip the
block unchanged and may be picked again in the next. Training gathers too, which equals the paper's masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from evovit.backbones.base import BackboneSpec, Block
from evovit.errors import EvoViTError, check_choice, check_count
from evovit.methods import register
from evovit.methods.base import Method, require_class_token
from evovit.ops.distance import head_mean_attention, token_cut
from evovit.ops.score import attention_column_mean, class_logit_mean
from evovit.ops.select import put, split_top, take, take_qkv, with_prefix
from evovit.schedule import KeepSchedule, per_block
from evovit.tokens import QKV, Tokens

Selection = Literal["class", "column_mean"]
Cut = Literal["both", "inter", "intra"]
CutBlocks = Literal["all", "released"]
SCORES = {"class": class_logit_mean, "column_mean": attention_column_mean}


class Idle(NamedTuple):
    """IdleViT's state beside the tokens."""

    rows: Tensor | None = None  # (B, P + K) int64, who took part in the last block; None: all
    before: Tensor | None = None  # (B, P + N, C), all tokens as that block found them
    places: Tensor | None = None  # (B, N) int64, their raster positions
    cuts: tuple[Tensor, ...] = ()  # token cut loss of each idle block so far, in training


@register("idle_vit")
class IdleViT(Method):
    """Token idling: a block updates the tokens its class logits pick; all others skip it, none is lost."""

    keeps_grid = True
    needs_class_token = False  # `selection` decides
    keep_all: ClassVar = {"keep_ratio": 1.0}
    example: ClassVar = {"start_block": 1, "group_length": 2}

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Options of IdleViT; the defaults are those of the published cost and the released training."""

        keep_ratio: float | tuple[float, ...] = (
            0.7  # r: groups keep r, r^2, ... of all patches; or one per block
        )
        start_block: int = 3  # first idle block, counted from 0
        group_length: int = 3  # blocks per power of r
        selection: Selection = "class"  # "column_mean" for hosts without class token
        cut: Cut = "both"  # parts of the token cut loss
        cut_weight: float = 20.0  # of the token cut loss, mean over idle blocks; 0 turns it off
        cut_blocks: CutBlocks = "all"  # "released" takes every second idle block, as the released code does

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        check_choice("selection", config.selection, get_args(Selection))
        check_choice("cut", config.cut, get_args(Cut))
        check_choice("cut_blocks", config.cut_blocks, get_args(CutBlocks))
        if config.selection == "class":
            require_class_token(spec, "selection='class'", "'column_mean'")
        check_count("start_block", config.start_block, 0, spec.depth - 1, "blocks count from 0")
        check_count("group_length", config.group_length, 1, spec.depth)
        if config.cut_weight < 0:
            raise EvoViTError(f"cut_weight is {config.cut_weight}; allowed is 0 or more.")
        ratios = per_block(config.keep_ratio, spec.depth, "keep_ratio", 0.0, 1.0)
        if min(ratios) == 0:
            raise EvoViTError("keep_ratio is 0; it is the share of tokens kept, above 0 and at most 1.")
        if not isinstance(config.keep_ratio, Sequence):
            past = [number - config.start_block for number in range(spec.depth)]
            powers = [0 if n < 0 else n // config.group_length + 1 for n in past]
            ratios = tuple(config.keep_ratio**power for power in powers)
        self.schedule = KeepSchedule(ratios, start=config.start_block)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        tokens = self.join(tokens)
        qkv = block.qkv(tokens)
        keep = self.schedule.count(block.number, tokens.num_cells)
        if keep is None:
            return block.ffn(block.attention(tokens, qkv))
        split = split_top(SCORES[self.config.selection](qkv, tokens.num_prefix), keep)
        rows = with_prefix(split.rows, tokens.num_prefix)
        active = tokens.change(
            x=take(tokens.x, rows),
            index=take(tokens.index, split.rows),
            carry=Idle(rows, tokens.x, tokens.index, self.cuts(tokens, qkv, split.kept)),
        )
        return block.ffn(block.attention(active, take_qkv(qkv, rows)))

    def join(self, tokens: Tokens) -> Tokens:
        """Put the tokens that took part back among the idle ones; all in raster order."""
        state: Idle = tokens.carry or Idle()
        if state.rows is None or state.before is None:
            return tokens
        x = put(state.before, state.rows, tokens.x)
        return tokens.change(x=x, index=state.places, carry=Idle(cuts=state.cuts))

    def finish(self, tokens: Tokens) -> Tokens:
        return self.join(tokens)

    def cuts(self, tokens: Tokens, qkv: QKV, kept: Tensor) -> tuple[Tensor, ...]:
        """Return the token cut losses so far and, in training, this block's (it needs the full matrix)."""
        before = tokens.carry.cuts if tokens.carry else ()
        if not self.training or self.config.cut_weight == 0:
            return before
        mask = torch.nn.functional.pad(kept, (tokens.num_prefix, 0), value=True)
        both = token_cut(head_mean_attention(qkv), mask, tokens.num_prefix)
        loss = both.inter + both.intra if self.config.cut == "both" else getattr(both, self.config.cut)
        return (*before, loss)

    def losses(self, outputs: Any, teacher: Any) -> dict[str, Tensor]:
        cuts = outputs.tokens.carry.cuts if outputs.tokens.carry else ()
        if not cuts:
            return {}
        used = cuts[::2] if self.config.cut_blocks == "released" else cuts
        return {"token_cut": self.config.cut_weight / len(cuts) * torch.stack(used).sum()}
