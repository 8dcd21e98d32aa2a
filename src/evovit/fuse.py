"""Fold batch norms into the layers beside them, for inference: fewer operators, the same numbers."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from evovit.backbones import adapt, check_tolerance, read_host
from evovit.errors import EvoViTError, in_one_line
from evovit.model import ReducedViT

Model = TypeVar("Model", bound=nn.Module)
Norm = nn.BatchNorm1d | nn.BatchNorm2d
Layer = nn.Linear | nn.Conv2d


def fuse_batch_norm(model: Model, tolerance: float = 1e-4) -> Model:
    """Return a copy for inference in which batch norms are folded into the layers they follow or precede.

    Fused are a convolution or linear layer and the batch norm right after it, and a batch norm and the linear
    layer right after it (dropout may lie between), inside one module. A batch norm that takes no part in
    inference, such as that of a training head, stays. The copy's features and logits on random images are
    compared with the model's; the model itself is left as it is.

    Args:
        model: a supported host or a `ReducedViT`, with batch norms that keep running statistics.
        tolerance: largest difference allowed, relative to the largest value; for float16 and bfloat16 models
            not below 0.05, which is their rounding.

    Raises:
        EvoViTError: nothing to fold, or the result differs.
    """
    tolerance = check_tolerance(tolerance)
    shape = read_host(model.model if isinstance(model, ReducedViT) else model).image_shape
    fused = copy.deepcopy(model).eval()
    host = fused.model if isinstance(fused, ReducedViT) else fused
    weight = next(p for p in host.parameters() if p.is_floating_point())
    if weight.is_meta:
        raise EvoViTError("The host is on the meta device and has no values to fuse; create it on the CPU.")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, *shape), generator=generator).to(weight)
    used = list[nn.Module]()
    norms = [module for module in host.modules() if isinstance(module, Norm)]
    hooks = [norm.register_forward_hook(lambda module, *_: used.append(module)) for norm in norms]
    expected = _results(host, images)
    for hook in hooks:
        hook.remove()
    if not sum(_fold_children(parent, used) for parent in list(host.modules())):
        raise EvoViTError(
            f"{type(host).__name__} holds no batch norm with running statistics beside a convolution or "
            "linear layer, so there is nothing to fuse; use it as it is."
        )
    if weight.dtype in (torch.float16, torch.bfloat16):
        tolerance = max(tolerance, 0.05)
    error = max(
        ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).nan_to_num(float("inf")).item()
        for ours, theirs in zip(_results(host, images), expected, strict=True)
    )
    if not error <= tolerance:
        raise EvoViTError(
            f"With its batch norms folded {type(host).__name__} differs by {error:.1e} of its output's size "
            f"(allowed {tolerance:.0e}): its layers do not run in the order they are stored; use it unfused."
        )
    return fused


@torch.no_grad()
def _results(host: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits in float32."""
    try:
        return adapt(host).host_features(images).float(), host(images).float()
    except Exception as error:  # a stranger's forward raises what it likes
        raise EvoViTError(
            f"This {type(host).__name__} gives no features and logits for random images of its own size "
            f"({type(error).__name__}: {in_one_line(error)}); check it with evovit.check_adapter."
        ) from error


@torch.no_grad()
def _fold_children(parent: nn.Module, used: list[nn.Module]) -> int:
    """Fold each batch norm among the children that took part; return how many."""
    children = [(name, part) for name, part in parent.named_children() if not _is_idle(part)]
    count = 0
    for i, (name, norm) in enumerate(children):
        if not isinstance(norm, Norm) or norm.running_var is None or not any(norm is part for part in used):
            continue
        before = children[i - 1][1] if i else None
        after = children[i + 1][1] if i + 1 < len(children) else None
        if isinstance(before, Layer) and before.weight.shape[0] == norm.num_features:
            _fold_after(before, norm)
        elif isinstance(after, nn.Linear) and after.in_features == norm.num_features:
            _fold_before(norm, after)
        else:
            continue
        setattr(parent, name, nn.Identity())
        count += 1
    return count


def _is_idle(module: nn.Module) -> bool:
    """Tell whether a module does nothing in evaluation."""
    return isinstance(module, nn.Identity | nn.Dropout)


def _scale_and_shift(norm: Norm) -> tuple[Tensor, Tensor]:
    """Return what a batch norm multiplies by and adds in evaluation, (C,) float64 each."""
    assert norm.running_var is not None and norm.running_mean is not None
    weight = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    bias = torch.zeros_like(norm.running_var) if norm.bias is None else norm.bias
    scale = weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, bias.double() - norm.running_mean.double() * scale


def _fold_after(layer: Layer, norm: Norm) -> None:
    """Fold a batch norm into the layer before it: each output row times its scale."""
    scale, shift = _scale_and_shift(norm)
    rows = scale.view(-1, *(1 for _ in layer.weight.shape[1:]))
    _set(layer, layer.weight * rows, shift if layer.bias is None else layer.bias * scale + shift)


def _fold_before(norm: Norm, layer: nn.Linear) -> None:
    """Fold a batch norm into the linear layer after it: each input column times its scale."""
    scale, shift = _scale_and_shift(norm)
    added = layer.weight.double() @ shift
    _set(layer, layer.weight * scale, added if layer.bias is None else layer.bias + added)


def _set(layer: Layer, weight: Tensor, bias: Tensor) -> None:
    kept = layer.weight
    layer.weight = nn.Parameter(weight.to(kept.dtype), kept.requires_grad)
    layer.bias = nn.Parameter(bias.to(kept.dtype), kept.requires_grad)
