"""Heads and FFN channels removed for good: S2ViTE's structured sparsity (Chen et al., NeurIPS 2021).

`StructuredMasks` holds the masks while a timm ViT trains and lets dead heads and channels grow again; `slim`
takes masked weights out and gives a smaller ViT that computes the same. Token reduction may follow on it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from evovit.backbones.base import expect_class
from evovit.errors import EvoViTError, check_kind, shown

HOST = "timm.models.vision_transformer.VisionTransformer"
FIRST_RATE, LAST_RATE = 0.5, 0.005  # share of the living that die at once, at the start and the end
SETTLED = 0.8  # share of the training after which masks stay


class BlockMask(NamedTuple):
    """What one block keeps."""

    heads: Tensor  # (H,) bool
    channels: Tensor  # (hidden channels of the FFN,) bool


def slim(model: nn.Module, masks: Sequence[BlockMask]) -> nn.Module:
    """Return a smaller copy of a timm ViT that computes what the model does with its masked weights at zero.

    A masked head has zero rows in `qkv.weight`, a masked channel a zero row in `fc1.weight` and a zero column
    in `fc2.weight`; biases stay. Such a head still outputs its bias of v, a constant, which is added to the
    bias of the projection. In evaluation, or without dropout of attention weights, the copy is exact.

    Args:
        model: its own weights need not be masked; those of dead heads and channels do not count.
        masks: one per block, as in `StructuredMasks.masks`.

    Raises:
        EvoViTError: another host, parts that tie heads or channels together, masks that do not fit.
    """
    blocks = checked_blocks(model)
    if len(masks) != len(blocks):
        raise EvoViTError(f"masks has {len(masks)} entries for {len(blocks)} blocks; give one each.")
    small: Any = copy.deepcopy(model)
    for number, (block, mask) in enumerate(zip(small.blocks, masks, strict=True)):
        attn, mlp = block.attn, block.mlp
        heads = chosen(mask.heads, attn.num_heads, f"heads of block {number}")
        channels = chosen(mask.channels, mlp.fc1.out_features, f"channels of block {number}")
        size = attn.head_dim
        inside = [head * size + i for head in heads for i in range(size)]
        dead = sorted(set(range(attn.attn_dim)) - set(inside))
        attn.proj = without_columns(attn.proj, inside, dead, values_bias(attn))
        attn.qkv = with_rows(attn.qkv, [part * attn.attn_dim + i for part in range(3) for i in inside])
        attn.num_heads, attn.attn_dim = len(heads), len(inside)
        mlp.fc1, mlp.fc2 = with_rows(mlp.fc1, channels), without_columns(mlp.fc2, channels, [], None)
    return small  # type: ignore[no-any-return]


def checked_blocks(model: nn.Module) -> Any:
    """Return the blocks of a host whose heads and channels can be told apart, or raise `EvoViTError`."""
    check_kind("model", model, nn.Module, "a timm VisionTransformer")
    expect_class(model, (HOST,), "The model")
    host: Any = model
    for number, block in enumerate(host.blocks):
        expect_class(block, ("timm.models.vision_transformer.Block",), f"Block {number}")
        expect_class(block.attn, ("timm.layers.attention.Attention",), f"The attention of block {number}")
        expect_class(block.mlp, ("timm.layers.mlp.Mlp",), f"The FFN of block {number}")
        tied = [part for part in (block.attn.norm, block.mlp.norm) if not isinstance(part, nn.Identity)]
        if tied or getattr(block.attn, "gate", None) is not None:
            raise EvoViTError(
                f"Block {number} normalises or gates its heads or channels together, so none can be "
                "removed alone; create the host without scale_attn_norm, scale_mlp_norm and gates."
            )
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            expect_class(layer, ("torch.nn.modules.linear.Linear",), f"A projection of block {number}")
    return host.blocks


def chosen(mask: Tensor, count: int, what: str) -> list[int]:
    """Return the places where a mask (count,) is true, one at least."""
    given = check_kind(what, mask, Tensor, f"a mask of {count} bools")
    if given.dtype != torch.bool or given.shape != (count,) or not given.any():
        raise EvoViTError(
            f"{what}: the mask is {given.dtype} of shape {tuple(given.shape)}; give {count} bools, "
            "at least one of them True."
        )
    return given.nonzero().flatten().tolist()


def values_bias(attn: Any) -> Tensor | None:
    """Return the bias of v, (H * D,), None without one."""
    return None if attn.qkv.bias is None else attn.qkv.bias.detach()[2 * attn.attn_dim :]


def with_rows(layer: nn.Linear, rows: Sequence[int]) -> nn.Linear:
    """Return a linear layer that computes these outputs alone."""
    weight = layer.weight.detach()
    at = torch.tensor(rows, device=weight.device)
    return linear(weight[at], None if layer.bias is None else layer.bias.detach()[at], layer)


def without_columns(
    layer: nn.Linear, kept: Sequence[int], dead: Sequence[int], fixed: Tensor | None
) -> nn.Linear:
    """Return a linear layer that reads these inputs alone; those that are dead have the value `fixed`."""
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    if fixed is not None and dead:
        at = torch.tensor(dead, device=weight.device)
        constant = weight[:, at] @ fixed[at]
        bias = constant if bias is None else bias + constant
    return linear(weight[:, torch.tensor(kept, device=weight.device)], bias, layer)


def linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    """Return a linear layer with these weights, which learn if those of `like` do."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone(), like.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), like.weight.requires_grad)
    return layer.train(like.training)


class Felt(NamedTuple):
    """What the last backward pass says of the heads of one block, each (H,) float32."""

    importance: Tensor  # mean over images of |sum of gradient * value|
    pull: Tensor  # sum of |gradient|


class StructuredMasks:
    """Masks of heads and FFN channels of a timm ViT in training; the numbers of a block stay as they are.

    After each optimiser step call `apply`; every few thousand steps, before it, `regrow`. Both work on the
    model that is trained, alone or within a reduced model or DistributedDataParallel, in eager mode.

    Args:
        model: a timm VisionTransformer.
        heads, channels: shares of them that stay, above 0 up to 1; the count is rounded down, at least one.
        seed: of the random choice of those that stay at first, the same in every process.
    """

    def __init__(self, model: nn.Module, heads: float = 0.7, channels: float = 0.6, seed: int = 0) -> None:
        for name, share in (("heads", heads), ("channels", channels)):
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                raise EvoViTError(f"{name} is {shown(share)}; allowed is a number above 0, at most 1.")
        self.blocks = checked_blocks(model)
        self.model, self.felt = model, dict[int, Felt]()
        generator = torch.Generator().manual_seed(seed)
        self.masks = [
            BlockMask(
                drawn(block.attn.num_heads, heads, generator),
                drawn(block.mlp.fc1.out_features, channels, generator),
            )
            for block in self.blocks
        ]
        self.hooks = [
            block.attn.proj.register_forward_pre_hook(self._listener(number))
            for number, block in enumerate(self.blocks)
        ]
        self.apply()

    def close(self) -> None:
        """Remove the hooks on the heads; masks stay."""
        for hook in self.hooks:
            hook.remove()

    def slim(self) -> nn.Module:
        """Return the smaller model, see `slim`."""
        self.close()
        return slim(self.model, self.masks)

    @torch.no_grad()
    def apply(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        """Set dead weights to zero, and what optimisers remember of them."""
        for block, mask in zip(self.blocks, self.masks, strict=True):
            rows = mask.heads.repeat_interleave(block.attn.head_dim).repeat(3)
            for p, living in (
                (block.attn.qkv.weight, rows[:, None]),
                (block.mlp.fc1.weight, mask.channels[:, None]),
                (block.mlp.fc2.weight, mask.channels),
            ):
                at = living.to(p.device)
                p.mul_(at)
                for optimizer in optimizers:
                    for slot in optimizer.state.get(p, {}).values():
                        if isinstance(slot, Tensor) and slot.shape == p.shape:
                            slot.mul_(at)

    @torch.no_grad()
    def regrow(self, progress: float) -> None:
        """Let the least useful die and as many others grow, by the gradients of the last step.

        Channels die by the size of their weights and grow by their gradients. Heads die by gradient times
        value of their output and grow by the gradient. What has just died may grow again at once.

        Args:
            progress: share of the training done, 0 to 1; from 0.8 on nothing changes.
        """
        if progress >= SETTLED:
            return
        rate = death_rate(progress)
        for number, (block, mask) in enumerate(zip(self.blocks, self.masks, strict=True)):
            fc1, fc2 = block.mlp.fc1.weight, block.mlp.fc2.weight
            if number not in self.felt or fc1.grad is None or fc2.grad is None:
                raise EvoViTError(f"Block {number} has no gradient; call regrow after a backward pass.")
            importance, pull = (everywhere(each) for each in self.felt[number])
            size, gradient = (a.abs().sum(1) + b.abs().sum(0) for a, b in ((fc1, fc2), (fc1.grad, fc2.grad)))
            self.masks[number] = BlockMask(
                turned(mask.heads, importance.cpu(), pull.cpu(), rate),
                turned(mask.channels, size.cpu(), gradient.cpu(), rate),
            )

    def _listener(self, number: int) -> Any:
        """Return a hook that records what the backward pass says of the heads of a block."""

        def listen(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            heads, values = self.blocks[number].attn.num_heads, given[0]  # (B, T, H * D)
            if not values.requires_grad:
                return

            def note(gradient: Tensor) -> None:
                apart = gradient.detach().float().unflatten(-1, (heads, -1))  # type: ignore[no-untyped-call]
                products = apart * values.detach().float().view(apart.shape)
                self.felt[number] = Felt(products.sum((1, 3)).abs().mean(0), apart.abs().sum((0, 1, 3)))

            values.register_hook(note)  # type: ignore[no-untyped-call]

        return listen


def drawn(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Return a mask (count,) with int(count * share) living, at least one, at random."""
    mask = torch.zeros(count, dtype=torch.bool, device="cpu")
    mask[torch.randperm(count, generator=generator, device="cpu")[: max(1, int(count * share))]] = True
    return mask


def death_rate(progress: float) -> float:
    """Return the share of the living that die, half a cosine from 0.5 to 0.005."""
    return LAST_RATE + (FIRST_RATE - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2


def turned(mask: Tensor, worth: Tensor, pull: Tensor, rate: float) -> Tensor:
    """Return a mask with the living of least worth dead and as many of the dead with most pull alive."""
    count = math.ceil(rate * int(mask.sum()))
    dying = worth.masked_fill(~mask, torch.inf).argsort(stable=True)[:count]
    after = mask.clone()
    after[dying] = False
    growing = pull.masked_fill(after, -torch.inf).argsort(descending=True, stable=True)[:count]
    after[growing] = True
    return after


def everywhere(value: Tensor) -> Tensor:
    """Return the mean over the processes of a training, so that they decide alike."""
    if not distributed.is_available() or not distributed.is_initialized():
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()
