"""Faults at file operations: a process that is killed at the n-th one, a disk that refuses from there on.

Every operation that changes a folder is counted, in the order of the program, so that a fault at the n-th
one comes at the same place each time.
"""

from __future__ import annotations

import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

Act = Callable[[int, str], None]  # number of the operation, from 0; what it is
CALLS = ("mkdir", "open", "chmod", "replace", "unlink", "rmdir", "fsync")


class Halfway:
    """A file that meets the fault when half of a text is written."""

    def __init__(self, file: Any, meet: Callable[[str], None]) -> None:
        self.file, self.meet = file, meet

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self.file.write(content[:half])
        self.file.flush()
        self.meet("write")
        return half + int(self.file.write(content[half:]))

    def __enter__(self) -> Halfway:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def watch(folder: Path, act: Act, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Call `act` before each operation that changes files in a folder, and halfway through each write.

    Args:
        patch: how a function of a module is replaced: `monkeypatch.setattr`, or for good.
    """
    number = iter(range(10**9))

    def inside(path: Any) -> bool:
        return not isinstance(path, int) and (folder == Path(path) or folder in Path(path).parents)

    def meet(kind: str) -> None:
        act(next(number), kind)

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(first: Any, *rest: Any, **named: Any) -> Any:
            if (name == "fsync" or "dir_fd" in named or inside(first)) and (
                name != "open" or rest[0] & os.O_CREAT
            ):
                meet(name)
            return real(first, *rest, **named)

        return call

    open_file, write_tensors = io.open, safetensors.torch.serialize_file

    def open_watched(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        file = open_file(path, mode, *rest, **named)
        return Halfway(file, meet) if mode[0] in "wa" and inside(path) else file

    def write_watched(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
        write_tensors(tensors, path, *rest, **named)
        os.truncate(path, Path(path).stat().st_size // 2)
        meet("tensors")
        write_tensors(tensors, path, *rest, **named)

    for name in CALLS:
        patch(os, name, watched(name))
    patch(io, "open", open_watched)
    patch(safetensors.torch, "serialize_file", write_watched)


def kill_at(place: int, number: int, kind: str) -> None:
    """Kill this process at an operation."""
    if number == place:
        os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop_from(place: int, number: int, kind: str) -> None:
    """Send SIGTERM to this process at every operation from one on."""
    if number >= place:
        os.kill(os.getpid(), signal.SIGTERM)


def refuse_from(place: int, error: int, number: int, kind: str) -> None:
    """Refuse operations from one on as a disk does; a full one still removes files."""
    if number >= place and not (kind == "unlink" and error == errno.ENOSPC):
        raise OSError(error, os.strerror(error))
