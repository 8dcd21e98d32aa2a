"""The image size that the positions of an official checkpoint were trained for."""

from __future__ import annotations

from math import isqrt

from evovit.errors import EvoViTError


def checked_size(
    patches: int, patch: tuple[int, int], img_size: int | tuple[int, int] | None
) -> tuple[int, int]:
    """Return (height, width) in pixels: `img_size`, or that of a square image.

    Args:
        patches: positions of the checkpoint, without prefix tokens.
        patch: (height, width) of a patch in pixels.

    Raises:
        EvoViTError: `img_size` has another number of patches.
    """
    size = (isqrt(patches) * patch[0], isqrt(patches) * patch[1]) if img_size is None else img_size
    height, width = (size, size) if isinstance(size, int) else size
    found = (height // patch[0]) * (width // patch[1])
    if found != patches:
        raise EvoViTError(
            f"img_size {height} x {width} has {found} patches, but the checkpoint has {patches} positions; "
            "leave img_size out for square images."
        )
    return height, width
