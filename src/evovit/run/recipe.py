"""Recipe: what a training is, as a tree of frozen tables. Every knob carries its meaning and its range.

`evovit.run.config` reads it from TOML; `evovit train --help` prints this file as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from evovit.errors import EvoViTError
from evovit.methods import build_config, find_method

DENSE = "none"  # the method's name where nothing is reduced
MUST: Any = object()  # default of a knob that has none


def knob(
    default: Any, meaning: str, *, low: float | None = None, high: float | None = None, allowed: str = ""
) -> Any:
    """Declare a knob: its default (MUST: has to be given), what it means, its range or allowed words."""
    facts = {"meaning": meaning, "low": low, "high": high, "allowed": allowed.split()}
    return field(metadata=facts) if default is MUST else field(default=default, metadata=facts)


class Table:
    """A table of a recipe; checks types and ranges of its knobs."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            if f.metadata:
                check(f"{title(type(self))}.{f.name}", getattr(self, f.name), f.metadata)


@dataclass(frozen=True, kw_only=True)
class ModelTable(Table):
    """The network before anything is reduced."""

    name: str = knob(MUST, "a timm name, or small_vit, the small ViT of the quickstart")
    num_classes: int = knob(0, "classes of the head; 0: as many as the data has", low=0)
    drop_path: float = knob(0.0, "stochastic depth at the last block, growing from 0", low=0, high=0.95)
    pretrained: bool = knob(False, "start from timm's published weights (needs the network)")
    weights: str = knob("", "start from this file, .safetensors or .pth; empty: from scratch")
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of timm's create_model


@dataclass(frozen=True, kw_only=True)
class MethodTable(Table):
    """The token reduction; every further key is an option of the method (`evovit methods` lists them)."""

    name: str = knob(DENSE, "a method's name; none: the dense model")
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name != DENSE:
            build_config(find_method(self.name), self.options)
        elif self.options:
            raise EvoViTError(f"method.{next(iter(self.options))} is given, but method.name is 'none'.")


@dataclass(frozen=True, kw_only=True)
class DataTable(Table):
    """Images and what happens to them before the network."""

    source: str = knob(
        MUST,
        "digits (built in), a folder of split/class/image, wds/FOLDER (WebDataset shards), or hfds/NAME "
        "(Hugging Face)",
    )
    train_split: str = knob(
        "train", "training images: sub-folder or .tar; part of the shards' names (wds); split (hfds)"
    )
    test_split: str = knob("val", "the same of the test images")
    batch_size: int = knob(MUST, "images per update over all devices: the EFFECTIVE batch", low=1)
    workers: int = knob(4, "processes per device that read images", low=0)
    max_corrupt: int = knob(10, "unreadable images, each reported, before the run stops", low=0)
    repeats: int = knob(1, "repeated augmentation: copies of an image per epoch (DeiT: 3)", low=1)
    crop_scale: float = knob(0.08, "least share of the area in a random crop", low=0.01, high=1)
    flip: float = knob(0.5, "chance of a horizontal flip", low=0, high=1)
    rand_augment: str = knob("", "timm's policy string (DeiT: rand-m9-mstd0.5-inc1); empty: none")
    colour_jitter: float = knob(
        0.0, "strength; without effect, so refused, beside rand_augment", low=0, high=1
    )
    erase: float = knob(0.0, "chance of random erasing, per-pixel noise", low=0, high=1)
    mixup: float = knob(0.0, "alpha of mixup; 0: off", low=0)
    cutmix: float = knob(0.0, "alpha of cutmix; 0: off; with both on each is used half of the time", low=0)
    token_labels: str = knob("", "folder of dense labels (TokenLabeling); empty: patches have the image's")
    token_label_grid: int = knob(14, "cells of a side of the dense labels: the model's grid", low=1)
    crop_pct: float = knob(0.875, "side of the test crop over the resized shorter side", low=0.1, high=1)
    scenes: int = knob(2048, "digits: training scenes per epoch, drawn anew each", low=1)
    test_scenes: int = knob(2000, "digits: test scenes, always the same", low=1)
    fragments: int = knob(
        4, "digits: distracting fragments in a scene, from 0 up to these at half the epochs", low=0
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveTable(Table):
    """What is minimised."""

    reduction: str = knob(
        "sum", "of the heads' losses (eq. 8): sum as printed, mean as released", allowed="sum mean"
    )
    label_smoothing: float = knob(0.0, "share of the target spread over all classes", low=0, high=0.99)
    distillation: str = knob("none", "soft: KL divergence, hard: its top class", allowed="none soft hard")
    teacher: str = knob("", "a timm name, or the folder of a finished run; frozen")
    teacher_weights: str = knob("", "file for a timm teacher; empty: timm's published weights")
    alpha: float = knob(0.5, "weight of the distillation; the labels get 1 - alpha", low=0, high=1)
    temperature: float = knob(1.0, "of soft distillation", low=0.01)
    token_distillation: float = knob(
        0.0, "weight of the squared distance to the teacher's patch tokens", low=0
    )
    token_label_weight: float = knob(
        0.0, "weight of the loss of every patch token (LV-ViT's token labelling: 1)", low=0
    )
    mix_token: bool = knob(False, "MixToken: a box of embedded patches comes from another image")


@dataclass(frozen=True, kw_only=True)
class OptimizerTable(Table):
    """AdamW; weight decay spares vectors, biases and what the model names."""

    name: str = knob("adamw", "muon: Muon for the blocks' matrices, AdamW for the rest", allowed="adamw muon")
    weight_decay: float = knob(0.05, "decoupled", low=0)
    beta1: float = knob(0.9, "decay of AdamW's first moment", low=0, high=0.9999)
    beta2: float = knob(0.999, "decay of AdamW's second moment", low=0, high=0.999999)
    eps: float = knob(1e-8, "of AdamW", low=1e-30)
    clip_norm: float = knob(0.0, "largest norm of the whole gradient; 0: off", low=0)
    adaptive_clip: float = knob(
        0.0, "largest ratio of a unit's gradient norm to its weight norm; 0: off", low=0
    )
    rate_factors: str = knob(
        "", "PREFIX=FACTOR words: the rate of parameters so named, times a factor; the host's are model."
    )
    freeze_host_epochs: int = knob(0, "first epochs in which the host's rate is 0, the method's not", low=0)
    frozen: str = knob("", "names of the host's parameters that are not trained, with spaces between")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.factors

    @property
    def factors(self) -> dict[str, float]:
        """`rate_factors` by prefix."""
        pairs = [word.rpartition("=") for word in self.rate_factors.split()]
        try:
            factors = {prefix: float(factor) for prefix, _, factor in pairs if prefix}
        except ValueError:
            factors = {}
        if len(factors) != len(pairs) or min(factors.values(), default=1.0) < 0:
            raise EvoViTError(
                f"optimizer.rate_factors is {self.rate_factors!r}; give words such as model.=0.01, no factor "
                "below 0."
            )
        return factors


@dataclass(frozen=True, kw_only=True)
class LearningRateTable(Table):
    """Linear warm-up, then a cosine, set anew for each update."""

    base: float = knob(
        MUST, "peak of AdamW's rate for a batch of reference_batch; scaled with the batch", low=0
    )
    reference_batch: int = knob(512, "images to which base and run.ema_decay refer", low=1)
    muon: float = knob(0.02, "peak of Muon's rate for a batch of reference_batch", low=0)
    warm_up_epochs: float = knob(5.0, "rise from warm_up_start; may be a fraction", low=0)
    warm_up_start: float = knob(1e-6, "first rate, not scaled", low=0)
    minimum: float = knob(1e-5, "last rate, not scaled", low=0)
    last_epochs: int = knob(0, "of run.epochs, after the cosine: at the last rate", low=0)


@dataclass(frozen=True, kw_only=True)
class RunTable(Table):
    """How the training is run."""

    epochs: int = knob(MUST, "passes over the data", low=1)
    seed: int = knob(
        0, "first weights, order, augmentation and drop path follow from it", low=0, high=2**31 - 1
    )
    device: str = knob("auto", "auto takes CUDA if there is any", allowed="auto cpu cuda")
    batch_per_device: int = knob(
        0, "images per device and forward; accumulation follows; 0: no accumulation", low=0
    )
    precision: str = knob("fp32", "of autocast; fp16 with a loss scaler", allowed="fp32 bf16 fp16")
    compile: bool = knob(False, "torch.compile of model and loss")
    activation_checkpointing: bool = knob(
        False, "recompute each block in the backward pass: less memory, more time"
    )
    ema_decay: float = knob(
        0.0, "of a moving average of the weights, per reference_batch images; 0: none", low=0, high=1
    )
    reduce_from_epoch: int = knob(
        0, "the first epoch that reduces tokens (supplement, starting epoch)", low=0
    )
    reduce_ramp_epochs: int = knob(
        0, "epochs over which the share of reduced tokens grows to its full value", low=0
    )
    test_every: int = knob(1, "epochs between tests; the last epoch is always tested", low=1)
    checkpoint_every: int = knob(
        0, "updates between checkpoints, beside the one after each epoch; 0: none", low=0
    )
    max_skipped: int = knob(10, "updates in a row skipped for a non-finite loss before the run stops", low=1)
    log_to: str = knob("none", "also log to this, if installed", allowed="none tensorboard wandb")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete training. Two equal recipes give the same weights on the same machine."""

    model: ModelTable
    method: MethodTable
    data: DataTable
    objective: ObjectiveTable
    optimizer: OptimizerTable
    learning_rate: LearningRateTable
    run: RunTable

    @property
    def scale(self) -> float:
        """Effective batch over reference batch."""
        return self.data.batch_size / self.learning_rate.reference_batch

    def knobs(self) -> Iterator[tuple[str, Any]]:
        """Yield every knob as (table.key, value)."""
        for table in fields(self):
            part = getattr(self, table.name)
            for f in fields(part):
                value = getattr(part, f.name)
                if f.name != "options":
                    yield f"{table.name}.{f.name}", value
                    continue
                inside = "options." if table.name == "model" else ""
                yield from ((f"{table.name}.{inside}{key}", item) for key, item in value.items())

    def to_toml(self) -> str:
        """Return the recipe as TOML with every knob."""
        lines: list[str] = []
        last = ""
        for path, value in self.knobs():
            table, key = path.split(".", 1)
            if table != last:
                lines.append(f"\n[{table}]" if lines else f"[{table}]")
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
            last = table
        return "\n".join(lines) + "\n"


TABLES: dict[str, type[Any]] = {
    name: kind for name, kind in get_type_hints(Recipe).items() if isinstance(kind, type)
}


def title(table: type[Any]) -> str:
    """Return a table's name in the recipe."""
    return next(name for name, kind in TABLES.items() if kind is table)


def check(path: str, value: Any, facts: Any) -> None:
    """Raise `EvoViTError` unless a value lies in its knob's range."""
    if facts["allowed"] and value not in facts["allowed"]:
        raise EvoViTError(f"{path} is {value!r}; allowed is {' or '.join(facts['allowed'])}.")
    low, high = facts["low"], facts["high"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        span = f"{low:g} or more" if high is None else f"{low:g} to {high:g}"
        raise EvoViTError(f"{path} is {value!r}; allowed is {span}.")
