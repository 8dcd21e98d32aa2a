"""A reduced vision model in its place inside a larger one: the same number of tokens out, in the same places.

The tower stays the same module, with its names, weights and config; only its forward is replaced, by that of
a `ReducedViT`. So processors, placeholders and positions of the language side stay valid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from evovit.backbones import adapt, adapter_of
from evovit.backbones.hf_trunk import HFTrunk
from evovit.backbones.hf_whole import find_trunks
from evovit.errors import EvoViTError, check_kind, shown
from evovit.methods.base import Method
from evovit.model import ReducedViT, reduce_tokens


class TowerCall:
    """What replaces a tower's forward."""

    def __init__(self, reduced: ReducedViT) -> None:
        self.reduced = reduced

    def __call__(self, *images: Any, **arguments: Any) -> Any:
        """Return the tower's answer; the method follows the tower's mode."""
        reduced = self.reduced
        if reduced.training != reduced.model.training:
            reduced.training = reduced.model.training
            reduced.method.train(reduced.training)
        return reduced(*images, **arguments)


def reduce_tower(
    model: nn.Module,
    method: str | Method.Config = "evo_vit",
    *,
    tower: str | None = None,
    verify: bool = True,
    **options: Any,
) -> ReducedViT:
    """Let a method run the blocks of the vision model inside a larger model; `restore_tower` undoes it.

    Args:
        model: a transformers model with a supported vision model in it, such as LLaVA, PaliGemma or CLIP.
        tower: name of the vision model, as for `model.get_submodule`, if there are several.
        method, verify, options: as for `reduce_tokens`.

    Returns:
        The reduced tower, for its `method` and `run`; the model uses it already.

    Raises:
        EvoViTError: no or several supported vision models, one that is reduced already, a method that drops
        tokens or has weights to learn, and whatever `reduce_tokens` refuses.
    """
    found = _find(model, tower)
    if isinstance(vars(found).get("forward"), TowerCall):
        raise EvoViTError("The tower is reduced already; call evovit.restore_tower(model) first.")
    reduced = reduce_tokens(found, method, verify=verify, **options)
    _expect_whole(reduced)
    found.forward = TowerCall(reduced)
    return reduced


def restore_tower(model: nn.Module) -> None:
    """Give every reduced tower of a model its own forward back."""
    check_kind("model", model, nn.Module, "the model that reduce_tower was given")
    reduced = [part for part in model.modules() if isinstance(vars(part).get("forward"), TowerCall)]
    if not reduced:
        raise EvoViTError(f"This {type(model).__name__} has no reduced tower; there is nothing to restore.")
    for part in reduced:
        del part.forward


def _find(model: nn.Module, tower: str | None) -> nn.Module:
    """Return the vision model to reduce."""
    check_kind("model", model, nn.Module, "a model of transformers with a vision model in it")
    found = {path: module for path, module, _ in find_trunks(model)}
    if tower is not None:
        if tower not in found:
            raise EvoViTError(
                f"tower is {shown(tower)}; supported vision models in this {type(model).__name__} are "
                f"{', '.join(found) or 'none'}."
            )
        return found[tower]
    if len(found) != 1:
        known = adapter_of(type(model))
        bare = known is not None and issubclass(known, HFTrunk)
        raise EvoViTError(
            f"This {type(model).__name__} holds {', '.join(found) or 'no supported vision model'}; "
            + (
                "it is one itself: use evovit.reduce_tokens."
                if bare
                else "name one as tower='...'."
                if found
                else "docs/transformers.md lists those that are supported."
            )
        )
    return next(iter(found.values()))


@torch.no_grad()
def _expect_whole(reduced: ReducedViT) -> None:
    """Raise `EvoViTError` unless every token leaves the tower, and the method has nothing to learn."""
    name = type(reduced.method).__name__
    if any(True for _ in reduced.method.parameters()):
        raise EvoViTError(
            f"{name} as configured has parameters of its own, which nothing inside a larger model trains; "
            "choose evo_vit, idle_vit or tome."
        )
    backbone = adapt(reduced.model)
    weight = next(p for p in reduced.model.parameters() if p.is_floating_point())
    if weight.is_meta:  # what a tower is given may be read as numbers
        return
    images = torch.zeros(1, *backbone.image_shape, dtype=weight.dtype, device=weight.device)
    tokens = reduced.method.finish(reduced.blocks(backbone, images)[0])
    cells = math.prod(backbone.spec.grid)
    if tokens.num_patches != cells:
        raise EvoViTError(
            f"{name} as configured leaves {tokens.num_patches} of {cells} patch tokens, and the "
            "model around the tower expects each in its place; choose a method that brings all back: "
            "evo_vit, idle_vit or tome."
        )
