"""PS-ViT: static masks, the same for every image, nested from block to block (Tang et al., CVPR 2022).

In a block, the tokens that stay attend to all that entered it (rectangular attention), so they become what
the unpruned block makes of them; the others are dropped. Masks are nested, so one order of the cells gives
all of them: each block keeps its first cells. `evovit.calibrate` finds order and numbers on unlabelled
images; until then the order is random.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evovit.backbones.base import BackboneSpec, Block
from evovit.errors import EvoViTError
from evovit.methods import register
from evovit.methods.base import Method, expect_grid
from evovit.ops.select import keep_rows
from evovit.options import Ratio, option
from evovit.schedule import KeepSchedule, per_block
from evovit.tokens import Tokens


@register("patch_slimming")
class PatchSlimming(Method):
    """Static masks: each block drops the same patches of every image, which calibration has chosen."""

    needs_class_token = False
    keep_all: ClassVar = {"keep_ratio": 1.0}
    example: ClassVar = {"keep_ratio": 0.25}

    order: Tensor  # (cells,) int64 raster positions, those kept longest first

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Options of patch slimming; its masks are for one grid, so one image size."""

        keep_ratio: Ratio | tuple[Ratio, ...] = option(
            0.2, "share of all patches left after the last block, falling evenly; a list has one per block"
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        self.plan(config)
        cells = math.prod(spec.grid)
        order = random.Random(0).sample(range(cells), cells)
        self.register_buffer("order", torch.tensor(order))

    def plan(self, config: Config) -> None:
        depth = self.spec.depth
        ratios = per_block(config.keep_ratio, depth, "keep_ratio")
        if not isinstance(config.keep_ratio, Sequence):
            fall = (1 - config.keep_ratio) / depth
            ratios = tuple(1 - fall * (number + 1) for number in range(depth - 1)) + ratios[-1:]
        if list(ratios) != sorted(ratios, reverse=True):
            raise EvoViTError(
                f"keep_ratio is {ratios}, but a dropped patch does not return; let no value rise."
            )
        self.schedule = KeepSchedule(ratios, rounding=round)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        keep = self.schedule.count(block.number, tokens.num_cells)
        if keep is None or keep >= tokens.num_patches:
            return block(tokens)
        if tokens.num_patches == tokens.num_cells:  # nobody has left yet
            tokens = self.arrange(tokens)
        tokens, _ = block.attend(tokens, asking=tokens.num_prefix + keep)
        return block.ffn(tokens)

    def arrange(self, tokens: Tokens) -> Tokens:
        """Put the tokens that stay longest first, from raster order."""
        expect_grid(tokens, self.spec, "The masks of patch slimming are")
        return keep_rows(tokens, self.order.expand(tokens.index.shape[0], -1))

    def masks(self) -> list[Tensor]:
        """Return the raster positions that each block keeps, int64 ascending, one tensor a block."""
        cells = self.order.shape[0]
        counts = [self.schedule.count(number, cells) for number in range(self.spec.depth)]
        return [self.order[:count].sort().values for count in counts]

    def set_order(self, order: Any) -> None:
        """Say which patches are kept longest: all raster positions, each once; a block keeps the first."""
        given = torch.as_tensor(order, dtype=torch.int64, device=self.order.device)
        if given.sort().values.tolist() != list(range(self.order.shape[0])):
            raise EvoViTError(
                f"order has {given.numel()} entries; give each raster position from 0 to "
                f"{self.order.shape[0] - 1} once."
            )
        self.order = given
