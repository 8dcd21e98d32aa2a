"""`evovit compare`: methods trained under equal budgets, side by side in one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

PICTURES = 6  # test images shown


def compare(
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE ...")],
    /,
    dense: str = "",
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    seeds: tuple[int, ...] = (0,),
    out: Path = Path("runs/compare"),
    engine: str = "eager",
    batch: int = 64,
    rounds: int = 40,
) -> None:
    """Train recipes under equal conditions and report accuracy, GMACs and measured speed.

    The same command again continues where it stopped. One of the recipes must be the dense model's.

    $ evovit compare digits/compare --dense "runs/dense/seed{seed}" --seeds 0 1 2

    Args:
        recipes: TOML files or folders of them, yours or those that come with evovit; their [data] and [run]
            must be equal.
        dense: folder of a finished run of the dense model; every recipe starts from its weights, and it is
            the teacher of methods that need one; {seed} in it stands for the seed. Empty: as the recipes say.
        set: table.key=value, overrides every recipe.
        seeds: each recipe is trained once for each seed.
        out: folder of the runs (OUT/RECIPE/seed<n>) and of compare.md, .csv and .html.
        engine: eager or compiled, for the speed measurement.
        batch: images per step of the speed measurement.
        rounds: how often each model is timed; all take turns.
    """
    from rich.console import Console

    from evovit.bench.step import ENGINES
    from evovit.errors import EvoViTError, check_choice, check_count
    from evovit.recipe.reading import find_recipes
    from evovit.report.compare import write_report
    from evovit.runtime.files import hold_folder, told
    from evovit.runtime.world import is_alone, join_world
    from evovit.study import hold, measure, plan, shown_images
    from evovit.train.build import open_images_of

    check_choice("engine", engine, ENGINES)
    check_count("batch", batch, 1, 1_000_000)
    check_count("rounds", rounds, 1, 100_000)
    if not is_alone():
        raise EvoViTError("evovit compare runs in one process; train the recipes under torchrun instead.")
    contestants = plan(find_recipes(recipes), set, dense, seeds, out)
    for contestant in contestants:
        images = open_images_of(
            contestant.recipe
        )  # tells of a mistake in the last before the first is trained
    with hold_folder(out), join_world(contestants[0].recipe.run.device) as world:
        found = [hold(contestant, world, Console()) for contestant in contestants]
        rows = measure(found, world, engine, batch, rounds)
        shown = shown_images(contestants[0].recipe, images, found[0].model, world, PICTURES)
        with told(out):
            report = write_report(out, found, rows, shown)
    print(report)
