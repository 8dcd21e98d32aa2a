"""OpenVINO on a CPU. int8 is NNCF's quantisation; what decides a selection stays in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from evovit.engines.base import Engine, Plan, Run, quietly, upstream_products


class OpenVino(Engine):
    """An OpenVINO model: a graph (.xml) and its weights beside it (.bin)."""

    name = "OpenVINO"
    file = "openvino/model.xml"
    precisions = ("fp32", "fp16", "int8")
    needs = ("openvino", "nncf")
    extra = "openvino"
    computes_half = False

    def write(self, program: ExportedProgram, path: Path, plan: Plan) -> None:
        import openvino

        with quietly():
            model = openvino.convert_model(program)
            model.inputs[0].get_tensor().set_names({"images"})
            model.outputs[0].get_tensor().set_names({"logits"})
            if plan.precision == "int8":
                model = quantised(model, plan)
            path.parent.mkdir(exist_ok=True)
            openvino.save_model(model, path, compress_to_fp16=plan.precision == "fp16")

    def load(self, path: Path, threads: int | None = None) -> Run:
        import openvino

        # Some processors would compute in bfloat16 by default.
        config = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        compiled = openvino.Core().compile_model(path, "CPU", config)

        def run(images: Tensor) -> list[Tensor]:
            return [torch.from_numpy(out.copy()) for out in compiled(images.numpy()).to_tuple()]

        return run


def quantised(model: Any, plan: Plan) -> Any:
    """Return an OpenVINO model with int8 products."""
    import nncf

    batches = [images.numpy() for images in plan.batches()]
    return nncf.quantize(
        model,
        nncf.Dataset(batches),
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=sorted(_deciding(model))),
    )


def _deciding(model: Any) -> set[str]:
    """Return the names of the products that selections read first."""
    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    sources = {
        name: [value.get_node().get_friendly_name() for value in node.input_values()]
        for name, node in nodes.items()
    }
    return upstream_products(
        sources, {name: node.get_type_name() for name, node in nodes.items()}, ("MatMul",)
    )
