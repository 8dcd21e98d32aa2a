"""What the page offers to choose: timm names, and the folders of models, exports and searches at hand."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from evovit.checkpoints.reduced import MANIFEST
from evovit.engines.exporting import RECORD
from evovit.look import QUICKSTART
from evovit.train.state import FOLDER
from evovit.tuning.record import TUNED

NAMES = ("deit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch16_224", "small_vit")
BELOW = ("runs", "tuned", "exports", "saved", "models")  # folders that are searched, so deep
DEPTH, MOST = 3, 40


class Known(NamedTuple):
    """What may be chosen."""

    models: tuple[str, ...]  # the first one is shown at the start
    exports: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()


def look_around(place: Path, model: str = "") -> Known:
    """Return what lies below a folder, with paths from there.

    Args:
        model: that comes first; default: the run of `evovit quickstart`, else the first of `NAMES`.
    """
    runs = [run for run in _below(place, "recipe.toml") if (place / run / FOLDER).is_dir()]
    saved = _below(place, MANIFEST)
    trained = str(QUICKSTART) if str(QUICKSTART) in runs else ""
    first = [name for name in (model, trained) if name][:1]
    models = dict.fromkeys([*first, *NAMES, *runs, *saved])
    return Known(tuple(models), tuple(_below(place, RECORD)), tuple(_below(place, TUNED)))


def _below(place: Path, name: str) -> list[str]:
    """Return the folders that hold a file of this name, sorted."""
    found = set(place.glob(f"*/{name}"))
    for folder in BELOW:
        for depth in range(2, DEPTH + 1):
            found |= {*(place / folder).glob("/".join(["*"] * (depth - 1) + [name]))}
    return sorted(str(path.parent.relative_to(place)) for path in found)[:MOST]
