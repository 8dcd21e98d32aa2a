"""The processes of one training: torchrun's, over NCCL or gloo, or this one alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from traceback import clear_frames

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from evovit.errors import EvoViTError, in_one_line, shown

MOST = 10**6  # processes of one training
JOINING = timedelta(minutes=5)  # by which processes begin one after another; a dead one is waited for as long


@dataclass(frozen=True)
class World:
    """Who this process is among all that train one model."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Tell whether this process writes files and talks."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Return the sums over all processes, in float64."""
        if self.size == 1:
            return values
        place = self.device if self.device.type == "cuda" else torch.device("cpu")
        total = torch.tensor(values, dtype=torch.float64, device=place)
        distributed.all_reduce(total)
        return total.tolist()

    def wait(self) -> None:
        """Wait until every process is here."""
        self.sum([0.0])


def is_alone() -> bool:
    """Tell whether this process is the only one of its training."""
    return _place("WORLD_SIZE", 1, MOST, "1") == 1


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if it did; `device` is auto, cpu or cuda.

    Raises:
        EvoViTError: there is no such device; the processes cannot meet; one of the others has ended.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise EvoViTError("run.device is 'cuda', but PyTorch finds no CUDA device; use 'auto' or 'cpu'.")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    size = _place("WORLD_SIZE", 1, MOST, "1")
    local = _place("LOCAL_RANK", 0, MOST if size == 1 else size - 1, "0")
    place = torch.device("cpu")
    if kind == "cuda":
        place = torch.device(kind, _place("LOCAL_RANK", 0, torch.cuda.device_count() - 1, str(local)))
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    rank = _place("RANK", 0, size - 1)
    _meet("nccl" if kind == "cuda" else "gloo", size)
    try:
        yield World(rank, size, place)
    except BaseException as error:
        clear_frames(error.__traceback__)  # what holds the group, as DDP does, goes before the group
        if _is_of_communication(error):
            raise EvoViTError(
                f"Another of the {size} processes has ended or cannot be reached ({_reason(error)}); see "
                "its output, and run the same command again."
            ) from error
        raise
    finally:
        distributed.destroy_process_group()


def _meet(backend: str, size: int) -> None:
    """Begin what connects the processes; torchrun's are sure to find each other."""
    port = _place("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR"):
        raise EvoViTError(
            f"WORLD_SIZE is {size}, but MASTER_ADDR is missing; start the processes with torchrun."
        )
    if not _is_address(address := os.environ["MASTER_ADDR"]):
        raise EvoViTError(f"MASTER_ADDR is {shown(address)}, not the name of a machine: torchrun sets it.")
    try:
        store, rank, _ = next(rendezvous("env://", timeout=JOINING))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise EvoViTError(
            f"The {size} processes cannot meet at {os.environ['MASTER_ADDR']}:{port} ({_reason(error)}); "
            "start them with torchrun."
        ) from error


def _place(name: str, low: int, high: int, default: str | None = None) -> int:
    """Return a number that torchrun sets in the environment."""
    text = os.environ.get(name, default)
    if text is None:
        raise EvoViTError(f"WORLD_SIZE is above 1, but {name} is missing; start the processes with torchrun.")
    if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise EvoViTError(
            f"{name} is {shown(text)}; allowed is an integer from {low} to {high}: torchrun sets it."
        )
    return int(text)


def _is_address(text: str) -> bool:
    try:
        return bool(re.fullmatch(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]*", text) or ip_address(text.partition("%")[0]))
    except ValueError:
        return False


def _is_of_communication(error: BaseException) -> bool:
    of_gloo = isinstance(error, RuntimeError) and "/gloo/" in str(
        error
    )  # its errors have no kind of their own
    return of_gloo or isinstance(error, distributed.DistError)


def _reason(error: BaseException) -> str:
    """Return what an error of communication says, without its place in the source and what to do."""
    return re.sub(r"^\[\S+\] ", "", in_one_line(error)).partition(". ")[0]
