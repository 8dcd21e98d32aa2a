"""Trainings that many tests start from or compare with, made once a worker; tests copy them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run.processes import ONCE, small, train_here


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small recipe, finished without disturbance."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(small(folder), folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def once_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small recipe with one update an epoch, finished without disturbance."""
    folder = tmp_path_factory.mktemp("once")
    train_here(small(folder, *ONCE), folder / "run")
    return folder / "run"
