"""Multiply-accumulates of one image, twice: by formula from the token counts, and by PyTorch's counter.

Patch embedding, projections, attention and classifier count; norms, softmax, scores, selection and attention
pooling do not (methods' tables count the same way). 1 GMAC is 1e9 multiply-accumulates; most papers call them
"FLOPs".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from evovit.backbones import Block, Stage, adapt
from evovit.backbones.base import matrix_entries
from evovit.methods.base import Method
from evovit.model import ReducedViT
from evovit.tokens import QKV, Tokens


class CountedBlock(Block):
    """A block view that notes the multiply-accumulates of each call."""

    def __init__(self, block: Block, notes: list[int]) -> None:
        self.block, self.number, self.notes = block, block.number, notes

    def qkv(self, tokens: Tokens) -> QKV:
        self.notes.append(tokens.x.shape[1] * self.weights()[0])
        return self.block.qkv(tokens)

    def attention(self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None) -> Tokens:
        heads, queries, width = qkv.q.shape[1:]
        both_products = 2 * heads * width * queries * qkv.k.shape[2]
        self.notes.append(tokens.x.shape[1] * self.weights()[1] + both_products)
        return self.block.attention(tokens, qkv, bias)

    def ffn(self, tokens: Tokens) -> Tokens:
        self.notes.append(tokens.x.shape[1] * self.weights()[2])
        return self.block.ffn(tokens)

    def weights(self) -> tuple[int, int, int]:
        return self.block.weights()


class CountedMethod(Method):
    """A method (None: dense) that runs on counted blocks."""

    needs_class_token = False

    def __init__(self, method: Method | None, model: nn.Module) -> None:
        super().__init__(None, adapt(model).spec)
        self.method, self.notes, self.num_patches = method, list[int](), 0

    def begin(self, tokens: Tokens, stages: Sequence[Stage]) -> Tokens:
        self.num_patches = tokens.num_patches
        counted = [
            Stage(stage.enter, [CountedBlock(b, self.notes) for b in stage.blocks]) for stage in stages
        ]
        return self.method.begin(tokens, counted) if self.method else tokens

    def enter_stage(self, stage: Stage, tokens: Tokens) -> Tokens:
        return self.method.enter_stage(stage, tokens) if self.method else super().enter_stage(stage, tokens)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        counted = CountedBlock(block, self.notes)
        return self.method.run_block(counted, tokens) if self.method else counted(tokens)

    def finish(self, tokens: Tokens) -> Tokens:
        return self.method.finish(tokens) if self.method else tokens


def _run_on_meta(model: nn.Module, image_shape: Sequence[int]) -> None:
    """Run one forward of shapes alone: no arithmetic, no copy of the weights."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    weight = next(model.parameters())
    images = torch.empty(1, *image_shape, device="meta", dtype=weight.dtype)
    with torch.no_grad():
        functional_call(model, {name: tensor.to("meta") for name, tensor in state.items()}, (images,))


def gmacs(model: nn.Module, image_shape: Sequence[int]) -> float:
    """Return GMACs of one image by formula: a block of T rows has 4 T D^2 + 2 T^2 D + 8 T D^2.

    The patch embedding is taken as one matrix per patch; a host with a finer convolutional stem needs
    `gmacs_counted`.

    Args:
        model: a host or a `ReducedViT`.
        image_shape: (channels, height, width).
    """
    host = model.model if isinstance(model, ReducedViT) else model
    counted = CountedMethod(model.method if isinstance(model, ReducedViT) else None, host)
    _run_on_meta(ReducedViT(host, counted), image_shape)
    embed = sum(p.numel() for p in host.get_submodule("patch_embed").parameters() if p.ndim in (2, 4))
    classifiers = host.get_classifier()  # type: ignore[operator]
    heads = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    macs = counted.num_patches * embed + sum(counted.notes) + sum(matrix_entries(head) for head in heads)
    return float(macs) / 1e9


def gmacs_counted(model: nn.Module, image_shape: Sequence[int]) -> float:
    """Return GMACs of one image by `torch.utils.flop_counter` on the meta device; arguments as `gmacs`."""
    with FlopCounterMode(display=False) as counter:
        _run_on_meta(model, image_shape)
    return int(counter.get_total_flops()) / 2e9
