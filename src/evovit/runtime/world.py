"""The processes of one training: torchrun's, over NCCL or gloo, or this one alone; and seeds by place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed

from evovit.errors import EvoViTError


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
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, if it did; `device` is auto, cpu or cuda."""
    if device == "cuda" and not torch.cuda.is_available():
        raise EvoViTError("run.device is 'cuda', but PyTorch finds no CUDA device; use 'auto' or 'cpu'.")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    )
    if kind == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(rank, size, place)
    finally:
        distributed.destroy_process_group()
