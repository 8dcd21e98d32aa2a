"""How informative is a patch token? Scores in float32, from q and k; the attention matrix stays unbuilt."""

from __future__ import annotations

import torch
from torch import Tensor

from evovit.ops.mask import masked_mean
from evovit.tokens import QKV


def with_bias(qkv: QKV, bias: Tensor | None) -> QKV:
    """Return what attention sees with a bias of the method's, (B, 1 or H, 1 or T, T), beside the host's."""
    if bias is None:
        return qkv
    if not bias.is_floating_point():  # True where a key may be seen
        bias = torch.zeros_like(bias, dtype=qkv.q.dtype).masked_fill(~bias, -torch.inf)
    return qkv._replace(bias=bias if qkv.bias is None else qkv.bias + bias)


def class_logits(qkv: QKV) -> Tensor:
    """Return the class token's attention logits to all tokens, (B, H, P + N), at least float32.

    Written as product and sum because a matrix product with one row is slower, and so that half-precision
    inputs are multiplied in float32.
    """
    query = qkv.q[:, :, :1].float() * qkv.scale  # (B, H, 1, D)
    logits = (query * qkv.k).sum(-1)  # (B, H, P + N)
    return logits if qkv.bias is None else logits + qkv.bias[:, :, 0].float()


def class_attention(qkv: QKV, num_prefix: int, count: int | None = None) -> Tensor:
    """Return the class token's attention to the patch tokens, mean over heads (Evo-ViT eq. 3; one query row).

    The softmax runs over all keys, prefix included.

    Args:
        count: N, the number of leading patch tokens to score; None: all.

    Returns:
        (B, N) float32, each in [0, 1].
    """
    return class_logits(qkv).softmax(-1)[..., _patches(num_prefix, count)].mean(1).float()


def _patches(num_prefix: int, count: int | None) -> slice:
    """Return where the first `count` patch tokens stand behind the prefix; None: all."""
    return slice(num_prefix, None if count is None else num_prefix + count)


def class_logit_mean(qkv: QKV, num_prefix: int) -> Tensor:
    """Return the class token's attention logits to the patch tokens, mean over heads, no softmax (IdleViT).

    Returns:
        (B, N) float32.
    """
    return class_logits(qkv)[..., num_prefix:].mean(1).float()


def attention_column_mean(
    qkv: QKV, num_prefix: int, count: int | None = None, asking: Tensor | None = None
) -> Tensor:
    """Return the attention each patch token receives, mean over heads and queries (Evo-ViT, table 4).

    For hosts without a class token. The column sums need every row, so the weights are formed one head at a
    time: (B, T, T) float32 is the peak.

    Args:
        count: N, the number of leading patch tokens to score; None: all.
        asking: (B, P + N) 1 for queries that count; None: all do but padding.

    Returns:
        (B, N) float32, each in [0, 1].
    """
    if asking is None and qkv.padding is not None:
        asking = ~qkv.padding
    total = torch.zeros((), device=qkv.q.device)
    for head in range(qkv.q.shape[1]):
        logits = (qkv.q[:, head].float() * qkv.scale) @ qkv.k[:, head].float().transpose(-2, -1)  # (B, T, T)
        if qkv.bias is not None:
            logits = logits + qkv.bias[:, min(head, qkv.bias.shape[1] - 1)].float()
        weights = logits.softmax(-1)  # (B, T, T)
        total = total + (weights.mean(1) if asking is None else masked_mean(weights, asking))
    return total[:, _patches(num_prefix, count)] / qkv.q.shape[1]


def key_norm(qkv: QKV, num_prefix: int, count: int | None = None) -> Tensor:
    """Return the length of each patch token's key, mean over heads, as a share of the lengths of all.

    For hosts without a class token; no query is read, so it costs next to nothing. A longer key moves every
    query's attention more, so the longest stay: a choice of ours, as papers on decoders keep the shortest
    (Devoto et al., EMNLP 2024). Where the host normalises its keys, they hardly differ. As a
    share it weighs tokens as attention does.

    Args:
        count: N, the number of leading patch tokens to score; None: all.

    Returns:
        (B, N) float32, each in [0, 1], with the sum 1.
    """
    length = qkv.k.float().norm(dim=-1) if qkv.key_length is None else qkv.key_length  # (B, H, P + N)
    length = length if qkv.padding is None else length.masked_fill(qkv.padding[:, None], 0.0)
    length = length[..., _patches(num_prefix, count)].mean(1)
    return length / length.sum(-1, keepdim=True).clamp_min(torch.finfo(length.dtype).tiny)


def probe_attention(qkv: QKV, num_patches: int, count: int | None = None) -> Tensor:
    """Return the attention that the pooling head's probe pays each patch token, mean over heads.

    The head with one learnt query of SigLIP (Zhai et al., ICCV 2023; "MAP" of CVPR 2022) attends to the
    tokens as if they were the last: what it would read of each is what counts.

    Args:
        qkv: of the head, with one query, (B, H, 1, D); the last `num_patches` keys are the patch tokens'.
        count: N, the number of leading patch tokens to score; None: all.

    Returns:
        (B, N) float32, each in [0, 1].
    """
    return class_attention(qkv, qkv.k.shape[2] - num_patches, count)


def representation_shift(before: Tensor, after: Tensor) -> Tensor:
    """Return how far the FFN moves each token, (B, N) float32 (Representation Shift, Choi et al., ICCV 2025).

    The L2 distance between the output of the FFN's branch and its input (eq. 4 to 6; the residual is not
    added): || branch(x) - x ||, where the block gives x + branch(x), LayerScale and drop path of the host in
    it. It needs neither attention weights nor a class token.

    Args:
        before: (B, N, C), patch tokens after attention.
        after: (B, N, C), the same after the FFN.
    """
    distance: Tensor = torch.linalg.vector_norm(after.float() - 2 * before.float(), dim=-1)
    return distance


def running_score(old: Tensor | None, new: Tensor, trade_off: float | Tensor) -> Tensor:
    """Return trade_off * old + (1 - trade_off) * new (Evo-ViT eq. 4); `new` if there is no old."""
    if old is None or (not isinstance(trade_off, Tensor) and trade_off == 0):
        return new
    return trade_off * old + (1 - trade_off) * new


def random_score(index: Tensor, salt: int | None) -> Tensor:
    """Return a random score per token, (B, N) float32 in [0, 1).

    Args:
        index: (B, N) raster positions.
        salt: None draws afresh; a number gives every position its fixed score, equal on every device and run.
    """
    if salt is None:
        return torch.rand_like(index, dtype=torch.float32)
    mixed = (index + 1) * 2654435761 + (salt + 1) * 40503
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 3266489917) & 0xFFFFFF
    return mixed.float() / 0x1000000


def attention_map(qkv: QKV) -> Tensor:
    """Return the attention weights, (B, H, T, T), at least float32, for methods that need the matrix."""
    kind = "cpu" if qkv.q.is_meta else qkv.q.device.type  # autocast knows no meta device
    q, k = (x if x.dtype == torch.float64 else x.float() for x in (qkv.q, qkv.k))
    with torch.autocast(kind, enabled=False):
        logits = (q * qkv.scale) @ k.transpose(-2, -1)
    return (logits if qkv.bias is None else logits + qkv.bias).softmax(-1)
