"""Where the time of a step goes: kernels counted, and their time by part of the model.

On CUDA a part is read from a kernel's name; a kernel fused by Inductor carries the names of its operators.
On the CPU a part is read from the operator; Inductor's loops there are seen if compiled under `named_loops`.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._inductor import config as inductor_config
from torch.profiler import ProfilerActivity, record_function

from evovit.runtime.files import write_bytes

PARTS = (
    *("projections", "attention", "score", "selection"),
    *("data movement", "norm and elementwise", "other"),
)

_LOSS = ("norm and elementwise", r"nll_loss|log_?softmax")  # its softmax is no score
# The first match wins, so that `fmha_cutlass` is attention and `gatherTopK` selection.
_LIBRARY_KERNELS = (
    ("attention", r"flash|fmha|sdpa|attention|mha_|convert_dq|dot_do_o"),
    _LOSS,
    ("selection", r"topk|radix|sort|scan|bitonic"),
    ("score", r"gemv|softmax|dot_kernel"),
    ("projections", r"gemm|cutlass|nvjet|cublas|xmma|conv|splitk|wgrad|dgrad|matmul"),
    (
        "data movement",
        r"index|gather|scatter|catarray|copy|memcpy|memset|fill|transpose|nchwtonhwc|nhwctonchw",
    ),
    ("norm and elementwise", r"norm|elementwise|reduce|gelu|loss"),
)
_FUSED_OPERATORS = (  # an `addmm` or `convolution` in a name is its bias or layout: products are not fused
    ("projections", r"triton_tem|triton_mm"),
    _LOSS,
    ("selection", r"topk|sort|cumsum|bitwise|scatter(?!_add)"),
    ("score", r"softmax|bmm|dot(?!_product)"),
    ("norm and elementwise", r"layer_norm|gelu|var_mean|rsqrt"),
    ("data movement", r"index|gather|scatter|cat(?:_|$)|clone|copy|permute|transpose"),
    ("norm and elementwise", r""),
)
_ATEN_OPERATORS = (
    ("attention", r"scaled_dot_product|flash_attention|efficient_attention"),
    _LOSS,
    ("selection", r"topk|sort|cumsum|bitwise|::[gl][te]$|::eq$|arange|::where|shift|_and__|_xor_"),
    ("score", r"softmax|bmm|gemv|::mv$|::dot$"),
    ("projections", r"addmm|::mm$|linear|convolution|matmul"),
    ("data movement", r"index|gather|scatter|::cat$|copy|clone|contiguous|::fill_|::zero_|repeat|stack"),
    ("norm and elementwise", r"norm|gelu|::add|::mul|::sub|::div|::mean|::sum|relu|sigmoid|rsqrt|amin|clamp"),
)
_OPERATOR = re.compile(r"(aten|mkldnn|mkl)::")
_NO_WORK = re.compile(
    r"aten::(view|_?reshape(_alias)?|_unsafe_view|permute|transpose|t|expand(_as)?|as_strided|select|slice|unbind|"
    r"unsqueeze|squeeze|empty\w*|detach\w*|alias|flatten|unflatten|to|_to_copy|resize_|result_type|lift_fresh|"
    r"chunk|split\w*|narrow|numel|dropout|is_\w+|new_empty\w*|item|_local_scalar_dense|size|broadcast_to|linear|matmul|conv2d|_?convolution|layer_norm|softmax|"
    r"scaled_dot_product_attention|contiguous|clone|resolve_conj|resolve_neg|zeros|zeros_like)"
)


class Profile(NamedTuple):
    """What one step runs."""

    kernels: int  # CUDA kernels, copies and fills; on the CPU operators that do work
    parts_ms: dict[str, float]  # keys: `PARTS`
    names: dict[str, tuple[int, float, str]]  # kernel -> calls, milliseconds, part; longest first


def part_of(name: str) -> str:
    """Return the part of the model that a kernel or operator belongs to, by its name."""
    lower = name.lower().replace("_to_copy", "")  # a cast, fused into what uses it
    if "triton_" in lower or "cpp_fused" in lower:
        rules: Sequence[tuple[str, str]] = _FUSED_OPERATORS
    else:
        rules = _ATEN_OPERATORS if "::" in lower and _OPERATOR.match(lower) else _LIBRARY_KERNELS
    return next((part for part, pattern in rules if re.search(pattern, lower)), "other")


def profile(step: Callable[[int], object], device: str, repeats: int = 3) -> Profile:
    """Run a warm step a few times under PyTorch's profiler; return the fullest, then the quickest profile."""
    found = [_profile_once(step, device) for _ in range(repeats)]
    return min(found, key=lambda p: (-p.kernels, sum(p.parts_ms.values())))


def _profile_once(step: Callable[[int], object], device: str) -> Profile:
    on_cuda = device == "cuda"
    with _without_chatter(), _profiler(on_cuda) as profiler:
        _feed(on_cuda)
        step(0)
        _wait(on_cuda)
    names: dict[str, tuple[int, float, str]] = {}
    for event in profiler.events():
        duration_ms = _work_ms(event, on_cuda)
        if duration_ms is not None:
            calls, total, part = names.get(event.name, (0, 0.0, part_of(event.name)))
            names[event.name] = (calls + 1, total + duration_ms, part)
    parts_ms = dict.fromkeys(PARTS, 0.0)
    for _, total, part in names.values():
        parts_ms[part] += total
    ordered = dict(sorted(names.items(), key=lambda item: -item[1][1]))
    return Profile(sum(calls for calls, _, _ in names.values()), parts_ms, ordered)


def named_loops(device: str) -> AbstractContextManager[Any]:
    """Let what is compiled for the CPU inside name its loops to a profiler; without one it costs nothing."""
    return inductor_config.patch({"cpp.enable_kernel_profile": True}) if device == "cpu" else nullcontext()


def write_trace(steps: Mapping[str, Callable[[int], object]], device: str, path: Path) -> None:
    """Write one Chrome trace (chrome://tracing, ui.perfetto.dev) with one step of each, under its name."""
    on_cuda = device == "cuda"
    with _without_chatter(), _profiler(on_cuda) as profiler:
        _feed(on_cuda)
        for name, step in steps.items():
            with record_function(name):
                step(0)
                _wait(on_cuda)
    with tempfile.TemporaryDirectory() as folder:  # the profiler's own writer takes plain names alone
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        write_bytes(path, file.read_bytes())


def _profiler(on_cuda: bool) -> Any:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    return torch.profiler.profile(activities=activities, acc_events=True)


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep the profiler library's own log ("USDT: ...", a missing GPU as ERROR) off the console."""
    sys.stderr.flush()
    console = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(console, 2)
            os.close(console)
            caught.seek(0)
            for line in caught.read().decode(errors="replace").splitlines():
                if not re.match(r"(USDT|ERROR|WARNING|INFO):.*\d+:\d+ \w+\.cpp:\d+\]", line):
                    print(line, file=sys.stderr)


def _feed(on_cuda: bool) -> None:
    """Launch idle kernels: below CUDA 13.1 a session loses the first ones it sees (pytorch#192021)."""
    for _ in range(300 if on_cuda else 0):
        torch.cuda._sleep(100)  # type: ignore[no-untyped-call]


def _wait(on_cuda: bool) -> None:
    if on_cuda:
        torch.cuda.synchronize()


def _work_ms(event: Any, on_cuda: bool) -> float | None:
    """Return the milliseconds an event worked itself; None for views, labels and the other device."""
    if on_cuda:
        is_label = event.is_user_annotation or event.name.startswith("##")
        if event.device_type.name != "CUDA" or is_label or "spin_kernel" in event.name:  # of `_feed`
            return None
        return float(event.time_range.elapsed_us()) / 1e3
    is_work = _OPERATOR.match(event.name) and not _NO_WORK.fullmatch(event.name)
    if not (is_work or "cpp_fused" in event.name):
        return None
    return float(event.self_cpu_time_total) / 1e3
