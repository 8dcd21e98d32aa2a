"""A reduced model as a backbone for dense tasks: its maps, the pyramid of ViTDet, how old each cell is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import FeatureInfo
from torch import Tensor, nn

from evovit.backbones import adapt
from evovit.errors import EvoViTError, check_count, check_kind, listed, shown
from evovit.intermediates import Indices, check_restore, present_rows, taken
from evovit.model import ReducedViT

SCALES = (4.0, 2.0, 1.0, 0.5)


class FeatureNet(nn.Module):
    """A reduced model that returns its feature maps, as timm's models made with `features_only=True`.

    Attributes:
        feature_info: timm's; `feature_info.channels()` and `feature_info.reduction()` describe the maps.
    """

    def __init__(
        self, model: ReducedViT, out_indices: Indices, norm: bool, output_fmt: str, restore: str | None
    ) -> None:
        super().__init__()
        self.model = model
        self.numbers = taken(adapt(model.model).spec, out_indices)
        check_restore(model.method, restore, output_fmt)
        self.options: dict[str, Any] = {"norm": norm, "output_fmt": output_fmt, "restore": restore}
        told, spec = model.feature_info, adapt(model.model).spec
        places = [taken(spec, None).index(number) for number in self.numbers]
        self.out_indices = places
        self.feature_info = FeatureInfo(told, tuple(places))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps, (B, C, rows, columns) each or as asked, of images (B, channels, height, width)."""
        maps: list[Tensor] = self.model.forward_intermediates(
            images, self.out_indices, stop_early=True, intermediates_only=True, **self.options
        )
        return maps


def features(
    model: ReducedViT,
    out_indices: Indices = 3,
    *,
    norm: bool = False,
    output_fmt: str = "NCHW",
    restore: str | None = "auto",
    prune: bool = False,
) -> FeatureNet:
    """Turn a reduced model into a backbone for dense tasks, like timm's `features_only=True`.

    Args:
        model: what `reduce_tokens` returns; it is used as it is, not copied.
        out_indices: as `indices` of `ReducedViT.forward_intermediates`, where `restore` is explained too.
        prune: take the blocks that no map needs, and the head, out of the host for good. They are not run
            in either case; without them there are fewer weights.
    """
    check_kind("model", model, ReducedViT, "what reduce_tokens returns")
    net = FeatureNet(model, out_indices, norm, output_fmt, restore)
    if prune:
        model.prune_intermediate_layers(net.out_indices, prune_norm=not norm)
    return net


class SimplePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (Li et al., ECCV 2022, section 3): all levels from one map.

    Scale 4 is two deconvolutions, 2 is one, 1 the map itself, 1/2 max pooling; then a 1 x 1 and a 3 x 3
    convolution, each with a layer norm over channels. It has the interface of torchvision's detectors: it
    returns a dictionary of levels, the finest first, and has `out_channels`.

    Args:
        backbone: from `features`; the last of its maps is read.
        channels: of every level.
        scales: scales of the levels, some of 4, 2, 1 and 0.5.
    """

    def __init__(self, backbone: FeatureNet, channels: int = 256, scales: Sequence[float] = SCALES) -> None:
        super().__init__()
        check_kind("backbone", backbone, FeatureNet, "what evovit.features returns")
        check_count("channels", channels, 1, 65536)
        if backbone.options["output_fmt"] != "NCHW":
            raise EvoViTError("The backbone gives no maps; make it with output_fmt='NCHW'.")
        known = isinstance(scales, list | tuple) and all(
            type(s) in (int, float) and s in SCALES for s in scales
        )
        if not known or not scales or len(set(scales)) < len(scales):
            raise EvoViTError(f"scales is {shown(scales)}; list some of {listed(SCALES)}, each once.")
        self.backbone, self.out_channels = backbone, channels
        dim, stride = backbone.feature_info.channels()[-1], backbone.feature_info.reduction()[-1]
        self.scales = tuple(sorted(scales, reverse=True))
        self.strides = tuple(stride / scale for scale in self.scales)  # in pixels
        self.levels = nn.ModuleList(level(dim, scale, channels) for scale in self.scales)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the levels, (B, channels, rows * scale, columns * scale), under "0", "1", ..."""
        last = self.backbone(images)[-1]
        return OrderedDict((str(i), make(last)) for i, make in enumerate(self.levels))


def level(dim: int, scale: float, channels: int) -> nn.Sequential:
    """Return what makes one level of the pyramid from a map of `dim` channels."""
    layers: list[nn.Module] = []
    if scale == 4:
        middle = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        layers = [
            middle,
            LayerNorm2d(dim // 2),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2),
        ]
    elif scale == 2:
        layers = [nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)]
    elif scale == 0.5:
        layers = [nn.MaxPool2d(2, stride=2)]
    width = dim // int(scale) if scale > 1 else dim
    layers += [nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)]
    return nn.Sequential(*layers)


@torch.inference_mode()
def last_updates(model: ReducedViT, images: Tensor) -> Tensor:
    """Return the block that last computed each cell, (B, blocks, rows, columns) int64; -1: none has.

    A cell is computed where its token, or the token it was merged into, takes part in the block. A cell that
    waits is not, even if the method updates it from outside (Evo-ViT's fast update). The grid is the first
    block's.
    """
    check_kind("model", model, ReducedViT, "what reduce_tokens returns")
    trace, flat = model.run(images, record=True).trace, len(model.method.spec.depths) == 1
    newest, found = torch.full((images.shape[0], 1, *trace[0].grid), -1, device=images.device), []
    for number, tokens in enumerate(trace):
        grid = trace[0].grid if flat else tokens.grid
        part = (present_rows(model.method, tokens, grid) >= 0).reshape(-1, 1, *grid)
        part = nn.functional.interpolate(part.float(), size=trace[0].grid, mode="nearest") > 0.5
        newest = newest.masked_fill(part, number)
        found.append(newest)
    return torch.cat(found, dim=1)


def stale_share(
    model: ReducedViT, images: Tensor, indices: Indices = None, *, older_than: int = 1
) -> list[float]:
    """Return, for each chosen block, the share of cells not computed in the last `older_than` blocks.

    Args:
        model: in evaluation mode.
        images: (B, channels, height, width); the shares are means over them.
        indices: as of `ReducedViT.forward_intermediates`.
        older_than: 1: not computed in the chosen block itself; 2: nor in the block before it.
    """
    newest, depth = last_updates(model, images), adapt(model.model).spec.depth
    check_count("older_than", older_than, 1, depth)
    numbers = taken(adapt(model.model).spec, indices)
    return [(newest[:, n] < max(n - older_than + 1, 0)).float().mean().item() for n in numbers]
