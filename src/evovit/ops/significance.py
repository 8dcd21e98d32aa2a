"""How much does the answer depend on a token? Attention followed through blocks (PS-ViT, Tang et al., 2022).

In float64: the weights of many blocks are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evovit.ops.score import attention_map
from evovit.tokens import QKV


def precise_map(qkv: QKV) -> Tensor:
    """Return the attention weights, (B, H, Q, T) float64, each row summing to 1."""
    return attention_map(qkv._replace(q=qkv.q.double(), k=qkv.k.double()))


def own_weight(attention: Tensor, x: Tensor) -> Tensor:
    """Return sum over heads of the squared norm of each row of attention @ |x|, (B, T) float64.

    Args:
        attention: (B, H, T, T), of the block that reads x.
        x: (B, T, C), the tokens that enter it.
    """
    return (attention @ x.double().abs().unsqueeze(1)).square().sum((1, 3))


def path_weight(maps: Sequence[Tensor]) -> Tensor:
    """Return how much the rows after the last block attend to each row before the first, (B, T) float64.

    The mean over all paths of heads, one head a block, of the squared norm of the token's column in the
    product of their maps. Not every path is walked: G = 1 after the last block, then G <- mean over heads of
    P^T G P, whose diagonal it is at the end.

    Args:
        maps: of blocks in a row, (B, H, Q, T); the rows Q that one leaves are the T of the next.
    """
    batch, _, rows, _ = maps[-1].shape
    carried = torch.eye(rows, dtype=maps[-1].dtype, device=maps[-1].device).expand(batch, rows, rows)
    for attention in reversed(maps):
        carried = (attention.transpose(-2, -1) @ carried.unsqueeze(1) @ attention).mean(1)
    return carried.diagonal(dim1=-2, dim2=-1)
