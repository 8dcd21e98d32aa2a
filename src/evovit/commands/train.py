"""`evovit train`: from a recipe to a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def train(
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")],
    /,
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    out: Path | None = None,
    seeds: tuple[int, ...] = (),
) -> None:
    """Train a recipe; the same command again resumes it. Under torchrun all processes train one model.

    $ evovit train digits/dense
    $ evovit train my.toml --set method.keep_ratio=0.7 --set run.epochs=30 --out runs/mine
    $ torchrun --nproc_per_node 8 -m evovit train evo_deit_small

    evovit recipes lists the recipes that come with evovit; evovit options lists what --set can set.

    Args:
        recipe: a TOML file, or the name of a recipe that comes with evovit.
        set: table.key=value, overrides the recipe; may be given several times.
        out: folder of the run; default: runs/RECIPE/seed<run.seed>.
        seeds: train once for each seed, into OUT/seed<n>.
    """
    from dataclasses import replace

    from evovit.recipe.reading import check_different, find_recipe, read_recipe
    from evovit.train.run import train_in_folder

    path = find_recipe(recipe)
    read = read_recipe(path, set)
    check_different(seeds)
    base = out or Path("runs") / path.stem
    runs = [(replace(read, run=replace(read.run, seed=seed)), base / f"seed{seed}") for seed in seeds]
    for each, folder in runs or [(read, out or base / f"seed{read.run.seed}")]:
        _, finished = train_in_folder(each, folder)
        if not finished:
            break  # SIGTERM asked to stop
