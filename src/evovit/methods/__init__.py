"""One paper a file. The registry finds every file beside this one, so a new method needs no other edit."""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Literal, get_args, get_origin, get_type_hints

from evovit.errors import EvoViTError
from evovit.methods.base import Method

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
    if name not in _METHODS:
        near = difflib.get_close_matches(name, list_methods(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise EvoViTError(f"There is no method {name!r}; the methods are {', '.join(list_methods())}.{hint}")
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
    """Return the method's `Config`; raises `EvoViTError` for an unknown option. Lists become tuples."""
    known = [f.name for f in fields(cls.Config)]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise EvoViTError(
                f"{cls.__name__} has no option {key!r}; its options are {', '.join(known)}.{hint}"
            )
    return cls.Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def describe_options(cls: type[Method]) -> list[tuple[str, Any, str]]:
    """Return (name, default, meaning) of each option: words allowed, and the comment in the file."""
    source = textwrap.dedent(inspect.getsource(cls.Config))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.strip("# ") for t in tokens if t.type == tokenize.COMMENT}
    lines: dict[str, range] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines[node.target.id] = range(node.lineno, (node.end_lineno or node.lineno) + 1)
    hints, found = get_type_hints(cls.Config), []
    for f in fields(cls.Config):
        words = get_args(hints[f.name]) if get_origin(hints[f.name]) is Literal else ()
        meaning = " ".join(comments[n] for n in lines.get(f.name, ()) if n in comments)
        found.append((f.name, f.default, f"{' | '.join(words)}: {meaning}" if words else meaning))
    return found


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
