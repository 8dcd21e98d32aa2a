"""Options: declared once, with type, range, default and meaning; checked alike wherever they come from.

A class of options is a frozen dataclass below `Options`, whose types carry their ranges:

    keep_ratio: Ratio | tuple[Ratio, ...] = option(0.5, "share of the patch tokens kept")

The same text means the same value in a TOML file, after `--set` and in `--method NAME:option=value`.
"""

from __future__ import annotations

import ast
import datetime
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter

from evovit.errors import EvoViTError, listed, nearest, shown

MOST = 2**31 - 1  # of a whole number: above it counts no longer fit where they go

Share = Annotated[float, Ge(0), Le(1)]
Ratio = Annotated[float, Gt(0), Le(1)]  # a keep ratio: keeping none is no option
Weight = Annotated[float, Ge(0)]  # of a loss, a rate
Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1), Le(MOST)]
Number = Annotated[int, Ge(0), Le(MOST)]  # a count that may be 0, a position

WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a table",
}

Kind = TypeVar("Kind", bound="Options")


def option(default: Any = MISSING, meaning: str = "") -> Any:
    """Declare an option: its default (without one it has to be given), and what it means in few words."""
    return field(default=default, metadata={"meaning": meaning})


class Options:
    """Base of every class of options; values are checked and made plain when it is built.

    Numbers may be NumPy's or PyTorch's, tuples may be lists, and a whole number may stand for a number.

    Raises:
        EvoViTError: a value of another type or out of its range.
    """

    title: ClassVar[str] = ""  # stands before the names in sentences, such as `run.`

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, (kind, adapter) in _checks(cls).items():
            given = getattr(self, name)
            try:
                value = adapter.validate_python(_plain(given, kind))
            except (ValueError, RuntimeError):  # also a tensor without values, a list that holds itself
                hint = nearest(given, get_args(kind)) if get_origin(kind) is Literal else ""
                most = "" if _small(given) else f", at most {MOST}"
                sentence = f"{self.title}{name} is {shown(given)}; allowed is {allowed(kind)}{most}.{hint}"
                raise EvoViTError(sentence) from None
            object.__setattr__(self, name, value)


class Described(NamedTuple):
    """An option as help and docs show it."""

    name: str
    default: str  # as it is written in TOML; empty where the option has to be given
    allowed: str
    meaning: str


@cache
def _checks(cls: Any) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    hints = get_type_hints(cls, include_extras=True)
    config = ConfigDict(strict=True, allow_inf_nan=False)
    return {f.name: (hints[f.name], TypeAdapter(hints[f.name], config=config)) for f in fields(cls)}


def _plain(value: Any, kind: Any) -> Any:
    """Return a value of Python's own types: scalars of NumPy and PyTorch as numbers, lists as tuples."""
    if isinstance(value, str):
        if not is_text(value):
            raise ValueError("no file can hold it as text")
        members = _members(kind)
        return None if value == "none" and NoneType in members and str not in members else value
    if isinstance(value, list | tuple):
        return tuple(_plain(item, None) for item in value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return tuple(value.tolist()) if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist") else value


def is_text(value: str) -> bool:
    """Tell whether a file, or the name of one, can hold the text: no NUL, no half of a character."""
    return "\x00" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _small(value: Any) -> bool:
    return not isinstance(value, int) or value <= MOST


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def allowed(kind: Any) -> str:
    """Say which values a type takes, in words."""
    members, texts = _members(kind), list[str]()
    for member in members:
        if get_origin(member) is tuple:
            each = get_args(member)
            items = "such" if each[0] in members else allowed(each[0])
            many = "a list" if each[-1] is Ellipsis else f"a list of {len(each)}"
            texts.append(f"{many}, each {items}" if items != "such" else f"{many} of such")
        else:
            texts.append("none" if member is NoneType else _one(member))
    return ", or ".join(texts)


def _one(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return listed(get_args(kind))
    base, *limits = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    word = WORDS[get_origin(base) or base]
    low = next((limit for limit in limits if isinstance(limit, Ge | Gt)), None)
    high = next((limit for limit in limits if isinstance(limit, Le | Lt) and limit != Le(MOST)), None)
    if isinstance(low, Ge) and isinstance(high, Le):
        return f"{word} from {low.ge} to {high.le}"
    first = "" if low is None else f", {low.ge} or more" if isinstance(low, Ge) else f" above {low.gt}"
    last = "" if high is None else f", at most {high.le}" if isinstance(high, Le) else f", below {high.lt}"
    return word + first + last


def build(cls: type[Kind], values: Mapping[str, Any], what: str) -> Kind:
    """Build a class of options from plain values; `what` names it in sentences.

    Raises:
        EvoViTError: an unknown option (with the nearest name), a missing one, a wrong value.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            there = f"there are {', '.join(known)}" if known else "there are none"
            raise EvoViTError(f"{what} has no option {shown(key)}; {there}.{nearest(key, known)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise EvoViTError(f"{cls.title}{name} is missing; give it: {f.metadata['meaning']}.")
    return cls(**values)


def describe(cls: type[Options]) -> list[Described]:
    """Return every option of a class in its order."""
    hints, found = get_type_hints(cls, include_extras=True), []
    for f in fields(cls):  # type: ignore[arg-type]
        default = "" if f.default is MISSING and f.default_factory is MISSING else written(f.default)
        found.append(Described(f.name, default, allowed(hints[f.name]), f.metadata.get("meaning", "")))
    return found


def written(value: Any) -> str:
    """Return a value as `read_value` reads it, in TOML where TOML has it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(written, value))}]"
    return f'"{value}"' if isinstance(value, str) else "{}" if value is MISSING else str(value)


def read_value(text: str) -> Any:
    """Return the value that a text stands for: one of TOML or a Python literal, else the text itself."""
    text = text.strip()
    try:
        value = tomllib.loads(f"value = {text}")
        if len(value) == 1 and not isinstance(value["value"], datetime.date | datetime.time):
            return value["value"]
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return text


def read_assignment(text: str, example: str) -> tuple[str, Any]:
    """Return name and value of `name=value`; raises `EvoViTError`, with an example, for anything else."""
    name, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not equals or not name.strip():
        raise EvoViTError(f"{shown(text)} is not of the form name=value, such as {example}.")
    return name.strip(), read_value(value)


def read_named(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of `NAME:option=value,option=value`; commas in brackets do not part."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in _split(rest) if rest.strip() else []:
        key, value = read_assignment(part, "keep_ratio=0.5")
        if key in options:
            raise EvoViTError(f"{shown(text)} gives {key} twice; give it once.")
        options[key] = value
    return name.strip(), options


def _split(text: str) -> Sequence[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
