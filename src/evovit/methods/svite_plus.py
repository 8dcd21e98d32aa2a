"""SViTE+: a learnt selector drops patch tokens before the first block (Chen et al., NeurIPS 2021, 3.3).

One linear layer scores the embedded tokens. Training draws the best with Gumbel noise, straight-through, sets
the others to zero and hides them from attention; evaluation takes the best without noise and drops the rest.
The released code hides nothing and drops nothing: `faithful_zero_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones.base import BackboneSpec, Block, Stage
from evovit.methods import register
from evovit.methods.base import Method, run_masked
from evovit.ops.mask import gumbel_noise, gumbel_top
from evovit.ops.select import keep_rows, split_top
from evovit.options import Positive, Ratio, option
from evovit.schedule import KeepSchedule
from evovit.tokens import Tokens


@register("svite_plus")
class SViTEPlus(Method):
    """Learnt selector at the input: one linear layer picks the patch tokens that enter the first block."""

    needs_class_token = False
    samples_in_training = True
    keep_all: ClassVar = {"keep_ratio": 1.0}
    example: ClassVar = {"keep_ratio": 0.5}

    tau: Tensor  # (), temperature of the samples in force

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Options of SViTE+."""

        keep_ratio: Ratio = option(0.7, "share of the patch tokens kept")
        temperature: Positive = option(
            10.0, "temperature of the Gumbel samples at the start of the training; it falls linearly"
        )
        last_temperature: Positive = option(
            0.1, "temperature of the Gumbel samples at the end of the training"
        )
        faithful_zero_tokens: bool = option(
            False,
            "as released: tokens not kept stay as zeros, also as keys, and the class token competes too",
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        self.keeps_grid = config.faithful_zero_tokens
        self.plan(config)
        self.gumbel = nn.Linear(spec.dims[0], 1)
        nn.init.trunc_normal_(self.gumbel.weight, std=0.02)
        nn.init.zeros_(self.gumbel.bias)
        self.register_buffer("tau", torch.tensor(config.temperature))

    def plan(self, config: Config) -> None:
        self.schedule = KeepSchedule.at_blocks(self.spec.depth, (config.keep_ratio,), (0,))

    def begin(self, tokens: Tokens, stages: Sequence[Stage]) -> Tokens:
        score, keep = self.gumbel(tokens.x).squeeze(-1).float(), self.schedule.count(0, tokens.num_cells)
        if keep is None:  # the selector stays in the graph
            return tokens.with_x(tokens.x * (1 + 0 * score.to(tokens.x.dtype)).unsqueeze(-1))
        if self.config.faithful_zero_tokens:  # `keep` counts no prefix token, the released number does
            return zeroed(tokens, self.chosen(score, keep + tokens.num_prefix)[:, tokens.num_prefix :])
        if not self.training:
            return keep_rows(tokens, split_top(score[:, tokens.num_prefix :], keep).rows)
        mask = self.chosen(score[:, tokens.num_prefix :], keep)
        return zeroed(tokens, mask).change(mask=mask)

    def chosen(self, score: Tensor, keep: int) -> Tensor:
        """Return 1 for the `keep` best of each image, 0 for the others, (B, N) float32; drawn in training."""
        if not self.training:
            return split_top(score, keep).kept.float()
        return gumbel_top(score.log_softmax(-1), gumbel_noise(score), keep, self.tau)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        return block(tokens) if tokens.mask is None else run_masked(block, tokens)

    def set_progress(self, fraction: float) -> None:
        start, end = self.config.temperature, self.config.last_temperature
        self.tau.fill_(start + (end - start) * fraction)

    def current_config(self) -> Any:
        return replace(self.config, keep_ratio=self.schedule.ratios[0])


def zeroed(tokens: Tokens, mask: Tensor) -> Tokens:
    """Return the tokens with the patches that `mask` (B, N) leaves out set to zero."""
    whole = F.pad(mask, (tokens.num_prefix, 0), value=1.0)
    return tokens.with_x(tokens.x * whole.to(tokens.x.dtype).unsqueeze(-1))
