"""Multiply-accumulates of one image, twice: by formula from the token counts, and by PyTorch's counter.

Layers of host and method and both products of attention count; norms, softmax, scores and selection do not
(methods' tables count the same way). 1 GMAC is 1e9 multiply-accumulates; most papers call them "FLOPs".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from evovit.backbones import Block, Stage, adapt
from evovit.backbones.base import Mix
from evovit.backbones.timm_levit_blocks import LevitEntry
from evovit.methods.base import Dense, Method
from evovit.model import ReducedViT
from evovit.tokens import QKV, Tokens


class Ledger:
    """The multiply-accumulates noted so far: of blocks by formula, of what runs beside them as counted."""

    def __init__(self) -> None:
        self.macs, self.in_block = 0.0, False
        self.counter, self.starts = FlopCounterMode(display=False), list[int]()

    @contextmanager
    def block(self, macs: int) -> Iterator[None]:
        """Note what a block does in here, whatever it runs."""
        self.macs += macs
        self.in_block = True
        yield
        self.in_block = False

    def watch(self, module: nn.Module) -> list[RemovableHandle]:
        """Note what a module does outside the blocks; return the hooks to remove."""
        return [module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after)]

    def _before(self, *_: Any) -> None:
        self.starts.append(self.counter.get_total_flops())

    def _after(self, *_: Any) -> None:
        flops = self.counter.get_total_flops() - self.starts.pop()
        self.macs += 0 if self.in_block else flops / 2


class CountedBlock(Block):
    """A block view that notes the multiply-accumulates of each call."""

    def __init__(self, block: Block, ledger: Ledger) -> None:
        self.block, self.number, self.ledger = block, block.number, ledger

    def qkv(self, tokens: Tokens) -> QKV:
        with self.ledger.block(tokens.x.shape[1] * self.weights()[0]):
            return self.block.qkv(tokens)

    def glance(self, tokens: Tokens) -> QKV:
        with self.ledger.block(0):
            seen = self.block.glance(tokens)
        parts = sum(part.shape[1] * part.shape[2] * part.shape[3] for part in seen[:3])
        rows, whole = tokens.x.shape[1], seen.v.shape[2] > 0
        self.ledger.macs += rows * self.weights()[0] if whole else tokens.x.shape[2] * parts
        return seen

    def focus(self, active: Tokens, glanced: QKV, rows: Tensor) -> QKV:
        keys = active.x.shape[2] * glanced.k.shape[1] * glanced.k.shape[3]  # are projected already
        with self.ledger.block(0 if glanced.v.shape[2] else rows.shape[1] * (self.weights()[0] - keys)):
            return self.block.focus(active, glanced, rows)

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        with self.ledger.block(tokens.x.shape[1] * self.weights()[1] + both_products(qkv)):
            return self.block.attention(tokens, qkv, bias, mix)

    def ffn(self, tokens: Tokens) -> Tokens:
        with self.ledger.block(tokens.x.shape[1] * self.weights()[2]):
            return self.block.ffn(tokens)

    def weights(self) -> tuple[int, int, int]:
        return self.block.weights()


class CountedEntry(LevitEntry):
    """A down-sampling attention that notes its two products; its layers are noted as they run."""

    def __init__(self, entry: LevitEntry, ledger: Ledger) -> None:
        super().__init__(entry.down)
        self.ledger = ledger

    def attend(self, tokens: Tokens) -> tuple[Tokens, QKV]:
        tokens, qkv = super().attend(tokens)
        self.ledger.macs += both_products(qkv)
        return tokens, qkv


class CountedMethod(Method):
    """A method that runs on counted blocks."""

    needs_class_token = False
    crosses_stages = True

    def __init__(self, method: Method, ledger: Ledger) -> None:
        super().__init__(None, method.spec)
        self.method, self.ledger = method, ledger

    def begin(self, tokens: Tokens, stages: Sequence[Stage]) -> Tokens:
        counted = [
            Stage(stage.enter, [CountedBlock(b, self.ledger) for b in stage.blocks]) for stage in stages
        ]
        return self.method.begin(tokens, counted)

    def enter_stage(self, stage: Stage, tokens: Tokens) -> Tokens:
        if isinstance(stage.enter, LevitEntry):
            stage = stage._replace(enter=CountedEntry(stage.enter, self.ledger))
        return self.method.enter_stage(stage, tokens)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        return self.method.run_block(CountedBlock(block, self.ledger), tokens)

    def finish(self, tokens: Tokens) -> Tokens:
        return self.method.finish(tokens)


def both_products(qkv: QKV) -> int:
    """Return the multiply-accumulates of an attention's two matrix products."""
    heads, queries, width = qkv.q.shape[1:]
    return heads * queries * qkv.k.shape[2] * (width + qkv.v.shape[3])


def _layers(host: nn.Module, method: Method) -> list[nn.Module]:
    """Return the modules to watch: the host's layers, and the method's own modules whole."""
    own = [*method.children()]
    lists = [module for module in own if isinstance(module, nn.ModuleList)]
    own = [module for module in own if module not in lists] + [part for parts in lists for part in parts]
    return [module for module in host.modules() if isinstance(module, nn.Linear | nn.Conv2d)] + own


def _run_on_meta(model: nn.Module, image_shape: Sequence[int]) -> None:
    """Run one forward of shapes alone: no arithmetic, no copy of the weights."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    weight = next(model.parameters())
    images = torch.empty(1, *image_shape, device="meta", dtype=weight.dtype)
    with torch.no_grad():
        functional_call(model, {name: tensor.to("meta") for name, tensor in state.items()}, (images,))


def gmacs(model: nn.Module, image_shape: Sequence[int]) -> float:
    """Return GMACs of one image by formula: a block of T rows has 4 T D^2 + 2 T^2 D + 8 T D^2.

    What runs beside the blocks (embedding, predictors of a method, heads) is counted as it runs.

    Args:
        model: a host or a `ReducedViT`.
        image_shape: (channels, height, width).
    """
    host: nn.Module = model.model if isinstance(model, ReducedViT) else model
    method = model.method if isinstance(model, ReducedViT) else Dense(None, adapt(host).spec)
    ledger = Ledger()
    counting = ReducedViT(host, CountedMethod(method, ledger))
    counting.training = model.training  # its own flag; host and method keep theirs
    hooks = [hook for module in _layers(host, method) for hook in ledger.watch(module)]
    try:
        with ledger.counter:
            _run_on_meta(counting, image_shape)
    finally:
        for hook in hooks:
            hook.remove()
    return ledger.macs / 1e9


def gmacs_counted(model: nn.Module, image_shape: Sequence[int]) -> float:
    """Return GMACs of one image by `torch.utils.flop_counter` on the meta device; arguments as `gmacs`."""
    with FlopCounterMode(display=False) as counter:
        _run_on_meta(model, image_shape)
    return int(counter.get_total_flops()) / 2e9
