"""What timm's hosts with a relative position bias share: the bias is gathered by `Tokens.index` on both axes.

Checked with timm 1.0.28 to 1.0.31.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evovit.backbones.base import BackboneSpec, Mix, mixed_values
from evovit.backbones.timm_vit import timm_spec
from evovit.ops.select import take_bias, with_prefix
from evovit.tokens import QKV, Tokens


def relative_spec(host: Any) -> BackboneSpec:
    """Return what such a host offers; its heads are those of its first block."""
    return timm_spec(host, host.blocks[0].attn.num_heads)


def placed_bias(bias: Tensor, tokens: Tokens, raster: Tensor) -> Tensor:
    """Return the position bias of the tokens present, (1 or B, H, P + N, P + N).

    A token without a place (index -1) stands for several: it has the mean over all places.

    Args:
        bias: (1, H, P + cells, P + cells), of the whole grid in raster order.
        raster: the index of freshly embedded tokens; while the tokens still have this very tensor, nobody
            has moved and the bias is taken as it is.
    """
    if tokens.index is raster:
        return bias
    num_prefix, cells = tokens.num_prefix, tokens.num_cells
    bias = torch.cat((bias, bias[:, :, num_prefix:].mean(2, keepdim=True)), dim=2)
    bias = torch.cat((bias, bias[..., num_prefix:].mean(3, keepdim=True)), dim=3)
    places = tokens.index.where(tokens.index >= 0, cells)
    return take_bias(bias, with_prefix(places, num_prefix))


def biased_output(attn: Any, qkv: QKV, bias: Tensor | None, mix: Mix | None) -> Tensor:
    """Return the attention's output (B, T, C), before any scale and drop path.

    Args:
        bias: of the method; the host's is in `qkv`.
    """
    x = mixed_values(qkv, bias, mix, attn.attn_drop.p if attn.training else 0.0)
    return attn.proj_drop(attn.proj(x.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]
