"""Masked training: tokens stay in place, but those masked out influence no other (DynamicViT, section 3).

What a head pools is masked too: it learns on the tokens that it will read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evovit.ops.select import split_top
from evovit.tokens import QKV


def masked_softmax(logits: Tensor, mask: Tensor, eps: float = 1e-6, itself: bool = True) -> Tensor:
    """Return attention weights in which masked keys count for nothing, except to themselves (eq. 11).

    The mask multiplies the exponentials, so that it has a gradient at 0 too.

    Args:
        logits: (B, H, T, T).
        mask: (B, T) 1 where a token takes part, with gradient.
        eps: of the released code, which spreads it over the row: with a mask of ones nearly the softmax.
        itself: False: not to themselves either; queries may then be any, logits (B, H, Q, T).

    Returns:
        (B, H, T, T) float32.
    """
    logits, mask = logits.float(), mask.float()[:, None, None, :]  # (B, 1, 1, T)
    allowed = mask + (1 - mask) * torch.eye(logits.shape[-1], device=logits.device) if itself else mask
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * allowed
    return (weight + eps / logits.shape[-1]) / (weight.sum(-1, keepdim=True) + eps)


def masked_attention(qkv: QKV, bias: Tensor | None, mask: Tensor, itself: bool = True) -> Tensor:
    """Return values mixed by `masked_softmax`, (B, H, T, D); see `backbones.base.Mix`.

    Args:
        mask: (B, T) 1 where a token takes part.
        itself: as of `masked_softmax`.
    """
    logits = (qkv.q * qkv.scale) @ qkv.k.transpose(-2, -1)
    logits = logits if bias is None else logits + bias
    return masked_softmax(logits, mask, itself=itself).to(qkv.v.dtype) @ qkv.v


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean (B, C) of the rows that take part; 0 where none does.

    Args:
        x: (B, N, C).
        mask: (B, N) 1 where a row takes part, with gradient.
    """
    weight = mask.float().unsqueeze(-1)
    return ((x * weight).sum(1) / weight.sum(1).clamp_min(1)).to(x.dtype)


def masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """Return the largest value (B, C) among the rows that take part; arguments as of `masked_mean`.

    Rows that do not take part fall to the least value of all: the mask has a gradient where a row is largest.
    """
    weight = mask.to(x.dtype).unsqueeze(-1)
    least = x.detach().amin(1, keepdim=True)
    return (x * weight + least * (1 - weight)).amax(1)


def mask_bias(mask: Tensor, eps: float = 1e-12) -> Tensor:
    """Return what a mask adds to logits before a softmax over keys, (B, 1, 1, N): log(mask + eps).

    So it multiplies the exponentials, and has the gradient of this product, at 0 too.

    Args:
        mask: (B, N) 1 where a key takes part, with gradient.
        eps: weight of a key that does not, beside 1.
    """
    return (mask.float() + eps).log()[:, None, None]


def gumbel_noise(like: Tensor) -> Tensor:
    """Return standard Gumbel noise of the shape of `like`, float32, drawn afresh."""
    return -torch.empty_like(like, dtype=torch.float32).exponential_().log()


def gumbel_keep(log_p: Tensor, noise: Tensor) -> Tensor:
    """Return a sampled decision per token, (B, N) float32: 1 keep, 0 drop; straight-through, temperature 1.

    Args:
        log_p: (B, N, 2) float32 log-probabilities of keep and drop.
        noise: the same shape, from `gumbel_noise`.
    """
    noisy = log_p + noise
    soft = noisy.softmax(-1)[..., 0]
    hard = (noisy[..., 0] >= noisy[..., 1]).to(soft.dtype)
    return hard + (soft - soft.detach())  # the value of `hard`, the gradient of `soft`


def gumbel_top(log_p: Tensor, noise: Tensor, keep: int, temperature: Tensor) -> Tensor:
    """Return a sampled choice of `keep` tokens of each image, (B, N) float32: 1 in, 0 out; straight-through.

    Args:
        log_p: (B, N) float32 log-probabilities; their softmax at this temperature is what learns.
        noise: the same shape, from `gumbel_noise`.
    """
    noisy = (log_p + noise) / temperature.float()
    soft = noisy.softmax(-1)
    hard = split_top(noisy, keep).kept.to(soft.dtype)
    return hard + (soft - soft.detach())  # the value of `hard`, the gradient of `soft`
