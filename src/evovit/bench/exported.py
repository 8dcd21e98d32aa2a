"""A step on an engine outside PyTorch's eager mode: the model written for it, and loaded, in this process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from evovit.engines.base import LogitsAlone, Plan, on_cpu, trace
from evovit.engines.exporting import TARGETS

EXPORTED = {"aoti": "aoti", "onnxruntime": "onnx", "openvino": "openvino"}  # engine -> target of an export


def why_not(engine: str, precision: str, device: str, train: bool) -> str:
    """Return why an engine does not run such a step here, "" where it does."""
    if engine not in EXPORTED:
        return "int8 is for onnxruntime and openvino" if precision == "int8" else ""
    if device != "cpu":
        return f"{engine} runs on the CPU here"
    if train:
        return f"{engine} does not train"
    if precision not in TARGETS[EXPORTED[engine]].precisions:
        return f"{engine} is not written in {precision}"
    return ""


def exported_step(
    engine: str, model: nn.Module, precision: str, batches: Sequence[Tensor]
) -> Callable[[int], object]:
    """Return a step on the i-th batch, all of one size, on as many threads as PyTorch has now.

    int8 of OpenVINO reads its ranges from these batches; ONNX Runtime finds them in each run.
    """
    target = TARGETS[EXPORTED[engine]]
    images = [batch.float() for batch in batches]
    seen = torch.cat(images) if precision == "int8" and engine == "openvino" else None
    plan = Plan(precision=precision, batch=len(images[0]), calibration=seen)
    half = precision == "fp16" and target.computes_half
    program = trace(LogitsAlone(on_cpu(model)), images[0].shape[1:], plan, half=half)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / target.file
        path.parent.mkdir(exist_ok=True)
        target.write(program, path, plan)
        run = target.load(path, torch.get_num_threads())

    def step(i: int) -> object:
        return run(images[i % len(images)])

    return step
