"""What may be chosen: a method with its options, as one count per block or as its own knob."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from evovit.backbones import adapt
from evovit.backbones.base import BackboneSpec, evaluating
from evovit.errors import EvoViTError, listed
from evovit.methods import DENSE, build_config, find_method, list_methods
from evovit.methods.base import Method, ScheduledConfig
from evovit.model import ReducedViT, reduce_tokens
from evovit.options import read_named

FIRST_CHOICE = ("evo_vit", "evit", "tome", "keep:selection=even")
NO_CLASS_TOKEN = (
    "evo_vit:selection=column_mean",
    "evit:selection=column_mean",
    "tome",
    "keep:selection=even",
)
PLACES, USUAL_DEPTH = ("blocks", "start_block", "stage_length", "group_length"), 12


@dataclass(frozen=True)
class Plan:
    """A method and its options."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, host: nn.Module) -> ReducedViT:
        """Wrap a host that has been proven already."""
        return reduce_tokens(host, self.method, verify=False, **self.options)

    @property
    def key(self) -> str:
        """A text that tells plans apart."""
        return json.dumps([self.method, self.options], sort_keys=True, default=list)

    def __str__(self) -> str:
        parts = []
        for name, value in self.options.items():
            if name == "keep_per_block":
                pairs = zip((value[0], *value), value, strict=False)
                falls = [(number, now) for number, (old, now) in enumerate(pairs) if now != old]
                parts += [", ".join(f"{now} from block {number}" for number, now in falls)]
            else:
                parts.append(f"{name}={value}")
        return f"{self.method} ({', '.join(parts)})" if parts else self.method


def choose_methods(texts: Sequence[str], spec: BackboneSpec) -> list[Plan]:
    """Return the methods to try with the options that all of their schedules share.

    Args:
        texts: each NAME or NAME:option=value; empty for the usual ones of this host.

    Raises:
        EvoViTError: a method that takes no schedule, or has weights of its own and so needs training first.
    """
    if len(spec.depths) > 1:
        raise EvoViTError("tune is for hosts of one stage; this one down-samples its grid in between.")
    found = []
    for text in texts or (FIRST_CHOICE if spec.has_class_token else NO_CLASS_TOKEN):
        name, options = read_named(text)
        cls = find_method(name)
        if not issubclass(cls.Config, ScheduledConfig):
            able = [each for each in list_methods() if issubclass(find_method(each).Config, ScheduledConfig)]
            raise EvoViTError(f"{name} cannot take one count per block; choose {listed(able)}.")
        options = fitted(cls, options, spec.depth)
        whole = math.prod(spec.grid)
        counts = (*(whole,) * (spec.depth - 1), whole - whole // 2)
        method = cls(build_config(cls, {**options, "keep_per_block": counts}), spec)
        if any(True for _ in method.parameters()):
            raise EvoViTError(f"{name} as configured has weights of its own; train it first, then tune it.")
        found.append(Plan(name, options))
    return found


def fitted(cls: type[Method], options: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Return options with default places, which are made for 12 blocks, where they lie in `depth`."""
    found = dict(options)
    for f in fields(cls.Config):
        if f.name in PLACES and f.name not in options and depth != USUAL_DEPTH:
            many = f.default if isinstance(f.default, tuple) else (f.default,)
            scaled = tuple(sorted({max(1, round(place * depth / USUAL_DEPTH)) for place in many}))
            found[f.name] = scaled if isinstance(f.default, tuple) else scaled[0]
    return found


def defaults(spec: BackboneSpec) -> list[Plan]:
    """Return every method as it comes, if it fits the host and has nothing that must be trained."""
    found = []
    for name in list_methods():
        cls = find_method(name)
        if name == DENSE:
            continue
        options = fitted(cls, {}, spec.depth)
        try:
            method = cls(build_config(cls, options), spec)
        except EvoViTError:  # another kind of host, or one with a class token
            continue
        if not method.state_dict():
            found.append(Plan(name, options))
    return found


def with_counts(base: Plan, counts: Sequence[int]) -> Plan:
    """Return a method's plan with so many patch tokens kept by each block."""
    own = {key: value for key, value in base.options.items() if key not in ("keep_ratio", *PLACES)}
    return Plan(base.method, {**own, "keep_per_block": tuple(counts)})


def with_budget(base: Plan, budget: float, spec: BackboneSpec) -> Plan:
    """Return a method's plan by its own knob, where it keeps this share."""
    cls = find_method(base.method)
    before = build_config(cls, dict(base.options))
    after = cls(before, spec).config_at(budget)
    changed = {
        f.name: getattr(after, f.name)
        for f in fields(after)
        if getattr(after, f.name) != getattr(before, f.name)
    }
    return Plan(base.method, {**base.options, **changed})


def by_chance(plan: Plan) -> Plan | None:
    """Return the same schedule with random patches, or None where the method cannot, or does so already."""
    chance = Plan(plan.method, {**plan.options, "selection": "random"})
    try:
        build_config(find_method(plan.method), dict(chance.options))
    except EvoViTError:
        return None
    return None if chance.key == plan.key else chance


def points_of(ffn: Sequence[int]) -> int:
    """Return how many blocks reduce, from the rows of each block's FFN; all but the first may."""
    return max(1, sum(now != before for before, now in pairwise(ffn)))


def rows_of(model: ReducedViT, images: torch.Tensor) -> tuple[list[int], list[int]]:
    """Return the rows that each block's attention and its FFN work on, from one forward."""
    backbone = adapt(model.model)
    with torch.inference_mode(), evaluating(model):
        before = backbone.embed(images).x.shape[1]
        after = [tokens.x.shape[1] for tokens in model.run(images, record=True).trace]
    if model.method.keeps_grid:  # it parks tokens before the block
        return after, after
    return [before, *after[:-1]], after
