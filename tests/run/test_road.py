"""The road stays short: graphs, recompiles, operators and MACs are counted, not seconds.

A bound may sink freely; raising one needs a reason and a measurement.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor import metrics

from evovit import ReducedViT, reduce_tokens
from evovit.macs import gmacs

IMAGE = (3, 64, 64)
MOVES = ("index", "index_select", "gather", "index_copy", "index_put", "scatter", "cat")
VIEWS = (
    *("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze"),
    *("select", "slice", "unbind", "split", "split_with_sizes", "getitem", "alias", "detach", "as_strided"),
)

# (mode, fast_update) -> operators that are no views, beyond the dense model's (a tenth above the
# count, as decompositions differ between versions of PyTorch); and of those, moves of data.
EXTRA_OPERATORS = {
    ("stage", False): (86, 10),
    ("stage", True): (102, 12),
    ("layer", False): (120, 17),
    ("layer", True): (146, 20),
}
SELECTIONS = {"stage": 2, "layer": 3}


def host() -> nn.Module:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=10
    ).eval()


def reduced(mode: str = "stage", fast_update: bool = False, keep_ratio: float = 0.5) -> ReducedViT:
    options: dict[str, Any] = {"start_block": 1, "stage_length": 2, "keep_ratio": keep_ratio}
    return reduce_tokens(host(), "evo_vit", mode=mode, fast_update=fast_update, **options)


def images(seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(seed))


def operators(model: nn.Module) -> Counter[str]:
    """Count the aten operators of the compiled forward that do work; three batches must give one graph."""
    found: Counter[str] = Counter()

    def count(graph: Any, inputs: Any) -> Any:
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        names = [str(node.target).split(".") for node in calls]  # aten.topk.default
        found.update(parts[-2] for parts in names if len(parts) > 1 and parts[-2] not in VIEWS)
        return graph.forward

    def backend(graph: Any, inputs: Any) -> Any:
        return aot_module_simplified(graph, inputs, fw_compiler=count)

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.inference_mode():
        for seed in range(3):
            compiled(images(seed))
    assert counters["stats"]["unique_graphs"] == 1 and sum(counters["graph_break"].values()) == 0
    return found


@cache
def dense_operators() -> Counter[str]:
    return operators(host())


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def test_two_keep_ratios_compile_two_graphs_and_no_more() -> None:
    models = [reduced(keep_ratio=ratio) for ratio in (0.5, 0.7)]
    with torch.inference_mode():
        for seed in range(3):
            for model in models:
                model.compile(backend="eager", fullgraph=True) if seed == 0 else None
                model(images(seed))
    assert counters["stats"]["unique_graphs"] == 2


def test_going_back_to_a_mode_compiles_nothing_new() -> None:
    model = reduced("layer")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.inference_mode():
        for seed, mode in enumerate(("layer", "stage", "layer", "stage")):
            model.method.mode = mode
            compiled(images(seed))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(("mode", "fast"), EXTRA_OPERATORS)
def test_the_forward_is_one_graph_with_few_extra_operators(mode: str, fast: bool) -> None:
    own = operators(reduced(mode, fast))
    extra = own - dense_operators()
    assert own["topk"] == SELECTIONS[mode] and own["sort"] == 0
    bound, moves = EXTRA_OPERATORS[mode, fast]
    assert sum(extra.values()) <= bound
    assert sum(extra[name] for name in MOVES) <= moves


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "bound"), [("stage", 120), ("layer", 134)])
def test_generated_kernels_stay_within_their_bound(mode: str, bound: int) -> None:
    metrics.reset()
    with torch.inference_mode():
        torch.compile(reduced(mode, True))(images(0))
    assert 0 < metrics.generated_kernel_count <= bound


ON_GPU = {  # Triton kernels, a tenth above the count, and library calls; `test_vit`, 6 blocks
    "evo_vit:start_block=2,stage_length=2": (44, 35),
    "evo_vit:start_block=2,mode=layer": (63, 37),
    "evit:blocks=[2]": (30, 34),
    "tome:r=8": (87, 45),
}


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.__version__.startswith(("2.11.", "2.15.")), reason="rests on internals of PyTorch 2.11 and 2.15"
)
def test_a_gpu_would_run_few_extra_kernels_and_none_where_nothing_is_reduced() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"
    whole = [f"{words},last_block=all" for words in ("evo_vit:keep_ratio=1.0", *ON_GPU)]
    words = [*whole, "dense:last_block=prefix", "--model=test_vit", "--batch=8"]
    done = subprocess.run([sys.executable, script, *words], check=True, capture_output=True, text=True)
    counts = [(int(a), int(b)) for a, b in re.findall(r": (\d+) Triton \+ (\d+),", done.stdout)]
    dense, nothing, *others, prefix = counts
    assert dense == nothing and min(dense) >= 18
    assert prefix[0] <= dense[0] + 1 and prefix[1] <= dense[1] + 1  # queries have a product of their own
    for (triton, library), bounds in zip(others, ON_GPU.values(), strict=True):
        assert triton <= bounds[0] and library <= bounds[1]


def test_multiply_accumulates_stay_what_they_are() -> None:
    counts = {
        "dense": gmacs(host(), IMAGE),
        "stage": gmacs(reduced("stage"), IMAGE),
        "stage, fast": gmacs(reduced("stage", True), IMAGE),
        "layer": gmacs(reduced("layer"), IMAGE),
        "dense, prefix": gmacs(reduce_tokens(host(), "dense"), IMAGE),
    }
    whole = reduced("stage")
    whole.last_block = "all"
    counts["stage, all"] = gmacs(whole, IMAGE)
    recorded = {
        **{"dense": 4670016, "dense, prefix": 3748416},
        **{"stage": 2492992, "stage, fast": 2532352, "layer": 2492992, "stage, all": 2888256},
    }
    assert {name: round(count * 1e9) for name, count in counts.items()} == recorded
