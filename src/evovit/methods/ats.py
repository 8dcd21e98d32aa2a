"""ATS: adaptive token sampling, as many tokens as an image needs (Fayyaz et al., ECCV 2022).

In a sampling block, class attention and the length of values score the patch tokens (eq. 4); the inverse of
the scores' cumulative sum is read at evenly spaced points (section 3.2), and each token met is kept, once.
Only these are queries; keys and values are those of all. Lengths are fixed: absent tokens are masked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from evovit.backbones.base import BackboneSpec, Block, Probe
from evovit.methods import register
from evovit.methods.base import Method, check_blocks
from evovit.methods.selection import check_selection
from evovit.ops.mask import masked_attention, masked_softmax
from evovit.ops.sample import sample, value_score
from evovit.ops.score import (
    attention_column_mean,
    class_attention,
    class_logits,
    key_norm,
    probe_attention,
)
from evovit.ops.select import keep_rows, leading_queries, put, rows_where, take_queries, with_prefix
from evovit.options import Number, Ratio, option
from evovit.schedule import KeepSchedule
from evovit.tokens import QKV, Tokens

Selection = Literal["class", "column_mean", "key_norm", "probe"]
Shorten = Literal["alone", "never", "batch"]
Softmax = Literal["fused", "released"]


class Sampled(NamedTuple):
    """ATS's state beside the tokens."""

    before: tuple[
        tuple[Tensor, Tensor], ...
    ] = ()  # patches (B, N, C), places (B, N) as each sampling met them


@register("ats")
class ATS(Method):
    """Adaptive token sampling: each image keeps as many tokens as it needs, up to a maximum."""

    keeps_grid = True
    needs_class_token = False  # `selection` decides
    keep_all: ClassVar = {"blocks": ()}
    example: ClassVar = {"blocks": (1, 2)}

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Options of ATS; keep_ratio 1 is the released code, which never uses fewer points."""

        keep_ratio: Ratio | tuple[Ratio, ...] = option(
            0.7,
            "largest share of patches kept: r, r^2, ... for a number r; a list has one per sampling block",
        )
        blocks: tuple[Number, ...] = option((3, 6, 9), "blocks that sample, counted from 0")
        shorten: Shorten = option(
            "alone", "length that the released code cuts an image to: its own, none (never), or the batch's"
        )
        softmax: Softmax = option(
            "fused", "released: add 1e-6 to each row of attention, as the released code does; slower"
        )
        selection: Selection = option(
            "class", "class: attention of the class token; the others are for hosts without one"
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        check_selection(config.selection, spec)
        check_blocks(config.blocks, spec.depth)
        self.schedule = KeepSchedule.at_blocks(spec.depth, config.keep_ratio, config.blocks)

    def ratios_now(self) -> tuple[float, ...]:
        return tuple(self.schedule.ratios[number] for number in self.config.blocks)

    def current_config(self) -> Any:
        if self.reduction == 0:
            return replace(self.config, blocks=(), keep_ratio=1.0)  # sampling alone leaves tokens out
        return super().current_config()

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        released = self.config.softmax == "released"
        samples = block.number in self.config.blocks and self.reduction > 0
        bias = self.hide_absent(tokens)
        if not samples and not released:
            return block(tokens, bias)
        qkv, mix = block.qkv(tokens), None
        if released:
            part = F.pad(tokens.taking_part, (tokens.num_prefix, 0), value=1.0)
            there = part[:, None, :, None].to(qkv.q.dtype)
            qkv = qkv._replace(q=qkv.q * there, k=qkv.k * there, v=qkv.v * there)
            mix = partial(masked_attention, mask=part, itself=False)
        if samples:
            score = self.score(tokens, qkv, bias, block.probe)
            tokens, rows = self.sample(tokens, score, block.number)
            qkv = take_queries(qkv, rows)
        return block.ffn(block.attention(tokens, qkv, bias, mix))

    def hide_absent(self, tokens: Tokens) -> Tensor | None:
        """Return what hides absent keys from attention, (B, 1, 1, P + N): 0 or minus infinity; None: none is.

        With the released softmax, absent keys that the released code pads count in its row maximum, as zeros.
        """
        if tokens.mask is None:
            return None
        absent = tokens.mask < 0.5
        if self.config.softmax == "released":
            absent = absent & ~self.padded(tokens).unsqueeze(-1)
        hidden = torch.zeros_like(tokens.mask).masked_fill(absent, -torch.inf)
        return F.pad(hidden, (tokens.num_prefix, 0))[:, None, None]

    def padded(self, tokens: Tokens) -> Tensor:
        """Tell which images the released code pads, (B,) bool."""
        there = tokens.taking_part.sum(-1)
        if self.config.shorten == "batch":
            return there < there.amax()
        return there < (tokens.num_patches if self.config.shorten == "never" else 0)

    def score(self, tokens: Tokens, qkv: QKV, bias: Tensor | None, probe: Probe | None = None) -> Tensor:
        """Return the score of each patch token, (B, N) float32, sum 1; 0 for absent ones."""
        count, part = tokens.num_prefix, tokens.taking_part
        selection = self.config.selection
        seen = leading_queries(qkv, count) if selection == "class" else qkv
        if bias is not None:
            own = torch.zeros_like(bias) if seen.bias is None else seen.bias
            seen = seen._replace(bias=(own + bias).expand(-1, -1, seen.q.shape[2], -1))
        if selection == "probe" and probe is not None:
            asked = probe(tokens)
            hidden = asked.bias if bias is None else bias[..., -asked.k.shape[2] :]
            weight = probe_attention(asked._replace(bias=hidden), tokens.num_patches)
        elif selection == "key_norm":
            weight = key_norm(seen, count)
        elif selection == "column_mean":
            asking = None if tokens.mask is None else F.pad(part, (count, 0), value=1.0)
            weight = attention_column_mean(seen, count, asking=asking)
        elif self.config.softmax == "released":
            mask = F.pad(part, (count, 0), value=1.0)
            weights = masked_softmax(class_logits(seen).unsqueeze(2), mask, itself=False)
            weight = weights[:, :, 0, count:].mean(1)
        else:
            weight = class_attention(seen, count)
        return value_score(weight * part, qkv.v, count)

    def sample(self, tokens: Tokens, score: Tensor, number: int) -> tuple[Tokens, Tensor]:
        """Return the tokens that go on, in their order, padded, and their rows, (B, P + K) int64."""
        points = self.schedule.count(number, tokens.num_cells) or tokens.num_cells
        chosen = sample(score, tokens.taking_part > 0.5, self.padded(tokens), points)
        length = min(points, tokens.num_patches)
        rows = rows_where(chosen, length)
        among_all = with_prefix(rows, tokens.num_prefix)
        live = torch.arange(length, device=rows.device) < chosen.sum(-1, keepdim=True)
        active = keep_rows(tokens, rows, among_all)
        before = tokens.carry.before if tokens.carry else ()
        active = active.change(
            index=active.index.masked_fill(~live, -1),
            mask=live.float(),
            carry=Sampled((*before, (tokens.patches, tokens.index))),
        )
        return active, among_all

    def finish(self, tokens: Tokens) -> Tokens:
        """Give all cells their token, in raster order; who was left out is as it was then."""
        state: Sampled = tokens.carry or Sampled()
        if not state.before:
            return tokens
        (first, index), *later = (*state.before, (tokens.patches, tokens.index))
        cells = index.shape[1]
        whole = F.pad(first, (0, 0, 0, 1))  # one more row, where absent tokens go
        for patches, places in later:
            whole = put(whole, places.where(places >= 0, cells), patches)
        x = torch.cat((tokens.prefix, whole[:, :cells]), dim=1)
        return tokens.change(x=x, index=index, mask=None, carry=None)
