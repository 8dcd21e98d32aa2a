"""Trainings that are killed, damaged or out of space go on, and end to the bit as if nothing had been.

Children come from a fork server that has imported everything; most of the time is their start.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evovit.errors import EvoViTError
from evovit.recipe.reading import read_recipe
from evovit.recipe.tables import Recipe
from evovit.train import state, trainer
from evovit.train.state import read_checkpoint
from tests.run.processes import ONCE, finish, losses, outcome, small, start, start_world, train_here

Outcome = tuple[dict[str, bytes], list[float]]


@pytest.fixture(scope="module")
def undisturbed(whole_run: Path) -> Outcome:
    return outcome(whole_run)


def kill_often(tmp_path: Path, kills: int, seed: int) -> tuple[Path, int]:
    """Kill a run at random moments until it has been killed often enough or has ended; return both."""
    rng, recipe, folder, done = random.Random(seed), small(tmp_path), tmp_path / "run", 0
    while done < kills:
        child = start(recipe, folder)
        steps = folder / "steps.jsonl"
        before = steps.stat().st_mtime_ns if steps.exists() else 0
        while child.exitcode is None and (not steps.exists() or steps.stat().st_mtime_ns == before):
            child.join(0.005)
        child.join(rng.uniform(0, 0.12))  # updates and checkpoints take turns, some 10 ms each
        if child.exitcode is not None:
            break
        child.kill()
        done += finish(child) == [-signal.SIGKILL]
    assert finish(start(recipe, folder)) == [0]
    return folder, done


def test_killed_runs_end_bit_identical(tmp_path: Path, undisturbed: Outcome) -> None:
    folder, kills = kill_often(tmp_path, 4, seed=0)
    assert kills >= 3
    assert outcome(folder) == undisturbed
    assert not list(folder.glob("**/.*.tmp"))


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path, once_run: Path) -> None:
    recipe, folder = small(tmp_path, *ONCE), tmp_path / "run"
    shutil.copytree(once_run, folder)
    left = [folder / place / ".file.1.tmp" for place in ("", "model", "checkpoints")]
    for path in left:
        path.write_bytes(b"half")
    train_here(recipe, folder)
    assert not any(path.exists() for path in left) and list(folder.glob("model/*.safetensors"))


@pytest.mark.slow
def test_twenty_kills_end_bit_identical(tmp_path: Path, undisturbed: Outcome) -> None:
    total, seed = 0, 1
    while total < 20:
        place = tmp_path / str(seed)
        place.mkdir()
        folder, kills = kill_often(place, 20 - total, seed)
        assert outcome(folder) == undisturbed
        total, seed = total + kills, seed + 1


@pytest.mark.parametrize("moment", ["before the tensors", "before the description", "after"])
def test_a_kill_within_a_checkpoint_loses_nothing(
    tmp_path: Path, undisturbed: Outcome, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kill is an exception here, thrown at each step of writing a checkpoint."""
    from evovit.train import state

    real, calls = state.write_atomically, iter(range(10**6))
    at = {"before the tensors": 14, "before the description": 15, "after": 16}[moment]

    def dying(path: Path, write: object) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt
        real(path, write)  # type: ignore[arg-type]

    monkeypatch.setattr(state, "write_atomically", dying)
    with pytest.raises(KeyboardInterrupt):
        train_here(small(tmp_path), tmp_path / "run")
    monkeypatch.undo()
    assert "going on after update" in train_here(small(tmp_path), tmp_path / "run")
    assert outcome(tmp_path / "run") == undisturbed


def test_sigterm_saves_and_exits_cleanly(tmp_path: Path, undisturbed: Outcome) -> None:
    recipe, folder = small(tmp_path, "run.checkpoint_every=0"), tmp_path / "run"
    child = start(recipe, folder)
    steps = folder / "steps.jsonl"
    while child.exitcode is None and not (steps.exists() and len(steps.read_text().splitlines()) >= 2):
        child.join(0.005)
    os.kill(child.pid or 0, signal.SIGTERM)
    assert finish(child) == [0]
    said = (tmp_path / "run.said").read_text()
    assert "stopped and saved after update" in said
    update = int(said.split("after update ")[1])
    assert read_checkpoint(folder / "checkpoints", f"{update:09d}").plain["update"] == update
    assert "finished" in train_here(small(tmp_path), folder)
    assert outcome(folder) == undisturbed


def interrupt(tmp_path: Path, after: int) -> Path:
    """Leave a run with checkpoints of the last two updates up to `after`."""
    real = trainer.Trainer.step

    def step(self: trainer.Trainer, *arguments: object) -> bool:
        if self.update == after:
            raise KeyboardInterrupt
        return real(self, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "step", step)
        train_here(small(tmp_path), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interrupt(tmp_path_factory.mktemp("interrupted"), 9)


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_checkpoint_is_seen_and_the_one_before_used(
    tmp_path: Path, undisturbed: Outcome, suffix: str, damage: str, interrupted: Path
) -> None:
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    victim = folder / "checkpoints" / f"000000009.{suffix}"
    content = bytearray(victim.read_bytes())
    place = len(content) // 2
    if damage == "remove":
        victim.unlink()
    else:
        content[place] ^= 4
        victim.write_bytes({"flip": bytes(content), "cut": content[:place], "empty": b""}[damage])
    said = train_here(small(tmp_path), folder)
    assert ("is damaged" in said) == (damage != "remove" or suffix == "safetensors")
    assert "going on after update 8 of 24" in said
    assert outcome(folder) == undisturbed


def test_nothing_is_overwritten_where_all_is_damaged(tmp_path: Path, interrupted: Path) -> None:
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    for path in folder.glob("checkpoints/0*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in folder.glob("checkpoints/*")}
    with pytest.raises(EvoViTError, match="All checkpoints in .* are damaged"):
        train_here(small(tmp_path), folder)
    assert {path: path.read_bytes() for path in folder.glob("checkpoints/*")} == before


def test_a_full_disk_is_a_sentence_and_loses_nothing(
    tmp_path: Path, undisturbed: Outcome, interrupted: Path
) -> None:
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    assert finish(start(small(tmp_path), folder, largest_file=200_000)) == [2]
    said = (tmp_path / "run.said").read_text()
    assert "cannot be written" in said and "are intact" in said
    assert "going on after update 9" in train_here(small(tmp_path), folder)
    assert outcome(folder) == undisturbed


def test_a_finished_run_stays_as_it_is_and_another_recipe_is_refused(tmp_path: Path, once_run: Path) -> None:
    recipe, folder = small(tmp_path, *ONCE), tmp_path / "run"
    shutil.copytree(once_run, folder)
    before = outcome(folder)
    assert "finished" in train_here(recipe, folder)
    assert outcome(folder) == before
    with pytest.raises(EvoViTError, match=r"method.keep_ratio: None, now 0.7"):
        train_here(small(tmp_path, *ONCE, "method.keep_ratio=0.7"), folder)
    assert outcome(folder) == before
    train_here(small(tmp_path, *ONCE, "run.batch_per_device=8"), folder)  # how, not what


NESTED = ('model.options.pretrained_cfg_overlay={mean = [0.5, 0.5, 0.5], license = "frei für alle"}',)


def test_a_run_with_nested_options_goes_on(tmp_path: Path) -> None:
    recipe, folder = small(tmp_path, *ONCE, *NESTED), tmp_path / "run"
    train_here(recipe, folder)
    assert read_recipe(folder / "recipe.toml") == recipe
    newest = max(folder.glob("checkpoints/0*.json"))
    for path in (newest, newest.with_suffix(".safetensors")):
        path.unlink()
    before = losses(folder)
    assert "going on after update 1 of 2" in train_here(small(tmp_path, *ONCE, *NESTED), folder)
    assert losses(folder) == before
    with pytest.raises(EvoViTError, match=r"model\.options\.pretrained_cfg_overlay: \{.*, now None"):
        train_here(small(tmp_path, *ONCE), folder)


def test_a_run_whose_recipe_version_0_1_wrote_goes_on(tmp_path: Path, once_run: Path) -> None:
    """A line each option, those of the model with dotted keys."""
    recipe, folder = small(tmp_path, *ONCE), tmp_path / "run"
    shutil.copytree(once_run, folder)
    lines = [(name.split(".", 1), json.dumps(value)) for name, value in recipe.knobs()]
    tables = {table: f"[{table}]\n" for (table, _), _ in lines}
    for (table, key), value in lines:
        tables[table] += f"{key} = {value}\n"
    assert "options.depth = 4\n" in tables["model"]
    (folder / "recipe.toml").write_text("\n".join(tables.values()))
    assert "finished" in train_here(recipe, folder)
    with pytest.raises(EvoViTError, match=r"model\.options\.depth: 4, now 3"):
        train_here(small(tmp_path, *ONCE, "model.options.depth=3"), folder)


def test_processes_and_accumulation_give_one_loss_curve(tmp_path: Path) -> None:
    """Two processes of 8, one of 16, one of 8 with two forwards per update: 50 updates, 1e-5."""
    shared = (
        "data.mixup=0.0",
        "model.drop_path=0.0",
        "data.scenes=400",
        "run.epochs=2",
        "run.checkpoint_every=0",
    )
    recipe = small(tmp_path, *shared)
    assert finish(*start_world(recipe, tmp_path / "two", 2)) == [0, 0]
    train_here(recipe, tmp_path / "one")
    train_here(small(tmp_path, *shared, "run.batch_per_device=8"), tmp_path / "accumulated")
    one = losses(tmp_path / "one")
    assert len(one) == 50 and abs(one[0] - one[-1]) > 0.01
    for name in ("two", "accumulated"):
        assert max(abs(a - b) for a, b in zip(one, losses(tmp_path / name), strict=True)) < 1e-5


def forge(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Change the newest checkpoint of a run, with right checksums."""
    name = state.numbered(folder)[0]
    tensors, plain = state.read_checkpoint(folder, name)
    change(plain, tensors)
    state.write_checkpoint(folder, name, state.Checkpoint(tensors, plain))


def bias_in(tensors: dict[str, Tensor], prefix: str) -> str:
    """Return the name of a vector of ten numbers."""
    return next(key for key, value in tensors.items() if key.startswith(prefix) and value.shape == (10,))


FORGED: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    "no update": lambda plain, _: plain.pop("update"),
    "update of text": lambda plain, _: plain.update(update="x"),
    "update below 0": lambda plain, _: plain.update(update=-1),
    "update above all": lambda plain, _: plain.update(update=10**12),
    "skipped more than done": lambda plain, _: plain.update(skipped=99),
    "best of text": lambda plain, _: plain.update(best="x"),
    "no totals": lambda plain, _: plain.update(totals=None),
    "odd totals": lambda plain, _: plain["totals"].update(loss=[]),
    "odd paths": lambda plain, _: plain.update(unreadable=["x"]),
    "no scaler": lambda plain, _: plain.pop("scaler"),
    "no weights": lambda _, tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("model.")],
    "more weights": lambda _, tensors: tensors.update({"model.x": torch.zeros(1)}),
    "odd weights": lambda _, tensors: tensors[bias_in(tensors, "model.")].fill_(float("nan")),
    "another shape": lambda _, tensors: tensors.update({bias_in(tensors, "model."): torch.zeros(3)}),
    "odd slot": lambda _, tensors: tensors.update({"optimizer.x": torch.zeros(1)}),
    "another slot": lambda _, tensors: tensors.update({bias_in(tensors, "optimizer."): torch.zeros(3)}),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    folder = tmp_path_factory.mktemp("forged")
    recipe = small(folder, "run.epochs=1", "data.scenes=32", "learning_rate.warm_up_epochs=0")
    train_here(recipe, folder / "run")
    return recipe, folder / "run"


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_checkpoint_is_one_sentence(how: str, begun: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, run = begun
    shutil.copytree(run, tmp_path / "run")
    forge(tmp_path / "run" / "checkpoints", FORGED[how])
    with pytest.raises(EvoViTError, match="The checkpoint in |The state of the optimizer") as caught:
        train_here(recipe, tmp_path / "run")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_pipe_in_place_of_a_checkpoint_is_no_wait(
    kind: str, begun: tuple[Recipe, Path], tmp_path: Path
) -> None:
    shutil.copytree(begun[1], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    path = folder / f"{state.numbered(folder)[0]}.{kind}"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(EvoViTError, match="is damaged"):
        state.read_checkpoint(folder, path.stem)
