"""Multiply-accumulates of one image, as PyTorch counts them: every matrix product and convolution.

Norms, softmax and selection do not count. 1 GMAC is 1e9 multiply-accumulates; most papers call them "FLOPs".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from evovit.backbones.base import evaluating


def gmacs(model: nn.Module, image_shape: Sequence[int]) -> float:
    """Return GMACs of one image in evaluation: no arithmetic is done, no weight copied.

    Args:
        model: a host, a `ReducedViT` or any other network; its weights may lie anywhere.
        image_shape: (channels, height, width).
    """
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    on_meta = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    kind = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    images = torch.empty(1, *image_shape, device="meta", dtype=kind)
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(model, on_meta, (images,))
    return int(counter.get_total_flops()) / 2e9
