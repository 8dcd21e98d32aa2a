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

from evovit.backbones.base import Backbone, BackboneSpec, Block, Stage, run_dense
from evovit.backbones.proof import LARGE_TOLERANCE, worst_errors
from evovit.errors import EvoViTError, in_one_line, shown

__all__ = [
    "Backbone",
    "BackboneSpec",
    "Block",
    "Stage",
    "adapt",
    "adapter",
    "check_adapter",
    "list_hosts",
    "run_dense",
]

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
    if not isinstance(model, nn.Module):
        raise EvoViTError(f"model is {shown(model)}; give a network, a torch.nn.Module.")
    return _find(type(model))(model)


def check_adapter(model: nn.Module, tolerance: float = 1e-4) -> None:
    """Prove that the views reproduce the host, or raise `EvoViTError` that says what differs.

    Two guards: every part the host and its blocks hold has a name and a class the adapter knows (this sees a
    part that starts at zero), and the runner with plain blocks gives the host's features and logits on random
    images: with the host's weights, with enlarged ones, and with these in training mode without dropout
    (`proof`). The second needs values, so a host on the meta device passes the first guard only.

    Args:
        tolerance: largest difference allowed with the host's weights, relative to the largest value; for
            float16 and bfloat16 hosts not below 0.05, which is their rounding.
    """
    adapt(model).check_structure()
    weight = next(model.parameters())
    if weight.is_meta:
        return
    if weight.dtype in (torch.float16, torch.bfloat16):
        tolerance = max(tolerance, 0.05)
    try:
        found = worst_errors(model, adapt)
    except EvoViTError:
        raise
    except Exception as error:  # a host of another kind fails in its own way
        raise EvoViTError(
            f"{type(model).__name__} does not run as its family does ({in_one_line(error)}); use a host "
            "that takes images and gives logits, or write an adapter (docs/adding_a_backbone.md)."
        ) from error
    limits = (tolerance, *(max(tolerance, LARGE_TOLERANCE),) * 2)
    when = ("", " once weights are large", " in training mode")
    for apart, limit, where in zip(found, limits, when, strict=True):
        if not apart <= limit:
            raise EvoViTError(
                f"{type(model).__name__} is not reproduced exactly{where}: with nothing reduced the output "
                f"differs by {apart:.1e} of its size (allowed {limit:.0e}), so it has a feature this version "
                "of evovit ignores; use a library version evovit was checked with, or extend the adapter "
                "(docs/adding_a_backbone.md)."
            )


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
for _point in entry_points(group="evovit.backbones"):
    try:
        _point.load()
    except Exception as error:
        warnings.warn(f"{_point.value} of another package, in evovit.backbones, fails: {error}", stacklevel=2)
