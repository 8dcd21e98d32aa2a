"""torch.export: the traced graph of PyTorch itself, which needs nothing but PyTorch to run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from evovit.engines.base import Engine, Plan, Run, outputs_of, quietly


class Pt2(Engine):
    """A graph that `torch.export.load` reads."""

    name = "torch.export"
    file = "model.pt2"
    precisions = ("fp32", "fp16")

    def write(self, program: ExportedProgram, path: Path, plan: Plan) -> None:
        torch.export.save(program, path)

    def load(self, path: Path, threads: int | None = None) -> Run:
        with quietly():  # torch 2.9 warns that it reads weights into read-only buffers
            module = torch.export.load(path).module()

        def run(images: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return outputs_of(module(images))

        return run
