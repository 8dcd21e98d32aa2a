"""What ranks patch tokens: the values of the option `selection` that methods share; formulas in `ops.score`.

`class` reads the class token's attention. Hosts without one have the attention a token receives
(`column_mean`), the length of its key (`key_norm`), what the pooling head's probe would read (`probe`), or
how far the block's FFN moves it (`shift`), which is known after the block only.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evovit.backbones.base import BackboneSpec, Block, Probe
from evovit.errors import EvoViTError, listed
from evovit.methods.base import require_class_token
from evovit.ops.score import (
    attention_column_mean,
    class_attention,
    key_norm,
    probe_attention,
    representation_shift,
)
from evovit.tokens import QKV, Tokens

MEASURES = {"column_mean": attention_column_mean, "key_norm": key_norm}  # all others: `class_attention`
CLASSLESS = (*MEASURES, "probe")


def check_selection(selection: str, spec: BackboneSpec, plain: Sequence[str] = ()) -> None:
    """Raise `EvoViTError` where the host has no class token, or no probe, that the selection reads.

    Args:
        plain: the method's own selections that read neither.
    """
    free = [name for name in CLASSLESS if name != "probe" or spec.has_probe]
    if selection == "probe" and not spec.has_probe:
        raise EvoViTError(
            "selection='probe' needs a head that pools by attention with one learnt query, as SigLIP's, and "
            f"this host has none; choose {listed(map(repr, free))}."
        )
    if selection not in (*CLASSLESS, *plain):
        require_class_token(spec, f"selection={selection!r}", listed(map(repr, (*free, *plain))))


def patch_score(
    selection: str, qkv: QKV, tokens: Tokens, probe: Probe | None = None, count: int | None = None
) -> Tensor:
    """Return how informative each patch token is, (B, N) float32, not negative.

    Args:
        qkv: what a block's attention saw of the tokens.
        tokens: as the block found them.
        probe: of the block.
        count: N, the number of leading patch tokens to score; None: all.
    """
    if selection == "probe" and probe is not None:
        return probe_attention(probe(tokens), tokens.num_patches, count)
    return MEASURES.get(selection, class_attention)(qkv, tokens.num_prefix, count)


def shift_score(attended: Tokens, after: Tokens, count: int | None = None) -> Tensor:
    """Return how far the FFN of a block moves each patch token, (B, N) float32: `selection="shift"`.

    Args:
        attended: after the block's attention.
        after: the same tokens after its FFN.
        count: N, the number of leading patch tokens to score; None: all.
    """
    return representation_shift(attended.patches[:, :count], after.patches[:, :count])


def shift_in(block: Block, tokens: Tokens) -> Tensor:
    """Return `shift_score` of the tokens that a block finds, without reducing them."""
    attended = block.attend(tokens)[0]
    return shift_score(attended, block.ffn(attended))
