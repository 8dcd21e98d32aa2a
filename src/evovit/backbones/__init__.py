"""Hosts: image -> tokens, block views, tokens -> logits. `adapt` finds an adapter by the host's class.

A package of another author offers adapters by an entry point of the group `evovit.backbones` that names a
module whose import registers them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any

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
    "adapter_of",
    "check_adapter",
    "check_tolerance",
    "list_hosts",
    "read_host",
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


def adapter_of(host: type) -> type[Backbone] | None:
    """Return the adapter of a host's class, or of the nearest of its bases that has one."""
    for cls in host.__mro__:
        found = _ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is not None:
            return found
    return None


def _find(host: type) -> type[Backbone]:
    found = adapter_of(host)
    if found is not None:
        return found
    others = [name for name in list_hosts() if not name.startswith(("transformers.", "peft."))]
    raise EvoViTError(
        f"{host.__module__}.{host.__qualname__} is not a supported host; pass a model of class "
        f"{' or '.join(others)}, one of transformers (docs/transformers.md), or write an adapter "
        "(docs/adding_a_backbone.md)."
    )


def adapt(model: nn.Module) -> Backbone:
    """Return the view of a host model; raises `EvoViTError`, listing the known hosts, for any other."""
    return _find(type(model))(model)


def read_host(model: nn.Module) -> Backbone:
    """Return the view of a host that comes from outside, or one sentence that says why there is none."""
    cls = _find(type(model))
    if not any(p.is_floating_point() for p in model.parameters()):
        raise EvoViTError(
            f"This {type(model).__name__} has no floating-point weights, which methods need; give "
            "the host as it was before quantisation."
        )
    try:
        backbone = cls(model)
    except EvoViTError:
        raise
    except Exception as error:  # a host whose parts somebody took away or replaced
        raise EvoViTError(
            f"This {type(model).__name__} is not built as its library builds it ({in_one_line(error)}); give "
            "it with one block or more and all its parts."
        ) from error
    if 0 in (*backbone.spec.depths, *backbone.spec.grid):
        raise EvoViTError(
            f"This {type(model).__name__} has {backbone.spec.depth} blocks and a {backbone.spec.grid[0]} x "
            f"{backbone.spec.grid[1]} grid of patches; give one with at least one block and one patch."
        )
    return backbone


def check_adapter(model: nn.Module, tolerance: float = 1e-4) -> None:
    """Check that evovit reproduces the host exactly, or raise `EvoViTError` that says what differs.

    There are two checks. Every part of the host and its blocks has a name and a class that the adapter knows;
    this finds parts that start at zero. And the adapter's views of the blocks, with nothing reduced, give the
    host's features and logits on random images: with the host's weights, with enlarged ones, and with these
    in training mode without dropout. The second needs values: for a host on the meta device it is left out.

    Args:
        tolerance: largest difference allowed with the host's weights, relative to the largest value; for
            float16 and bfloat16 hosts not below 0.05, which is their rounding.
    """
    tolerance = check_tolerance(tolerance)
    read_host(model).check_structure()
    weight = next(p for p in model.parameters() if p.is_floating_point())
    if weight.is_meta:
        return
    if weight.dtype in (torch.float16, torch.bfloat16):
        tolerance = max(tolerance, 0.05)
    try:
        found = worst_errors(model, adapt)
    except (EvoViTError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a stranger's forward raises what it likes
        raise EvoViTError(
            f"This {type(model).__name__} does not run on random images of its own size "
            f"({type(error).__name__}: {in_one_line(error)}); give a host that does, with all its weights on "
            "one device and in one dtype."
        ) from error
    limits = (tolerance, *(max(tolerance, LARGE_TOLERANCE),) * 2)
    when = ("", " once weights are large", " in training mode")
    for difference, limit, where in zip(found, limits, when, strict=True):
        if not difference <= limit:
            raise EvoViTError(
                f"{type(model).__name__} is not reproduced exactly{where}: with nothing reduced the output "
                f"differs by {difference:.1e} of its size (allowed {limit:.0e}), so it has a feature this "
                "version of evovit ignores; use a library version evovit was checked with, or extend "
                "the adapter (docs/adding_a_backbone.md)."
            )


def check_tolerance(tolerance: Any) -> float:
    """Return a largest relative difference; raises `EvoViTError` unless it is a finite number, 0 or more."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise EvoViTError(f"tolerance is {shown(tolerance)}; allowed is a finite number, 0 or more.")
    return float(tolerance)


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
for _point in entry_points(group="evovit.backbones"):
    try:
        _point.load()
    except Exception as error:
        warnings.warn(f"{_point.value} of another package, in evovit.backbones, fails: {error}", stacklevel=2)
