"""transformers' SigLIP2 vision model: it takes images cut into patches, each with the shape of its grid.

Supported where every image of a batch has the same grid and none is padded, as at a fixed size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evovit.backbones import adapter
from evovit.backbones.base import Backbone, Road
from evovit.backbones.hf_blocks import full
from evovit.backbones.hf_clip import HFSiglip
from evovit.errors import EvoViTError


@adapter(*full("siglip2.Siglip2VisionModel"))
class HFSiglip2(HFSiglip):
    """View of `Siglip2VisionModel`; positions are resized to the grid."""

    fits_any_size, interpolates = True, False

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
        shapes = torch.tensor([[rows, columns]], device=images.device).expand(batch, 2)
        mask = torch.ones(cut.shape[:2], dtype=torch.int32, device=images.device)
        return {"pixel_values": cut, "spatial_shapes": shapes, "pixel_attention_mask": mask}

    def whole_images(self, patches: Tensor, shapes: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return images (B, C, height, width) from patches; raises `EvoViTError` where they are padded."""
        grids = set() if shapes is None else {tuple(grid) for grid in shapes.tolist()}
        padded = mask is not None and not bool(mask.bool().all())
        if padded or len(grids) != 1 or patches.ndim != 3:
            raise EvoViTError(
                f"The batch has {len(grids)} grids{' and padding' if padded else ''}, and a reduced "
                f"{type(self.model).__name__} takes patches of one grid without padding; give images of one "
                "shape together, and the processor max_num_patches = their rows * columns."
            )
        (rows, columns), size = grids.pop(), self.config.patch_size
        cut = patches.reshape(-1, rows, columns, size, size, self.config.num_channels)
        return cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, cut.shape[-1], rows * size, columns * size)

    def embeddings(self, images: Tensor) -> Tensor:
        arguments = self.inputs(images)
        return self.model.embeddings(arguments["pixel_values"], arguments["spatial_shapes"])  # type: ignore[no-any-return]

    def answer_within(self, whole: Backbone, road: Road, images: Tensor, **arguments: Any) -> Any:
        if images.ndim != 4:
            shapes, mask = (arguments.pop(name, None) for name in ("spatial_shapes", "pixel_attention_mask"))
            images = self.whole_images(images, shapes, mask)
        return super().answer_within(whole, road, images, **arguments)
