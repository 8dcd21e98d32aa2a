"""One model with one engine, ready to be timed: eager, compiled, a CUDA graph, or another engine.

An inference step is a forward under `inference_mode`, weights and images in the same type. A training step is
forward and backward in training mode, no optimiser; bf16 and fp16 then mean autocast over float32 weights.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.nn import functional as F

from evovit.bench.exported import EXPORTED, exported_step, why_not
from evovit.errors import EvoViTError
from evovit.model import ReducedViT
from evovit.tokens import logits_of

ENGINES = ("eager", "compiled", "graphs", "frozen", *EXPORTED)
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,  # of the weights, until an engine quantises them
}
WARM_UP_STEPS = 4

Step = Callable[[int], object]  # runs one step on the i-th input (modulo their number)


class Batch(NamedTuple):
    """One input."""

    images: Tensor  # (B, channels, height, width)
    labels: Tensor  # (B,)


class TimedStep(NamedTuple):
    """A step ready to be timed, and what its preparation showed."""

    engine: str
    step: Step | None  # None: the engine does not work here
    skipped: str = ""  # why not
    peak_memory_mb: float | None = None  # of one step, with weights and input; None on the CPU
    graph_breaks: int | None = None  # None for eager
    recompiles: int | None = None

    def run(self, i: int) -> object:
        """Run one step on the i-th input."""
        assert self.step is not None
        return self.step(i)


NO_GRAPHS = TimedStep("graphs", None, "CUDA graphs need a CUDA device")


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the model's heads."""
    out = model.run(batch.images) if isinstance(model, ReducedViT) else logits_of(model(batch.images))
    if isinstance(model, ReducedViT):
        heads = [out.logits, *out.extra_logits.values()]
    else:
        heads = list(out) if isinstance(out, tuple) else [out]
    return torch.stack([F.cross_entropy(head.float(), batch.labels) for head in heads]).mean()


@contextmanager
def float32_precision(dtype: str, device: str) -> Iterator[None]:
    """Let float32 products on CUDA use TF32 for "tf32", else full precision; restore the settings after."""
    if device != "cuda":
        yield
        return
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def compiled(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """Compile a closure by itself.

    Dynamo keeps its cache, its recompile limit and its memory of changing numbers per code object, so that
    closures of one factory would count as recompiles of each other: this one gets its own code object.
    """
    code = function.__code__.replace(co_name=name)
    own = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    return torch.compile(own, dynamic=False)


def forward_of(model: nn.Module, train: bool) -> Callable[..., Tensor]:
    """Return what is compiled: images, labels -> logits, or the loss in training."""

    def forward(images: Tensor, labels: Tensor) -> Tensor:
        return loss_of(model, Batch(images, labels)) if train else logits_of(model(images))

    return forward


def step_of(
    model: nn.Module, forward: Callable[..., Tensor], dtype: str, batches: Sequence[Batch], train: bool
) -> Step:
    """Return the step over `batches`."""
    device_type, half = batches[0].images.device.type, dtype in ("bf16", "fp16")

    def infer(i: int) -> Tensor:
        with torch.inference_mode():
            return forward(*batches[i % len(batches)])

    def learn(i: int) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device_type, DTYPES[dtype] if half else None, enabled=half):
            loss = forward(*batches[i % len(batches)])
        loss.backward()  # type: ignore[no-untyped-call]

    return learn if train else infer


def prepare(
    model: nn.Module, engines: Sequence[str], dtype: str, batches: Sequence[Batch], train: bool, name: str
) -> list[TimedStep]:
    """Return one warm step per engine; an engine that does not work here says why.

    Args:
        name: of the compiled function; unlike any other since the last `torch.compiler.reset`.
    """
    model.train(train)
    device = batches[0].images.device.type
    refused = {engine: why for engine in engines if (why := why_not(engine, dtype, device, train))}
    engines = [engine for engine in engines if engine not in refused]
    ready = _prepare(model, engines, dtype, batches, train, name)
    images = [batch.images for batch in batches]
    for engine in (engine for engine in engines if engine in EXPORTED):
        ready.append(_tried(engine, partial(_exported, engine, model, dtype, images)))
    return ready + [TimedStep(engine, None, why) for engine, why in refused.items()]


def _exported(engine: str, model: nn.Module, dtype: str, images: Sequence[Tensor]) -> TimedStep:
    step = exported_step(engine, model, dtype, images)
    warm_up(step, len(images))
    return TimedStep(engine, step)


def _prepare(
    model: nn.Module, engines: Sequence[str], dtype: str, batches: Sequence[Batch], train: bool, name: str
) -> list[TimedStep]:
    """Return one warm step per engine of PyTorch's own."""
    forward, ready = forward_of(model, train), list[TimedStep]()
    if "eager" in engines:
        step = step_of(model, forward, dtype, batches, train)
        eager = _tried("eager", lambda: _warm("eager", model, batches, step))
        ready.append(eager._replace(graph_breaks=None, recompiles=None))
    if "frozen" in engines:
        ready.append(_tried("frozen", lambda: _frozen(model, forward, dtype, batches, train, name)))
    others = [engine for engine in ("compiled", "graphs") if engine in engines]
    if not others:
        return ready
    if others == ["graphs"] and not batches[0].images.is_cuda:
        return [*ready, NO_GRAPHS]
    quick = compiled(forward, name)
    quick_step = step_of(model, quick, dtype, batches, train)
    plain = _tried("compiled", lambda: _warm("compiled", model, batches, quick_step))
    if plain.step is None:
        return [*ready, *(plain._replace(engine=engine) for engine in others)]
    if "compiled" in engines:
        ready.append(plain)

    def graphs() -> TimedStep:
        step, peak = captured(model, quick, dtype, batches, train)
        return plain._replace(engine="graphs", step=step, peak_memory_mb=peak)

    if "graphs" in engines:
        on_cuda = batches[0].images.is_cuda
        ready.append(_tried("graphs", graphs, "the capture failed: ") if on_cuda else NO_GRAPHS)
    return ready


def _frozen(
    model: nn.Module,
    forward: Callable[..., Tensor],
    dtype: str,
    batches: Sequence[Batch],
    train: bool,
    name: str,
) -> TimedStep:
    """Return the compiled step with weights as constants, packed once for the products."""
    if train:
        return TimedStep("frozen", None, "frozen weights do not train")
    with inductor_config.patch({"freezing": True}):
        step = step_of(model, compiled(forward, f"{name}_frozen"), dtype, batches, train)
        return _warm("frozen", model, batches, step)


def _tried(engine: str, make: Callable[[], TimedStep], what: str = "") -> TimedStep:
    """Return the step, or one that says why there is none; memory and wrong input are the caller's."""
    try:
        return make()
    except (torch.OutOfMemoryError, EvoViTError):
        raise
    except Exception as error:  # compiled code asserts, and a compiler raises what it likes
        return TimedStep(engine, None, f"{what}{in_short(error)}")


def _warm(engine: str, model: nn.Module, batches: Sequence[Batch], step: Step) -> TimedStep:
    breaks, recompiles = warm_up(step, len(batches))
    return TimedStep(engine, step, "", _peak_of_step(model, batches, step), breaks, recompiles)


def warm_up(step: Step, num_batches: int) -> tuple[int, int]:
    """Run every input once or more; return the graph breaks, and the graphs compiled after the first step."""
    breaks, _ = _compile_counts()
    step(0)
    first_breaks, first_graphs = _compile_counts()
    for i in range(1, max(WARM_UP_STEPS, num_batches)):
        step(i)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return first_breaks - breaks, _compile_counts()[1] - first_graphs


def captured(
    model: nn.Module, forward: Callable[..., Tensor], dtype: str, batches: Sequence[Batch], train: bool
) -> tuple[Step, float]:
    """Capture the compiled step into a CUDA graph; the new step copies its input in and replays.

    The capture is ours, not `mode="reduce-overhead"`: that one falls back silently where it cannot capture,
    this one raises.

    Returns:
        The step, and the peak memory of the capture in MB.
    """
    static = Batch(*(tensor.clone() for tensor in batches[0]))
    step = step_of(model, forward, dtype, [static], train)
    home, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(home)
    with torch.cuda.stream(side):  # as PyTorch's notes on whole-network capture ask for
        warm_up(step, 1)
    home.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    held: list[Any] = []  # what the replay writes into

    def capture() -> None:
        try:
            with torch.cuda.graph(graph, stream=side):  # the stream whose cuBLAS workspace is there by now
                held.append(step(0))
        finally:
            torch.cuda.set_stream(home)  # a capture that fails may leave its own stream current

    peak = _peak_memory_mb(model, static, capture)
    held.append([parameter.grad for parameter in model.parameters()])

    def replay(i: int) -> object:
        new = batches[i % len(batches)]
        static.images.copy_(new.images)
        if train:
            static.labels.copy_(new.labels)
        graph.replay()
        return held

    warm_up(replay, len(batches))
    return replay, peak


def _peak_of_step(model: nn.Module, batches: Sequence[Batch], step: Step) -> float | None:
    return _peak_memory_mb(model, batches[0], lambda: step(0)) if batches[0].images.is_cuda else None


def _peak_memory_mb(model: nn.Module, batch: Batch, run: Callable[[], object]) -> float:
    """Return the most memory that `run` needs, with the model's weights and one input, in MB (1e6 bytes)."""
    gc.collect()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    own = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *batch))
    return (torch.cuda.max_memory_allocated() - before + own) / 1e6


def _compile_counts() -> tuple[int, int]:
    """Return how many graph breaks and graphs Dynamo has seen in this process."""
    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


def in_short(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
