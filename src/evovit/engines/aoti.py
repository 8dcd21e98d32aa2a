"""AOTInductor: the graph compiled ahead of time for this kind of processor; runs from Python and C++."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from evovit.engines.base import Engine, Plan, Run, outputs_of


class Aoti(Engine):
    """A compiled graph that `torch._inductor.aoti_load_package` reads, or its C++ runner."""

    name = "AOTInductor"
    file = "model.aoti.pt2"
    precisions = ("fp32", "fp16")

    def write(self, program: ExportedProgram, path: Path, plan: Plan) -> None:
        frozen = {"freezing": True}  # weights packed once, for the products
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=frozen)

    def load(self, path: Path, threads: int | None = None) -> Run:
        module = torch._inductor.aoti_load_package(str(path))

        def run(images: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return outputs_of(module(images))

        return run
