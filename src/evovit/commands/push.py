"""`evovit push`: a saved model, or the model of a run, onto the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def push(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="USER/NAME")],
    /,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a model of evovit",
    create_pr: bool = False,
    measured: Path | None = None,
    base_model: str | None = None,
) -> None:
    """Put a reduced model on the Hugging Face Hub, with a model card of what it is and what was measured.

    Anyone can load it with evovit.load_reduced("hf:USER/NAME"). Log in first with: hf auth login.

    $ evovit push tuned/deit_small_patch16_224 user/deit-small-fast --private
    $ evovit push runs/evo/seed0 user/flowers --measured runs/bench

    Args:
        folder: a run of evovit train, or a folder written by save_reduced, tune or calibrate.
        name: name of the repository; it is created if it does not exist.
        private: make a new repository private.
        revision: branch to write to; it is created if it does not exist.
        message: commit message.
        create_pr: open a pull request instead of committing.
        measured: folder of evovit bench; the card gets its rows of this model.
        base_model: the Hub's name of the model it was made from, for the card.
    """
    from evovit.bench.row import read_rows
    from evovit.checkpoints.card import rows_of
    from evovit.checkpoints.reduced import MANIFEST, load_reduced
    from evovit.checkpoints.sharing import push_to_hub
    from evovit.errors import EvoViTError, printable, shown
    from evovit.train.tested import accuracy_of_run

    is_run = (folder / "recipe.toml").is_file()
    place = folder / "model" if is_run else folder
    if is_run and not (place / MANIFEST).is_file():
        raise EvoViTError(
            f"{shown(folder)} is a run that did not end with a reduced model; give one that did."
        )
    rows = []
    if measured is not None:
        rows = rows_of(load_reduced(place), read_rows(measured))
        if not rows:
            raise EvoViTError(
                f"{shown(measured)} has no row of this model; measure it: evovit bench NAME --method METHOD."
            )
    address = push_to_hub(
        place,
        name,
        private=private or None,
        revision=revision,
        commit_message=message,
        create_pr=create_pr,
        measured=rows,
        accuracy=accuracy_of_run(folder) if is_run else {},
        base_model=base_model,
    )
    shared = f"hf:{name}@{revision}" if revision else f"hf:{name}"
    print(f"{printable(address)}: evovit.load_reduced({shared!r}) loads it")
