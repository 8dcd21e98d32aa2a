"""Checkpoints of a training: `<update>.safetensors` for tensors, then `<update>.json`, which vouches for it.

A checkpoint exists once its JSON does: that holds the plain state and the SHA-256 of the tensors' file and of
itself. A cut or changed file is seen on reading, and the checkpoint before it is used.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from evovit.errors import EvoViTError, shown
from evovit.runtime.files import hash_file, read_json, remove_leftovers, told, write_atomically, write_text

FOLDER = "checkpoints"
BEST = "best-"
COURSE = "epoch-"  # weights that stay, of some epochs (run.keep_every)
KEPT = 2  # checkpoints of the course of a training; the older is for the case that the newer is damaged


class Checkpoint(NamedTuple):
    """All that a training needs to go on."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]


def write_checkpoint(folder: Path, name: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all; raises `EvoViTError` where the disk refuses."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in checkpoint.tensors.items()}
    with told(folder):
        write_atomically(folder / f"{name}.safetensors", partial(save_file, tensors))
        content = {"plain": checkpoint.plain, "tensors": hash_file(folder / f"{name}.safetensors")}
        text = json.dumps({**content, "self": _hash(content)}, indent=1)
        write_text(folder / f"{name}.json", text)


def write_numbered(folder: Path, update: int, checkpoint: Checkpoint, prefix: str = "") -> None:
    """Write the checkpoint after `update` updates, then drop those no longer needed."""
    write_checkpoint(folder, f"{prefix}{update:09d}", checkpoint)
    drop_older(folder, prefix)


def drop_older(folder: Path, prefix: str = "") -> None:
    """Drop the checkpoints that are no longer needed."""
    if prefix == COURSE:
        return
    with told(folder):
        for stale in numbered(folder, prefix)[1 if prefix else KEPT :]:
            (folder / f"{stale}.json").unlink()  # first: without it the tensors are no checkpoint
            (folder / f"{stale}.safetensors").unlink(missing_ok=True)


def numbered(folder: Path, prefix: str = "") -> list[str]:
    """Return the names of the checkpoints of a training, or of its best ones, newest first."""
    names = (path.stem for path in folder.glob(f"{prefix}*.json"))
    return sorted((name for name in names if name.removeprefix(prefix).isdigit()), reverse=True)


def read_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Read a checkpoint and verify it; raises `EvoViTError` where it is damaged."""
    path = folder / f"{name}.safetensors"
    try:
        content = read_json(folder / f"{name}.json", "evovit")
        if content.pop("self") != _hash(content) or content["tensors"] != hash_file(path):
            raise ValueError("its checksum is wrong")
        if not isinstance(content["plain"], dict):
            raise TypeError("its state is no table")
        return Checkpoint(load_file(path), content["plain"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its checksum or its form is wrong"
        raise EvoViTError(f"The checkpoint {str(folder / name)!r} is damaged ({reason}).") from error


def read_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest whole checkpoint, if there is any, and a sentence for each damaged one."""
    complaints: list[str] = []
    for name in numbered(folder):
        try:
            return read_checkpoint(folder, name), complaints
        except EvoViTError as error:
            complaints.append(f"{error} The one before it is used.")
    if complaints:
        raise EvoViTError(
            f"All checkpoints in {str(folder)!r} are damaged; restore one, or move the run away."
        )
    return None, complaints


def course(folder: Path) -> dict[int, str]:
    """Return the names of a run's checkpoints by the updates done before each, rising."""
    names = [*numbered(folder), *numbered(folder, BEST), *numbered(folder, COURSE)]
    return dict(sorted((int(name.rpartition("-")[2]), name) for name in names))


def read_weights(run: Path, which: str) -> dict[str, Tensor]:
    """Return the weights of a run: last, best, or ema (of the last checkpoint)."""
    folder = run / FOLDER
    if which == "best" and (best := numbered(folder, BEST)):
        tensors = read_checkpoint(folder, best[0]).tensors
    else:
        newest, _ = read_newest(folder)
        if newest is None:
            raise EvoViTError(f"{str(run)!r} has no checkpoint; give the folder of a run of `evovit train`.")
        tensors = newest.tensors
    prefix = "ema." if which == "ema" else "model."
    found = part(tensors, prefix)
    if not found:
        raise EvoViTError(f"{str(run)!r} has no {which} weights; train with run.ema_decay above 0.")
    return found


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def clear_folder(folder: Path) -> None:
    """Remove what a killed process left half written in the folder of a run, which this process holds."""
    checkpoints = folder / FOLDER
    for place in (folder, checkpoints, folder / "model"):
        remove_leftovers(place, held=True)
    whole = {path.stem for path in checkpoints.glob("*.json")}
    for path in checkpoints.glob("*.safetensors"):
        if path.stem not in whole and path.stem.removeprefix(BEST).removeprefix(COURSE).isdigit():
            path.unlink()


def optimizer_tensors(optimizers: list[torch.optim.Optimizer], names: dict[int, str]) -> dict[str, Tensor]:
    """Return the state of optimisers as `optimizer.<parameter>|<slot>`; `names` by id of parameter."""
    return {
        f"optimizer.{names[id(parameter)]}|{slot}": value
        for optimizer in optimizers
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def restore_optimizers(
    optimizers: list[torch.optim.Optimizer], names: dict[int, str], tensors: dict[str, Tensor]
) -> None:
    """Undo `optimizer_tensors`."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, slot = key.removeprefix("optimizer.").rsplit("|", 1)
            slots.setdefault(name, {})[slot] = value
    for optimizer in optimizers:
        content = optimizer.state_dict()
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        found = {i: slots[names[id(p)]] for i, p in enumerate(flat) if names[id(p)] in slots}
        for i, own in found.items():
            if any(value.ndim and value.shape != flat[i].shape for value in own.values()):
                raise EvoViTError(f"The state of the optimizer does not fit {shown(names[id(flat[i])])}.")
        content["state"] = found
        optimizer.load_state_dict(content)


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
