"""Count the kernels and bytes of a compiled forward on a GPU, without a GPU: nothing is run or timed.

    python benchmarks/gpu_kernels.py [METHOD[:OPTION=VALUE,...] ...] [--model NAME] [--batch N] [--code DIR]

The forward is exported, put on a pretended H200 and given to Inductor, whose program is counted: Triton
kernels, kernels of libraries (products, fused attention) and the bytes that all of them read and write by
Inductor's own account, which may charge a kernel for more of a buffer than it reads. Rests on internals of
PyTorch; tried with 2.11 and 2.15. What PyTorch once believes it remembers: for a process of its own.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
from torch import Tensor, fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from evovit import reduce_tokens
from evovit.bench.setting import parse_variants
from evovit.ops import select

ATEN = torch.ops.aten
CUDA = torch.device("cuda", 0)
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=141 * 10**9,
    L2_cache_size=60 * 2**20,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    gcnArchName="",
)


class Count(NamedTuple):
    """What one forward takes."""

    triton: int
    library: int
    mebibytes: int


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let PyTorch believe in an H200, and methods choose as on a GPU."""
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "_lazy_init", None),
        (fake_tensor, "init_gpu_context", None),
        (torch.cuda, "is_available", True),
        (torch.cuda, "device_count", 1),
        (torch.cuda, "current_device", 0),
        (torch.cuda, "get_device_properties", H200),
        (torch.cuda, "get_device_capability", (9, 0)),
        (torch.utils._triton, "triton_hash_with_backend", "none"),
        (torch._C, "_cuda_getDevice", 0),
        (CudaInterface, "get_compute_capability", 90),
        (CudaInterface, "get_device_properties", H200),
        (CudaInterface.Worker, "get_device_properties", H200),
        (CudaInterface.Worker, "current_device", 0),
    ]
    with ExitStack() as stack:
        for owner, name, answer in answers:
            fake = mock.Mock(return_value=answer)
            stack.enter_context(mock.patch.object(owner, name, fake, create=True))
        stack.enter_context(mock.patch.object(select, "best_by_threshold", select.best_by_count))
        yield


class OnGpu(fx.Interpreter):
    """Runs an exported graph with the fused attention that a GPU takes."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not ATEN.scaled_dot_product_attention.default:
            return super().call_function(target, args, kwargs)
        q, k, v, *rest = args
        mask, scale = rest[0] if rest else kwargs.get("attn_mask"), kwargs.get("scale")
        if mask is None:
            return ATEN._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
        mask = mask.expand(*q.shape[:3], k.shape[2])
        return ATEN._scaled_dot_product_efficient_attention(q, k, v, mask, False, scale=scale)[0]


def on_gpu(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """Return an exported graph as a GPU runs it, decomposed, and its inputs; call in a fake mode."""

    def moved(value: Any) -> Any:
        return fx.node.map_aggregate(value, lambda a: CUDA if isinstance(a, torch.device) else a)

    for node in graph.graph.nodes:
        node.args, node.kwargs = moved(node.args), moved(node.kwargs)
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    inputs = [torch.empty(v.shape, dtype=v.dtype, device=CUDA) for v in values]
    table = select_decomp_table() | {ATEN.index_select.default: select_rows}
    return make_fx(OnGpu(graph).run, decomposition_table=table)(*inputs), inputs


def select_rows(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Decompose as PyTorch does, but without Python's indexing, which asks for a real device."""
    rows: Tensor = ATEN.index(x, [None] * dim + [index])
    return rows


def count(model: nn.Module, images: Tensor, code: Path | None = None) -> Count:
    """Count what Inductor makes of one forward; `code` is a file to write its program into."""
    fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    with pretended_gpu(), torch.no_grad(), config.patch({"triton.autotune_at_compile_time": False}):
        with mock.patch(
            "torch.compiler.is_exporting", lambda: False
        ):  # as a compiled step, not for an engine
            exported = torch.export.export(model, (images,)).graph_module
        with fake:
            graph, inputs = on_gpu(exported)
        with fake, V.set_fake_mode(fake):
            compile_fx.view_to_reshape(graph)
            compile_fx._recursive_post_grad_passes(graph, is_inference=True)
            lowering = GraphLowering(graph, example_inputs=inputs, is_inference=True)
            with V.set_graph_handler(lowering), DebugContext():
                lowering.run(*inputs)
                program = lowering.codegen()[0]
                moved = sum(node.get_read_write_buffers_sizes() for node in lowering.scheduler.nodes)
    text = getattr(program, "value", program)
    if code:
        code.write_text(text)
    body = text[text.index("def call(") :]
    library = re.findall(r"extern_kernels\.\w+\(|= torch\.ops\.aten\.\w+", body)
    return Count(len(re.findall(r"^\s*triton_\w+\.run\(", body, re.M)), len(library), round(moved / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", default=["evo_vit", "evo_vit:mode=layer", "evit", "tome:r=13"])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--code", type=Path, help="folder for the programs")
    options = parser.parse_args()
    if options.code:
        options.code.mkdir(parents=True, exist_ok=True)
    print(f"{options.model}, bf16, batch {options.batch}, torch {torch.__version__}: kernels, MiB moved")
    for number, variant in enumerate([None, *parse_variants(options.methods, [])]):
        model = timm.create_model(options.model).eval()
        images = torch.zeros(options.batch, *model.pretrained_cfg["input_size"], dtype=torch.bfloat16)
        if variant:
            model = reduce_tokens(model, variant.method, verify=False, **variant.options)
        code = options.code and options.code / f"{number}.py"
        found = count(model.bfloat16(), images, code)
        print(f"  {variant or 'dense'}: {found.triton} Triton + {found.library}, {found.mebibytes} MiB")


if __name__ == "__main__":
    main()
