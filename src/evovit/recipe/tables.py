"""Recipe: what a training is, as a tree of frozen tables. Every option carries its meaning and its range.

`evovit.recipe.reading` reads it from TOML; `evovit options` prints this file as text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import tomli_w
from annotated_types import Ge, Le, Lt

from evovit.errors import EvoViTError, shown
from evovit.methods import DENSE, build_config, find_method
from evovit.options import MOST, Count, Number, Options, Ratio, Share, Weight, option

Rate = Annotated[float, Ge(0), Le(100)]  # of learning, of decay
MSTD = r"mstd\d{1,3}(\.\d+)?"
POLICIES = (  # timm's, of which it takes any other word for no policy, or for nothing said
    r"|rand(-(m([12]?\d|30)|n[1-9]|p(0?\.\d+|[01])|mmax\d\d?|inc[01]|t(weights|3aw?)|" + MSTD + "))*"
    r"|(originalr?|v0r?|3a)(-" + MSTD + ")?"
    r"|augmix(-(m(\d|10)|w[1-9]|d[1-9]|a[1-9]|b[01]|" + MSTD + "))*"
)


@dataclass(frozen=True, kw_only=True)
class ModelTable(Options):
    """The network before anything is reduced."""

    title: ClassVar[str] = "model."

    name: str = option(meaning="a timm name, or small_vit, the small ViT of the quickstart")
    num_classes: Annotated[int, Ge(0), Le(1_000_000)] = option(
        0, "classes of the head; 0: as many as the data has"
    )
    drop_path: Annotated[float, Ge(0), Le(0.95)] = option(
        0.0, "stochastic depth: rate of the last block, rising from 0 at the first"
    )
    pretrained: bool = option(False, "start from timm's published weights (needs the network)")
    weights: str = option("", "start from this file, .safetensors or .pth; empty: from scratch")
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"meaning": "further arguments of timm's create_model"}
    )


@dataclass(frozen=True, kw_only=True)
class MethodTable(Options):
    """The token reduction; every further key is an option of the method (`evovit methods` lists them)."""

    title: ClassVar[str] = "method."

    name: str = option(DENSE, "a method's name; dense: nothing is reduced")
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"meaning": "options of the method; in a recipe they stand beside its name"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        build_config(find_method(self.name), self.options)


@dataclass(frozen=True, kw_only=True)
class DataTable(Options):
    """Images and what happens to them before the network."""

    title: ClassVar[str] = "data."

    source: str = option(
        meaning="digits (built in), a folder of split/class/image, wds/FOLDER (WebDataset shards), or "
        "hfds/NAME (Hugging Face)"
    )
    train_split: str = option(
        "train", "training images: sub-folder or .tar; part of the shards' names (wds); split (hfds)"
    )
    test_split: str = option("val", "test images, named in the same way")
    batch_size: Count = option(meaning="images per update over all devices: the EFFECTIVE batch")
    workers: Annotated[int, Ge(0), Le(256)] = option(4, "processes per device that read images")
    max_corrupt: Number = option(
        10, "unreadable images that are tolerated, each reported; one more stops the run"
    )
    repeats: Annotated[int, Ge(1), Le(1000)] = option(
        1, "repeated augmentation: copies of an image per epoch (DeiT: 3)"
    )
    crop_scale: Annotated[float, Ge(0.01), Le(1)] = option(
        0.08, "smallest share of the image's area in a random crop"
    )
    flip: Share = option(0.5, "chance of a horizontal flip")
    rand_augment: str = option("", "timm's policy string (DeiT: rand-m9-mstd0.5-inc1); empty: none")
    colour_jitter: Share = option(
        0.0, "strength of colour jitter; refused beside rand_augment, where it has no effect"
    )
    erase: Share = option(0.0, "chance of random erasing, with per-pixel noise")
    mixup: Annotated[float, Ge(0), Le(100)] = option(0.0, "alpha of mixup; 0: off")
    cutmix: Annotated[float, Ge(0), Le(100)] = option(
        0.0, "alpha of cutmix; 0: off; with mixup on too, each is used half of the time"
    )
    token_labels: str = option(
        "", "folder of dense labels (TokenLabeling); empty: patches get the image's label"
    )
    token_label_grid: Annotated[int, Ge(1), Le(1000)] = option(
        14, "cells along a side of the dense labels; equal to the model's grid"
    )
    crop_pct: Annotated[float, Ge(0.1), Le(1)] = option(
        0.875, "side of the test crop over the shorter side after resizing"
    )
    scenes: Count = option(2048, "digits: training scenes per epoch, drawn anew each")
    test_scenes: Count = option(2000, "digits: test scenes, always the same")
    fragments: Number = option(
        4, "digits: distracting fragments in a scene, rising from 0 to this at half of the epochs"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(POLICIES, self.rand_augment):
            raise EvoViTError(
                f"data.rand_augment is {shown(self.rand_augment)}; give a policy of timm, such as "
                "rand-m9-mstd0.5-inc1, or leave it empty."
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveTable(Options):
    """What is minimised."""

    title: ClassVar[str] = "objective."

    reduction: Literal["sum", "mean"] = option(
        "sum", "how the losses of several heads are combined (eq. 8): sum as printed, mean as released"
    )
    label_smoothing: Annotated[float, Ge(0), Le(0.99)] = option(
        0.0, "share of the target spread over all classes"
    )
    distillation: Literal["none", "soft", "hard"] = option(
        "none", "soft: KL divergence from the teacher; hard: the teacher's top class is the label"
    )
    teacher: str = option("", "the frozen teacher: a timm name, or the folder of a finished run")
    teacher_weights: str = option("", "weights file of a timm teacher; empty: timm's published weights")
    alpha: Share = option(0.5, "weight of the distillation loss; the loss on the labels gets 1 - alpha")
    temperature: Annotated[float, Ge(0.01), Le(1000)] = option(1.0, "temperature of soft distillation")
    token_distillation: Weight = option(0.0, "weight of the squared distance to the teacher's patch tokens")
    token_label_weight: Weight = option(
        0.0, "weight of the loss of every patch token (LV-ViT's token labelling: 1)"
    )
    mix_token: bool = option(False, "MixToken: a box of embedded patches comes from another image")


@dataclass(frozen=True, kw_only=True)
class OptimizerTable(Options):
    """AdamW; weight decay spares vectors, biases and what the model names."""

    title: ClassVar[str] = "optimizer."

    name: Literal["adamw", "muon"] = option(
        "adamw", "muon: Muon for the blocks' matrices, AdamW for the rest"
    )
    weight_decay: Rate = option(0.05, "decoupled weight decay")
    beta1: Annotated[float, Ge(0), Le(0.9999)] = option(0.9, "decay of AdamW's first moment")
    beta2: Annotated[float, Ge(0), Le(0.999999)] = option(0.999, "decay of AdamW's second moment")
    eps: Annotated[float, Ge(1e-30), Le(1)] = option(1e-08, "eps of AdamW")
    clip_norm: Weight = option(0.0, "largest norm of the whole gradient; 0: off")
    adaptive_clip: Weight = option(0.0, "largest ratio of a unit's gradient norm to its weight norm; 0: off")
    rate_factors: str = option(
        "",
        "PREFIX=FACTOR words: a factor on the rate of parameters with this prefix, such as model. (the host)",
    )
    freeze_host_epochs: Number = option(
        0, "number of first epochs that train the method alone, with the host's rate at 0"
    )
    frozen: str = option("", "names of the host's parameters that are not trained, separated by spaces")

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
        if len(factors) != len(pairs) or not all(0 <= factor < math.inf for factor in factors.values()):
            raise EvoViTError(
                f"optimizer.rate_factors is {shown(self.rate_factors)}; give words such as model.=0.01, no "
                "factor below 0 or infinite."
            )
        return factors


@dataclass(frozen=True, kw_only=True)
class LearningRateTable(Options):
    """Linear warm-up, then a cosine, set anew for each update."""

    title: ClassVar[str] = "learning_rate."

    base: Rate = option(
        meaning="the peak learning rate of AdamW for a batch of reference_batch; scaled with the batch"
    )
    reference_batch: Count = option(512, "batch size to which base and run.ema_decay refer")
    muon: Rate = option(0.02, "peak learning rate of Muon for a batch of reference_batch")
    warm_up_epochs: Weight = option(
        5.0, "epochs in which the rate rises from warm_up_start; may be a fraction"
    )
    warm_up_start: Rate = option(1e-06, "learning rate at the start, not scaled with the batch")
    minimum: Rate = option(1e-05, "learning rate at the end, not scaled with the batch")
    last_epochs: Number = option(
        0, "number of last epochs, of run.epochs, that stay at the minimum after the cosine"
    )


@dataclass(frozen=True, kw_only=True)
class RunTable(Options):
    """How the training is run."""

    title: ClassVar[str] = "run."

    epochs: Count = option(meaning="passes over the data")
    seed: Annotated[int, Ge(0), Le(MOST)] = option(
        0, "random seed of the first weights, the order, augmentation and drop path"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes CUDA if there is any")
    batch_per_device: Number = option(
        0, "images per device and forward; gradients accumulate to the batch; 0: no accumulation"
    )
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "precision of autocast; fp16 uses a loss scaler"
    )
    compile: bool = option(False, "compile model and loss with torch.compile")
    activation_checkpointing: bool = option(
        False, "recompute each block in the backward pass: less memory, more time"
    )
    ema_decay: Annotated[float, Ge(0), Lt(1)] = option(
        0.0, "decay of a moving average of the weights, per reference_batch images; 0: none"
    )
    reduce_from_epoch: Number = option(0, "the first epoch that reduces tokens (supplement, starting epoch)")
    reduce_ramp_epochs: Number = option(
        0, "epochs over which the share of reduced tokens grows to its full value"
    )
    budgets: tuple[Ratio, ...] = option(
        (), "keep ratios of one model for several speeds; the largest learns from labels, the others from it"
    )
    sandwich: Literal["both", "alternate"] = option(
        "both",
        "budgets beside the largest in an update: the smallest and a random one, or one of them in turn",
    )
    test_every: Count = option(1, "epochs between tests; the last epoch is always tested")
    checkpoint_every: Number = option(
        0, "updates between further checkpoints, beside the one after each epoch; 0: none"
    )
    keep_every: Number = option(
        0, "epochs between weights that stay in checkpoints/ for evovit analyse; 0: none"
    )
    max_skipped: Count = option(10, "updates in a row skipped for a non-finite loss before the run stops")
    log_to: Literal["none", "tensorboard", "wandb"] = option("none", "also log to this, if installed")


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
        """Return the recipe as TOML with every option."""
        tables = {table.name: dict(vars(getattr(self, table.name))) for table in fields(self)}
        tables["method"] |= tables["method"].pop("options")
        return tomli_w.dumps(tables)


TABLES: dict[str, type[Any]] = {
    name: kind for name, kind in get_type_hints(Recipe).items() if isinstance(kind, type)
}
