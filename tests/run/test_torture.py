"""Kill torture: trainings and saves are killed at random moments and at chosen file operations, then go on.

    python -m pytest -m torture -rP tests/run/test_torture.py
    python -m pytest -m torture -rP --kills 300 tests/run/test_torture.py

`--kills` is the number of kills of each kind. Whatever was killed when, the same command again ends with the
bits of an undisturbed run and leaves no stray file; a save leaves the old model or the new one.
"""

from __future__ import annotations

import json
import random
import signal
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import evovit
from evovit.checkpoints.reduced import load_reduced, save_reduced
from evovit.recipe.reading import read_recipe
from evovit.recipe.tables import Recipe
from evovit.runtime.files import write_text
from tests.conftest import make_host, pictures
from tests.run import faults
from tests.run.processes import (
    CONTEXT,
    SMALL,
    finish,
    on_pictures,
    outcome,
    small,
    start,
    start_world,
    strays,
    train_here,
)
from tests.tuning.counting import CountingClock

pytestmark = pytest.mark.torture
SHORT = ("run.epochs=3", "data.scenes=64", "data.test_scenes=20")
FEW_OPERATIONS = 90  # of a file: some updates with their checkpoints, so that a run is killed often
SAVE_OPERATIONS = 40
LATEST = 0.4  # seconds after the start, or after the first update of this start


def with_method(path: Path, method: str, *overrides: str) -> Recipe:
    """Return the small recipe with another [method] table."""
    head, rest = SMALL.partition("[method]")[0], SMALL.partition("[data]")[2]
    (path / "other.toml").write_text(f"{head}{method}\n[data]{rest}")
    return read_recipe(path / "other.toml", (*SHORT, *overrides))


def recipe_of(kind: str, path: Path) -> Recipe:
    """Return a recipe of a few short updates."""
    if kind == "dense":
        return with_method(path, "", "run.ema_decay=0")
    if kind == "idle_vit with a teacher":
        train_here(with_method(path, "", "run.epochs=2"), path / "teacher")
        method = '[method]\nname = "idle_vit"\nstart_block = 1\ngroup_length = 2'
        return with_method(path, method, f"objective.teacher={path / 'teacher'}")
    if kind == "dynamic_vit with image workers":
        return on_pictures(path)
    return small(path, *SHORT)  # Evo-ViT with a moving average


def wait_for_update(child: BaseProcess, folder: Path) -> None:
    """Wait until this start of a training has written an update."""
    steps = folder / "steps.jsonl"
    before = steps.stat().st_mtime_ns if steps.exists() else 0
    while child.exitcode is None and (not steps.exists() or steps.stat().st_mtime_ns == before):
        child.join(0.005)


def begin(recipe: Recipe, folder: Path, size: int, act: faults.Act | None = None) -> list[BaseProcess]:
    """Start a training in `size` processes."""
    if size > 1:
        return start_world(recipe, folder, size, act)
    return [start(recipe, folder, act=act)]


def kill_once(recipe: Recipe, folder: Path, size: int, rng: random.Random) -> bool:
    """Start a training and kill one of its processes; return False if it ended before."""
    at_operation, from_start = rng.random() < 0.5, size == 1 and rng.random() < 0.3
    act = partial(faults.kill_at, rng.randrange(FEW_OPERATIONS)) if at_operation else None
    children = begin(recipe, folder, size, act)
    victim = children[rng.randrange(size)]
    if not at_operation:
        if not from_start:
            wait_for_update(victim, folder)
        victim.join(rng.uniform(0, LATEST))
        victim.kill()
    codes = finish(*children)
    assert set(codes) <= {0, 2, -signal.SIGKILL}
    for rank, code in enumerate(codes):
        if code == 2:
            said = folder.with_suffix(f".said{rank if size > 1 else ''}").read_text()
            assert "Another of the 2 processes has ended" in said and "\n" not in said
    return -signal.SIGKILL in codes


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("dense", 1),
        ("evo_vit with a moving average", 1),
        ("idle_vit with a teacher", 1),
        ("dynamic_vit with image workers", 1),
        ("two processes", 2),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)
def test_killed_trainings_end_bit_identical_and_leave_nothing_behind(
    tmp_path: Path, kind: str, size: int, kills: int
) -> None:
    recipe, rng, done, runs = recipe_of(kind, tmp_path), random.Random(kind), 0, 0
    since = time.monotonic()

    def end(folder: Path) -> None:
        assert finish(*begin(recipe, folder, size)) == [0] * size

    end(tmp_path / "undisturbed")
    undisturbed = outcome(tmp_path / "undisturbed")
    while done < kills:
        folder, runs = tmp_path / f"run{runs}", runs + 1
        while done < kills and kill_once(recipe, folder, size, rng):
            done += 1
        end(folder)
        assert outcome(folder) == undisturbed
        assert not strays(folder)
    print(f"{kind}: {done} kills, {runs} runs, all identical, no strays, {time.monotonic() - since:.0f} s")


def numbered_model(number: int) -> evovit.ReducedViT:
    """Return a reduced model like no other of another number, also in its method's options."""
    host = make_host("vit")
    with torch.no_grad():
        host.head.bias += number
    return evovit.reduce_tokens(host, "evo_vit", start_block=1, keep_ratio=0.3 + 0.1 * (number % 5)).eval()


def save_child(number: int, folder: Path, act: faults.Act) -> None:
    torch.set_num_threads(1)
    model = numbered_model(number)
    faults.watch(folder, act)
    save_reduced(model, folder)


@torch.no_grad()
def test_killed_saves_leave_the_old_model_or_the_new_one(tmp_path: Path, kills: int) -> None:
    rng, done, saves, folder, images = random.Random(0), 0, 0, tmp_path / "model", pictures()
    save_reduced(numbered_model(0), folder)
    present, new_ones = numbered_model(0)(images), 0
    while done < kills:
        saves += 1
        act = partial(faults.kill_at, rng.randrange(SAVE_OPERATIONS))
        child = CONTEXT.Process(target=save_child, args=(saves, folder, act))
        child.start()
        code = finish(child)[0]
        assert code in (0, -signal.SIGKILL)
        done += code != 0
        new = numbered_model(saves)(images)
        found: Tensor = load_reduced(folder, make_host("vit")).eval()(images)
        assert torch.equal(found, new) or (code != 0 and torch.equal(found, present)), (done, saves, act.args)
        new_ones += code != 0 and torch.equal(found, new)
        present = found
    save_reduced(numbered_model(0), folder)
    assert not strays(folder) and len(list(folder.iterdir())) == 3
    print(f"save_reduced: {done} kills, {saves} saves; {new_ones} killed ones left the new model, no strays")


def search_and_tell(folder: Path) -> None:
    """Search a schedule in a folder and write what was found."""
    torch.set_num_threads(1)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    found = evovit.tune(make_host("vit"), images, speedup=1.2, rounds=4, tables=folder, clock=CountingClock())
    assert found.best is not None
    told = [(one.plan.key, one.ms, one.damage) for one in found.candidates]
    write_text(folder / "told.json", json.dumps([found.best.plan.key, told]))


def test_killed_searches_end_the_same(tmp_path: Path, kills: int) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, folder):
        place.mkdir()
    search_and_tell(whole)
    rng, done, wanted = random.Random(0), 0, min(kills, 10)
    while done < wanted:
        child = CONTEXT.Process(target=search_and_tell, args=(folder,))
        child.start()
        child.join(rng.uniform(0.5, 2.5))
        if child.exitcode is None:
            child.kill()
            done += finish(child) == [-signal.SIGKILL]
        elif finish(child) == [0]:  # done before it was killed: begin anew
            assert (folder / "told.json").read_text() == (whole / "told.json").read_text()
            for path in folder.iterdir():
                path.unlink()
    child = CONTEXT.Process(target=search_and_tell, args=(folder,))
    child.start()
    assert finish(child) == [0]
    assert (folder / "told.json").read_text() == (whole / "told.json").read_text()
    assert not strays(folder)
    print(f"{done} kills of a search, the same result")
