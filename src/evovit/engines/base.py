"""What an engine offers: a traced model written as a file, and the file run. One engine a file."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from evovit.backbones.base import evaluating
from evovit.errors import EvoViTError, check_choice, listed
from evovit.model import ReducedViT
from evovit.tokens import logits_of

PRECISIONS = ("fp32", "fp16", "int8")
SELECTIONS, SUM = ("TopK", "Greater"), "ReduceSum"  # as ONNX and OpenVINO name them; ranks are counted

Run = Callable[[Tensor], list[Tensor]]  # images (B, channels, height, width) float32 to outputs, logits first


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model is written.

    Args:
        precision: fp32, fp16 or int8.
        batch: images of a call; None: any number.
        calibration: (N, channels, height, width) images from which int8 reads the range of activations; None:
            ranges are found as the model runs, where the engine can do so.
    """

    precision: str = "fp32"
    batch: int | None = None
    calibration: Tensor | None = None

    def batches(self) -> list[Tensor]:
        """Return the calibration images as the model takes them; raises `EvoViTError` without any."""
        each = self.batch or 1
        images = torch.empty(0) if self.calibration is None else self.calibration
        whole = [images[start : start + each] for start in range(0, len(images) - each + 1, each)]
        if not whole:
            raise EvoViTError(f"int8 needs images to find the range of activations; give {each} or more.")
        return whole


class Engine(ABC):
    """An engine: how it writes a traced model, and how it runs the file."""

    name: ClassVar[str]  # as people call it
    file: ClassVar[str]  # where it lies in the folder of an export
    precisions: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]] = ()  # packages
    extra: ClassVar[str] = ""  # of evovit, that brings them
    computes_half: ClassVar[bool] = True  # False: fp16 is how weights are stored

    @abstractmethod
    def write(self, program: ExportedProgram, path: Path, plan: Plan) -> None:
        """Write a traced model; files beside `path` are part of it."""

    @abstractmethod
    def load(self, path: Path, threads: int | None = None) -> Run:
        """Return what runs the file, on so many CPU threads; None: as many as the engine likes."""

    def expect_ready(self, precision: str) -> None:
        """Raise `EvoViTError` where packages are missing or the precision is none of the engine's."""
        missing = [name for name in self.needs if find_spec(name) is None]
        if missing:
            raise EvoViTError(
                f"{self.name} needs {' and '.join(missing)}, not installed here; "
                f"use: pip install 'evovit[{self.extra}]'."
            )
        check_choice("precision", precision, PRECISIONS)
        if precision not in self.precisions:
            raise EvoViTError(
                f"{self.name} is written in {listed(self.precisions)} here, not in {precision}; "
                "int8 is for onnx and openvino."
            )


class WithIndices(nn.Module):
    """A reduced model that also tells which patch tokens are left after each block."""

    def __init__(self, model: ReducedViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return logits, then `Tokens.index` (B, N) of each block that changes it."""
        out = self.model.run(images, record=True)
        indices = [tokens.index for tokens in out.trace]
        changed = [now for before, now in zip([None, *indices], indices, strict=False) if now is not before]
        return (out.logits, *(index + 0 for index in changed))  # an output must not be an input of itself


class LogitsAlone(nn.Module):
    """A model that gives logits and nothing else, also where its answer is an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        return logits_of(self.model(images))  # type: ignore[no-any-return]


class HalfInside(nn.Module):
    """A model in float16 that takes and gives float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the model's outputs, those of floating point in float32."""
        out = self.model(images.half())
        outputs = out if isinstance(out, tuple) else (out,)
        return tuple(each.float() if each.is_floating_point() else each for each in outputs)


def on_cpu(model: nn.Module) -> nn.Module:
    """Return a copy of a model in float32 on the CPU, in evaluation mode."""
    return copy.deepcopy(model).to("cpu", torch.float32).eval()


def trace(model: nn.Module, image_shape: Sequence[int], plan: Plan, *, half: bool = False) -> ExportedProgram:
    """Trace a model in evaluation mode, for any batch or for the plan's.

    Args:
        model: on the CPU in float32.
        image_shape: (channels, height, width).
        half: compute in float16.
    """
    model = HalfInside(copy.deepcopy(model)) if half else model
    example = torch.zeros(plan.batch or 2, *image_shape)
    shapes = ({0: Dim("batch", min=1)},) if plan.batch is None else None
    with evaluating(model), torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)


def upstream_products(
    sources: Mapping[str, Sequence[str]], kinds: Mapping[str, str], products: Sequence[str]
) -> set[str]:
    """Return the matrix products that selections read first, going back from them.

    These decide which tokens go on, and stay in float when a model is quantised. The walk ends at sums too:
    a class token's logits are written as product and sum, which no engine quantises.

    Args:
        sources: names of the nodes whose outputs each node reads.
        kinds: what each node is.
        products: the kinds of matrix products.
    """
    found, seen = set[str](), set[str]()
    ahead = [name for name, kind in kinds.items() if kind in SELECTIONS]
    while ahead:
        name = ahead.pop()
        if name in seen or name not in kinds:
            continue
        seen.add(name)
        if kinds[name] in products:
            found.add(name)
        elif kinds[name] != SUM:
            ahead += sources[name]
    return found


def outputs_of(given: Any) -> list[Tensor]:
    """Return outputs as a list of tensors."""
    return list(given) if isinstance(given, list | tuple) else [given]


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what exporters and quantisers log about themselves off the console."""
    names = ("torch.onnx", "torch.export", "torch.utils.cpp_extension", "onnxscript", "onnx_ir", "nncf", "")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
