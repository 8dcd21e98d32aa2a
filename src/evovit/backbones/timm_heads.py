"""timm's heads for training with masks: they pool the tokens that take part.

Checked with timm 1.0.28 to 1.0.31.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from evovit.ops.mask import mask_bias, masked_max, masked_mean

KNOWN = (
    "VisionTransformer",
    "Eva",
    "Beit",
    "VisionTransformerRelPos",
)  # whose `forward_head` is pool, fc_norm, head_drop, head


def mean_of_max_and_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return timm's "avgmax" (B, C) of rows x (B, N, C)."""
    return 0.5 * (masked_max(x, mask) + masked_mean(x, mask))


POOLS = {"avg": masked_mean, "max": masked_max, "avgmax": mean_of_max_and_mean}


def masked_logits(host: Any, features: Tensor, mask: Tensor, with_prefix: bool) -> Tensor | None:
    """Return logits (B, classes) as the host's `forward_head` gives them from the rows that take part.

    Args:
        features: (B, P + N, C), normed.
        mask: (B, N) 1 where a patch row takes part.
        with_prefix: whether the host pools the prefix too.

    Returns:
        None where the host pools in another way.
    """
    owner = next(cls for cls in type(host).__mro__ if "forward_head" in cls.__dict__)
    if owner.__name__ not in KNOWN:
        return None
    first = host.num_prefix_tokens
    rows = features if with_prefix else features[:, first:]
    mask = F.pad(mask, (first, 0), value=1.0) if with_prefix else mask
    attn_pool: Any = getattr(host, "attn_pool", None)
    if type(attn_pool).__name__ == "AttentionPoolLatent":
        pooled = attn_pool(rows, mask_bias(mask).to(rows.dtype))
    elif attn_pool is None and host.global_pool in POOLS:
        pooled = POOLS[host.global_pool](rows, mask)
    else:
        return None
    return host.head(host.head_drop(host.fc_norm(pooled)))  # type: ignore[no-any-return]
