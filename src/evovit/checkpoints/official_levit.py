"""Checkpoints of the official LeViT and Evo-LeViT, read into timm's Levit or `models.levit_cls`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

from timm.models.levit import Levit, LevitDistilled
from torch import Tensor, nn

from evovit.errors import EvoViTError, in_one_line, shown
from evovit.model import ReducedViT, reduce_tokens
from evovit.models.levit_cls import SIZES, LevitCls

PARTS = (  # official name, timm's name; in this order
    (".proj.1.", ".proj.ln."),
    (".q.1.", ".q.ln."),
    (".mlp.0.", ".mlp.ln1."),
    (".mlp.2.", ".mlp.ln2."),
    (".c.", ".linear."),
    (".l.", ".linear."),
    ("poss", "pos_embed"),
)
HEADS = ("head", "head_dist", "head_cls", "head_cls_dist")


@dataclass(frozen=True)
class Layout:
    """What the names of an official checkpoint tell."""

    places: dict[str, str]  # official prefix -> timm's prefix
    trade_offs: dict[str, str]  # official name -> the method's name
    depths: tuple[int, ...]
    pairs: bool  # Evo-LeViT keeps attention and MLP of a block together, LeViT counts them apart


def load_evo_levit(
    state: dict[str, Tensor],
    *,
    key_dim: int | None = None,
    img_size: Any = None,
    class_heads: bool | None = None,
    fresh_parts: bool = False,
    **options: Any,
) -> ReducedViT:
    """Read an official Evo-LeViT checkpoint, whose blocks are stored twice, or start from one of LeViT.

    Args:
        key_dim: D, width of a head's keys; needed unless the widths are those of a published model.
        img_size: pixels if the images are not square.
        class_heads: keep the heads on the class token; default: if the checkpoint has them.
        fresh_parts: accept a checkpoint of plain LeViT: class token, positions and class heads start fresh,
            the position biases are left out, so the result has to be trained.
    """
    layout = read_layout(state)
    if not layout.pairs and not fresh_parts:
        raise EvoViTError(
            "This is a checkpoint of plain LeViT, which has no class token and no absolute positions; pass "
            "fresh_parts=True to start a training from it, or load it as 'levit'."
        )
    with _in_a_sentence():
        if class_heads is None:
            class_heads = not layout.pairs or "head_cls.l.weight" in state
        host = _host(state, layout, key_dim, img_size, LevitCls, class_heads=class_heads)
        mapped, learnt = rename(state, layout)
        if not class_heads:
            mapped = {key: value for key, value in mapped.items() if not key.startswith("head_cls")}
        if not layout.pairs:
            biased = {key: value for key, value in mapped.items() if not key.endswith("attention_biases")}
            mapped = {key: value for key, value in host.state_dict().items() if key not in biased} | biased
        host.load_state_dict(mapped)
        model = reduce_tokens(host, "evo_levit", verify=False, **options)
        if layout.pairs:
            model.method.load_state_dict(learnt)
    return model


def load_levit(state: dict[str, Tensor], *, key_dim: int | None = None, img_size: Any = None) -> nn.Module:
    """Read an official LeViT checkpoint into timm's Levit; arguments as `load_evo_levit`."""
    layout = read_layout(state)
    if layout.pairs:
        raise EvoViTError("This is a checkpoint of Evo-LeViT; load it as 'evo_levit'.")
    with _in_a_sentence():
        kind = LevitDistilled if "head_dist.l.weight" in state else Levit
        host = _host(state, layout, key_dim, img_size, kind)
        host.load_state_dict(rename(state, layout)[0])
    return host


def read_layout(state: dict[str, Tensor]) -> Layout:
    """Walk the flat list of blocks: residual blocks of a stage, its down-sampling and that one's MLP."""
    missing = next((key for key in ("patch_embed.0.c.weight", "head.l.weight") if key not in state), None)
    if missing:
        raise EvoViTError(f"This is no official LeViT or Evo-LeViT checkpoint: {missing!r} is missing.")
    places = {f"patch_embed.{2 * i}.": f"stem.conv{i + 1}." for i in range(4)}
    places |= {f"{name}.": f"{name}." for name in HEADS} | {"cls_token": "cls_token", "poss": "poss"}
    trade_offs, depths, entering, pairs, k = dict[str, str](), [0], False, False, 0
    while any(key.startswith(f"blocks.{k}.") for key in state):
        old, stage = f"blocks.{k}.", f"stages.{len(depths) - 1}."
        block = f"{stage}blocks.{depths[-1]}."
        if f"{old}kv.c.weight" in state:
            trade_offs[f"{old}learn_tradeoff"] = f"enter_tradeoff.{len(depths) - 1}"
            depths.append(0)
            places[old] = f"stages.{len(depths) - 1}.downsample.attn_downsample."
            entering = True
        elif f"{old}m1.m.qkv.c.weight" in state:
            trade_offs[f"{old}m1.m.learn_tradeoff"] = f"learn_tradeoff.{sum(depths)}"
            places |= {f"{old}m1.m.": f"{block}attn.", f"{old}m2.m.": f"{block}mlp."}
            depths[-1] += 1
            pairs = True
        elif f"{old}m.qkv.c.weight" in state:
            places[f"{old}m."] = f"{block}attn."
        elif entering:
            places[f"{old}m."] = f"{stage}downsample.mlp."
            entering = False
        else:
            places[f"{old}m."] = f"{block}mlp."
            depths[-1] += 1
        k += 1
    return Layout(places, trade_offs, tuple(depths), pairs)


def rename(state: dict[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the host's tensors and the method's under our names; second copies and index buffers go."""
    host, method = dict[str, Tensor](), dict[str, Tensor]()
    for key, value in state.items():
        if key.startswith("stage_blocks.") or key.endswith("attention_bias_idxs"):
            continue
        if key in layout.trade_offs:
            method[layout.trade_offs[key]] = value
            continue
        prefix = max((p for p in layout.places if key.startswith(p)), key=len, default=None)
        name = key if prefix is None else layout.places[prefix] + key[len(prefix) :]
        for official, ours in PARTS:
            name = name.replace(official, ours)
        host[name] = value
    return host, method


def _host(
    state: dict[str, Tensor], layout: Layout, key_dim: int | None, img_size: Any, kind: Any, **options: Any
) -> nn.Module:
    """Build the host that the tensors describe."""
    by_ours = {ours: official for official, ours in layout.places.items()}
    first = [by_ours[f"stages.{i}.blocks.0.attn."] for i in range(len(layout.depths))]
    rows, dims = zip(*(state[f"{name}qkv.c.weight"].shape for name in first), strict=True)
    sizes = {size["embed_dim"]: size["key_dim"] for size in SIZES.values()}
    key_dim = sizes.get(dims) if key_dim is None else key_dim
    if key_dim is None or key_dim < 1 or any(row % (4 * key_dim) for row in rows):
        raise EvoViTError(
            f"key_dim is {shown(key_dim)}; give the width of a head's keys (16 in LeViT-128S and 128, 32 in "
            f"the others), a divisor of {' and '.join(str(row // 4) for row in rows)}."
        )
    positions = state["poss"].shape[1] - 1 if layout.pairs else state[f"{first[0]}attention_biases"].shape[1]
    side = isqrt(positions) * 16
    size = (side, side) if img_size is None else (img_size,) * 2 if isinstance(img_size, int) else img_size
    if prod(-(-pixels // 16) for pixels in size) != positions:
        raise EvoViTError(
            f"img_size is {size[0]} x {size[1]} pixels, but the checkpoint has {positions} positions of "
            "16 x 16; leave img_size out for square images."
        )
    mlp = state[f"{by_ours['stages.0.blocks.0.mlp.']}0.c.weight"].shape[0]
    if kind is LevitCls:
        options["distilled"] = "head_dist.l.weight" in state
    host: nn.Module = kind(
        img_size=tuple(size),
        in_chans=state["patch_embed.0.c.weight"].shape[1],
        num_classes=state["head.l.weight"].shape[0],
        embed_dim=dims,
        key_dim=key_dim,
        depth=layout.depths,
        num_heads=tuple(row // (4 * key_dim) for row in rows),
        mlp_ratio=mlp / dims[0],
        **options,
    )
    return host


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    """Turn what is missing or of a wrong shape into a sentence."""
    try:
        yield
    except (KeyError, RuntimeError, IndexError) as error:
        raise EvoViTError(
            f"The LeViT checkpoint is incomplete or inconsistent: {in_one_line(error)}."
        ) from error
