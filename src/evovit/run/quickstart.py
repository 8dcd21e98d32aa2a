"""`evovit quickstart`: train a small ViT and the same ViT as Evo-ViT from scratch, and lay them side by side.

Both start from the same weights and see the same scenes in the same order under the same recipe; both are
timed in turn in one process. The scenes are real handwritten digits among fragments (`evovit.data`).
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from evovit.data import Scenes, colours, digit_scenes
from evovit.errors import EvoViTError, check_choice, check_count
from evovit.model import reduce_tokens
from evovit.run.benchmark import timed
from evovit.run.files import write_atomically
from evovit.run.macs import gmacs_counted
from evovit.run.report import COLUMNS, Comparison, Result, draw_accuracy_speed, page
from evovit.run.row import compare
from evovit.run.small_vit import IMAGE_SIZE, NAME, small_vit
from evovit.run.train import EVALUATION_BATCH, Recipe, State, top1, train
from evovit.visualize import draw_kept, kept_on_box, kept_patches, patches_on_box

TEST_SEED = 2**40  # above every seed of a training scene
PICTURES = 10  # test scenes shown
SPEED_BATCH = {"cpu": 64, "cuda": 512}  # images


def quickstart(
    out: Path = Path("runs/quickstart"),
    seed: int = 0,
    keep_ratio: float = 0.5,
    epochs: int = Recipe.epochs,
    scenes_per_epoch: int = Recipe.scenes_per_epoch,
    test_scenes: int = 2000,
    speed_rounds: int = 60,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Train a small ViT and the same ViT as Evo-ViT from scratch on built-in data, and compare them.

    Args:
        out: folder for results.json, report.html and the pictures.
        seed: first weights and training scenes follow from it; the test scenes are always the same.
        keep_ratio: share of the patch tokens that Evo-ViT updates, above 0 and at most 1.
        epochs: rounds of training of each model.
        scenes_per_epoch: training scenes in an epoch, each drawn anew.
        test_scenes: scenes of held-out digits for the accuracy.
        speed_rounds: how often each model is timed; they take turns, and the median counts.
        device: where to compute; auto takes CUDA if there is any.
    """
    recipe = Recipe(epochs=epochs, scenes_per_epoch=scenes_per_epoch, image_size=IMAGE_SIZE, seed=seed)
    check_count("seed", seed, 0, 1_000_000)
    check_count("test_scenes", test_scenes, 1, 1_000_000)
    check_count("speed_rounds", speed_rounds, 1, 10_000)
    place = _choose_device(device)
    dense = small_vit(seed).to(place)
    evo = reduce_tokens(copy.deepcopy(dense), "evo_vit", keep_ratio=keep_ratio, start_block=2, stage_length=3)
    models: dict[str, nn.Module] = {"dense": dense, "evo_vit": evo}
    _make_folder(out)

    console = Console()
    console.print(f"Training two models from scratch on {place}, {recipe.epochs} epochs each.")
    seconds = {name: _train(name, model, recipe, console) for name, model in models.items()}
    scenes = _test_scenes(recipe, test_scenes)
    speed_images = _test_scenes(recipe, SPEED_BATCH[place]).images.to(place)
    times_ms = time_in_turn(models, speed_images, speed_rounds)

    def row(name: str, keep_ratio: float) -> Result:
        return Result(
            model=NAME,
            method=name,
            keep_ratio=keep_ratio,
            top1=top1(models[name], scenes),
            gmacs=gmacs_counted(models[name], speed_images.shape[1:]),
            images_per_second=speed_images.shape[0] / _median(times_ms[name]) * 1e3,
            train_seconds=seconds[name],
            parameters=sum(weight.numel() for weight in models[name].parameters()),
            device=_device_name(place),
            dtype="float32",
            batch_size=speed_images.shape[0],
        )

    batches = torch.split(scenes.images, EVALUATION_BATCH)
    kept = torch.cat([kept_patches(evo.eval(), images.to(place)).cpu() for images in batches])
    on_box = patches_on_box(scenes.boxes, (kept.shape[2], kept.shape[3]), (IMAGE_SIZE, IMAGE_SIZE))
    comparison = Comparison(
        results=(row("dense", 1.0), row("evo_vit", keep_ratio)),
        speed_up=compare(times_ms["dense"], times_ms["evo_vit"]),
        on_box=tuple(kept_on_box(kept, on_box)),
        test_scenes=test_scenes,
    )
    _write(out, comparison, Scenes(*(part[:PICTURES] for part in scenes)), kept[:PICTURES])
    _print(console, comparison, out)


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


def _choose_device(device: str) -> str:
    check_choice("device", device, ("auto", "cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise EvoViTError("device is 'cuda', but PyTorch finds no CUDA device; use 'auto' or 'cpu'.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


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


def _test_scenes(recipe: Recipe, number: int) -> Scenes:
    return digit_scenes(
        "test", number, size=recipe.image_size, num_fragments=recipe.num_fragments, seed=TEST_SEED
    )


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def _train(name: str, model: nn.Module, recipe: Recipe, console: Console) -> float:
    """Train with a live bar where there is a terminal, and a line per epoch everywhere; return seconds."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=recipe.steps, state="")

        def show(now: State) -> None:
            state = f"loss {now.loss:.3f}, training top-1 {now.top1:.1f} %"
            bar.update(task, completed=now.step, state=state)
            if now.step % recipe.steps_per_epoch == 0:
                console.print(f"{name}: epoch {now.step // recipe.steps_per_epoch}/{recipe.epochs}, {state}")

        return train(model, recipe, show)


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
