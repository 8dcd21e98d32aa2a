"""Training losses between tokens, and between a model and its teacher (IdleViT, section 3)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from evovit.tokens import QKV


class TokenCut(NamedTuple):
    """The two sides of a normalised graph cut between taking part and waiting."""

    inter: Tensor  # (), attention across the cut
    intra: Tensor  # (), attention missing among those that take part


def head_mean_attention(qkv: QKV) -> Tensor:
    """Return softmax over keys of the logits' mean over heads, (B, T, T) float32.

    The sum over heads of their products is one product of the whole width.
    """
    q, k = (x.float().transpose(1, 2).flatten(2) for x in (qkv.q, qkv.k))  # (B, T, H * D)
    logits = q @ k.transpose(-2, -1) * (qkv.scale / qkv.q.shape[1])
    return (logits if qkv.bias is None else logits + qkv.bias.float().mean(1)).softmax(-1)


def token_cut(attention: Tensor, mask: Tensor, num_prefix: int) -> TokenCut:
    """Return the token cut loss of one block, as IdleViT's code has it (class rows count, its column not).

    Args:
        attention: (B, T, T), rows sum to 1; gradients flow through it alone.
        mask: (B, T) 1 for tokens that take part, prefix included; 0 for idle ones.
    """
    mask = mask.to(attention.dtype)
    across = (mask[:, :, None] - mask[:, None, num_prefix:]).abs()  # prefix columns do not count
    inter = (across * attention[:, :, num_prefix:]).sum(-1)  # (B, T)
    intra = mask * (attention @ mask[:, :, None]).squeeze(-1)
    return TokenCut(inter.square().mean(), (intra - mask).square().mean())


def logit_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) of logits (B, classes), temperature 1, mean over images."""
    log_q = F.log_softmax(teacher.float(), dim=1)
    return F.kl_div(F.log_softmax(student.float(), dim=1), log_q, reduction="batchmean", log_target=True)


def feature_distance(student: Tensor, teacher: Tensor, dim: int = -1) -> Tensor:
    """Return the mean squared difference of features scaled to length 1 along `dim`."""
    return F.mse_loss(F.normalize(student.float(), dim=dim), F.normalize(teacher.float(), dim=dim))
