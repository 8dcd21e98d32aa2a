"""Objective: images and targets to named loss terms. What DistributedDataParallel wraps.

The assisted class-token loss is eq. 8 of Evo-ViT (Xu et al., AAAI 2022); distillation is DeiT's (Touvron et
al., 2021), as the released Evo-ViT code applies it: the first head learns the labels, the others the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones import adapt
from evovit.errors import EvoViTError
from evovit.model import Outputs, ReducedViT
from evovit.run.recipe import ObjectiveTable


class Taught(NamedTuple):
    """What the teacher says about a batch."""

    logits: Tensor  # (B, classes)
    features: Tensor | None  # (B, P + N, C), its normed tokens in raster order, if a loss reads them


class Objective(nn.Module):
    """A model, its frozen teacher and the losses between them.

    Args:
        model: a `ReducedViT` or any classifier.
        goal: which losses, with which weights.
        teacher: of the same classes; it is frozen here and always in evaluation mode.
        teacher_colours: (scale, shift), three numbers each; images * scale + shift suits the teacher.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        goal: ObjectiveTable,
        teacher: nn.Module | None = None,
        teacher_colours: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.goal = model, goal
        self.teacher = teacher.requires_grad_(False).eval() if teacher is not None else None
        scale, shift = teacher_colours or (torch.ones(3), torch.zeros(3))
        self.register_buffer("scale", scale.view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(-1, 1, 1), persistent=False)
        reduced = isinstance(model, ReducedViT)
        self.reads_features = goal.token_distillation > 0 or (
            isinstance(model, ReducedViT) and model.method.learns_from_teacher
        )
        if goal.token_distillation > 0 and (not reduced or teacher is None):
            raise EvoViTError("token_distillation needs a reduced model and a teacher.")

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return loss terms by name, weighted: their sum is the loss.

        Args:
            images: (B, channels, height, width).
            targets: (B,) int64 classes, or (B, classes) shares after mixup.
        """
        outputs = self.model.run(images) if isinstance(self.model, ReducedViT) else None
        logits = self.model(images) if outputs is None else outputs.logits
        others = {} if outputs is None else outputs.extra_logits
        taught = self.teach(images) if self.teacher is not None else None
        terms = self.supervised(logits, others, targets, taught)
        if outputs is not None and isinstance(self.model, ReducedViT):
            terms |= self.model.method.losses(outputs, taught)
            if self.goal.token_distillation > 0 and taught is not None:
                distance = token_distance(self.model, outputs, taught.features)
                terms["tokens"] = self.goal.token_distillation * distance
        return terms

    def supervised(
        self, logits: Tensor, others: dict[str, Tensor], targets: Tensor, taught: Taught | None
    ) -> dict[str, Tensor]:
        """Return the terms of all heads, from labels (eq. 8) or from labels and teacher."""
        goal = self.goal
        if goal.distillation == "none" or taught is None:
            weight = 1 / (1 + len(others)) if goal.reduction == "mean" else 1.0
            heads = {"class": logits, **others}
            return {name: weight * self.cross_entropy(head, targets) for name, head in heads.items()}
        students = list(others.values()) or [logits]
        distances = [distillation(s, taught.logits, goal.distillation, goal.temperature) for s in students]
        return {
            "class": (1 - goal.alpha) * self.cross_entropy(logits, targets),
            "distillation": goal.alpha * torch.stack(distances).mean(),
        }

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in float32; labels are smoothed here, mixed targets already are."""
        smoothing = self.goal.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    @torch.no_grad()
    def teach(self, images: Tensor) -> Taught:
        """Ask the teacher."""
        assert self.teacher is not None
        images = images * self.scale + self.shift
        if not self.reads_features:
            return Taught(self.teacher(images), None)
        if isinstance(self.teacher, ReducedViT):
            features = self.teacher.forward_features(images)
            return Taught(self.teacher.forward_head(features), features)
        backbone = adapt(self.teacher)
        features = backbone.host_features(images)
        return Taught(backbone.head(features), features)

    def train(self, mode: bool = True) -> Objective:
        """Set the model's mode; the teacher's stays evaluation."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def distillation(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """Return DeiT's distillation loss of logits (B, classes).

    Args:
        kind: "hard" is the cross-entropy with the teacher's top class; "soft" the KL divergence at
            `temperature`, times its square, divided by B * classes as in the released code.
    """
    if kind == "hard":
        return F.cross_entropy(student.float(), teacher.argmax(1))
    log_p = F.log_softmax(student.float() / temperature, dim=1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) * temperature**2 / student.numel()


def token_distance(model: ReducedViT, outputs: Outputs, features: Tensor | None) -> Tensor:
    """Return the mean squared distance between the model's patch tokens and the teacher's at their places.

    Tokens that stand for several places (index -1) take no part.
    """
    assert features is not None
    tokens = model.method.finish(outputs.tokens)
    normed = adapt(model.model).norm(tokens.x)[:, tokens.num_prefix :]  # (B, N, C)
    patches = features[:, features.shape[1] - tokens.grid[0] * tokens.grid[1] :]
    index = tokens.index.clamp(min=0)[:, :, None].expand(-1, -1, patches.shape[2])
    squared = (normed.float() - patches.gather(1, index).float()).square().mean(2)  # (B, N)
    real = (tokens.index >= 0).to(squared.dtype)
    return (squared * real).sum() / real.sum()
