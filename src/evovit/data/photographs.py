"""Photographs of a folder as a model takes them, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from evovit.data.folder import walk
from evovit.data.pictures import as_rgb
from evovit.errors import EvoViTError, printable, shown
from evovit.runtime.files import as_path


def read_photographs(folder: str | Path, preprocessing: Mapping[str, Any], most: int) -> Tensor:
    """Return photographs below a folder, evenly spread over it, (N, 3, height, width).

    Args:
        folder: of images, in folders of their own or not.
        preprocessing: input_size, mean, std, interpolation, crop_pct and crop_mode, as timm names them.
        most: N at most; an image that cannot be read is left out.

    Raises:
        EvoViTError: no folder, or none of its images can be read.
    """
    place = as_path(folder, "the folder of images")
    if not place.is_dir():
        raise EvoViTError(f"There is no folder {shown(place)}; give one that holds images.")
    paths = [listed.place / name for listed in walk(place) for name in listed.images]
    asked = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    prepare: Any = create_transform(**{key: preprocessing[key] for key in asked})
    found, last = list[Tensor](), "it holds no image that Pillow reads"
    for path in paths[:: max(1, len(paths) // most)][:most]:
        try:
            with Image.open(path) as opened:
                found.append(prepare(as_rgb(opened)))
        except Exception as error:  # Pillow raises many kinds for damaged files
            last = f"{printable(path.name)}: {type(error).__name__}: {printable(error)}"
    if not found:
        raise EvoViTError(f"No image in {shown(place)} can be read ({last}); give a folder of images.")
    return torch.stack(found)
