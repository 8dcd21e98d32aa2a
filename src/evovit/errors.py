"""The one exception for wrong input, and the checks and words its sentences share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

LONGEST = 80  # characters of a value in a sentence


class EvoViTError(ValueError):
    """Wrong input: what was given, what is allowed, what to do; the command line's exit code 2."""


def shown(value: Any) -> str:
    """Return a value as a sentence shows it: on one line, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # a number of thousands of digits, an object that cannot say what it is
        text = f"<{type(value).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def in_one_line(error: BaseException) -> str:
    """Return what an error says in one line, cut where it is long, without its last dot."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 2 * LONGEST else f"{text[: 2 * LONGEST]}...").rstrip(".")


def nearest(word: Any, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the known word most like `word`, or nothing where none is."""
    near = difflib.get_close_matches(word, list(known), 1) if isinstance(word, str) else []
    return f" Did you mean {near[0]!r}?" if near else ""


def listed(words: Iterable[Any]) -> str:
    """Return words as a sentence lists them: `a, b or c`."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise `EvoViTError`, with the nearest word, unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        hint = nearest(value, map(str, allowed))
        raise EvoViTError(f"{name} is {shown(value)}; allowed is {listed(allowed)}.{hint}")


def check_count(name: str, value: Any, low: int, high: int, why: str = "") -> None:
    """Raise `EvoViTError` unless `value` is an integer from `low` to `high`, both included."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        span = f"{low} to {high}" if low < high else str(low)
        raise EvoViTError(f"{name} is {shown(value)}; allowed is {span}{why and f' ({why})'}.")
