"""Reading untrusted weights without unpickling, and writing files completely or not at all."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from evovit.errors import PLAIN_ONLY, EvoViTError, in_one_line, shown

TEMPORARY = ".tmp"  # ends the name of a file that is being written
PYTORCHS = (b"PK", b"\x80")  # begin its files: archives, and pickles of old versions
WRAPPERS = ("model", "state_dict", "model_state_dict")


def as_path(value: Any, what: str) -> Path:
    """Return the path that a value names, there or not; raise `EvoViTError` where none can have that name.

    Args:
        what: what the value is, for the sentence.
    """
    try:
        path = Path(value)
        if value == "":
            raise ValueError("it is empty")
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (TypeError, ValueError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else in_one_line(error)
        raise EvoViTError(f"{what} is {shown(value)}, which is not a path ({why}); give another.") from error
    return path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new file in a folder of its own beside `path`, sync it, then rename it over `path`.

    What a killed process left half written under this name is removed. The file's mode follows the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(
        path.parent, path.name
    ) as place:  # safetensors makes another file beside the one it is given
        temporary = place / place.name
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors' file is for this user alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def new_folder(folder: Path, name: str) -> Iterator[Path]:
    """Give a hidden folder to write new files into, and remove it at the end.

    What a killed process left under this name is removed.
    """
    remove_leftovers(folder, name)
    place = folder / f".{name}.{os.getpid()}.{secrets.token_hex(8)}{TEMPORARY}"
    place.mkdir(0o700)
    try:
        yield place
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


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files into a folder, each whole or not at all; raises `EvoViTError` where the disk refuses.

    Args:
        files: content by name.
    """
    make_folder(folder)
    for name, content in files.items():
        try:
            write_bytes(folder / name, content if isinstance(content, bytes) else content.encode("utf-8"))
        except OSError as error:
            raise EvoViTError(
                f"{shown(folder / name)} cannot be written ({error.strerror}); make room, or give another "
                "folder."
            ) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the table in a JSON file; raises `EvoViTError` for anything else.

    Args:
        what: who writes such files, for the sentence.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise ValueError("it is not a file")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no table")
    except (OSError, ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else in_one_line(error)
        raise EvoViTError(f"{shown(path)} is damaged or not written by {what}: {why}.") from error
    return content


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from .pth / .pt / .bin with `weights_only=True`.

    What wraps it is opened, as `plain_state_dict` does.
    """
    path = as_path(path, "The checkpoint")
    if not path.is_file():
        raise EvoViTError(
            f"There is no checkpoint file {shown(path)}; give the path of a .safetensors or .pth file."
        )
    return plain_state_dict(read_tensors(path, "a checkpoint"), shown(path))


def read_tensors(path: Path, what: str) -> Any:
    """Return what a file of tensors holds; nothing is unpickled, and what cannot be read is one sentence.

    Args:
        what: what the file should be, for the sentence.
    """
    said = f"{shown(path)} cannot be read"
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise EvoViTError(f"{said}: it is not a file.")
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            if not file.read(2).startswith(PYTORCHS):
                raise EvoViTError(f"{said} as {what}: it is not a PyTorch file (a web page or Git LFS?).")
        return _load_plain(path)
    except EvoViTError:
        raise
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise EvoViTError(f"{said} as {what} (cut off or damaged?): {in_one_line(error)}.") from error
    except Exception as error:  # pickle.UnpicklingError and what broken pickles raise
        raise EvoViTError(
            f"{said} for safety: {PLAIN_ONLY}; take a .safetensors file, or one with tensors only."
        ) from error


def _load_plain(path: Path) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # about pickles of another kind, which are refused
        return torch.load(path, map_location="cpu", weights_only=True)  # official files keep their arguments


def check_plain(value: Tensor, what: str) -> None:
    """Raise `EvoViTError` unless a tensor has its values in memory, each once."""
    kind = "quantised" if value.is_quantized else f"{value.layout} on {value.device}"
    if not value.is_quantized and not value.is_meta and value.layout == torch.strided:
        if value.nbytes <= value.untyped_storage().nbytes():
            return
        kind = f"{tuple(value.shape)}, stretched from fewer values"
    raise EvoViTError(f"{what} is {kind}; give plain tensors with their values.")


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
        raise EvoViTError(f"{what} has no state dict (tensors by name, also under 'model' or 'state_dict').")
    for key, value in content.items():
        check_plain(value, f"{shown(key)} in {what}")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file; raises `EvoViTError` where it cannot be read."""
    if path.exists() and not path.is_file():  # a pipe would wait for ever
        raise EvoViTError(f"{shown(path)} cannot be read: it is not a file.")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EvoViTError(f"{shown(path)} cannot be read: {error.strerror}.") from error


def check_fit(module: nn.Module, state: Mapping[str, Tensor], what: str, where: str = "the network") -> None:
    """Raise `EvoViTError`, saying why, unless a state dict has the names, shapes and kinds of a module.

    Counters of batch norms, which inference does not read and old files lack, may be missing.
    """
    own = module.state_dict()
    if not all(isinstance(value, Tensor) and not value.is_meta for value in own.values()):
        why = "is on the meta device or quantised; create it on the CPU"
        raise EvoViTError(f"{what} does not fit {where}, which {why}.")
    lacking = sorted(key for key in own if key not in state and not key.endswith("num_batches_tracked"))
    surplus = sorted(set(state) - set(own))
    both = [(key, state[key], own[key]) for key in state if key in own]
    wrong = [f"missing {', '.join(lacking[:3])}"] if lacking else []
    wrong += [f"unknown {', '.join(surplus[:3])}"] if surplus else []
    shapes = [
        f"{key} is {tuple(a.shape)}, needed {tuple(b.shape)}" for key, a, b in both if a.shape != b.shape
    ]
    kinds = [
        f"{key} holds {a.dtype}, needed {b.dtype}"
        for key, a, b in both
        if a.is_floating_point() != b.is_floating_point() or a.is_complex()
    ]
    odd = [f"{key} has values that are not finite" for key, a, _ in both if not a.isfinite().all()]
    wrong += shapes[:1] + kinds[:1] + odd[:1]
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
            f"{str(folder)!r} cannot be written ({said}); earlier files are intact: make room there, or give "
            "this user write permission, and run the same command again."
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder that this user may write into, or raise `EvoViTError`."""
    path = as_path(path, "The folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvoViTError(
            f"The folder {shown(path)} cannot be created ({error.strerror}); give another."
        ) from error
    if not os.access(path, os.W_OK):
        raise EvoViTError(f"This user may not write into {shown(path)}; give another folder.")
