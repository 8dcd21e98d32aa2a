"""Objective: images and targets to named loss terms. What DistributedDataParallel wraps.

The assisted class-token loss is eq. 8 of Evo-ViT (Xu et al., AAAI 2022); distillation is DeiT's (Touvron et
al., 2021), as the released Evo-ViT code applies it: the first head learns the labels, the others the teacher;
where heads are made for the teacher ("distilled"), all others learn the labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones import adapt
from evovit.backbones.base import trace_dense
from evovit.errors import EvoViTError
from evovit.model import ReducedViT, backbone_of
from evovit.recipe.tables import ObjectiveTable
from evovit.tokens import Outputs, Taught, Tokens, logits_of
from evovit.train.token_labels import run_with_token_labels, with_token_labels


class Looked(NamedTuple):
    """One forward of an objective."""

    terms: dict[str, Tensor]  # of the loss, by name, weighted
    heads: dict[str, Tensor]  # logits (B, classes) by name, "class" first
    taught: Taught | None


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
        self.labels_tokens = goal.token_label_weight > 0 or goal.mix_token
        model = with_token_labels(model, goal, teacher) if self.labels_tokens else model
        check_teacher(model, goal, teacher)
        self.model, self.goal = model, goal
        self.teacher = teacher.requires_grad_(False).eval() if teacher is not None else None
        scale, shift = teacher_colours or (torch.ones(3), torch.zeros(3))
        self.register_buffer("scale", scale.view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(-1, 1, 1), persistent=False)
        self.reads_features = goal.token_distillation > 0 or (
            isinstance(model, ReducedViT) and model.method.learns_from_teacher
        )
        switch = None if isinstance(model, ReducedViT) else getattr(model, "set_distilled_training", None)
        if switch and goal.distillation != "none":
            switch(True)  # timm's distilled models then give one prediction for labels, one for the teacher

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return loss terms by name, weighted: their sum is the loss.

        Args:
            images: (B, channels, height, width).
            targets: (B,) int64 classes, (B, classes) shares after mixup, or with token labels
                (B, 1 + N, classes) shares of image and patches.
        """
        return self.look(images, targets).terms

    def look(self, images: Tensor, targets: Tensor) -> Looked:
        """Return loss terms, the logits of every head and what the teacher said."""
        again = self.second_start()  # first: what draws numbers is not compiled, and ends a graph
        outputs: Outputs | None = None
        labelled: dict[str, Tensor] = {}
        if isinstance(self.model, ReducedViT) and self.labels_tokens:
            outputs, targets, labelled = run_with_token_labels(self.model, self.goal, images, targets)
        elif isinstance(self.model, ReducedViT):
            outputs = self.model.run(images)
        logits = logits_of(self.model(images)) if outputs is None else outputs.logits
        others = {} if outputs is None else outputs.extra_logits
        if isinstance(logits, tuple):  # of timm's distilled models
            logits, others = logits[0], {"distilled": logits[1]}
        taught = self.teach(images) if self.teacher is not None else None
        terms = self.supervised(logits, others, targets, taught)
        if again is not None and outputs is not None and isinstance(self.model, ReducedViT):
            other = self.model.run(images, prepare=again)
            also = self.supervised(other.logits, other.extra_logits, targets, taught)
            terms = self.model.method.pair_losses((terms, outputs), (also, other), targets)
        terms |= labelled
        if outputs is not None and isinstance(self.model, ReducedViT):
            terms |= self.model.method.losses(outputs, taught)
            if self.goal.token_distillation > 0 and taught is not None:
                distance = token_distance(self.model, outputs, taught.features)
                terms["tokens"] = self.goal.token_distillation * distance
        return Looked(terms, {"class": logits, **others}, taught)

    def second_start(self) -> Callable[[Tokens], Tokens] | None:
        """Return how a second pass of the same images begins, if the method trains by two."""
        if self.training and isinstance(self.model, ReducedViT):
            return self.model.method.second_start()
        return None

    def supervised(
        self, logits: Tensor, others: dict[str, Tensor], targets: Tensor, taught: Taught | None
    ) -> dict[str, Tensor]:
        """Return the terms of all heads, from labels (eq. 8) or from labels and teacher."""
        goal, heads = self.goal, {"class": logits, **others}
        if goal.distillation == "none" or taught is None:
            weight = 1 / len(heads) if goal.reduction == "mean" else 1.0
            return {name: weight * self.cross_entropy(head, targets) for name, head in heads.items()}
        marked = [name for name in heads if name.endswith("distilled")]  # made for the teacher, as in LeViT
        students = marked or list(others) or ["class"]
        distances = [
            distillation(heads[name], taught.logits, goal.distillation, goal.temperature) for name in students
        ]
        labelled = [name for name in heads if name not in marked] if marked else ["class"]
        losses = [self.cross_entropy(heads[name], targets) for name in labelled]
        return {
            "class": (1 - goal.alpha) * torch.stack(losses).mean(),
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
            return Taught(logits_of(self.teacher(images)), None)
        trace: list[Tokens] = []
        backbone = backbone_of(self.teacher)
        if isinstance(self.model, ReducedViT) and self.model.method.reads_teacher_trace:
            trace = trace_dense(backbone, images)
            features = backbone.norm(trace[-1].x)
        elif isinstance(self.teacher, ReducedViT):
            features = self.teacher.forward_features(images)
        else:
            features = backbone.host_features(images)
        patches = tuple(tokens.patches for tokens in trace)
        each = backbone.token_logits(features)
        alone = None if each is None else backbone.class_logits(features)
        return Taught(backbone.head(features), features, patches, each, alone)

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


def check_teacher(model: nn.Module, goal: ObjectiveTable, teacher: nn.Module | None) -> None:
    """Raise `EvoViTError` where the losses cannot be had from this model and this teacher."""
    compares = goal.token_distillation > 0
    if compares and (not isinstance(model, ReducedViT) or teacher is None):
        raise EvoViTError("token_distillation needs a reduced model and a teacher.")
    if teacher is None:
        return
    own = {id(p): name for name, p in model.named_parameters()}
    shared = [own[id(p)] for p in teacher.parameters() if id(p) in own]
    if shared:
        raise EvoViTError(
            f"The teacher, which is frozen, shares {shared[0]} with the model, which learns; give a copy "
            "(copy.deepcopy) or another network."
        )
    if not isinstance(model, ReducedViT):
        return
    method, name = model.method, type(model.method).__name__
    if compares and not method.keeps_places:
        raise EvoViTError(
            f"{name} leaves no patch token at its place on the grid, where token_distillation compares; "
            "leave it out."
        )
    if not (compares or method.learns_from_teacher):
        return
    name = name if method.learns_from_teacher else "token_distillation"
    if isinstance(teacher, ReducedViT) and (
        method.reads_teacher_trace or not (teacher.method.keeps_grid and teacher.method.keeps_places)
    ):
        raise EvoViTError(
            f"{name} learns from all tokens of its teacher, which reduces them; take a dense one."
        )
    ours, other = (backbone_of(m).spec for m in (model, teacher))
    unequal = (ours.grid, ours.dims) != (other.grid, other.dims)
    unequal |= method.learns_from_teacher and ours.num_prefix != other.num_prefix
    if unequal or (method.reads_teacher_trace and ours.depths != other.depths):
        raise EvoViTError(
            f"{name} compares tokens with its teacher's, which has {other.depth} blocks of width "
            f"{other.dims[-1]} on {other.grid} and {other.num_prefix} prefix tokens; the model {ours.depth} "
            f"of {ours.dims[-1]} on {ours.grid} and {ours.num_prefix}; choose an equal teacher."
        )
