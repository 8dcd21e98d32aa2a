"""`evovit quickstart`: train a small ViT and the same ViT as Evo-ViT from scratch, and lay them side by side.

Both start from the same weights and see the same scenes in the same order under the same recipe; both are
timed in turn in one process. The scenes are real handwritten digits among fragments (`evovit.data`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from evovit.data import Scenes, colours, digit_scenes
from evovit.errors import EvoViTError, check_count
from evovit.model import ReducedViT
from evovit.run.benchmark import timed
from evovit.run.build import SMALL_VIT, check_model
from evovit.run.config import parse_recipe
from evovit.run.datasets import TEST_BATCH, TEST_SEED
from evovit.run.files import write_atomically
from evovit.run.macs import gmacs_counted
from evovit.run.recipe import Recipe
from evovit.run.records import EPOCHS, read_lines
from evovit.run.report import COLUMNS, Comparison, Result, draw_accuracy_speed, page
from evovit.run.row import compare
from evovit.run.small_vit import IMAGE_SIZE, NAME
from evovit.run.train_command import train_one
from evovit.visualize import draw_kept, kept_on_box, kept_patches, patches_on_box

PICTURES = 10  # test scenes shown
SPEED_BATCH = {"cpu": 64, "cuda": 512}  # images


def quickstart(
    out: Path = Path("runs/quickstart"),
    seed: int = 0,
    keep_ratio: float = 0.5,
    epochs: int = 10,
    scenes_per_epoch: int = 2048,
    test_scenes: int = 2000,
    speed_rounds: int = 60,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Train a small ViT and the same ViT as Evo-ViT from scratch on built-in data, and compare them.

    Given again after an interruption, it goes on where it stopped.

    Args:
        out: folder for results.json, report.html, the pictures and the two runs.
        seed: first weights and training scenes follow from it; the test scenes are always the same.
        keep_ratio: share of the patch tokens that Evo-ViT updates, above 0 and at most 1.
        epochs: rounds of training of each model.
        scenes_per_epoch: training scenes in an epoch, each drawn anew.
        test_scenes: scenes of held-out digits for the accuracy.
        speed_rounds: how often each model is timed; they take turns, and the median counts.
        device: where to compute; auto takes CUDA if there is any.
    """
    check_count("speed_rounds", speed_rounds, 1, 10_000)
    recipes = make_recipes(
        keep_ratio,
        {"source": "digits", "batch_size": 32, "scenes": scenes_per_epoch, "test_scenes": test_scenes},
        {"epochs": epochs, "seed": seed, "device": device, "test_every": max(1, epochs)},
    )
    for recipe in recipes.values():
        check_model(recipe)
    _make_folder(out)
    console, models = Console(), dict[str, nn.Module]()
    console.print(f"Training two models from scratch, {epochs} epochs each.")
    for name, recipe in recipes.items():
        console.print(f"{name}:")
        models[name] = train_one(recipe, out / name, console).eval()
    records = {name: read_lines(out / name / EPOCHS) for name in models}
    evo = models["evo_vit"]
    assert isinstance(evo, ReducedViT)
    place = next(evo.parameters()).device.type
    scenes = _test_scenes(test_scenes)
    speed_images = _test_scenes(SPEED_BATCH[place]).images.to(place)
    times_ms = time_in_turn(models, speed_images, speed_rounds)

    def row(name: str, keep_ratio: float) -> Result:
        return Result(
            model=NAME,
            method=name,
            keep_ratio=keep_ratio,
            top1=records[name][-1]["top1"],
            gmacs=gmacs_counted(models[name], speed_images.shape[1:]),
            images_per_second=speed_images.shape[0] / _median(times_ms[name]) * 1e3,
            train_seconds=sum(epoch["train_seconds"] for epoch in records[name]),
            parameters=sum(weight.numel() for weight in models[name].parameters()),
            device=_device_name(place),
            dtype="float32",
            batch_size=speed_images.shape[0],
        )

    batches = torch.split(scenes.images, TEST_BATCH)
    kept = torch.cat([kept_patches(evo, images.to(place)).cpu() for images in batches])
    on_box = patches_on_box(scenes.boxes, (kept.shape[2], kept.shape[3]), (IMAGE_SIZE, IMAGE_SIZE))
    comparison = Comparison(
        results=(row("dense", 1.0), row("evo_vit", keep_ratio)),
        speed_up=compare(times_ms["dense"], times_ms["evo_vit"]),
        on_box=tuple(kept_on_box(kept, on_box)),
        test_scenes=test_scenes,
    )
    _write(out, comparison, Scenes(*(part[:PICTURES] for part in scenes)), kept[:PICTURES])
    _print(console, comparison, out)


def make_recipes(keep_ratio: float, data: dict[str, Any], run: dict[str, Any]) -> dict[str, Recipe]:
    """Return the recipes of both models, alike but for the method; else as recipes/digits/dense.toml."""
    tables = {
        "model": {"name": SMALL_VIT},
        "data": data,
        "optimizer": {"name": "muon", "beta2": 0.98, "clip_norm": 1.0},
        "learning_rate": {
            **{"base": 2e-3, "muon": 0.02, "reference_batch": data["batch_size"]},
            **{"warm_up_epochs": 0.08 * run["epochs"], "warm_up_start": 0.0, "minimum": 0.0},
        },
        "run": run,
    }
    method = {"name": "evo_vit", "keep_ratio": keep_ratio, "start_block": 2, "stage_length": 3}
    return {"dense": parse_recipe(tables), "evo_vit": parse_recipe(tables | {"method": method})}


@torch.inference_mode()
def time_in_turn(models: Mapping[str, nn.Module], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Time one batch of each model in turn, in evaluation mode; milliseconds, one per round.

    Args:
        models: on one device.
        images: (B, channels, height, width) on it.
        rounds: each begins with another model, so that no place is favoured.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds):
        for name in list(models) if turn % 2 == 0 else reversed(list(models)):
            step = partial(_forward, models[name].eval(), images)
            times[name].append(timed(step, 0, 1, images.is_cuda))
    return times


def _forward(model: nn.Module, images: Tensor, _: int) -> object:
    return model(images)


def _device_name(place: str) -> str:
    return torch.cuda.get_device_name() if place == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvoViTError(
            f"out is {str(out)!r}, where no folder can be made ({error.strerror}); give a folder."
        ) from error
    if not os.access(out, os.W_OK):
        raise EvoViTError(f"out is {str(out)!r}, where this user may not write; give another folder.")


def _test_scenes(number: int) -> Scenes:
    """Draw the first of the scenes on which the trainings are tested."""
    return digit_scenes("test", number, size=IMAGE_SIZE, seed=TEST_SEED)


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def _write(out: Path, comparison: Comparison, shown: Scenes, kept: Tensor) -> None:
    """Write the pictures, the results and the report, each whole or not at all."""
    titles = [f"digit {label}" for label in shown.labels.tolist()]
    pictures = {
        "accuracy_speed.png": draw_accuracy_speed(comparison.results),
        "kept_patches.png": draw_kept(colours(shown.images), kept, shown.boxes, titles),
    }
    for name, figure in pictures.items():
        write_atomically(out / name, partial(figure.savefig, format="png", dpi=110))
    texts = {
        "results.json": json.dumps([asdict(result) for result in comparison.results], indent=2) + "\n",
        "report.html": page(comparison, *(out / name for name in pictures)),
    }
    for name, text in texts.items():
        write_atomically(out / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]


def _print(console: Console, comparison: Comparison, out: Path) -> None:
    table = Table(*COLUMNS)
    for result in comparison.results:
        table.add_row(*result.cells())
    console.print(table)
    for sentence in comparison.findings():
        console.print(sentence)
    console.print(f"Report: {(out / 'report.html').resolve()}", soft_wrap=True)
