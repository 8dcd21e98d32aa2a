"""Seeds by place: a random choice follows from where in a training it is made, not from what came before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def seed_for(*place: object) -> int:
    """Return a seed below 2**32 that follows from a place in the training, such as (seed, epoch, step)."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=4).digest(), "big")


@contextmanager
def seeded(*place: object) -> Iterator[None]:
    """Draw from generators seeded by a place; Python's, NumPy's and PyTorch's go on unchanged afterwards."""
    states = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    seed = seed_for(*place)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
