"""transformers' BEiT: attention has a bias of the distance between two tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evovit.backbones import adapter
from evovit.backbones.hf_blocks import HFBlock, full
from evovit.backbones.hf_trunk import HFTrunk
from evovit.ops.select import leading_queries
from evovit.tokens import QKV, Tokens


def gathered(bias: Tensor, tokens: Tokens) -> Tensor:
    """Return the bias between these tokens, (B, H, P + N, P + N); 0 for a token without a place of its own.

    Args:
        bias: (1, H, P + cells, P + cells), the host's, in raster order.
    """
    num_prefix, cells = tokens.num_prefix, bias.shape[-1]
    prefix = torch.arange(num_prefix, device=bias.device).expand(tokens.index.shape[0], num_prefix)
    place = torch.where(tokens.index < 0, cells, tokens.index + num_prefix)
    rows = torch.cat((prefix, place), dim=1)  # (B, T)
    table = F.pad(bias[0], (0, 1, 0, 1)).flatten(1)  # (H, (P + cells + 1) ** 2)
    both = rows[:, :, None] * (cells + 1) + rows[:, None, :]  # (B, T, T)
    return table[:, both.flatten()].reshape(-1, *both.shape).transpose(0, 1)


class BeitBlock(HFBlock):
    """`BeitLayer`: dropout, LayerScale, drop path end both branches.

    Args:
        bias: (1, H, P + cells, P + cells) of this block for the images embedded last, None where it has none.
    """

    parts = (
        *("layernorm_before", "attention", "layernorm_after", "mlp", "dropout", "drop_path"),
        *("lambda_1", "lambda_2", "relative_position_bias"),
    )
    attentions = full("beit.BeitAttention")
    norms = ("layernorm_before", "layernorm_after")
    heads_name, scale_name, dropout_name = "num_attention_heads", "scaling", "attention_dropout"

    def __init__(self, block: Any, number: int, bias: Tensor | None = None) -> None:
        super().__init__(block, number)
        self.bias = bias

    def with_bias(self, qkv: QKV, tokens: Tokens) -> QKV:
        """Return q, k, v with the bias between these tokens."""
        return qkv if self.bias is None else qkv._replace(bias=gathered(self.bias, tokens).to(qkv.q.dtype))

    def qkv(self, tokens: Tokens) -> QKV:
        return self.with_bias(super().qkv(tokens), tokens)

    def scoring_qkv(self, tokens: Tokens) -> QKV:
        return self.qkv(tokens)

    def queries_keys(self, tokens: Tokens) -> QKV:
        return self.with_bias(super().queries_keys(tokens), tokens)

    def leading_qkv(self, tokens: Tokens, count: int) -> QKV:
        return leading_queries(self.qkv(tokens), count)

    def ended(self, branch: Tensor, which: int) -> Tensor:
        scale = (self.block.lambda_1, self.block.lambda_2)[which]
        return self.block.drop_path(scale * self.block.dropout(branch))  # type: ignore[no-any-return]


@adapter(*full("beit.BeitModel"))
class HFBeit(HFTrunk):
    """View of `BeitModel`."""

    parts = ("embeddings", "shared_position_bias", "layers", "layernorm", "pooler")
    fits_any_size = True
    views = dict.fromkeys(full("beit.BeitLayer"), BeitBlock)
    bias_of: Callable[[Any], Tensor | None] | None = None  # the bias that a module gives the images

    def embeddings(self, images: Tensor) -> Tensor:
        x: Tensor = self.model.embeddings(images)
        grid, count = self.grid_of(images), x.shape[1]

        def bias_of(module: Any) -> Tensor | None:
            return None if module is None else module(grid, self.interpolate, dim_size=count)

        self.bias_of = bias_of
        return x

    def blocks(self) -> list[Any]:
        bias_of = self.bias_of or (lambda module: None)
        shared, views = bias_of(self.model.shared_position_bias), []
        for number, block in enumerate(self.layers):
            own = bias_of(block.relative_position_bias)
            bias = own if shared is None else shared if own is None else own + shared
            views.append(BeitBlock(block, number, bias))
        return views

    def wrapped(self, features: Tensor, hidden: Any = None) -> Any:
        from transformers.models.beit.modeling_beit import BeitModelOutputWithPooling

        return BeitModelOutputWithPooling(
            last_hidden_state=features, pooler_output=self.pooled(features), hidden_states=hidden
        )
