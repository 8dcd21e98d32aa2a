"""What a search found, on disk: `tuned.json`, to look at later."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from evovit.errors import EvoViTError, shown
from evovit.runtime.files import as_path, read_json, told, write_text
from evovit.tuning.latency import LatencyTable
from evovit.tuning.plans import Plan
from evovit.tuning.sensitivity import SensitivityTable
from evovit.tuning.tune import Candidate, Tuned

TUNED = "tuned.json"


class _Record(BaseModel):
    """What the file holds of a `Tuned`; the model lies beside it."""

    best: int | None  # which of the candidates
    target: float
    met: bool
    sentence: str
    dense_ms: float
    candidates: list[Candidate]
    latency: LatencyTable
    sensitivity: dict[str, SensitivityTable]
    conditions: dict[str, Any]


def write_tuned(folder: Path, found: Tuned) -> None:
    """Write `tuned.json` into a folder."""
    own = {name: getattr(found, name) for name in _Record.model_fields if name != "best"}
    own["best"] = None if found.best is None else found.candidates.index(found.best)
    with told(folder):
        write_text(folder / TUNED, json.dumps({"evovit": version("evovit"), **own}, default=asdict))


def read_tuned(folder: str | Path) -> Tuned:
    """Return what a search found, without its model.

    Args:
        folder: that `evovit tune` wrote.

    Raises:
        EvoViTError: no such folder, or a damaged file.
    """
    path = as_path(folder, "the folder of evovit tune") / TUNED
    if not path.is_file():
        raise EvoViTError(
            f"There is no {shown(path)}; give a folder that evovit tune wrote. For an older one, run "
            "the same command again: it writes the file from the tables there."
        )
    try:
        record = _Record.model_validate(read_json(path, "evovit"))
        record.candidates = [one._replace(plan=_as_it_was(one.plan)) for one in record.candidates]
        best = None if record.best is None else record.candidates[record.best]
        if not record.candidates or not {"clock", "images", "random_images", "measure"} <= {
            *record.conditions
        }:
            raise ValueError("candidates or conditions are missing")
    except (ValidationError, ValueError, IndexError) as error:
        what = error.errors()[0]["loc"] if isinstance(error, ValidationError) else error
        raise EvoViTError(f"{shown(path)} is damaged or not written by evovit: see {shown(what)}.") from error
    return Tuned(None, best, *(getattr(record, name) for name in list(_Record.model_fields)[1:]))


def _as_it_was(plan: Plan) -> Plan:
    """Return a plan whose lists are tuples, which JSON has not."""
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in plan.options.items()}
    return Plan(plan.method, options)
