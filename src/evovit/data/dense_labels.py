"""Dense labels from files: what a random crop shows of an image's label map (Jiang et al., NeurIPS 2021).

A file `<class folder>/<name of the image>.pt` holds the scores and ids of the best classes in each cell of
the whole image, (2, 5, rows, columns) half precision, as TokenLabeling's annotator stores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align  # type: ignore[import-untyped]

from evovit.errors import EvoViTError, shown
from evovit.runtime.files import check_plain, read_tensors
from evovit.runtime.seeds import seeded


@dataclass(frozen=True)
class DenseLabels:
    """Labels of an image and its patches, as shares of the classes.

    Args:
        folder: of the files.
        grid: cells of a side of the grid of patches.
        smoothing: share spread over all classes.
        crop: timm's random crop, the first step of the augmentation, which draws before all others do.
        flip: chance of the horizontal flip, the second step.
    """

    folder: Path
    grid: int
    num_classes: int
    smoothing: float
    crop: Any
    flip: float

    def __call__(self, place: Sequence[object], name: str, image: Image.Image, label: int) -> Tensor:
        """Return (1 + N, classes) float16: the crop as a whole, then its cells in raster order.

        Without a file all have the image's label.

        Args:
            place: the seeds under which the image is augmented.
            name: path of the image.
        """
        path = self.path_of(name)
        if not path.is_file():
            shares = torch.zeros(1 + self.grid**2, self.num_classes)
            shares[:, label] = 1
        else:
            label_map = read_label_map(path, self.num_classes)
            box, flipped = self.drawn(place, image)
            shares = crop_label_map(label_map, box, self.grid, flipped).softmax(1)
        return (shares * (1 - self.smoothing) + self.smoothing / self.num_classes).half()

    def path_of(self, name: str) -> Path:
        """Return where the labels of an image of this path are, if it has any."""
        return self.folder / Path(name).parent.name / f"{Path(name).stem}.pt"

    def drawn(self, place: Sequence[object], image: Image.Image) -> tuple[tuple[float, ...], bool]:
        """Return left, top, right, bottom of the crop as shares of the image, and whether it is flipped."""
        with seeded(*place):
            top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
            flipped = self.flip > 0 and bool(torch.rand(1) < self.flip)
        across, down = image.size
        return (left / across, top / down, (left + width) / across, (top + height) / down), flipped


def read_label_map(path: Path, num_classes: int) -> Tensor:
    """Return the scores of a file, (classes, rows, columns) float32; 0 for classes that it does not name."""
    stored, what = read_tensors(path, "dense labels"), shown(path)
    if not isinstance(stored, Tensor) or stored.ndim != 4 or len(stored) != 2 or 0 in stored.shape:
        raise EvoViTError(f"{what} holds no scores and class ids, (2, best, rows, columns).")
    check_plain(stored, what)
    if stored.is_complex() or not stored.isfinite().all() or (stored[1] % 1 != 0).any():
        raise EvoViTError(f"{what} holds no finite scores and whole class ids; write it again.")
    scores, classes = stored[0].float(), stored[1].long()
    wrong = classes[(classes < 0) | (classes >= num_classes)]
    if len(wrong):
        raise EvoViTError(f"{what} names class {wrong[0]}, but the data has {num_classes} classes.")
    return torch.zeros(num_classes, *scores.shape[1:]).scatter_(0, classes, scores)


def crop_label_map(label_map: Tensor, box: Sequence[float], grid: int, flipped: bool) -> Tensor:
    """Return scores (1 + N, classes) of a box as a whole and of its grid x grid cells (RoIAlign).

    Args:
        label_map: (classes, rows, columns).
        box: left, top, right, bottom as shares of the image.
    """
    rows, columns = label_map.shape[1:]
    corners = torch.tensor([[box[0] * columns, box[1] * rows, box[2] * columns, box[3] * rows]])
    whole, cells = (roi_align(label_map[None], [corners], side, aligned=True)[0] for side in (1, grid))
    cells = cells.flip(2) if flipped else cells
    return torch.cat((whole.flatten(1), cells.flatten(1)), dim=1).T
