"""transformers' SigLIP2 vision model (NaFlex): it takes images cut into patches, each with its own grid.

Images of one grid are run as such. Where grids differ, or patches are padded, a batch is run as rows of
patches that know their places, and the padding is hidden, as in the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evovit.backbones import adapter
from evovit.backbones.base import Backbone, Road
from evovit.backbones.hf_blocks import full
from evovit.backbones.hf_clip import HFPadded
from evovit.errors import EvoViTError, shown
from evovit.tokens import Tokens


@adapter(*full("siglip2.Siglip2VisionModel"))
class HFSiglip2(HFPadded):
    """View of `Siglip2VisionModel`; positions are resized to the grid."""

    refused = ("attention_mask",)
    shapes: Tensor | None = None  # (B, 2) rows and columns of each image; None: those of the images
    masked = False  # whether the caller gave a mask, which a head around the host reads too

    def image_size(self) -> tuple[int, int]:
        side = self.model.embeddings.position_embedding_size * self.config.patch_size
        return side, side

    def inputs(self, images: Tensor) -> dict[str, Any]:
        """Return images (B, C, height, width), or (B, N, patch * patch * C), as the host's arguments."""
        if images.ndim != 4:
            return {"pixel_values": images}
        (rows, columns), size = self.grid_of(images), self.config.patch_size
        batch, channels = images.shape[:2]
        cut = images[:, :, : rows * size, : columns * size]
        cut = cut.reshape(batch, channels, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1)
        cut = cut.reshape(batch, rows * columns, size * size * channels)
        place = "cpu" if images.is_meta else images.device  # the host reads their values
        shapes = torch.tensor([[rows, columns]], device=place).expand(batch, 2)
        return {"pixel_values": cut, "spatial_shapes": shapes, "pixel_attention_mask": None}

    def laid_out(self, patches: Tensor, shapes: Any, mask: Any) -> Tensor:
        """Return patches (B, N, patch * patch * C) as images of their grid, or else of one row each."""
        size, channels = self.config.patch_size, self.config.num_channels
        self.expect_patches(patches, shapes, mask)
        self.masked = mask is not None
        if mask is not None:
            self.hide(mask)
        grids, count = {tuple(grid) for grid in shapes.tolist()}, patches.shape[1]
        rows, columns = next(iter(grids))
        if len(grids) > 1 or self.mask is not None or rows * columns != count:
            rows, columns, self.shapes = 1, count, shapes
        cut = patches.reshape(-1, rows, columns, size, size, channels)
        return cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * size, columns * size)

    def expect_patches(self, patches: Tensor, shapes: Any, mask: Any) -> None:
        """Raise `EvoViTError` unless patches, the shapes of their grids and their mask fit together."""
        width = self.config.num_channels * self.config.patch_size**2
        what = None
        if patches.ndim != 3 or patches.shape[2] != width or 0 in patches.shape:
            what = f"pixel_values is a tensor {tuple(patches.shape)}; allowed is (B, N, {width})"
        elif not isinstance(shapes, Tensor) or shapes.shape != (patches.shape[0], 2):
            what = f"spatial_shapes is {shown(shapes)}; allowed is a tensor ({patches.shape[0]}, 2)"
        elif (shapes < 1).any() or (shapes.prod(-1) > patches.shape[1]).any():
            what = f"spatial_shapes is {shown(shapes.tolist())}; an image has 1 to {patches.shape[1]} patches"
        elif mask is not None and (not isinstance(mask, Tensor) or mask.shape != patches.shape[:2]):
            what = f"pixel_attention_mask is {shown(mask)}; allowed is a tensor {tuple(patches.shape[:2])}"
        if what is not None:
            raise EvoViTError(f"{what}; give what the host's own processor returns.")

    def embeddings(self, images: Tensor) -> Tensor:
        arguments = self.inputs(images)
        shapes = arguments["spatial_shapes"] if self.shapes is None else self.shapes
        return self.model.embeddings(arguments["pixel_values"], shapes)  # type: ignore[no-any-return]

    def pooled(self, features: Tensor) -> Tensor | None:
        return self.model.head(features, self.mask) if self.model.use_head else None

    def answer_within(self, whole: Backbone, road: Road, images: Tensor, **arguments: Any) -> Any:
        shapes, mask = (arguments.pop(name, None) for name in ("spatial_shapes", "pixel_attention_mask"))
        if isinstance(images, Tensor) and images.ndim != 4:
            images = self.laid_out(images, shapes, mask)
        return super().answer_within(whole, road, images, **arguments)

    def expect_apart(self, whole: Backbone, road: Road, tokens: Tokens) -> None:
        super().expect_apart(whole, road, tokens)
        if self.masked and whole is not self and road.method.finish(tokens).num_patches != tokens.num_cells:
            raise EvoViTError(
                f"The host reads pixel_attention_mask beside a token for each patch, and "
                f"{type(road.method).__name__} as configured drops tokens; leave the mask out where nothing "
                "is padded, or choose a method that keeps all of them."
            )
