"""ONNX, run by ONNX Runtime. int8 is ONNX Runtime's own quantisation of the products with weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from evovit.engines.base import Engine, Plan, Run, quietly, upstream_products

OPSET = 20
QUANTISED = ("MatMul", "Gemm")


class Onnx(Engine):
    """An ONNX file of opset 20."""

    name = "ONNX Runtime"
    file = "model.onnx"
    precisions = ("fp32", "fp16", "int8")
    needs = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"

    def write(self, program: ExportedProgram, path: Path, plan: Plan) -> None:
        count = len(program.graph_signature.user_outputs)
        outputs = ["logits", *(f"index{number}" for number in range(1, count))]
        with quietly():
            written: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=outputs,
                verbose=False,
            )
        written.save(path)
        if plan.precision == "int8":
            quantise(path, plan)

    def load(self, path: Path, threads: int | None = None) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> list[Tensor]:
            return [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]

        return run


def quantise(path: Path, plan: Plan) -> None:
    """Replace an ONNX file by one of int8 products; attention and what decides a selection stay in float.

    Without calibration images the ranges of activations are found in each run.
    """
    import onnx
    from onnxruntime import quantization as ort

    ready = path.with_name("ready.onnx")
    with quietly():
        ort.shape_inference.quant_pre_process(path, ready, skip_symbolic_shape=True)
        shared: dict[str, Any] = {
            "op_types_to_quantize": list(QUANTISED),
            "nodes_to_exclude": sorted(_deciding(onnx.load(ready, load_external_data=False))),
            "weight_type": ort.QuantType.QInt8,
            "extra_options": {"MatMulConstBOnly": True},
        }
        if plan.calibration is None:
            ort.quantize_dynamic(ready, path, **shared)
        else:
            reader = _Reader(iter(plan.batches()))
            ort.quantize_static(ready, path, reader, per_channel=True, **shared)
    ready.unlink()


def _deciding(model: Any) -> set[str]:
    """Return the names of the products that selections read first."""
    nodes = list(model.graph.node)
    makers = {output: node.name for node in nodes for output in node.output}
    sources = {node.name: [makers[name] for name in node.input if name in makers] for node in nodes}
    return upstream_products(sources, {node.name: node.op_type for node in nodes}, QUANTISED)


class _Reader:
    """Calibration images as ONNX Runtime asks for them, a batch at a time."""

    def __init__(self, images: Iterator[Tensor]) -> None:
        self.images = images

    def get_next(self) -> dict[str, Any] | None:
        """Return the next input, None at the end."""
        image = next(self.images, None)
        return None if image is None else {"images": image.numpy()}
