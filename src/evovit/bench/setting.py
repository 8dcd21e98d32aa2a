"""What a benchmark compares: a timm model, variants of it, and the conditions they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from evovit.bench.step import DTYPES, MODES, Batch
from evovit.errors import EvoViTError, check_choice
from evovit.hosts import create_host
from evovit.model import reduce_tokens

NUM_BATCHES = 4  # distinct inputs, used in turn


@dataclass(frozen=True)
class Variant:
    """A method with its options, or `dense`."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)

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
    modes: tuple[str, ...] = ("eager",)
    rounds: int = 30
    threads: int | None = None  # of the CPU; None: as PyTorch has it
    size: int | None = None  # pixels; None: the model's own
    pretrained: bool = False
    load: float | None = None  # average of the machine before this process began to work

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("device", self.device, ("cpu", "cuda"))
        for mode in self.modes:
            check_choice("mode", mode, MODES)
        if not self.modes:
            raise EvoViTError(f"No mode is given; allowed are {', '.join(MODES)}.")
        for name in ("batch", "rounds", "threads", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvoViTError(f"{name} is {value}; allowed is 1 or more.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise EvoViTError("device is 'cuda', but PyTorch finds no CUDA device; use 'cpu'.")
        if self.dtype == "tf32" and self.device != "cuda":
            raise EvoViTError("dtype 'tf32' is a mode of CUDA devices; use 'fp32' on the CPU.")

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
        kind = str(DTYPES[self.dtype]).removeprefix("torch.")
        return f"{kind} autocast, float32 weights" if self.train else f"weights and images in {kind}"


def build_host(setting: Setting) -> nn.Module:
    """Build the timm model on the CPU in float32."""
    name = setting.model
    size: dict[str, Any] = {} if setting.size is None else {"img_size": setting.size}
    model = create_host(name, pretrained=setting.pretrained, **size)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if setting.size and patch and any(setting.size % side for side in patch):
        raise EvoViTError(f"size is {setting.size}; allowed is a multiple of the patch's {patch[0]} pixels.")
    if setting.train and getattr(model, "num_classes", 1) < 1:
        raise EvoViTError(f"{name} has no classifier and so no loss; measure inference.")
    return model


def build_models(host: nn.Module, variants: Sequence[Variant]) -> list[nn.Module]:
    """Return the host and one wrapper around it per variant: all share its weights."""
    wrapped = [reduce_tokens(host, v.method, verify=i == 0, **v.options) for i, v in enumerate(variants)]
    return [host, *wrapped]


def image_size_of(setting: Setting, model: Any) -> int:
    """Return the pixels of an image's side."""
    return int(setting.size or model.pretrained_cfg["input_size"][-1])


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
