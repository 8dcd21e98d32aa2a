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
from evovit.errors import EvoViTError, check_count, check_kind, in_one_line, shown

MOST_PIXELS = 1_000_000  # of an image's side


def gmacs(model: nn.Module, image_shape: Sequence[int]) -> float:
    """Return GMACs of one image in evaluation: no arithmetic is done, no weight copied.

    Args:
        model: a host, a `ReducedViT` or any other network; its weights may be on any device.
        image_shape: (channels, height, width).

    Raises:
        EvoViTError: not a network, an invalid shape, or a network that does not run on it.
    """
    check_kind("model", model, nn.Module, "a host, a reduced model or another network")
    shape = image_shape if isinstance(image_shape, Sequence) and not isinstance(image_shape, str) else ()
    if len(shape) != 3:
        raise EvoViTError(f"image_shape is {shown(image_shape)}; give (channels, height, width).")
    sides = [check_count("a side in image_shape", side, 1, MOST_PIXELS) for side in shape]
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    on_meta = {name: tensor.detach().to("meta") for name, tensor in state.items()}
    kind = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    images = torch.empty(1, *sides, device="meta", dtype=kind)
    try:
        with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, on_meta, (images,))
    except EvoViTError:
        raise
    except Exception as error:  # a stranger's forward raises what it likes
        raise EvoViTError(
            f"The work of this {type(model).__name__} on an image of {tuple(sides)} cannot be counted "
            f"({type(error).__name__}: {in_one_line(error)}); give the shape of its images."
        ) from error
    return int(counter.get_total_flops()) / 2e9
