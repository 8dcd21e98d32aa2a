"""The one exception for wrong input, and the two checks that raise it most."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class EvoViTError(ValueError):
    """Wrong input: what was given, what is allowed, what to do; the command line's exit code 2."""


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise `EvoViTError` unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise EvoViTError(f"{name} is {value!r}; allowed is {' or '.join(repr(a) for a in allowed)}.")


def check_count(name: str, value: Any, low: int, high: int, why: str = "") -> None:
    """Raise `EvoViTError` unless `value` is an integer from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise EvoViTError(f"{name} is {value!r}; allowed is {low} to {high}{why and f' ({why})'}.")
