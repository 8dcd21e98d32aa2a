"""A folder that `export` wrote, opened again: what its files are, and how they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evovit.engines.base import PRECISIONS, Engine, Run
from evovit.engines.exporting import ANY, PREPROCESSING, RECORD, TARGETS
from evovit.errors import EvoViTError, shown
from evovit.hosts.preprocessing import Preprocessing
from evovit.methods import build_config, find_method
from evovit.options import build
from evovit.runtime.files import as_path, read_json


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file of an export, as the folder's record tells of it."""

    target: str  # as `evovit export --to` names it
    engine: Engine
    path: Path
    precision: str
    batch: int | None  # images of a call; None: any number
    gmacs: float  # of one image
    method: str
    config: Any  # the method's options
    preprocessing: Preprocessing

    def load(self, threads: int | None = None) -> Run:
        """Return what runs the file, on so many CPU threads; None: as many as the engine likes."""
        self.engine.expect_ready(self.precision)
        if not self.path.is_file():
            raise EvoViTError(f"There is no {shown(self.path)}, which {RECORD} names; export it again.")
        try:
            return self.engine.load(self.path, threads)
        except EvoViTError:
            raise
        except Exception as error:  # engines raise what they like for damaged files
            raise EvoViTError(
                f"{self.engine.name} cannot read {shown(self.path)} ({type(error).__name__}); export again."
            ) from error


def read_exports(folder: str | Path) -> dict[str, Exported]:
    """Return what a folder of `evovit export` holds, by target.

    Raises:
        EvoViTError: no such folder, or one that is damaged.
    """
    place = as_path(folder, "the folder of an export")
    if not (place / RECORD).is_file():
        raise EvoViTError(f"There is no {shown(place / RECORD)}; give a folder that evovit export wrote.")
    prepared = build(Preprocessing, read_json(place / PREPROCESSING, "evovit"), PREPROCESSING)
    return {
        target: _exported(target, entry, place, prepared)
        for target, entry in read_json(place / RECORD, "evovit").items()
    }


def _exported(target: str, entry: Any, place: Path, prepared: Preprocessing) -> Exported:
    kinds: Mapping[str, Any] = {"precision": str, "method": str, "options": dict, "gmacs": int | float}
    whole = isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
    if target not in TARGETS or not whole or entry["precision"] not in PRECISIONS:
        raise EvoViTError(
            f"{shown(place / RECORD)} is damaged or not written by evovit: see {shown(target)}."
        )
    batch = entry.get("batch")
    if batch != ANY and (not isinstance(batch, int) or batch < 1):
        raise EvoViTError(f"{shown(place / RECORD)} is damaged: {target} has a batch of {shown(batch)}.")
    return Exported(
        target=target,
        engine=TARGETS[target],
        path=place / TARGETS[target].file,
        precision=entry["precision"],
        batch=None if batch == ANY else batch,
        gmacs=float(entry["gmacs"]),
        method=entry["method"],
        config=build_config(find_method(entry["method"]), entry["options"]),
        preprocessing=prepared,
    )
