"""What a benchmark compares: a timm model, variants of it, and the conditions they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

import torch
from torch import nn

from evovit.backbones import adapt
from evovit.bench.exported import EXPORTED
from evovit.bench.step import DTYPES, ENGINES, Batch
from evovit.engines.exporting import TARGETS
from evovit.errors import EvoViTError, check_choice, check_count, check_ratio, nearest, shown
from evovit.hosts import check_name, create_host
from evovit.methods import DENSE, build_config, find_method, list_methods
from evovit.model import LastBlock, reduce_tokens
from evovit.options import read_assignment, read_named

ALL = "all"  # stands for every method
LAST_BLOCK, BUDGET = "last_block", "budget"  # options of a reduced model, beside the method's own
MOST = {"batch": 1_000_000, "rounds": 100_000, "threads": 1024, "size": 16384}
NUM_BATCHES = 4  # distinct inputs, used in turn


@dataclass(frozen=True)
class Variant:
    """A method with its options and perhaps `last_block`; `dense` without any is the host itself."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """Return the method's `Config`; raises `EvoViTError` for a wrong option."""
        if LAST_BLOCK in self.options:
            check_choice(LAST_BLOCK, self.options[LAST_BLOCK], get_args(LastBlock))
        if BUDGET in self.options:
            check_ratio(BUDGET, self.options[BUDGET])
        own = {name: value for name, value in self.options.items() if name not in (LAST_BLOCK, BUDGET)}
        return build_config(find_method(self.method), own)

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.options.items())])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the dense and the reduced models of one comparison share."""

    model: str  # a timm name
    device: str = "cpu"
    dtype: str = "fp32"
    batch: int = 1
    train: bool = False
    engines: tuple[str, ...] = ("eager",)
    rounds: int = 30
    threads: int | None = None  # of the CPU; None: as PyTorch has it
    size: int | None = None  # pixels; None: the model's own
    pretrained: bool = False
    load: float | None = None  # average of the machine before this process began to work

    def __post_init__(self) -> None:
        check_choice("precision", self.dtype, DTYPES)
        check_choice("device", self.device, ("cpu", "cuda"))
        for engine in self.engines:
            check_choice("engine", engine, ENGINES)
        if not self.engines:
            raise EvoViTError(f"No engine is given; allowed are {', '.join(ENGINES)}.")
        for name, most in MOST.items():
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1, most)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise EvoViTError("device is 'cuda', but PyTorch finds no CUDA device; use 'cpu'.")
        if self.dtype == "tf32" and self.device != "cuda":
            raise EvoViTError("precision 'tf32' is a mode of CUDA devices; use 'fp32' on the CPU.")

    def __str__(self) -> str:
        return f"{self.model} {self.device} {self.dtype} batch {self.batch} {self.task}"

    @property
    def task(self) -> str:
        """Name of the step."""
        return "training step" if self.train else "inference"

    @property
    def types(self) -> str:
        """What `dtype` means in this task."""
        if self.dtype in ("fp32", "tf32"):
            return "float32" if self.dtype == "fp32" else "float32, products in TF32"
        if self.dtype == "int8":
            return "products with weights in int8, the rest in float32"
        kind = str(DTYPES[self.dtype]).removeprefix("torch.")
        return f"{kind} autocast, float32 weights" if self.train else f"weights and images in {kind}"


def parse_settings(
    models: Sequence[str],
    dtypes: Sequence[str],
    batches: Sequence[str],
    engines: Sequence[str],
    device: str,
    **shared: Any,
) -> list[tuple[Setting, bool]]:
    """Return the settings asked for, and whether the batch of each is the largest that fits.

    Args:
        batches: each a number or "max".
        engines: empty for all that the device has.
        device: empty for CUDA if there is any.
        shared: further fields of `Setting`.
    """
    if not models:
        raise EvoViTError("No model is given; give a timm name, for example deit_small_patch16_224.")
    for name, given in (("precision", dtypes), ("batch", batches)):
        if not given:
            raise EvoViTError(f"No {name} is given; give one or more.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    engines = tuple(engines) or (
        ("eager", "compiled", "graphs") if device == "cuda" else ("eager", "compiled")
    )
    for engine in engines:
        if engine in EXPORTED:
            TARGETS[EXPORTED[engine]].expect_ready("fp32")
    shared |= {"device": device, "engines": engines}
    return [
        (Setting(model=check_name(model), dtype=dtype, batch=parse_batch(batch), **shared), batch == "max")
        for model in models
        for dtype in dtypes
        for batch in batches
    ]


def parse_batch(text: str) -> int:
    """Return a batch size; 1 stands for "max" until the size is found."""
    if text == "max":
        return 1
    try:
        return int(text)
    except ValueError:
        raise EvoViTError(f"batch is {shown(text)}; allowed is a number of images or 'max'.") from None


def parse_variants(
    methods: Sequence[str],
    options: Sequence[str],
    keep_ratios: Sequence[float] = (),
    budgets: Sequence[float] = (),
) -> list[Variant]:
    """Return the variants asked for; checks methods and options before anything runs.

    Args:
        methods: each NAME or NAME:option=value,option=value; a method's own option counts over `options`.
            "all" is every method, each with those of the options that it has.
        options: option=value, for every method.
        keep_ratios: each makes a variant of every method.
        budgets: the same for methods of any options: the share kept, as `ReducedViT.budget` means it.
    """
    shared = dict(read_assignment(text, "keep_ratio=0.5") for text in options)
    variants: list[Variant] = []
    for name, own in map(read_named, methods):
        if name == DENSE:
            variants += [Variant(DENSE, own)] if own else []  # the host is measured anyway
            continue
        asked = shared | own
        if keep_ratios and "keep_ratio" in asked:
            raise EvoViTError(
                f"keep_ratio of {name} is given twice, as an option and by --keep-ratio; give one."
            )
        if keep_ratios and budgets:
            raise EvoViTError("--keep-ratio and --budgets both say how much is kept; give one.")
        each_asked = [{"keep_ratio": ratio} | asked for ratio in keep_ratios] or [asked]
        each_asked = [asked | {BUDGET: budget} for budget in budgets] or each_asked
        if name == ALL:
            variants += _of_all(each_asked)
        else:
            variants += [Variant(name, asked) for asked in each_asked]
    for variant in variants:
        variant.config()
    return variants


def _of_all(each_asked: Sequence[dict[str, Any]]) -> list[Variant]:
    """Return every method with those of the options it has; an option that none has is refused."""
    known = {
        name: {LAST_BLOCK, BUDGET, *(f.name for f in fields(find_method(name).Config))}
        for name in list_methods()
        if name != DENSE
    }
    every = set().union(*known.values())
    for option in each_asked[0]:
        if option not in every:
            raise EvoViTError(f"No method has an option {shown(option)}.{nearest(option, every)}")
    found = [] if LAST_BLOCK in each_asked[0] else [Variant(DENSE, {LAST_BLOCK: "prefix"})]
    for name, own in known.items():
        for asked in each_asked:
            variant = Variant(name, {key: value for key, value in asked.items() if key in own})
            found += [variant] if variant not in found else []
    return found


def usable(setting: Setting, variants: Sequence[Variant]) -> tuple[list[Variant], list[str]]:
    """Return the variants that the model takes, and for each other one a sentence that says why not."""
    with torch.device("meta"):
        backbone = adapt(build_host(replace(setting, pretrained=False)))
    chosen, left_out = [], []
    for variant in variants:
        try:
            if variant.method == DENSE and (setting.train or backbone.head_reads_patches):
                why = "training computes all rows" if setting.train else "the head reads patch tokens"
                raise EvoViTError(f"{why}.")
            find_method(variant.method)(variant.config(), backbone.spec)
            chosen.append(variant)
        except EvoViTError as error:
            left_out.append(f"{variant} is left out: {error}")
    return chosen, left_out


def build_host(setting: Setting) -> nn.Module:
    """Build the timm model on the current default device in float32."""
    name = setting.model
    size: dict[str, Any] = {} if setting.size is None else {"img_size": setting.size}
    model = create_host(name, size, pretrained=setting.pretrained)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if setting.size and patch and any(setting.size % side for side in patch):
        raise EvoViTError(f"size is {setting.size}; allowed is a multiple of the patch's {patch[0]} pixels.")
    if setting.train and getattr(model, "num_classes", 1) < 1:
        raise EvoViTError(f"{name} has no classifier and so no loss; measure inference.")
    return model


def build_models(
    host: nn.Module, variants: Sequence[Variant], train: bool, verify: bool = True
) -> list[nn.Module]:
    """Return the host and one wrapper around it per variant: all share its weights.

    Args:
        train: whether a training step is measured, which computes all rows of the last block.
        verify: prove the host's adapter, which takes some forwards; False: it has been proven.
    """
    whole = {LAST_BLOCK: "all"} if train else {}
    wrapped: list[nn.Module] = []
    for i, variant in enumerate(variants):
        options = variant.options | whole
        budget = options.pop(BUDGET, None)
        model = reduce_tokens(host, variant.method, verify=verify and i == 0, **options)
        model.budget = budget
        wrapped.append(model)
    return [host, *wrapped]


def image_size_of(setting: Setting, model: Any) -> int:
    """Return the pixels of an image's side."""
    shape = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or adapt(model).image_shape
    return int(setting.size or shape[-1])


def place(setting: Setting, model: nn.Module) -> nn.Module:
    """Move a model to the device, in the type its step needs."""
    return model.to(setting.device, torch.float32 if setting.train else DTYPES[setting.dtype])


def random_batches(setting: Setting, model: Any) -> list[Batch]:
    """Return `NUM_BATCHES` distinct inputs on the model's device, in its type."""
    weight, size = next(model.parameters()), image_size_of(setting, model)
    shape = (setting.batch, getattr(model, "in_chans", 3), size, size)
    where: dict[str, Any] = {
        "device": weight.device,
        "generator": torch.Generator(weight.device).manual_seed(0),
    }
    classes = max(1, getattr(model, "num_classes", 1))
    return [
        Batch(
            torch.randn(shape, dtype=weight.dtype, **where),
            torch.randint(classes, (setting.batch,), **where),
        )
        for _ in range(NUM_BATCHES)
    ]
