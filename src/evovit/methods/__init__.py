"""The methods, one file per paper. The registry finds all files beside this one, and those of other packages.

A package of another author offers methods by an entry point of the group `evovit.methods` that names a module
whose import registers them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any

from evovit.errors import EvoViTError, nearest, shown
from evovit.methods.base import Method
from evovit.options import build

DENSE = "dense"  # the method that reduces nothing

_METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Register a method under its snake-case name; refuses a second use of a name."""

    def add(cls: type[Method]) -> type[Method]:
        if name in _METHODS:
            raise ValueError(f"the method name {name!r} is taken by {_METHODS[name].__name__}")
        _METHODS[name] = cls
        return cls

    return add


def list_methods() -> list[str]:
    """Return the names that `reduce_tokens` takes."""
    return sorted(_METHODS)


def find_method(name: str) -> type[Method]:
    """Return the method class of a name; raises `EvoViTError` with the nearest name."""
    if not isinstance(name, str) or name not in _METHODS:
        raise EvoViTError(
            f"There is no method {shown(name)}; the methods are {', '.join(list_methods())}."
            f"{nearest(name, list_methods())}"
        )
    return _METHODS[name]


def find_method_of(config: Method.Config) -> type[Method]:
    """Return the method class a `Config` belongs to."""
    for cls in _METHODS.values():
        if type(config) is cls.Config:
            return cls
    raise EvoViTError(f"{type(config).__qualname__} is not the Config of a registered method.")


def name_of(method: Method) -> str:
    """Return the registered name of a method's class."""
    return next(name for name, cls in _METHODS.items() if cls is type(method))


def build_config(cls: type[Method], options: dict[str, Any]) -> Any:
    """Return the method's `Config`; raises `EvoViTError` for an unknown option or a wrong value."""
    return build(cls.Config, cls.Config.renamed(options), cls.__name__)


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
for _point in entry_points(group="evovit.methods"):
    try:
        _point.load()
    except Exception as error:
        warnings.warn(f"{_point.value} of another package, in evovit.methods, fails: {error}", stacklevel=2)
