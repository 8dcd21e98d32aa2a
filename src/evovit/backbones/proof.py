"""The proof that an adapter's views compute what the host computes: with its weights, and with larger ones.

A feature that the views ignore may be invisible at first: a cap on the attention logits, a clamp, a gate at
zero changes nothing while weights are small. So the host runs again with weights that make every branch
large, in evaluation and in training mode; its own weights and buffers are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from evovit.backbones.base import Backbone, evaluating, run_dense, trace_dense
from evovit.backbones.prefix import with_prefix_block
from evovit.errors import EvoViTError
from evovit.tokens import Tokens

GAINS = (3.0, 1.0)  # deviation that a matrix gives of inputs with deviation 1; the first that works
LARGE_TOLERANCE = 1e-3  # with enlarged weights rounding grows too, block by block

Adapt = Callable[[nn.Module], Backbone]


class Plain:
    """The forward through the host's own blocks, nothing reduced."""

    merges: ClassVar[bool] = False

    def __init__(self) -> None:
        self.method = self

    def finish(self, tokens: Tokens) -> Tokens:
        """Return the tokens: all are there."""
        return tokens

    def narrows(self, backbone: Backbone) -> bool:
        """Tell that the last block computes all."""
        return False

    def blocks(
        self, backbone: Backbone, images: Tensor, record: bool = False, *, prefix_only: bool = False
    ) -> tuple[Tokens, list[Tokens]]:
        """Return the tokens after the last block, and after each."""
        trace = trace_dense(backbone, images, with_prefix_block if prefix_only else None)
        return trace[-1], trace

    def logits(self, images: Tensor, backbone: Backbone) -> Tensor:
        """Return logits (B, classes)."""
        return backbone.head(backbone.norm(self.blocks(backbone, images)[0].x))


class Both(nn.Module):
    """A host beside its views, so that both can be run with other weights than the host's own."""

    def __init__(self, model: nn.Module, adapt: Adapt) -> None:
        super().__init__()
        self.model, self.adapt = model, adapt

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of what the host and its views give: features, in evaluation also logits.

        A head that is said to read prefix tokens alone is given nothing else, as `PrefixBlock` leaves them.
        """
        backbone = self.adapt(self.model)
        pairs = [(_seeded(backbone.host_features, images), _seeded(self._features, images))]
        if not self.model.training:  # in training a head may give several predictions
            host, ours = (
                backbone.values(_seeded(answer, images)) for answer in (backbone.host_answer, self._answer)
            )
            if len(host) != len(ours):
                raise EvoViTError(f"The host returns {len(host)} tensors, but its views return {len(ours)}.")
            pairs += zip(host, ours, strict=True)
            if not backbone.head_reads_patches:
                whole = backbone.head(pairs[0][0])
                pairs.append((whole, backbone.head(run_dense(backbone, images, with_prefix_block))))
        return pairs

    def _answer(self, images: Tensor) -> Any:
        backbone = self.adapt(self.model)
        return backbone.answer(Plain(), images)

    def _features(self, images: Tensor) -> Tensor:
        return run_dense(self.adapt(self.model), images)


def worst_errors(model: nn.Module, adapt: Adapt) -> tuple[float, float, float]:
    """Return the largest relative error: with the host's weights, with large ones, with these in training."""
    both, weight = Both(model, adapt), next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    count = 8 if has_batch_norm else 2  # two alone would become +1 and -1 by the smallest difference
    images = torch.randn((count, *adapt(model).image_shape), generator=generator).to(weight)
    with torch.no_grad():
        with evaluating(model):
            pairs = both(images[:2])
        as_it_is = _worst(pairs)
        if not all(host.isfinite().all() for host, _ in pairs):
            raise EvoViTError(
                f"{type(model).__name__} is not reproduced exactly: it gives values that are not finite "
                "on random images; load intact weights."
            )
        images = images.float()
        for gain in GAINS:  # without norms by token, as in LeViT, values grow from block to block
            state = enlarged(model, adapt(model), gain, generator)
            with evaluating(model):
                pairs = functional_call(both, state, (images[:1],))
            if all(host.isfinite().all() for host, _ in pairs):
                break
        with training_without_dropout(model):
            in_training = _worst(functional_call(both, state, (images,)))
    return as_it_is, _worst(pairs), in_training


def enlarged(
    model: nn.Module, backbone: Backbone, gain: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return a state for `Both` in float32, buffers as they are.

    What the views re-state is large: matrices give `gain`, vectors are away from 0 and 1. The rest, such as a
    deep convolutional stem, is called as it is by both and keeps its weights.
    """
    restated = {id(p) for part in backbone.bypassed() if part is not model for p in part.parameters()}
    state: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        value = p.detach().float()
        if id(p) in restated and value.ndim > 1 and value.any():
            spread = value.std() * (value.numel() / value.shape[0]) ** 0.5  # output over input deviation
            value = value * (gain / spread).clamp_min(1)
        elif id(p) in restated:
            value = value + torch.randn(value.shape, generator=generator).to(value.device)
        state[f"model.{name}"] = value
    for name, buffer in model.named_buffers():  # copies: batch norms write into theirs
        kind = torch.float32 if buffer.is_floating_point() else buffer.dtype
        state[f"model.{name}"] = buffer.to(kind, copy=True)
    return state


@contextmanager
def training_without_dropout(model: nn.Module) -> Iterator[None]:
    """Put every module into training mode, without dropout and drop path; all is as before afterwards."""
    training = {id(module) for module in model.modules() if module.training}
    chances = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in ("p", "drop_prob")
        if isinstance(getattr(module, name, None), float)
    ]
    try:
        model.train()
        for module, name, _ in chances:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, chance in chances:
            setattr(module, name, chance)
        for module in model.modules():
            module.training = id(module) in training


def _seeded(run: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Run with the same random numbers each time: a host may move positions at random in training."""
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return run(images)


def _worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference relative to the host's largest value; infinite where shapes differ."""
    for found in (each for pair in pairs for each in pair):
        if not isinstance(found, Tensor):
            raise EvoViTError(
                f"The host returns a {type(found).__name__}, but evovit reads one tensor, features or "
                "logits; give a host that returns only that."
            )
    errors = [float("inf")] * any(host.shape != ours.shape for host, ours in pairs)
    for host, ours in pairs if not errors else ():
        error = (ours.float() - host.float()).abs().max() / host.float().abs().max().clamp_min(1e-12)
        errors.append(error.nan_to_num(float("inf")).item())
    return max(errors)
