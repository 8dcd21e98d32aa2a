"""Training losses between tokens, and between a model and its teacher (IdleViT, section 3; DynamicViT)."""

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


def logit_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) of logits (B, classes), temperature squared times, mean over images."""
    log_p = F.log_softmax(student.float() / temperature, dim=1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def feature_distance(student: Tensor, teacher: Tensor, dim: int = -1) -> Tensor:
    """Return the mean squared difference of features scaled to length 1 along `dim`."""
    return F.mse_loss(F.normalize(student.float(), dim=dim), F.normalize(teacher.float(), dim=dim))


def kept_distance(student: Tensor, teacher: Tensor, kept: Tensor, kind: str) -> Tensor:
    """Return the mean distance of kept tokens from the teacher's (DynamicViT, eq. 14); 0 where none is kept.

    Args:
        student: (B, N, C) features, or logits of every token.
        teacher: the same of the teacher.
        kept: (B, N) 1 for tokens that count, 0 for the others; no gradient flows through it.
        kind: "squared" is the mean squared difference; "divergence" KL(teacher || student) over C classes.
    """
    student, teacher, kept = student.float(), teacher.float(), kept.detach().float()
    if kind == "squared":
        each = (student - teacher).square().mean(-1)  # (B, N)
    else:
        log_q = teacher.log_softmax(-1)
        each = (log_q.exp() * (log_q - student.log_softmax(-1))).sum(-1)
    return (each * kept).sum() / kept.sum().clamp_min(1)


def confidence(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the probability of each image's label, (B,) float32 without gradient; of both where two mix.

    Args:
        logits: (B, classes).
        targets: (B,) classes, or (B, classes) shares: labels are the classes above the least share.
    """
    each = logits.detach().float().softmax(-1)
    if targets.ndim == 1:
        return each.gather(1, targets[:, None])[:, 0]
    return (each * (targets > targets.amin(1, keepdim=True))).sum(1)


def confident_distance(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Return the mean over the counted images of the mean squared difference; 0 where none counts (MCTF).

    Args:
        student: (B, C) features.
        teacher: (B, C), without gradient.
        counted: (B,) bool.
    """
    each = (student.float() - teacher.detach().float()).square().mean(-1)
    return (each * counted).sum() / counted.sum().clamp_min(1)
