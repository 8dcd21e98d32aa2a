"""Reading weights from strangers without unpickling, and writing files that are whole or absent."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
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


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from .pth / .pt / .bin with `weights_only=True`.

    A dictionary that wraps it under "model" or "state_dict" is opened; DistributedDataParallel's "module."
    goes.
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
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise EvoViTError(f"{str(path)!r} holds no state dict (tensors by name, or such under 'model').")
    return {key.removeprefix("module."): value for key, value in content.items()}
