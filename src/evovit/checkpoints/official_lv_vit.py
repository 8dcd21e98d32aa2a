"""Checkpoints in LV-ViT's layout: TokenLabeling's LV-ViT, SiT, and other methods on these hosts."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from evovit.errors import EvoViTError, in_one_line, shown
from evovit.model import ReducedViT, reduce_tokens
from evovit.models.lv_vit import LVViT

EXPECTED = (
    *("patch_embed.conv1.weight", "patch_embed.bn1.weight", "cls_token", "pos_embed"),
    *("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "head.weight", "aux_head.weight"),
)
RELEASED = {  # (width, depth): (heads, divisor of the residual branches), which no tensor tells
    (240, 12): (4, 1.0),
    (320, 14): (5, 2.0),
    (384, 16): (6, 2.0),
    (512, 20): (8, 2.0),
    (768, 24): (12, 3.0),
}
STEM_OF = {4: "4c", 6: "6c"}  # SiT's, by the number of convolutions


def in_lv_vit_layout(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a checkpoint has the convolutional stem of LV-ViT or SiT."""
    return EXPECTED[0] in state and EXPECTED[1] in state


def load_lv_vit_host(
    name: str,
    state: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    skip_lam: float | None = None,
    img_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> LVViT:
    """Build the host of a checkpoint and load it.

    Args:
        name: of the checkpoint's model, for messages.
        num_heads, skip_lam: needed where the size is no released one.
        img_size: needed where images are not square.
        options: further ones of `LVViT`, such as `aux_in_training`.

    Raises:
        EvoViTError: a checkpoint of another model, contradicting options.
    """
    missing = next((key for key in EXPECTED if key not in state), None)
    if missing:
        raise EvoViTError(
            f"This is not an official {name} checkpoint in LV-ViT's layout: {missing!r} is missing."
        )
    width, patches = state["cls_token"].shape[2], state["pos_embed"].shape[1] - 1
    depth = sum(key.endswith(".attn.qkv.weight") for key in state)
    heads, divisor = RELEASED.get((width, depth), (num_heads, skip_lam))
    heads, divisor = num_heads or heads, skip_lam or divisor
    if not heads or not divisor or width % heads:
        raise EvoViTError(
            f"num_heads is {shown(num_heads)} and skip_lam {shown(skip_lam)}; a {name} of width {width} and "
            f"{depth} blocks is no released size, so give both: the heads, a divisor of the width, and what "
            "residual branches are divided by."
        )
    projection = state.get("patch_embed.proj.weight")
    convolutions = sum(key.startswith("patch_embed.conv") for key in state)
    patch = 16 if projection is None else 2 * projection.shape[-1]
    height, width_px = checked_size(patches, (patch, patch), img_size)
    stem_width, channels = state["patch_embed.conv1.weight"].shape[:2]
    told: dict[str, Any] = {
        "stem": STEM_OF.get(convolutions, "4c") if projection is None else "4_2",
        "stem_width": stem_width,
        "aux_weight": 0.0 if projection is None else 0.5,
    }
    try:
        host = LVViT(
            img_size=(height, width_px),
            patch_size=patch,
            in_chans=channels,
            num_classes=state["head.weight"].shape[0],
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
            skip_lam=divisor,
            **(told | options),
        )
        host.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise EvoViTError(
            f"The {name} checkpoint is incomplete or inconsistent: {in_one_line(error)}."
        ) from error
    return host


def load_lv_vit(state: dict[str, Tensor], **options: Any) -> LVViT:
    """Load the dense LV-ViT (or SiT's teacher); options as `load_lv_vit_host`."""
    return load_lv_vit_host("lv_vit", state, **options)


def load_sit(
    state: dict[str, Tensor],
    *,
    num_heads: int | None = None,
    skip_lam: float | None = None,
    img_size: int | tuple[int, int] | None = None,
    blocks: tuple[int, ...] | None = None,
    **options: Any,
) -> ReducedViT:
    """Load a SiT; `token_weight=0` leaves its reverse modules out.

    Args:
        blocks: needed where the file has no reverse modules ("rtsm."), which tell it.
    """
    own = {key: value for key, value in state.items() if key.split(".")[0] in ("tsm", "rtsm")}
    if not any(key.startswith("tsm.") for key in own):
        raise EvoViTError(
            "This is not an official sit checkpoint: it has no 'tsm.' tensors. A teacher loads with "
            "evovit.load_official('lv_vit', ...)."
        )
    kept = {int(key.split(".")[1]): value.shape[1] for key, value in own.items() if "mlp1.fc1.weight" in key}
    if blocks is None and not kept:
        raise EvoViTError(
            "The file has no 'rtsm.' tensors, which tell after which blocks it slims; give blocks, counted "
            "from 0 (SiT-S: blocks=(8, 11, 13))."
        )
    slims = tuple(number for number in sorted(kept) if kept.get(number - 1) != kept[number])
    own_options = {"blocks": slims if blocks is None else tuple(blocks)} | (
        {} if kept else {"token_weight": 0.0}
    )
    rest = {key: value for key, value in state.items() if key not in own}
    host = load_lv_vit_host("sit", rest, num_heads=num_heads, skip_lam=skip_lam, img_size=img_size)
    model = reduce_tokens(host, "sit", verify=False, **(own_options | options))
    if model.method.config.token_weight == 0:
        own = {key: value for key, value in own.items() if key.startswith("tsm.")}
    try:
        model.method.load_state_dict(own)
    except RuntimeError as error:
        raise EvoViTError(
            f"The slimming modules do not fit blocks and keep_ratio: {in_one_line(error)}."
        ) from error
    return model


def checked_size(
    patches: int, patch: tuple[int, int], img_size: int | tuple[int, int] | None
) -> tuple[int, int]:
    """Return (height, width) in pixels: `img_size`, or that of a square image.

    Args:
        patches: positions of the checkpoint, without prefix tokens.
        patch: (height, width) of a patch in pixels.

    Raises:
        EvoViTError: `img_size` has another number of patches.
    """
    size = (isqrt(patches) * patch[0], isqrt(patches) * patch[1]) if img_size is None else img_size
    height, width = (size, size) if isinstance(size, int) else size
    found = (height // patch[0]) * (width // patch[1])
    if found != patches:
        raise EvoViTError(
            f"img_size {height} x {width} has {found} patches, but the checkpoint has {patches} positions; "
            "leave img_size out for square images."
        )
    return height, width
