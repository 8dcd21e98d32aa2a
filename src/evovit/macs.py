"""Multiply-accumulates of one image, as PyTorch counts them: every matrix product and convolution.

Norms, softmax and selection do not count. 1 GMAC is 1e9 multiply-accumulates; most papers call them "FLOPs".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from evovit.backbones.base import evaluating, expect_module
from evovit.errors import EvoViTError, check_count, in_one_line, shown

MOST = 100_000  # pixels of a side


def gmacs(model: nn.Module, image_shape: Sequence[int]) -> float:
    """Return GMACs of one image in evaluation: no arithmetic is done, no weight copied.

    Args:
        model: a host, a `ReducedViT` or any other network; its weights may lie anywhere.
        image_shape: (channels, height, width).
    """
    expect_module(model, "model")
    if not isinstance(image_shape, Sequence) or isinstance(image_shape, str) or len(image_shape) != 3:
        raise EvoViTError(f"image_shape is {shown(image_shape)}; give (channels, height, width).")
    for side in image_shape:
        check_count("image_shape", side, 1, MOST)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    on_meta = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    kind = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    images = torch.empty(1, *image_shape, device="meta", dtype=kind)
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            functional_call(model, on_meta, (images,))
        except (RuntimeError, AssertionError, TypeError, ValueError, AttributeError) as error:
            raise EvoViTError(
                f"{type(model).__name__} does not run on images of {tuple(image_shape)}, so its work cannot "
                f"be counted ({in_one_line(error)})."
            ) from error
    return int(counter.get_total_flops()) / 2e9
