"""Reading weights from strangers without unpickling, and writing files that are whole or absent."""

from __future__ import annotations

import argparse
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from evovit.errors import EvoViTError, in_one_line, shown

TEMPORARY = ".tmp"  # ends the name of a file that is being written
WRAPPERS = ("model", "state_dict", "model_state_dict")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new file in a folder of its own beside `path`, sync it, then rename it over `path`.

    What a killed process left half written under this name is removed. The file's mode follows the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    name = f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}{TEMPORARY}"
    place = path.with_name(name)  # safetensors makes another file beside the one it is given
    place.mkdir(0o700)
    try:
        temporary = place / name
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors' file is for this user alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        shutil.rmtree(place)


def remove_leftovers(folder: Path, name: str | None = None, *, held: bool = False) -> None:
    """Remove what killed processes left half written in a folder, of one file's name or of any.

    Args:
        held: this process holds the folder, so nobody else writes there, whatever process has the number in
            a name; names without a number, as safetensors makes them, go too.
    """
    found = [*folder.glob(f".{'*' if name is None else escape(name)}.*{TEMPORARY}")]
    for path in [*found, *folder.glob(f"{TEMPORARY}??????")] if held else found:
        pid = path.name.removesuffix(TEMPORARY).split(".")[-2]
        if held or not pid.isdigit() or not _is_alive(int(pid)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # it writes one file at a time
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


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
            f"{str(path)!r} cannot be read as a checkpoint (cut off or damaged?): {in_one_line(error)}."
        ) from error
    except Exception as error:  # pickle.UnpicklingError and what broken pickles raise
        raise EvoViTError(
            f"{str(path)!r} holds more than plain tensors, and nothing else is loaded, for safety; take a "
            ".safetensors file, or one that holds a state dict alone."
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


def as_path(path: object) -> Path:
    """Return a path given as text or as a `Path`; raises `EvoViTError` for anything else."""
    if not isinstance(path, str | Path) or not str(path) or "\x00" in str(path):
        raise EvoViTError(f"{shown(path)} is no path; give the path of a file or folder.")
    return Path(path)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_fit(module: nn.Module, state: Mapping[str, Tensor], what: str, where: str = "the network") -> None:
    """Raise `EvoViTError`, saying why, unless a state dict has the names and shapes of a module."""
    own = module.state_dict()
    lacking, surplus = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    other = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    wrong = [f"missing {', '.join(lacking[:3])}"] if lacking else []
    wrong += [f"unknown {', '.join(surplus[:3])}"] if surplus else []
    if other:
        wrong.append(f"{other[0]} is {tuple(state[other[0]].shape)}, needed {tuple(own[other[0]].shape)}")
    if wrong:
        raise EvoViTError(f"{what} does not fit {where}: {'; '.join(wrong)}.")


@contextmanager
def hold_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Make a folder and hold it, so that no other process does, or raise `EvoViTError`; or wait for it.

    No file is left behind: the system lets go when the holder ends, however it ends. Where it has no such
    locks, nothing is held.
    """
    make_folder(folder)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with told(folder):
        held = [os.open(folder, os.O_RDONLY)]

    def let_go() -> None:
        while held:
            os.close(held.pop())

    os.register_at_fork(after_in_child=let_go)  # a process that reads images may outlive a killed holder
    try:
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvoViTError(
                f"{str(folder)!r} is in use by another process; wait for its end, or give another folder."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        let_go()


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Turn what the system says where a folder cannot be written into one sentence, an `EvoViTError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = in_one_line(error)
        if isinstance(error, OSError) and error.strerror:
            said = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise EvoViTError(
            f"{str(folder)!r} cannot be written ({said}); what was written before is whole: make room there, "
            "or let this user write, and give the same command again."
        ) from error


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
