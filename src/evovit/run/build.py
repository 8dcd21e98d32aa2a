"""From a recipe to model, teacher and optimisers; to check a recipe, its model is built without memory."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from evovit.data import MEAN, NUM_CLASSES, STD
from evovit.errors import EvoViTError
from evovit.model import ReducedViT, backbone_of, reduce_tokens
from evovit.run.config import read_recipe
from evovit.run.files import read_state_dict
from evovit.run.objective import Objective
from evovit.run.recipe import DENSE, OptimizerTable, Recipe
from evovit.run.small_vit import small_vit
from evovit.run.state import read_weights
from evovit.run.world import number

SMALL_VIT = "small_vit"  # the name of the quickstart's model in recipes
Colours = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel


def build_model(recipe: Recipe, num_classes: int, *, weights: bool = True) -> nn.Module:
    """Build the recipe's model for a number of classes; equal seeds give equal first weights.

    Args:
        weights: also load `model.weights` or the published ones, if the recipe asks for them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number(recipe.run.seed, "weights"))
        host = _host(recipe, num_classes, pretrained=weights and recipe.model.pretrained)
        if weights and recipe.model.weights:
            fit(host, read_state_dict(recipe.model.weights), f"model.weights, {recipe.model.weights!r},")
        freeze(host, recipe.optimizer.frozen.split())
        if recipe.method.name == DENSE:
            return host
        model = reduce_tokens(host, recipe.method.name, **recipe.method.options)
    if recipe.run.reduce_from_epoch or recipe.run.reduce_ramp_epochs:
        model.method.set_reduction(1.0)  # refuses a method that cannot
    return model


def freeze(host: nn.Module, names: Sequence[str]) -> None:
    """Take parameters of the host, named as it names them, out of the training."""
    own = dict(host.named_parameters())
    for name in names:
        if name not in own:
            near = difflib.get_close_matches(name, own, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; name parameters as the network does."
            raise EvoViTError(f"optimizer.frozen names {name!r}, which the network does not have{hint}")
        own[name].requires_grad_(False)


def check_model(recipe: Recipe) -> tuple[int, Colours]:
    """Build model, teacher and losses on the meta device, where they take no memory, to check a recipe.

    Returns:
        the side of the images in pixels; mean and standard deviation of their colours.
    """
    classes = recipe.model.num_classes or NUM_CLASSES
    if recipe.model.weights and not Path(recipe.model.weights).is_file():
        raise EvoViTError(f"model.weights: there is no file {recipe.model.weights!r}.")
    with torch.device("meta"):
        model = build_model(recipe, classes, weights=False)
        build_objective(recipe, model, classes, weights=False)
        build_optimizers(recipe, model)
    return image_side(model), colours_of(recipe, model)


def image_side(model: nn.Module) -> int:
    """Return the side of the square images a model was built for, in pixels."""
    height, width = backbone_of(model).image_shape[1:]
    if height != width:
        raise EvoViTError(
            f"The model is for images of {height} x {width} pixels; only squares can be trained."
        )
    return height


def colours_of(recipe: Recipe, model: nn.Module) -> Colours:
    """Return mean and standard deviation by which the images of a recipe are normalised."""
    if recipe.data.source == "digits":
        return (MEAN,) * 3, (STD,) * 3
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return tuple(cfg.get("mean", IMAGENET_DEFAULT_MEAN)), tuple(cfg.get("std", IMAGENET_DEFAULT_STD))


def build_objective(recipe: Recipe, model: nn.Module, num_classes: int, *, weights: bool = True) -> Objective:
    """Join a model with its teacher and losses; without `weights` theirs, or the teacher, may be left out."""
    goal = recipe.objective
    if goal.teacher_weights and not Path(goal.teacher_weights).is_file():
        raise EvoViTError(f"objective.teacher_weights: there is no file {goal.teacher_weights!r}.")
    if not goal.teacher:
        if weights and isinstance(model, ReducedViT) and model.method.needs_teacher:
            raise EvoViTError(
                f"{recipe.method.name} as configured learns from a teacher and there is none; set "
                "objective.teacher, or the method's token_weight to 0."
            )
        return Objective(model, goal)
    if (Path(goal.teacher) / "recipe.toml").is_file():
        taught = read_recipe(Path(goal.teacher) / "recipe.toml")
        teacher = build_model(taught, num_classes, weights=False)
        if weights:
            fit(teacher, read_weights(Path(goal.teacher), "best"), f"The teacher {goal.teacher!r}")
        theirs = colours_of(taught, teacher)
    else:
        download = weights and not goal.teacher_weights
        teacher = _timm(goal.teacher, num_classes, download, "objective.teacher")
        if weights and goal.teacher_weights:
            fit(
                teacher,
                read_state_dict(goal.teacher_weights),
                f"objective.teacher, {goal.teacher_weights!r},",
            )
        cfg: Any = teacher.pretrained_cfg
        theirs = tuple(cfg.get("mean", IMAGENET_DEFAULT_MEAN)), tuple(cfg.get("std", IMAGENET_DEFAULT_STD))
    (mean, std), (other_mean, other_std) = (
        [torch.tensor(part, device="cpu") for part in colours]
        for colours in (colours_of(recipe, model), theirs)
    )
    objective = Objective(model, goal, teacher, (std / other_std, (mean - other_mean) / other_std))
    if goal.token_distillation and isinstance(model, ReducedViT):
        ours, other = (backbone_of(m).spec for m in (model, teacher))
        if (ours.grid, ours.dims) != (other.grid, other.dims):
            raise EvoViTError(
                f"token_distillation compares token by token, but the teacher has {other.grid} of width "
                f"{other.dims[-1]} and the model {ours.grid} of {ours.dims[-1]}; choose an equal teacher."
            )
    return objective


def _host(recipe: Recipe, num_classes: int, pretrained: bool) -> nn.Module:
    table = recipe.model
    if table.name != SMALL_VIT:
        extra = table.options | ({"drop_path_rate": table.drop_path} if table.drop_path else {})
        return _timm(table.name, num_classes, pretrained, "model.name", extra)
    if table.options or table.drop_path or table.pretrained or num_classes != 10:
        raise EvoViTError(f"{SMALL_VIT} has 10 classes, no drop_path, no options and no published weights.")
    return small_vit(recipe.run.seed)


def _timm(
    name: str, num_classes: int, pretrained: bool, key: str, extra: dict[str, Any] | None = None
) -> nn.Module:
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 1)
        raise EvoViTError(
            f"{key} is {name!r}, which timm does not know; {f'did you mean {near[0]!r}?' if near else ''}"
        )
    make = partial(timm.create_model, name, pretrained=pretrained, num_classes=num_classes, **(extra or {}))
    try:
        try:
            model: nn.Module = make()
        except NotImplementedError:  # timm below 1.0.30 reads numbers to build a RegNet: meta has none
            with torch.device("cpu"):
                model = make()
    except EvoViTError:
        raise
    except (TypeError, AssertionError, ValueError) as error:
        raise EvoViTError(f"timm cannot make {name} with {extra}: {error}.") from error
    except (OSError, RuntimeError) as error:
        raise EvoViTError(f"{key}: the weights of {name} cannot be had: {error}.") from error
    return model


def fit(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load a state dict or say in a sentence why it does not fit."""
    own = module.state_dict()
    lacking, surplus = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    other = [key for key, value in state.items() if key in own and own[key].shape != value.shape]
    wrong = []
    if lacking:
        wrong.append(f"missing {', '.join(lacking[:3])}")
    if surplus:
        wrong.append(f"unknown {', '.join(surplus[:3])}")
    if other:
        wrong.append(f"{other[0]} is {tuple(state[other[0]].shape)}, needed {tuple(own[other[0]].shape)}")
    if wrong:
        raise EvoViTError(f"{what} does not fit the network: {'; '.join(wrong)}.")
    module.load_state_dict(state)


def build_optimizers(recipe: Recipe, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return AdamW, before it Muon for the blocks' matrices if asked for; `set_rates` sets their rates."""
    table, rate = recipe.optimizer, recipe.learning_rate
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for prefix in table.factors:
        if not any(name.startswith(prefix) for name in named):
            raise EvoViTError(f"optimizer.rate_factors: no trained parameter's name starts with {prefix!r}.")
    if table.freeze_host_epochs and not isinstance(model, ReducedViT):
        raise EvoViTError("optimizer.freeze_host_epochs needs a method to train meanwhile; there is none.")
    optimizers: list[torch.optim.Optimizer] = []
    if table.name == "muon":
        matrices = {name: p for name, p in named.items() if "blocks." in name and p.ndim == 2}
        named = {name: p for name, p in named.items() if name not in matrices}
        groups = _groups(table, matrices, set(), rate.muon * recipe.scale)
        optimizers.append(torch.optim.Muon(groups, lr=0.0))
    bare = {name for name, p in named.items() if p.ndim <= 1 or name.endswith(".bias") or name in spared}
    groups = _groups(table, named, bare, rate.base * recipe.scale)
    optimizers.append(torch.optim.AdamW(groups, lr=0.0, betas=(table.beta1, table.beta2), eps=table.eps))
    return optimizers


def _groups(
    table: OptimizerTable, named: dict[str, nn.Parameter], bare: set[str], peak: float
) -> list[dict[str, Any]]:
    """Return parameter groups, those at the full rate with weight decay first."""
    groups: dict[tuple[bool, bool, float, bool], dict[str, Any]] = {}
    for name, p in named.items():
        factor = next((value for prefix, value in table.factors.items() if name.startswith(prefix)), 1.0)
        waits = table.freeze_host_epochs > 0 and name.startswith("model.")
        decay = 0.0 if name in bare else table.weight_decay
        new = {"params": [], "weight_decay": decay, "peak": peak, "factor": factor, "waits": waits}
        groups.setdefault((name in bare, factor != 1, factor, waits), new)["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def set_rates(
    recipe: Recipe, optimizers: Sequence[torch.optim.Optimizer], update: int, per_epoch: int
) -> None:
    """Set the learning rate of every group for an update, counted from 0."""
    frozen = update < recipe.optimizer.freeze_host_epochs * per_epoch
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        rate = rate_at(recipe, group["peak"], update, per_epoch)
        group["lr"] = 0.0 if frozen and group["waits"] else group["factor"] * rate


def rate_at(recipe: Recipe, peak: float, update: int, per_epoch: int) -> float:
    """Return the learning rate of an update, counted from 0: linear warm-up, then a cosine to the minimum."""
    table = recipe.learning_rate
    rise, total = table.warm_up_epochs * per_epoch, (recipe.run.epochs - table.last_epochs) * per_epoch
    if update < rise:
        return table.warm_up_start + (peak - table.warm_up_start) * update / rise
    done = min(1.0, (update - rise) / max(1.0, total - rise))
    return table.minimum + (peak - table.minimum) * 0.5 * (1 + math.cos(math.pi * done))
