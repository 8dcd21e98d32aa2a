"""Checkpoints of the official implementations, read into ready models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.checkpoints.official_levit import load_evo_levit, load_levit
from evovit.checkpoints.official_lv_vit import (
    checked_size,
    in_lv_vit_layout,
    load_lv_vit,
    load_lv_vit_host,
    load_sit,
)
from evovit.errors import EvoViTError, in_one_line, nearest, shown
from evovit.model import ReducedViT, reduce_tokens
from evovit.models.evo_deit import build_evo_deit
from evovit.models.named import checked_arguments
from evovit.runtime.files import plain_state_dict, read_state_dict

INDICES = ("num_batches_tracked", "_idxs", "index")  # end the names of tensors of whole numbers


def load_official(name: str, source: str | Path | Mapping[str, Tensor], **options: Any) -> Any:
    """Load an official checkpoint and return the ready model, in evaluation mode.

    Args:
        name: a method, as in `list_methods`, for a `ReducedViT`; "lv_vit" or "levit" for that dense host.
        source: path of the file, or its content: a state dict, possibly wrapped under "model".
        options: `num_heads` (no tensor shows it); `img_size` if the images are not square; the method's own
            options, whose defaults here are the released code's.

    Raises:
        EvoViTError: unknown method, missing or damaged file, a checkpoint of another model, contradicting
        options.
    """
    if not isinstance(name, str) or name not in LOADERS:
        there = f"there are {', '.join(sorted(LOADERS))}"
        raise EvoViTError(f"There is no official loader {shown(name)}; {there}.{nearest(name, LOADERS)}")
    if not isinstance(source, str | Path | Mapping):
        raise EvoViTError(f"source is {shown(source)}; give the path of a checkpoint, or its state dict.")
    options = checked_arguments(options)
    state = plain_state_dict(source, "source") if isinstance(source, Mapping) else read_state_dict(source)
    _check_values(state)
    try:
        return LOADERS[name](state, **options).eval()
    except EvoViTError:
        raise
    except Exception as error:  # tensors and options of strangers contradict each other in many ways
        raise EvoViTError(
            f"The checkpoint cannot be loaded as {name} with {shown(options)} ({in_one_line(error)})."
        ) from error


def _check_values(state: Mapping[str, Tensor]) -> None:
    """Raise `EvoViTError` for values that no weights are: not finite, complex, whole but for indices."""
    for key, value in state.items():
        kind = f"of {value.dtype}"
        if value.is_floating_point() or (key.endswith(INDICES) and not value.is_complex()):
            kind = "" if value.isfinite().all() else "not finite"
        if kind:
            raise EvoViTError(
                f"{shown(key)} in the checkpoint has values {kind}; weights are finite numbers."
            )


def _load_evo_vit(
    state: dict[str, Tensor], *, num_heads: int | None = None, img_size: Any = None, **options: Any
) -> ReducedViT:
    """Map the released Evo-DeiT layout (q/k and v apart, norms and projections outside) to timm's."""
    depth = sum(key.startswith("qks.") and key.endswith(".qk.weight") for key in state)
    if (
        not depth
        or "pos_embed" not in state
        or "patch_embed.proj.weight" not in state
        or "head.weight" not in state
    ):
        missing = next(
            k
            for k in ("qks.0.qk.weight", "pos_embed", "patch_embed.proj.weight", "head.weight")
            if k not in state
        )
        raise EvoViTError(
            f"This is not an official Evo-ViT (DeiT) checkpoint: {missing!r} is missing. Load another "
            "model's weights into its own host and wrap that with evovit.reduce_tokens."
        )
    width, channels = state["patch_embed.proj.weight"].shape[:2]
    patch_height, patch_width = state["patch_embed.proj.weight"].shape[2:]
    num_heads = _checked_heads(num_heads, width)
    patches = state["pos_embed"].shape[1] - 1
    height, width_px = checked_size(patches, (patch_height, patch_width), img_size)
    mapped = {
        key: value
        for key, value in state.items()
        if key.split(".")[0] not in ("qks", "vs", "norms", "projs", "norm")
    }
    heads = {key: mapped.pop(key) for key in list(mapped) if key.split(".")[0] in ("norm_cls", "head_cls")}
    try:
        for i in range(depth):
            for part in ("weight", "bias"):
                mapped[f"blocks.{i}.norm1.{part}"] = state[f"norms.{i}.{part}"]
                mapped[f"blocks.{i}.attn.proj.{part}"] = state[f"projs.{i}.{part}"]
                mapped[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(
                    (state[f"qks.{i}.qk.{part}"], state[f"vs.{i}.v.{part}"])
                )
        mapped |= {f"fc_norm.{part}": state[f"norm.{part}"] for part in ("weight", "bias")}
        model = build_evo_deit(
            img_size=(height, width_px),
            patch_size=(patch_height, patch_width),
            in_chans=channels,
            num_classes=state["head.weight"].shape[0],
            embed_dim=width,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
            **({"assisted_head": bool(heads)} | options),
        )
        model.model.load_state_dict(mapped)
        if heads and model.method.class_head is not None:
            model.method.class_head.load_state_dict(heads)
    except (KeyError, RuntimeError) as error:
        raise EvoViTError(
            f"The Evo-ViT checkpoint is incomplete or inconsistent: {in_one_line(error)}."
        ) from error
    return model


def _load_deit(
    name: str,
    state: dict[str, Tensor],
    *,
    num_heads: int | None = None,
    img_size: Any = None,
    pool: Mapping[str, Any] = {},
    **options: Any,
) -> ReducedViT:
    """Load a checkpoint with DeiT's own keys; the positions are resized to `img_size` as the releases do.

    LV-ViT's keys are known too; the method's defaults are then those released for LV-ViT.

    Args:
        pool: of the host, how its head pools.
    """
    if in_lv_vit_layout(state):
        return _on_lv_vit(name, state, num_heads=num_heads, img_size=img_size, **options)
    expected = ("pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight")
    missing = next((key for key in expected if key not in state), None)
    if missing:
        raise EvoViTError(
            f"This is not an official {name} checkpoint in DeiT's layout: {missing!r} is missing."
        )
    width, channels, *patch = state["patch_embed.proj.weight"].shape
    num_heads = _checked_heads(num_heads, width)
    side = isqrt(state["pos_embed"].shape[1] - 1)
    size = (side * patch[0], side * patch[1]) if img_size is None else img_size
    height, width_px = (size, size) if isinstance(size, int) else size
    try:
        host = VisionTransformer(
            img_size=(height, width_px),
            patch_size=tuple(patch),
            in_chans=channels,
            num_classes=state["head.weight"].shape[0],
            embed_dim=width,
            depth=sum(key.endswith(".attn.qkv.weight") for key in state),
            num_heads=num_heads,
            mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
            qkv_bias="blocks.0.attn.qkv.bias" in state,
            **pool,
        )
        grid = (height // patch[0], width_px // patch[1])
        host.load_state_dict(state | {"pos_embed": _resize_positions(state["pos_embed"], side, grid)})
    except (KeyError, RuntimeError) as error:
        raise EvoViTError(
            f"The {name} checkpoint is incomplete or inconsistent: {in_one_line(error)}."
        ) from error
    return reduce_tokens(host, name, verify=False, **options)


def _on_lv_vit(
    name: str,
    state: dict[str, Tensor],
    *,
    aux_in_training: bool | None = None,
    skip_lam: float | None = None,
    **options: Any,
) -> ReducedViT:
    """Load a checkpoint in LV-ViT's layout; DynamicViT trains on class logits alone, as released."""
    build = {key: options.pop(key) for key in ("num_heads", "img_size")}
    training = name != "dynamic_vit" if aux_in_training is None else aux_in_training
    host = load_lv_vit_host(name, state, skip_lam=skip_lam, aux_in_training=training, **build)
    quarter = len(host.blocks) // 4
    blocks = {"blocks": (quarter, 2 * quarter, 3 * quarter)}
    released: dict[str, dict[str, Any]] = {
        "evit": blocks,
        "ats": blocks,
        "dynamic_vit": blocks | {"token_loss": "divergence"},
        "idle_vit": {"start_block": quarter, "group_length": quarter, "compared": "active"},
    }
    return reduce_tokens(host, name, verify=False, **(released[name] | options))


def _load_dynamic_vit(state: dict[str, Tensor], **options: Any) -> ReducedViT:
    """Load the backbone's keys and the predictors'; one predictor per block in `blocks`."""
    own = {key: value for key, value in state.items() if key.startswith("score_predictor.")}
    if not own:
        raise EvoViTError(
            "This is not an official dynamic_vit checkpoint: it has no 'score_predictor.' tensors. Load "
            "another model's weights into its own host and wrap that with evovit.reduce_tokens."
        )
    model = _load_deit("dynamic_vit", {key: state[key] for key in state if key not in own}, **options)
    try:
        model.method.load_state_dict(own)
    except RuntimeError as error:
        count = len(model.method.config.blocks)
        raise EvoViTError(f"The predictors do not fit the {count} blocks: {in_one_line(error)}.") from error
    return model


def _load_ats(state: dict[str, Tensor], **options: Any) -> ReducedViT:
    """Load DeiT's keys; the rows of zeros that the released sampling blocks store are left."""
    released: dict[str, Any] = {"keep_ratio": 1.0, "softmax": "released"}  # a point for each patch
    state = {key: value for key, value in state.items() if not key.endswith("out_zero_mask")}
    return _load_deit("ats", state, **(released | options))


def _load_cropr(state: dict[str, Tensor], *, global_pool: str = "token", **options: Any) -> ReducedViT:
    """Load timm's keys and the routers'; their options are read from the tensors, but not `router_heads`.

    Routers and auxiliary heads in the file that the options do not ask for are left.
    """
    own = {key: value for key, value in state.items() if key.startswith("cropr.")}
    numbers = {int(key.split(".")[1]) for key in own if key.split(".")[1].isdecimal()}
    first = {key.removeprefix("cropr.0.") for key in own}
    if "cross_attn.queries" not in first:
        raise EvoViTError(
            "This is not an official cropr checkpoint: 'cropr.0.cross_attn.queries' is missing. Load "
            "another model's weights into its own host and wrap that with evovit.reduce_tokens."
        )
    depth = sum(key.endswith(".attn.qkv.weight") for key in state)
    width, hidden = own["cropr.0.cross_attn.queries"].shape[-1], own.get("cropr.0.cross_attn.mlp.fc1.weight")
    read = {
        "llf": len(numbers) < depth - 1,
        "num_queries": own["cropr.0.cross_attn.queries"].shape[1],
        "auxiliary": "head.norm.weight" in first,
        "pre_attn_norm": "cross_attn.attn_norm.weight" in first,
        **{f"{each}_proj": f"cross_attn.{each}.weight" in first for each in ("q", "k", "v")},
        "qkv_bias": any(f"cross_attn.{each}.bias" in first for each in ("q", "k", "v")),
        "mlp": hidden is not None,
        "mlp_ratio": 4.0 if hidden is None else hidden.shape[0] / width,
    }
    unused = "norm." if global_pool == "avg" else "fc_norm."
    host = {key: value for key, value in state.items() if key not in own and not key.startswith(unused)}
    pool = {"global_pool": global_pool, "pool_include_prefix": global_pool == "avg"}
    model = _load_deit("cropr", host, pool=pool, **(read | options))
    wanted = model.method.state_dict()
    try:
        model.method.load_state_dict({key: value for key, value in own.items() if key in wanted})
    except RuntimeError as error:
        raise EvoViTError(f"The routers do not fit the options: {in_one_line(error)}.") from error
    return model


def _checked_heads(num_heads: int | None, width: int) -> int:
    """Return `num_heads`, which no tensor tells; raises `EvoViTError` unless it divides the width."""
    if type(num_heads) is not int or num_heads < 1 or width % num_heads:
        raise EvoViTError(
            f"num_heads is {shown(num_heads)}; give the number of attention heads, a divisor of the width "
            f"{width} (DeiT: width / 64)."
        )
    return num_heads


def _resize_positions(positions: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """Resize (1, 1 + side * side, C) to a grid, bicubic without antialiasing; the class token's stays."""
    if grid == (side, side):
        return positions
    square = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # type: ignore[no-untyped-call]
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1].float(), resized.flatten(2).transpose(1, 2)), dim=1)


LOADERS: dict[str, Callable[..., nn.Module]] = {
    "evo_vit": _load_evo_vit,
    "evit": partial(_load_deit, "evit"),
    "idle_vit": partial(_load_deit, "idle_vit"),
    "dynamic_vit": _load_dynamic_vit,
    "ats": _load_ats,
    "cropr": _load_cropr,
    "lv_vit": load_lv_vit,
    "sit": load_sit,
    "levit": load_levit,
    "evo_levit": load_evo_levit,
}
