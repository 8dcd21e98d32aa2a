"""Hosts: image -> tokens, block views, tokens -> logits. `adapt` finds an adapter by the host's class.

A package of another author offers adapters by an entry point of the group `evovit.backbones` that names a
module whose import registers them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

import torch
from torch import nn

from evovit.backbones.base import Backbone, BackboneSpec, Block, Stage, evaluating, run_dense
from evovit.errors import EvoViTError

__all__ = ["Backbone", "BackboneSpec", "Block", "Stage", "adapt", "adapter", "check_adapter", "list_hosts"]

_ADAPTERS: dict[str, type[Backbone]] = {}


def adapter(*host_classes: str) -> Callable[[type[Backbone]], type[Backbone]]:
    """Register a `Backbone` for hosts by full class name (no import of the host's library)."""

    def add(cls: type[Backbone]) -> type[Backbone]:
        for name in host_classes:
            if name in _ADAPTERS:
                raise ValueError(f"{name} already has the adapter {_ADAPTERS[name].__name__}")
            _ADAPTERS[name] = cls
        return cls

    return add


def list_hosts() -> list[str]:
    """Return the full class names of the hosts that have an adapter."""
    return sorted(_ADAPTERS)


def _find(host: type) -> type[Backbone]:
    for cls in host.__mro__:
        found = _ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is not None:
            return found
    raise EvoViTError(
        f"{host.__module__}.{host.__qualname__} is not a supported host; pass a model of class "
        f"{' or '.join(list_hosts())}, or write an adapter (docs/adding_a_backbone.md)."
    )


def adapt(model: nn.Module) -> Backbone:
    """Return the view of a host model; raises `EvoViTError`, listing the known hosts, for any other."""
    return _find(type(model))(model)


def check_adapter(model: nn.Module, tolerance: float = 1e-4) -> None:
    """Prove that the views reproduce the host, or raise `EvoViTError` that says what differs.

    Two guards: every part the host and its blocks hold has a name the adapter knows (this sees a part that
    starts at zero), and the runner with plain blocks gives the host's features and logits on random images.
    The second needs values, so a host on the meta device passes the first guard only.

    Args:
        tolerance: largest difference allowed, relative to the largest value; for float16 and bfloat16 hosts
            not below 0.05, which is their rounding.
    """
    backbone = adapt(model)
    backbone.check_structure()
    weight = next(model.parameters())
    if weight.is_meta:
        return
    if weight.dtype in (torch.float16, torch.bfloat16):
        tolerance = max(tolerance, 0.05)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, *backbone.image_shape), generator=generator).to(weight)
    with evaluating(model), torch.no_grad():
        pairs = [(backbone.host_features(images), features := run_dense(backbone, images))]
        pairs.append((model(images), backbone.head(features)))
    error = max(_relative_error(ours, host) for host, ours in pairs)
    if not error <= tolerance:
        raise EvoViTError(
            f"{type(model).__name__} is not reproduced exactly: with nothing reduced the output differs by "
            f"{error:.1e} of its size (allowed {tolerance:.0e}), so it has a feature this version of evovit "
            "ignores; use a library version evovit was checked with, or extend the adapter "
            "(docs/adding_a_backbone.md)."
        )


def _relative_error(ours: torch.Tensor, host: torch.Tensor) -> float:
    """Return the largest difference relative to the host's largest value; infinite where shapes differ."""
    if ours.shape != host.shape:
        return float("inf")
    error = (ours.float() - host.float()).abs().max() / host.float().abs().max().clamp_min(1e-12)
    return error.nan_to_num(float("inf")).item()


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
for _point in entry_points(group="evovit.backbones"):
    try:
        _point.load()
    except Exception as error:
        warnings.warn(f"{_point.value} of another package, in evovit.backbones, fails: {error}", stacklevel=2)
