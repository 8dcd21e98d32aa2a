"""A model with the images to test it on: of a run, or of a timm name and a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evovit.checkpoints.reduced import is_saved, load_reduced
from evovit.data.images import Images
from evovit.data.pictures import open_images
from evovit.errors import EvoViTError, check_choice, shown
from evovit.hosts import create_host
from evovit.hosts.preprocessing import read_preprocessing
from evovit.macs import gmacs
from evovit.methods import build_config, find_method
from evovit.model import ReducedViT, backbone_of, reduce_tokens
from evovit.options import read_named
from evovit.recipe.reading import overridden, parse_recipe, read_recipe
from evovit.recipe.tables import Recipe
from evovit.runtime.files import read_state_dict
from evovit.runtime.world import World
from evovit.train.build import build_model, colours_in, fit, image_side, open_images_of, preprocessing_in
from evovit.train.evaluate import Accuracy, evaluate, paired
from evovit.train.records import EPOCHS, read_lines
from evovit.train.run import settle
from evovit.train.state import FOLDER, course, part, read_checkpoint, read_weights

OF_A_RUN = ("last", "best", "ema")


class Tested(NamedTuple):
    """A model and what it is tested on."""

    name: str  # with its weights
    recipe: Recipe
    images: Images
    model: nn.Module
    places: Tensor | None = None  # (classes of the images,) class of the model; None: the same


def run_model(run: Path, weights: str, folder: Path | None, overrides: Sequence[str]) -> Tested:
    """Return the model of a run with its weights: last, best or ema."""
    check_choice("weights", weights, OF_A_RUN)
    recipe = read_recipe(run / "recipe.toml", overrides)
    if folder is not None:
        recipe = replace(recipe, data=replace(recipe.data, **_splits(folder)))
    images = open_images_of(recipe)
    model = build_model(recipe, images.num_classes, weights=False)
    fit(model, read_weights(run, weights), f"The checkpoint of {str(run)!r}")
    settle(model)
    return Tested(f"{run}, {weights} weights", recipe, images, model)


def saved_model(name: str, images: Path | None, overrides: Sequence[str]) -> Tested:
    """Return a model that was saved or shared, and a folder of images, prepared as the model tells."""
    if images is None:
        raise EvoViTError(f"{shown(name)} has no test images of its own; give --images FOLDER.")
    model = load_reduced(name)
    prepared = read_preprocessing(model.model, backbone_of(model).image_shape)
    if not prepared:
        raise EvoViTError(f"{shown(name)} does not say how images are prepared; give a run, or a timm name.")
    recipe = parse_recipe(overridden(_tables(name, images, prepared["crop_pct"]), overrides))
    resize = {key: prepared[key] for key in ("interpolation", "crop_mode")}
    opened = open_images(recipe, image_side(model), colours_in(prepared), resize)
    return Tested(name, recipe, opened, model, places_of(opened.class_names, model))


def named_model(
    name: str,
    weights: str,
    pretrained: bool,
    folder: Path | None,
    overrides: Sequence[str],
) -> Tested:
    """Return a timm model with weights from a file, or the published ones, and a folder of images."""
    if folder is None:
        raise EvoViTError(f"{name!r} has no test images of its own; give --images FOLDER.")
    if bool(weights) == pretrained:
        raise EvoViTError(f"Give either --weights FILE or --pretrained for {name!r}.")
    model = load_named(name, weights, pretrained)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    recipe = parse_recipe(overridden(_tables(name, folder, cfg.get("crop_pct", 0.875)), overrides))
    images = open_images_of(recipe)
    return Tested(
        f"{name}, {weights or 'published weights'}",
        recipe,
        images,
        model,
        places_of(images.class_names, model),
    )


def load_named(name: str, weights: str, pretrained: bool) -> nn.Module:
    """Return a timm model with the published weights, those of a file, or random ones."""
    model = create_host(name, pretrained=pretrained)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if weights:
        state = read_state_dict(weights)
        heads = cfg.get("classifier") or ()
        head = state.get(f"{heads if isinstance(heads, str) else next(iter(heads), '')}.weight")
        if head is not None and head.shape[0] != getattr(model, "num_classes", head.shape[0]):
            model = create_host(name, {"num_classes": head.shape[0]})
        fit(model, state, f"{weights!r}")
    return model


def open_model(
    text: str, weights: str = "", pretrained: bool = False
) -> tuple[nn.Module, dict[str, Any] | None, str]:
    """Return a model by what names it, how its images are prepared if that is its own, and a warning.

    Args:
        text: a timm name, the folder of a run, or one written by `save_reduced`, `hf:user/name` on the Hub.
        weights: of a run: last, best or ema, "" for last; of a timm name: a file, "" for random ones.
        pretrained: of a timm name: the published weights.
    """
    folder = Path(text)
    if is_saved(text):
        if weights or pretrained:
            raise EvoViTError(f"{shown(text)} has weights of its own; leave --weights and --pretrained out.")
        return load_reduced(text), None, ""
    if not folder.exists():
        if weights and pretrained:
            raise EvoViTError("Give either --weights or --pretrained.")
        random = f"{text} has random weights; give --pretrained or --weights FILE for others"
        return load_named(text, weights, pretrained), None, "" if weights or pretrained else random
    if pretrained:
        raise EvoViTError("--pretrained is for a timm name; a folder has weights of its own.")
    if not (folder / "recipe.toml").is_file():
        raise EvoViTError(f"{text!r} is neither the folder of a run nor one that save_reduced wrote.")
    tested = run_model(folder, weights or "last", None, ())
    host = tested.model.model if isinstance(tested.model, ReducedViT) else tested.model
    return tested.model, preprocessing_in(tested.recipe, host, tested.images), ""


def _tables(name: str, folder: Path, crop_pct: float) -> dict[str, Any]:
    """Return the tables of a recipe that tests a model on a folder of images."""
    return {
        "model": {"name": name},
        "data": {**_splits(folder), "batch_size": 1, "crop_pct": crop_pct},
        "learning_rate": {"base": 0.0, "warm_up_epochs": 0},
        "run": {"epochs": 1},
    }


def accuracy_of_run(run: Path) -> dict[str, float]:
    """Return what the test at the end of a run found, in percent; empty where there was none."""
    recipe = read_recipe(run / "recipe.toml")
    last = next((line for line in reversed(read_lines(run / EPOCHS)) if "top1" in line), {})
    if last.get("epoch") != recipe.run.epochs:
        return {}
    what = f"{last['test_images']} test images of {Path(recipe.data.source).name}"
    at_budgets = {
        key: f"budget {key.removeprefix('top1_at_')}, " for key in last if key.startswith("top1_at_")
    }
    return {f"top-1 %, {words}{what}": last[key] for key, words in (at_budgets or {"top1": ""}).items()}


def _splits(folder: Path) -> dict[str, Any]:
    """Return the data table's source and splits for one folder of test images."""
    folder = folder.resolve()
    return {"source": str(folder.parent), "train_split": folder.name, "test_split": folder.name}


def weights_by_epoch(run: Path, most: int) -> list[tuple[str, dict[str, Tensor]]]:
    """Return the weights of a run's checkpoints, each with the name of its epoch, oldest first.

    Args:
        most: so many at most, 2 or more, evenly spread; first and last are among them.
    """
    epochs = {record["update"]: record.get("epoch") for record in read_lines(run / EPOCHS)}
    found = list(course(run / FOLDER).items())
    if len(found) > most:
        found = [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]
    return [
        (
            f"epoch {epochs[update]}" if update in epochs else f"update {update}",
            part(read_checkpoint(run / FOLDER, name).tensors, "model."),
        )
        for update, name in found
    ]


def places_of(names: Sequence[str], model: Any) -> Tensor | None:
    """Return the model's class of each class of the images; None where they are the same in number.

    Folders named as ImageNet names its classes (n01440764) find theirs among the 1000.
    """
    if len(names) == model.num_classes:
        return None
    from timm.data import ImageNetInfo

    known = {label: place for place, label in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    if model.num_classes != len(known) or not set(names) <= set(known):
        raise EvoViTError(
            f"The images have {len(names)} classes and the model {model.num_classes}; give weights with as "
            "many, or folders named as ImageNet's classes are (n01440764)."
        )
    return torch.tensor([known[name] for name in names])


def at_budgets(models: Mapping[str, nn.Module], budgets: Sequence[float]) -> Iterator[tuple[str, nn.Module]]:
    """Yield each model, a reduced one once per budget, which is then in force."""
    for what, each in models.items():
        own = (budgets or each.budgets) if isinstance(each, ReducedViT) else ()
        for budget in own:
            each.budget = budget  # type: ignore[assignment]
            yield f"{what}, budget {budget:g}", each
        if not own:
            yield what, each


def test_lines(
    tested: Tested, methods: Sequence[str], world: World, budgets: Sequence[float] = ()
) -> Iterator[str]:
    """Test the model as it is and with each method; yield a line for each.

    Args:
        budgets: each reduced model is tested at each; default: one trained for several, at those.
    """
    asked = [(name, options) for name, options in map(read_named, methods)]
    for name, options in asked:
        build_config(find_method(name), options)
    model = tested.model.to(world.device)
    models = {"as trained" if isinstance(model, ReducedViT) else "dense": model}
    host: nn.Module = model.model if isinstance(model, ReducedViT) else model
    if asked and host is not model:
        models["dense"] = host
    for text, (name, options) in zip(methods, asked, strict=True):
        models[text] = reduce_tokens(host, name, budgets=tuple(budgets), **options)
    yield f"{tested.name}:"
    first: Accuracy | None = None
    for what, each in at_budgets(models, budgets):
        accuracy = evaluate(each, tested.images, tested.recipe, world, tested.places)
        beside = ""
        if first is not None:
            against = paired(accuracy.right, first.right, world)
            beside = f" ({against.difference:+.2f} ± {against.error:.2f})"
        first = first or accuracy
        work = gmacs(each, backbone_of(each).image_shape)
        yield (
            f"  {what}: top-1 {accuracy.top1:.2f} %{beside}, top-5 {accuracy.top5:.2f} %, {work:.4g} GMACs, "
            f"{accuracy.images} images, {len(tested.images.unreadable)} unreadable"
        )
