"""Token labelling (Jiang et al., "All Tokens Matter", NeurIPS 2021): every patch token has a label; MixToken.

Each patch token of LV-ViT is classified by its second head, if it has a place on the grid: against its part
of a dense label, or against the image's label where there is none. MixToken puts a box of embedded patches
of one image into another; labels follow, patch by patch.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones import adapt
from evovit.errors import EvoViTError
from evovit.methods.dense import Dense
from evovit.model import ReducedViT
from evovit.recipe.tables import ObjectiveTable
from evovit.tokens import Outputs, Tokens


class Labels(NamedTuple):
    """Shares of the classes, float32; they sum to 1."""

    image: Tensor  # (B, classes)
    tokens: Tensor  # (B, N, classes), raster order


def with_token_labels(model: nn.Module, goal: ObjectiveTable, teacher: nn.Module | None) -> ReducedViT:
    """Return the model as it can be trained with token labels or MixToken, or raise `EvoViTError`."""
    if not isinstance(model, ReducedViT):
        model = ReducedViT(model, Dense(Dense.Config(), adapt(model).spec))
    if model.method.trains_twice:
        raise EvoViTError(
            f"{type(model.method).__name__} as configured trains by two passes, and token labels and "
            "mix_token are made for one; leave them out, or set r_teacher=0."
        )
    backbone = adapt(model.model)
    if goal.mix_token and teacher is not None:
        raise EvoViTError("mix_token mixes embedded patches, which the teacher does not see; leave one out.")
    if goal.token_label_weight > 0:
        weight = next(model.parameters())
        features = torch.zeros(1, backbone.spec.num_prefix + 1, backbone.spec.dims[-1]).to(weight)
        if backbone.token_logits(features) is None:
            raise EvoViTError(
                f"token_label_weight needs a host that classifies every patch token, which "
                f"{type(model.model).__name__} does not; choose an LV-ViT, or leave it out."
            )
        if not model.method.keeps_places:
            raise EvoViTError(
                f"{type(model.method).__name__} leaves no patch token at its place on the grid, where its "
                "label is; leave token_label_weight out."
            )
    return model


def run_with_token_labels(
    model: ReducedViT, goal: ObjectiveTable, images: Tensor, targets: Tensor
) -> tuple[Outputs, Tensor, dict[str, Tensor]]:
    """Run a model and label its patch tokens.

    Args:
        targets: (B,) classes, (B, classes) shares, or (B, 1 + N, classes) shares of image and patches.

    Returns:
        outputs, whose logits are the class token's alone where its patch tokens have a loss of their own; the
        image's targets, (B, classes); the patch tokens' loss by name, weighted.
    """
    backbone = adapt(model.model)
    mixes = goal.mix_token and model.training
    box = draw_box(backbone.spec.grid, images.device) if mixes else None
    outputs = model.run(images, prepare=None if box is None else partial(mix_tokens, box=box))
    labels = soft_labels(targets, outputs.logits.shape[1], backbone.spec.grid, goal.label_smoothing)
    labels = labels if box is None else mix_labels(labels, box)
    if goal.token_label_weight == 0 or outputs.token_logits is None:
        return outputs, labels.image, {}
    whole = model.method.finish(outputs.tokens) if backbone.head_reads_patches else outputs.tokens
    loss = token_loss(outputs.token_logits, whole.index, labels.tokens)
    alone = outputs._replace(logits=backbone.class_logits(outputs.features))
    return alone, labels.image, {"token_labels": goal.token_label_weight * loss}


def draw_box(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return (N,) bool, True in a random box: its share of the grid is uniform, but the border cuts it."""
    side = torch.rand((), device=device).sqrt()
    inside = []
    for cells in grid:
        half = (side * cells).floor().div(2, rounding_mode="floor")
        centre = torch.randint(cells, (), device=device)
        place = torch.arange(cells, device=device)
        inside.append((place >= centre - half) & (place < centre + half))
    return (inside[0][:, None] & inside[1]).flatten()


def mix_tokens(tokens: Tokens, box: Tensor) -> Tokens:
    """Take the patches in the box from the image at the other end of the batch.

    Positions are added already, which changes nothing: both patches have the same.
    """
    patches = torch.where(box[:, None], tokens.patches.flip(0), tokens.patches)
    return tokens.with_x(torch.cat((tokens.prefix, patches), dim=1))


def soft_labels(targets: Tensor, num_classes: int, grid: tuple[int, int], smoothing: float) -> Labels:
    """Return labels of images and patches; classes are smoothed here, shares stay as they are."""
    if targets.ndim == 1:
        targets = F.one_hot(targets, num_classes) * (1 - smoothing) + smoothing / num_classes
    if targets.ndim == 3:
        if targets.shape[1] != 1 + grid[0] * grid[1]:
            raise EvoViTError(
                f"The dense labels have {targets.shape[1] - 1} cells and the model {grid[0]} x {grid[1]} "
                "patches; set data.token_label_grid."
            )
        return Labels(targets[:, 0].float(), targets[:, 1:].float())
    return Labels(targets.float(), targets.float()[:, None].expand(-1, grid[0] * grid[1], -1))


def mix_labels(labels: Labels, box: Tensor) -> Labels:
    """Follow `mix_tokens`: patch by patch, and the image's label by its share of patches."""
    share = box.float().mean()
    image = (1 - share) * labels.image + share * labels.image.flip(0)
    return Labels(image, torch.where(box[:, None], labels.tokens.flip(0), labels.tokens))


def token_loss(logits: Tensor, index: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the patch tokens that have a place, float32.

    Args:
        logits: (B, K, classes) of the tokens that are left.
        index: (B, K) their places; -1 for none.
        labels: (B, N, classes) of all places.
    """
    own = labels.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, labels.shape[2]))
    losses = -(own * logits.float().log_softmax(-1)).sum(-1)  # (B, K)
    placed = (index >= 0).float()
    return (losses * placed).sum() / placed.sum()
