"""Optimisers and learning rates of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from evovit.errors import EvoViTError
from evovit.model import ReducedViT
from evovit.recipe.tables import OptimizerTable, Recipe

BLOCKS = ("blocks.", "layers.", "layer.")  # in the names of blocks' parameters: timm's, transformers'


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
        matrices = {
            name: p for name, p in named.items() if p.ndim == 2 and any(word in name for word in BLOCKS)
        }
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
