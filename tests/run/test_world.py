"""Processes that train together: when one ends, the others say so in one sentence and end as well."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from evovit.errors import EvoViTError
from evovit.recipe.tables import Recipe
from evovit.runtime import world
from evovit.runtime.files import hold_folder
from evovit.runtime.world import is_alone, join_world
from evovit.train import trainer
from tests.run.processes import CONTEXT, ONCE, finish, outcome, port, small, start_world, train_child

BOUND = 60.0  # seconds from the end of one process to the end of the other


def dying(moment: str, place: int, text: str, folder: Path, environment: dict[str, str]) -> None:
    """Train in a child that is killed at the beginning of a training step, a test or a checkpoint."""
    calls = iter(range(10**6))
    owner: Any = {"step": trainer.Trainer, "save": trainer.Trainer, "evaluate": trainer}[moment]
    real = getattr(owner, moment)

    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls) == place:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(owner, moment, call)
    train_child(text, folder, environment, 0, None)


def start_with_one_dying(recipe: Recipe, folder: Path, victim: int, moment: str) -> list[Any]:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": "2"}
    children = []
    for rank in range(2):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (recipe.to_toml(), folder, environment)
        plain = partial(train_child, *arguments, 0, None)
        work = partial(dying, moment, 2, *arguments) if rank == victim else plain
        children.append(CONTEXT.Process(target=work))
        children[-1].start()
    return children


@pytest.mark.parametrize(
    "moment", ["step", *(pytest.param(name, marks=pytest.mark.slow) for name in ("evaluate", "save"))]
)
@pytest.mark.parametrize("victim", [0, 1], ids=["main", "other"])
def test_the_one_left_ends_with_one_sentence_and_the_same_command_goes_on(
    tmp_path: Path, victim: int, moment: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = small(tmp_path, "data.scenes=32", "run.epochs=3"), tmp_path / "run"
    children = start_with_one_dying(recipe, folder, victim, moment)
    children[victim].join(120)
    start, left = time.monotonic(), children[1 - victim]
    left.join(BOUND)
    print(f"{time.monotonic() - start:.1f} s")
    assert children[victim].exitcode == -signal.SIGKILL and left.exitcode == 2
    said = (tmp_path / f"run.said{1 - victim}").read_text()
    assert "Another of the 2 processes has ended" in said and "\n" not in said
    assert "terminate called" not in capfd.readouterr().err
    assert finish(*start_world(recipe, folder, 2)) == [0, 0]
    assert finish(*start_world(recipe, tmp_path / "whole", 2)) == [0, 0]
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_a_refusal_of_the_main_process_ends_the_other(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "run"):
        assert finish(*start_world(small(tmp_path, *ONCE), tmp_path / "run", 2)) == [2, 2]
    assert "in use by another process" in (tmp_path / "run.said0").read_text()
    assert "Another of the 2 processes has ended" in (tmp_path / "run.said1").read_text()


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; allowed is an integer from 1"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x'; allowed is an integer from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'; allowed is an integer from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1.5"}, "LOCAL_RANK is '1.5'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_PORT is missing"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "http"},
            "MASTER_PORT is 'http'; allowed is an integer",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "70000"}, "from 1 to 65535"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1234"}, "MASTER_ADDR is missing"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "2"},
            "LOCAL_RANK is '2'; allowed is an integer from 0 to 1",
        ),
        *(
            (
                {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1234", "MASTER_ADDR": name},
                "not the name of a machine",
            )
            for name in ("-1", "a b", "localhost:9", "\udcff", "a/b", "\n", "::x")
        ),
    ],
)
def test_malformed_places_in_a_world_are_one_sentence(
    environment: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EvoViTError, match=sentence), join_world("cpu"):
        pass
    if "WORLD_SIZE" in sentence:
        with pytest.raises(EvoViTError, match=sentence):
            is_alone()


def test_a_port_that_is_taken_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in ({"WORLD_SIZE": "2", "RANK": "0"} | place).items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(EvoViTError, match="cannot meet at 127.0.0.1:.*failed to listen"),
            join_world("cpu"),
        ):
            pass


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_wait_for_one_that_never_comes_end(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "JOINING", timedelta(seconds=2))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": "2", "RANK": rank}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EvoViTError, match="The 2 processes cannot meet"), join_world("cpu"):
        pass


def test_an_error_of_ones_own_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), join_world("cpu"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
