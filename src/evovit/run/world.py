"""The processes of one training: torchrun's, over NCCL or gloo, or this one alone; and seeds by place."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
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


def number(*place: object) -> int:
    """Return a seed below 2**32 that follows from a place in the training, such as (seed, epoch, step)."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=4).digest(), "big")


@contextmanager
def seeded(*place: object) -> Iterator[None]:
    """Draw from generators seeded by a place; Python's, NumPy's and PyTorch's go on unchanged afterwards."""
    states = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    seed = number(*place)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
