"""SiT: slim the patch tokens by soft assignment after a few blocks (Zong et al., ECCV 2022).

Token slimming (TSM) mixes all patch tokens into fewer; prefix tokens pass it by. In training, reverse
modules (RTSM) bring the tokens after each block back to the full number, where they are compared with those
of a dense teacher (feature recalibration distillation, FRD). Modules have the official names.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from evovit.backbones.base import BackboneSpec, Block, Stage
from evovit.errors import check_count
from evovit.methods import register
from evovit.methods.base import Method, check_blocks, expect_grid
from evovit.ops.distance import logit_divergence
from evovit.options import Number, Positive, Ratio, Weight, option
from evovit.schedule import KeepSchedule
from evovit.tokens import Tokens


class Recovered(NamedTuple):
    """SiT's state beside the tokens, in training."""

    patches: tuple[Tensor, ...] = ()  # (B, N at the start, C) after each block so far


class TokenSlimming(nn.Module):
    """TSM: each of `keep` slots is a mean of all tokens, with weights from a softmax over the tokens."""

    def __init__(self, dim: int, keep: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        layers = nn.LayerNorm(dim), nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, keep)
        self.weight = nn.Sequential(*layers)

    def shares(self, patches: Tensor) -> Tensor:
        """Return the share of each token in each slot, (B, N, K) float32; a slot's shares sum to 1."""
        logits: Tensor = self.scale * self.weight(patches)
        return logits.float().softmax(1)

    def forward(self, patches: Tensor) -> Tensor:
        """Return (B, K, C) from (B, N, C)."""
        return self.shares(patches).to(patches.dtype).transpose(1, 2) @ patches


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Return linear, GELU, linear, named as timm's `Mlp` names them."""
    return nn.Sequential(
        OrderedDict(fc1=nn.Linear(inputs, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, outputs))
    )


class ReverseSlimming(nn.Module):
    """RTSM: `keep` slots to `whole` tokens, by an MLP along the tokens and one along the channels."""

    def __init__(self, dim: int, keep: int, whole: int) -> None:
        super().__init__()
        self.norm1, self.mlp1 = nn.LayerNorm(dim), mlp(keep, 4 * whole, whole)
        self.norm2, self.mlp2 = nn.LayerNorm(dim), mlp(dim, 4 * dim, dim)

    def forward(self, patches: Tensor) -> Tensor:
        """Return (B, N, C) from (B, K, C)."""
        whole = self.mlp1(self.norm1(patches).transpose(1, 2)).transpose(1, 2)
        return whole + self.mlp2(self.norm2(whole))  # type: ignore[no-any-return]


@register("sit")
class SiT(Method):
    """Self-slimming: after a few blocks all patch tokens are mixed into fewer; none is selected or lost."""

    needs_class_token = False
    learns_from_teacher = True
    keep_all: ClassVar = {"blocks": ()}
    example: ClassVar = {"blocks": (1,)}

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Options of SiT; its modules fit one number of patches, so one image size."""

        keep_ratio: Ratio = option(0.5, "the j-th slimming leaves int(keep_ratio^j * all patches)")
        blocks: tuple[Number, ...] = option(
            (2, 5, 8), "blocks AFTER which tokens are slimmed, counted from 0; the last block cannot be one"
        )
        token_weight: Weight = option(
            2.0, "loss weight of the distance to the teacher's tokens; 0: no reverse modules"
        )
        logit_weight: Weight = option(2.0, "loss weight of the divergence from the teacher's logits")
        temperature: Positive = option(1.0, "temperature of the logits in that divergence")

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        check_blocks(config.blocks, spec.depth)
        for number in config.blocks:
            check_count("blocks", number, 0, spec.depth - 2, "nothing reads what the last block would slim")
        self.keeps_places = not config.blocks
        self.learns_from_teacher = self.reads_teacher_trace = config.token_weight > 0
        self.needs_teacher = self.reads_teacher_trace and bool(config.blocks)
        dim, whole = spec.dims[0], math.prod(spec.grid)
        schedule = KeepSchedule.at_blocks(spec.depth, config.keep_ratio, config.blocks)
        counts = [whole, *(schedule.count(number, whole) or whole for number in config.blocks)]
        self.tsm = nn.ModuleList(TokenSlimming(dim, keep) for keep in counts[1:])
        self.rtsm = nn.ModuleList()  # one for each block; nothing to reverse before the first slimming
        for number in range(spec.depth if config.token_weight > 0 else 0):
            past = sum(block <= number for block in config.blocks)
            self.rtsm.append(ReverseSlimming(dim, counts[past], whole) if past else nn.Identity())
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def begin(self, tokens: Tokens, stages: Sequence[Stage]) -> Tokens:
        expect_grid(tokens, self.spec, "SiT's modules are")
        return tokens.change(carry=Recovered())

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        tokens = block(tokens)
        if block.number in self.config.blocks:
            tokens = self.slim(tokens, self.config.blocks.index(block.number))
        if self.training and self.config.token_weight > 0:
            whole = self.rtsm[block.number](tokens.patches)
            tokens = tokens.change(carry=Recovered((*tokens.carry.patches, whole)))
        return tokens

    def slim(self, tokens: Tokens, place: int) -> Tokens:
        """Return prefix and slots, in learnt order; a slot has no place of its own (index -1)."""
        patches = self.tsm[place](tokens.patches)
        index = tokens.index.new_full(patches.shape[:2], -1)
        return tokens.change(x=torch.cat((tokens.prefix, patches), dim=1), index=index)

    def losses(self, outputs: Any, teacher: Any) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if teacher is not None and outputs.tokens.carry.patches:
            pairs = zip(outputs.tokens.carry.patches, teacher.trace, strict=True)
            # written out: compiled, the gradient of mse_loss takes transposed tokens for contiguous
            distances = [(ours.float() - theirs.float()).square().mean() for ours, theirs in pairs]
            terms["frd_tokens"] = config.token_weight * torch.stack(distances).mean()
        if teacher is not None and config.logit_weight > 0:
            divergence = logit_divergence(outputs.logits, teacher.logits, config.temperature)
            terms["frd_logits"] = config.logit_weight * divergence
        return terms
