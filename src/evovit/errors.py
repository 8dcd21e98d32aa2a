"""The exception for all wrong input, and the checks and words its sentences share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

LONGEST = 80  # characters of a value in a sentence
LONGEST_SENTENCE = 1000  # characters; what stands in the middle of a longer one goes
PLAIN_ONLY = "it holds more than plain tensors, and nothing else is loaded"

Kind = TypeVar("Kind")


class EvoViTError(ValueError):
    """Wrong input: what was given, what is allowed, what to do; the command line's exit code 2.

    Its sentence is one line without control characters, whatever names it quotes.
    """

    def __init__(self, sentence: object = "") -> None:
        text = printable(sentence)
        if len(text) > LONGEST_SENTENCE:
            text = f"{text[: LONGEST_SENTENCE // 2]} ... {text[-LONGEST_SENTENCE // 2 :]}"
        super().__init__(text)


def printable(text: object) -> str:
    """Return text that no terminal, page or file obeys: white space as one space, other controls escaped.

    Also what turns the direction of writing, and bytes of a file's name that are no UTF-8.
    """
    return "".join(
        letter
        if letter.isprintable()
        else " "
        if letter.isspace()
        else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )


def shown(value: Any) -> str:
    """Return a value as a sentence shows it: on one line, cut where it is long."""
    if isinstance(value, Path):
        return _cut(repr(str(value)), 4 * LONGEST)
    try:
        text = repr(value)
    except Exception:  # a number of thousands of digits, an object that cannot say what it is
        text = f"<{type(value).__name__}>"
    return _cut(text, LONGEST)


def in_one_line(error: BaseException) -> str:
    """Return what an error says in one line, cut where it is long, without its last dot.

    Advice of PyTorch and timm to unpickle a file after all is not passed on.
    """
    text = str(error) or type(error).__name__
    return PLAIN_ONLY if "weights_only" in text else _cut(text, 2 * LONGEST).rstrip(".")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory, of this machine or its GPU, did not suffice; PyTorch has no kind for the CPU's."""
    words = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _cut(text: str, longest: int) -> str:
    text = " ".join(printable(text).split())
    return text if len(text) <= longest else f"{text[:longest]}..."


def nearest(word: Any, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the known word most like `word`, or nothing where none is."""
    is_word = isinstance(word, str) and len(word) <= LONGEST  # a longer one takes long to compare
    near = difflib.get_close_matches(word, list(known), 1) if is_word else []
    return f" Did you mean {near[0]!r}?" if near else ""


def listed(words: Iterable[Any]) -> str:
    """Return words as a sentence lists them: `a, b or c`."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise `EvoViTError`, with the nearest word, unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if not isinstance(value, (str, int)) or value not in allowed:
        hint = nearest(value, map(str, allowed))
        raise EvoViTError(f"{name} is {shown(value)}; allowed is {listed(allowed)}.{hint}")


def check_count(name: str, value: Any, low: int, high: int, why: str = "") -> int:
    """Return a whole number, also one of NumPy or PyTorch, as Python's; raise `EvoViTError` for any other.

    Args:
        low, high: the least and the most that is allowed.
    """
    count = _whole(value)
    if count is None or not low <= count <= high:
        span = f"{low} to {high}" if low < high else str(low)
        raise EvoViTError(f"{name} is {shown(value)}; allowed is {span}{why and f' ({why})'}.")
    return count


def _whole(value: Any) -> int | None:
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    try:  # of NumPy or PyTorch
        return int(value) if getattr(value, "ndim", None) == 0 and "int" in str(value.dtype) else None
    except RuntimeError:  # a tensor on the meta device has no value
        return None


def check_ratio(name: str, value: Any) -> float:
    """Return a keep ratio, above 0 and at most 1; raise `EvoViTError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise EvoViTError(f"{name} is {shown(value)}; allowed is a number above 0, at most 1.")
    return float(value)


def check_kind(name: str, value: Any, kind: type[Kind], give: str) -> Kind:
    """Return a value of a class; raise `EvoViTError`, with what to give instead, for any other."""
    if not isinstance(value, kind):
        raise EvoViTError(f"{name} is {shown(value)}; give {give}.")
    return value
