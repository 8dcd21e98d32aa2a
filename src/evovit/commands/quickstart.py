"""`evovit quickstart`: a small ViT and the same as Evo-ViT, trained from scratch and laid side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


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

    Both start from the same weights and see the same scenes in the same order: real handwritten digits among
    fragments of others. After an interruption, the same command continues where it stopped.

    $ evovit quickstart
    $ evovit quickstart --keep-ratio 0.3 --seed 1 --out runs/quick03

    Args:
        out: folder for results.json, report.html, the pictures and the two runs.
        seed: of the initial weights and the training scenes; the test scenes are always the same.
        keep_ratio: share of the patch tokens that Evo-ViT updates, above 0 and at most 1.
        epochs: epochs of training of each model.
        scenes_per_epoch: training scenes in an epoch, each drawn anew.
        test_scenes: scenes of held-out digits for the accuracy.
        speed_rounds: how often each model is timed; they take turns, and the median counts.
        device: where to compute; auto uses CUDA if available.
    """
    from rich.console import Console

    from evovit.data.digits import digit_scenes
    from evovit.data.images import TEST_SEED
    from evovit.errors import EvoViTError, check_count
    from evovit.models.small_vit import IMAGE_SIZE
    from evovit.report.quickstart import write_report
    from evovit.runtime.files import hold_folder, told
    from evovit.runtime.world import is_alone, join_world
    from evovit.study import Contestant, digit_recipes, hold, measure
    from evovit.train.build import check_recipe

    check_count("speed_rounds", speed_rounds, 1, 10_000)
    if not is_alone():
        raise EvoViTError("evovit quickstart runs in one process; train a recipe under torchrun instead.")
    recipes = digit_recipes(
        keep_ratio,
        {"source": "digits", "batch_size": 32, "scenes": scenes_per_epoch, "test_scenes": test_scenes},
        {"epochs": epochs, "seed": seed, "device": device, "test_every": max(1, epochs)},
    )
    for recipe in recipes.values():
        check_recipe(recipe)
    console = Console()
    with hold_folder(out), join_world(device) as world:
        console.print(f"Training two models from scratch, {epochs} epochs each.")
        contestants = [Contestant(name, [(recipe, out / name)]) for name, recipe in recipes.items()]
        found = [hold(contestant, world, console) for contestant in contestants]
        rows = measure(found, world, "eager", 512 if world.device.type == "cuda" else 64, speed_rounds)
        scenes = digit_scenes("test", test_scenes, size=IMAGE_SIZE, seed=TEST_SEED)
        with told(out):
            write_report(out, recipes["evo_vit"], found, rows, scenes, console)
