"""Trainings in processes of their own, to be killed: small, and equal to the bit whenever they finish."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import socket
import sys
import tomllib
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from rich.console import Console

from evovit.errors import EvoViTError
from evovit.recipe.reading import parse_recipe, read_recipe
from evovit.recipe.tables import Recipe
from evovit.train.run import train_recipe

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["evovit.train.run", "sklearn.datasets", "tests.run.processes"])

SMALL = """
[model]
name = "vit_tiny_patch16_224"
drop_path = 0.1
options = {img_size = 24, patch_size = 6, embed_dim = 32, depth = 4, num_heads = 2, global_pool = "avg"}
[method]
name = "evo_vit"
start_block = 1
stage_length = 2
assisted_head = true
mode = "layer"
switch_at = 0.5
[data]
source = "digits"
batch_size = 16
scenes = 96
test_scenes = 40
mixup = 0.2
[optimizer]
clip_norm = 1.0
[learning_rate]
base = 2e-3
reference_batch = 16
warm_up_epochs = 1
[run]
epochs = 4
device = "cpu"
ema_decay = 0.9
checkpoint_every = 1
"""


def small(path: Path, *overrides: str) -> Recipe:
    """Return the small recipe with overrides; `path` is any folder to write it into."""
    (path / "small.toml").write_text(SMALL)
    return read_recipe(path / "small.toml", overrides)


def train_here(recipe: Recipe, folder: Path) -> str:
    """Train in this process; return what was said."""
    said = io.StringIO()
    train_recipe(recipe, folder, Console(file=said, width=200))
    return said.getvalue()


def train_child(text: str, folder: Path, environment: dict[str, str], largest_file: int) -> None:
    """Train in a child: exit code 0 where it finished or stopped on request, 2 after an `EvoViTError`."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    said = folder.with_suffix(f".said{environment.get('RANK', '')}")
    try:
        text_said = train_here(parse_recipe(tomllib.loads(text)), folder)
    except EvoViTError as error:
        said.write_text(str(error))
        sys.exit(2)
    said.write_text(text_said)


def start(recipe: Recipe, folder: Path, largest_file: int = 0, **environment: str) -> BaseProcess:
    """Start a training in a process of its own."""
    child = CONTEXT.Process(target=train_child, args=(recipe.to_toml(), folder, environment, largest_file))
    child.start()
    return child


def start_world(recipe: Recipe, folder: Path, size: int) -> list[BaseProcess]:
    """Start `size` processes that train one model, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [start(recipe, folder, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(size)]


def finish(*children: BaseProcess) -> list[int | None]:
    """Wait for children; return their exit codes."""
    for child in children:
        child.join(120)
        if child.exitcode is None:
            child.kill()
    return [child.exitcode for child in children]


def losses(folder: Path) -> list[float]:
    """Return the loss of every update of a run."""
    return [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> tuple[dict[str, bytes], list[float]]:
    """Return all that must not depend on interruptions: weights, newest checkpoint, best one, losses."""
    files = sorted(folder.glob("model/*")) + sorted(folder.glob("checkpoints/*.safetensors"))
    return {path.name: path.read_bytes() for path in files}, losses(folder)
