"""IdleViT: in each idle block only some patch tokens take part; the others wait (Xu et al., AJCAI 2023).

Before attention, the class token's raw logits in this block select the tokens that take part. Idle tokens
skip the block unchanged and may be picked again in the next. Training gathers too, which equals
the paper's masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from evovit.backbones.base import BackboneSpec, Block
from evovit.errors import check_count
from evovit.methods import register
from evovit.methods.base import Method, Ranking, ScheduledConfig, require_class_token
from evovit.methods.selection import check_selection, patch_score
from evovit.ops.distance import feature_distance, head_mean_attention, logit_divergence, token_cut
from evovit.ops.score import class_logit_mean
from evovit.ops.select import keep_rows, put, split_top, take, take_qkv, with_prefix
from evovit.options import Count, Number, Ratio, Weight, option
from evovit.schedule import KeepSchedule, check_start, per_block
from evovit.tokens import QKV, Tokens

Selection = Literal["class", "column_mean", "key_norm", "probe"]
Cut = Literal["both", "inter", "intra"]
CutBlocks = Literal["all", "released"]
Compared = Literal["class", "active"]


class Idle(NamedTuple):
    """IdleViT's state beside the tokens."""

    rows: Tensor | None = None  # (B, P + K) int64, who took part in the last block; None: all
    before: Tensor | None = None  # (B, P + N, C), all tokens as that block found them
    places: Tensor | None = None  # (B, N) int64, their raster positions
    cuts: tuple[Tensor, ...] = ()  # token cut loss of each idle block so far, in training


@register("idle_vit")
class IdleViT(Method):
    """Token idling: a block updates the tokens of highest class attention; others skip it, none is dropped.

    With a teacher, `losses` compares logits and features with the teacher's; this is added to the recipe's
    own `objective.distillation`, which the released training leaves off.
    """

    keeps_grid = True
    crosses_stages = True
    needs_class_token = False  # `selection` decides
    learns_from_teacher = True
    keep_all: ClassVar = {"keep_ratio": 1.0}
    example: ClassVar = {"start_block": 1, "group_length": 2}

    @dataclass(frozen=True, kw_only=True)
    class Config(ScheduledConfig):
        """Options of IdleViT; the defaults are those of the published cost and the released training."""

        keep_ratio: Ratio | tuple[Ratio, ...] = option(
            0.7, "share of all patches kept: r, r^2, ... from group to group; a list has one per block"
        )
        start_block: Number = option(
            3, "first block in which tokens idle, counted from 0; a list has 1 before it"
        )
        group_length: Count = option(
            3, "blocks of a group, which share one power of r; unused where keep_ratio is a list"
        )
        selection: Selection = option(
            "class", "class: attention of the class token; the others are for hosts without one"
        )
        cut: Cut = option("both", "which parts of the token cut loss are used")
        cut_weight: Weight = option(
            20.0, "weight of the token cut loss, its mean over idle blocks; 0 turns it off"
        )
        cut_blocks: CutBlocks = option(
            "all", "idle blocks in the token cut loss; released: every second one, as in the released code"
        )
        distill_weight: Weight = option(
            10.0, "loss weight of KL(teacher || student); the feature distance has 100 times this weight"
        )
        compared: Compared = option(
            "class",
            "features compared: the class token's, or of all tokens active in the last block (LV-ViT)",
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        check_selection(config.selection, spec)
        check_count("start_block", config.start_block, 0, spec.depth - 1, "blocks count from 0")
        check_count("group_length", config.group_length, 1, spec.depth)
        self.learns_from_teacher = config.distill_weight > 0
        self.plan(config)

    def plan(self, config: Config) -> None:
        depth = self.spec.depth
        if config.keep_per_block is not None:
            whole = math.prod(self.spec.grid)
            self.schedule = KeepSchedule.from_counts(depth, config.keep_per_block, whole)
            return
        ratios = per_block(config.keep_ratio, depth, "keep_ratio")
        if not isinstance(config.keep_ratio, Sequence):
            past = [number - config.start_block for number in range(depth)]
            powers = [0 if n < 0 else n // config.group_length + 1 for n in past]
            ratios = tuple(config.keep_ratio**power for power in powers)
        check_start(ratios, config.start_block)
        self.schedule = KeepSchedule(ratios, start=config.start_block)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        tokens = self.finish(tokens)
        keep = self.schedule.count(block.number, tokens.num_cells)
        if keep is None:
            return block(tokens)
        cut = self.training and self.config.cut_weight > 0
        whole = cut or self.config.selection == "column_mean"  # the cut and the column mean read every query
        seen = block.qkv(tokens) if whole else block.scoring_qkv(tokens)
        split = split_top(self.score(seen, tokens, block), keep)
        rows = with_prefix(split.rows, tokens.num_prefix)
        cuts = tokens.carry.cuts if tokens.carry else ()
        if cut:
            cuts = (*cuts, self.token_cut(seen, split.kept, tokens.num_prefix))
        active = keep_rows(tokens, split.rows, rows)
        active = active.change(carry=Idle(rows, tokens.x, tokens.index, cuts))
        qkv = take_qkv(seen, rows) if whole else block.qkv_of_rows(active, seen, rows)
        return block.ffn(block.attention(active, qkv))

    def score(self, qkv: QKV, tokens: Tokens, block: Block) -> Tensor:
        """Return the score of each patch token, (B, N) float32; of the class token its logits, no softmax."""
        if self.config.selection == "class":
            return class_logit_mean(qkv, tokens.num_prefix)
        return patch_score(self.config.selection, qkv, tokens, block.probe)

    def finish(self, tokens: Tokens) -> Tokens:
        """Put the tokens that took part back among the idle ones; all in raster order."""
        state: Idle = tokens.carry or Idle()
        if state.rows is None or state.before is None:
            return tokens
        x = put(state.before, state.rows, tokens.x)
        return tokens.change(x=x, index=state.places, carry=Idle(cuts=state.cuts))

    def ranking(self, block: Block, tokens: Tokens) -> Ranking | None:
        tokens = self.finish(tokens)
        if self.schedule.count(block.number, tokens.num_cells) is None:
            return None
        return Ranking(self.score(block.qkv(tokens), tokens, block), tokens.index)

    def token_cut(self, qkv: QKV, kept: Tensor, num_prefix: int) -> Tensor:
        """Return the token cut loss of one block; it needs the full attention matrix."""
        mask = torch.nn.functional.pad(kept, (num_prefix, 0), value=True)
        both = token_cut(head_mean_attention(qkv), mask, num_prefix)
        return {"both": both.inter + both.intra, "inter": both.inter, "intra": both.intra}[self.config.cut]

    def losses(self, outputs: Any, teacher: Any) -> dict[str, Tensor]:
        config, terms, state = self.config, {}, outputs.tokens.carry or Idle()
        if state.cuts:
            used = state.cuts[::2] if config.cut_blocks == "released" else state.cuts
            terms["token_cut"] = config.cut_weight / len(state.cuts) * torch.stack(used).sum()
        if teacher is not None and config.distill_weight > 0:
            terms["logits"] = config.distill_weight * logit_divergence(outputs.logits, teacher.logits)
            terms["features"] = 100 * config.distill_weight * self.distance(outputs, teacher)
        return terms

    def distance(self, outputs: Any, teacher: Any) -> Tensor:
        """Return the distance of features from the teacher's, as released."""
        student: Tensor = outputs.features
        taught: Tensor = teacher.features
        if self.config.compared == "class":
            require_class_token(self.spec, "compared='class'", "'active'")
            return feature_distance(student[:, 0], taught[:, 0])
        state: Idle = outputs.tokens.carry or Idle()
        if state.rows is None:
            return feature_distance(student, taught, dim=1)
        student = take(student, state.rows) if student.shape[1] > state.rows.shape[1] else student
        share = state.rows.shape[1] / taught.shape[1]  # the released mean counts idle tokens, as zeros
        return share * feature_distance(student, take(taught, state.rows), dim=1)
