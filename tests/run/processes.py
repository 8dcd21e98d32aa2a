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
from PIL import Image
from rich.console import Console

from evovit.errors import EvoViTError
from evovit.recipe.reading import parse_recipe, read_recipe
from evovit.recipe.tables import Recipe
from evovit.train.run import train_recipe
from tests.run import faults

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


ONCE = ("run.epochs=2", "data.scenes=16", "data.test_scenes=8")  # one update an epoch


def small(path: Path, *overrides: str) -> Recipe:
    """Return the small recipe with overrides; `path` is any folder to write it into."""
    (path / "small.toml").write_text(SMALL)
    return read_recipe(path / "small.toml", overrides)


DYNAMIC = """
[method]
name = "dynamic_vit"
blocks = [1, 3]
logit_weight = 0.0
token_weight = 0.0
[data]
source = "SOURCE"
batch_size = 16
workers = 2
mixup = 0.2
"""


def on_pictures(path: Path, *overrides: str) -> Recipe:
    """Return a recipe like the small one, with DynamicViT on image files that processes of their own read."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("val", 6)):
        for label in range(2):
            place = path / "pictures" / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (24, 24, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(place / f"{number}.png")
    head, tail = SMALL.partition("[method]")[0], SMALL.partition("[optimizer]")
    text = head + DYNAMIC.replace("SOURCE", str(path / "pictures")) + "".join(tail[1:])
    (path / "pictures.toml").write_text(text)
    return read_recipe(path / "pictures.toml", overrides)


def train_here(recipe: Recipe, folder: Path) -> str:
    """Train in this process; return what was said."""
    said = io.StringIO()
    train_recipe(recipe, folder, Console(file=said, width=200))
    return said.getvalue()


def train_child(
    text: str, folder: Path, environment: dict[str, str], largest_file: int, act: faults.Act | None
) -> None:
    """Train in a child: exit code 0 where it finished or stopped on request, 2 after an `EvoViTError`."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for processes that read images, as from a shell
    os.environ.update(environment)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if act is not None:
        faults.watch(folder, act)
    said = folder.with_suffix(f".said{environment.get('RANK', '')}")
    try:
        text_said = train_here(parse_recipe(tomllib.loads(text)), folder)
    except EvoViTError as error:
        said.write_text(str(error))
        sys.exit(2)
    said.write_text(text_said)


def start(
    recipe: Recipe, folder: Path, largest_file: int = 0, act: faults.Act | None = None, **environment: str
) -> BaseProcess:
    """Start a training in a process of its own; `act` is called before each file operation there."""
    arguments = (recipe.to_toml(), folder, environment, largest_file, act)
    child = CONTEXT.Process(target=train_child, args=arguments)
    child.start()
    return child


def port() -> int:
    """Return the number of a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_world(recipe: Recipe, folder: Path, size: int, act: faults.Act | None = None) -> list[BaseProcess]:
    """Start `size` processes that train one model, as torchrun does."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": str(size)}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return [start(recipe, folder, act=act, **environment) for environment in ranks]


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


def strays(folder: Path) -> list[Path]:
    """Return what is neither a file of a finished run nor a folder of one."""
    hidden = list(folder.glob("**/.*"))
    lonely = [p for p in folder.glob("checkpoints/*.safetensors") if not p.with_suffix(".json").exists()]
    return hidden + lonely + list(folder.glob("**/new.*"))
