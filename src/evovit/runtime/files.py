"""Reading weights from strangers without unpickling, and writing files that are whole or absent."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from evovit.errors import EvoViTError

WRAPPERS = ("model", "state_dict", "model_state_dict")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it, then rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from .pth / .pt / .bin with `weights_only=True`.

    What wraps it is opened, as `plain_state_dict` does.
    """
    path = Path(path)
    if not path.is_file():
        raise EvoViTError(
            f"There is no checkpoint file {str(path)!r}; give the path of a .safetensors or .pth file."
        )
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals(
                [argparse.Namespace]
            ):  # official files keep their arguments
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise EvoViTError(
            f"{str(path)!r} cannot be read as a checkpoint (cut off or damaged?): {error}"
        ) from error
    except Exception as error:  # pickle.UnpicklingError and what broken pickles raise
        raise EvoViTError(
            f"{str(path)!r} is no checkpoint of plain tensors, and nothing else is loaded for safety: {error}"
        ) from error
    return plain_state_dict(content, repr(str(path)))


def plain_state_dict(content: Any, what: str) -> dict[str, Tensor]:
    """Return tensors by name from what a checkpoint holds.

    A mapping that wraps them under "model" or "state_dict" is opened; DistributedDataParallel's "module."
    goes.
    """
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise EvoViTError(f"{what} holds no state dict (tensors by name, or such under 'model').")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def make_folder(path: Path) -> None:
    """Make a folder that this user may write into, or raise `EvoViTError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvoViTError(
            f"No folder can be made at {str(path)!r} ({error.strerror}); give a folder."
        ) from error
    if not os.access(path, os.W_OK):
        raise EvoViTError(f"This user may not write into {str(path)!r}; give another folder.")
