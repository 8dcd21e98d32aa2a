"""`evovit eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from evovit.errors import EvoViTError
from evovit.model import ReducedViT
from evovit.recipe.reading import read_recipe
from evovit.runtime.world import join_world
from evovit.train.build import fit, open_run
from evovit.train.evaluate import evaluate
from evovit.train.state import read_weights


def eval(
    run: Path,
    /,
    weights: Literal["last", "best", "ema"] = "last",
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> None:
    """Test the weights of a run; under torchrun the test images are shared out.

    Args:
        run: folder of a run of `evovit train`.
        weights: of the last checkpoint, of the one with the best test so far, or their moving average.
        set: table.key=value, as for train: other data, another keep ratio, another precision.
    """
    if not (run / "recipe.toml").is_file():
        raise EvoViTError(
            f"There is no {str(run / 'recipe.toml')!r}; give the folder of a run of `evovit train`."
        )
    recipe = read_recipe(run / "recipe.toml", set)
    with join_world(recipe.run.device) as world:
        images, model = open_run(recipe)
        fit(model, read_weights(run, weights), f"The checkpoint of {str(run)!r}")
        if isinstance(model, ReducedViT):
            model.method.set_progress(1.0)
        accuracy = evaluate(model.to(world.device), images, recipe, world)
        if world.is_main:
            print(
                f"{run}, {weights} weights: top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} %, "
                f"{accuracy.images} images, {len(images.unreadable)} unreadable"
            )
