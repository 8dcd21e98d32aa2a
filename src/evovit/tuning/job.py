"""A search on the command line: which model and images, and what is written at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evovit.checkpoints.reduced import MODEL, save_reduced
from evovit.data.photographs import read_photographs
from evovit.engines.exporting import preprocessing_of
from evovit.errors import EvoViTError, shown
from evovit.hosts.preprocessing import tell_preprocessing
from evovit.model import ReducedViT
from evovit.recipe.reading import LIBRARY, read_recipe
from evovit.recipe.tables import MethodTable, Recipe
from evovit.runtime.files import as_path, told, write_text
from evovit.runtime.world import join_world
from evovit.train.build import preprocessing_in
from evovit.train.evaluate import evaluate
from evovit.train.tested import Tested, load_named, open_model, run_model
from evovit.tuning.tune import Tuned


class Job(NamedTuple):
    """What a search is about."""

    name: str
    model: nn.Module
    images: Tensor | None  # None: random ones
    tested: Tested | None  # of a run: its labelled test images
    host: dict[str, Any]  # timm's name and arguments
    source: Path | None  # of the images
    notes: list[str]


def open_job(model: str, weights: str, pretrained: bool, folder: Path | None, samples: int) -> Job:
    """Return model and images by what names them."""
    if as_path(Path(model) / "recipe.toml", "MODEL").is_file():
        if pretrained:
            raise EvoViTError("--pretrained is for a timm name; a run has weights of its own.")
        tested = run_model(Path(model), weights or "last", None, ["run.device=cpu"])
        if isinstance(tested.model, ReducedViT):
            raise EvoViTError(f"{shown(model)} is reduced already; give the run of a dense model.")
        table = tested.recipe.model
        host = {"name": table.name, "options": {"num_classes": tested.images.num_classes, **table.options}}
        if folder is None:
            return Job(model, tested.model, spread_images(tested, samples), tested, host, None, [])
        _, preparation, _ = open_model(model, weights)
        assert preparation is not None  # a run has its own
        given = read_photographs(folder, preparation, samples)
        return Job(model, tested.model, given, tested, host, folder, [])
    if Path(model).exists():
        raise EvoViTError(f"There is no {str(Path(model) / 'recipe.toml')!r}; give the folder of a run.")
    opened = load_named(model, weights, pretrained)
    random = (
        [] if weights or pretrained else [f"{model} has random weights; give --pretrained or --weights FILE"]
    )
    host = {"name": model, "options": {}}
    images = None if folder is None else read_photographs(folder, preprocessing_of(opened), samples)
    return Job(model, opened, images, None, host, folder, random)


@torch.inference_mode()
def spread_images(tested: Tested, samples: int) -> Tensor:
    """Return test images of a run, evenly spread over them."""
    with join_world("cpu") as world:
        images = torch.cat([batch for batch, _ in tested.images.test(world)])
    return images[:: max(1, len(images) // samples)][:samples].clone()


def top1_lines(job: Job, found: Tuned) -> list[str]:
    """Return the top-1 of the dense model and of the winner, where there are labels."""
    if job.tested is None or found.model is None:
        return []
    tested = job.tested
    with join_world("cpu") as world:
        dense, ours = (
            evaluate(model, tested.images, tested.recipe, world, tested.places)
            for model in (job.model, found.model)
        )
    return [
        f"top-1 without training: dense {dense.top1:.2f} %, reduced {ours.top1:.2f} % "
        f"({ours.top1 - dense.top1:+.2f}), {ours.images} test images"
    ]


def save_found(job: Job, found: Tuned, folder: Path) -> None:
    """Write the winner, and a recipe that trains it on."""
    if found.model is None or found.best is None:
        return
    if job.tested is not None:
        told_by = preprocessing_in(job.tested.recipe, job.model, job.tested.images)
        tell_preprocessing(found.model.model, told_by)
    save_reduced(found.model, folder)
    with told(folder):
        write_text(folder / "finetune.toml", finetune(job, found, folder).to_toml())


def finetune(job: Job, found: Tuned, folder: Path) -> Recipe:
    """Return the recipe: that of the run at a tenth of its rate, or `evovit recipes finetune`."""
    assert found.best is not None
    plan = found.best.plan
    weights = str((folder / MODEL).resolve())
    method = MethodTable(name=plan.method, options=dict(plan.options))
    if job.tested is not None:
        recipe = job.tested.recipe
        rate = replace(
            recipe.learning_rate, base=recipe.learning_rate.base / 10, muon=recipe.learning_rate.muon / 10
        )
        epochs = max(1, recipe.run.epochs // 3)
        rate = replace(rate, warm_up_epochs=min(rate.warm_up_epochs, epochs / 4))
        run = replace(recipe.run, epochs=epochs, device="auto")
        recipe = replace(recipe, learning_rate=rate, run=run)
    else:
        recipe = read_recipe(LIBRARY / "finetune.toml")
    model = replace(recipe.model, name=job.host["name"], weights=weights, pretrained=False)
    return replace(recipe, model=model, method=method)
