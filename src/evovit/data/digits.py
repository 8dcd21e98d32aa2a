"""Digit scenes: real handwritten digits somewhere on a noisy canvas, with the digit's box and mask known.

The digits are scikit-learn's `load_digits` (1797 real 8 x 8 images, from UCI's "Optical Recognition of
Handwritten Digits"), split by source image before anything is drawn. A scene holds one whole digit, the
label, and fragments of other digits of the same split: few patches matter, and bright strokes alone do not
show which.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from evovit.errors import EvoViTError, check_choice, check_count

Split = Literal["train", "test"]

MEAN, STD = 0.5, 0.25  # of the normalisation: image = (colour in [0, 1] - MEAN) / STD
NUM_CLASSES = 10
SOURCE_SIZE = 8  # pixels a side of a source digit
FRAGMENT_SIZE = 3  # source pixels a side of a fragment
TEST_DIGITS = 500  # of 1797 source digits
SMALLEST_CANVAS = 24  # pixels
CHUNK = 256  # scenes drawn at once, so that they stay in the processor's cache


class Digits(NamedTuple):
    """Source digits of one split."""

    ink: Tensor  # (n, 8, 8) float32 in [0, 1]
    labels: Tensor  # (n,) int64
    source: Tensor  # (n,) int64, row in scikit-learn's `load_digits`


class Scenes(NamedTuple):
    """Scenes with what is known about them."""

    images: Tensor  # (n, 3, size, size) float32, normalised
    labels: Tensor  # (n,) int64
    boxes: Tensor  # (n, 4) float32, left, top, right, bottom of the digit's ink in pixels
    source: Tensor  # (n,) int64, row of the digit in scikit-learn's `load_digits`
    masks: Tensor  # (n, size, size) bool, pixels that the digit's ink covers by half or more


def colours(images: Tensor) -> Tensor:
    """Undo the normalisation of images of any shape: colours in [0, 1]."""
    return (images * STD + MEAN).clamp(0, 1)


@cache
def digits(split: Split) -> Digits:
    """Return the source digits of a split; the two splits share no source image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    rows = order[:TEST_DIGITS] if split == "test" else order[TEST_DIGITS:]
    ink = torch.from_numpy(bunch.images).float()[rows] / 16  # the source counts ink in 0 .. 16
    return Digits(ink, torch.from_numpy(bunch.target).long()[rows], rows)


def digit_scenes(
    split: Split, num_scenes: int, *, size: int = 48, num_fragments: int = 4, seed: int = 0
) -> Scenes:
    """Draw scenes; equal arguments give equal scenes.

    Args:
        split: whose source digits are used, for the digit and the fragments alike.
        num_scenes: scenes to draw.
        size: side of the square canvas in pixels, at least 24.
        num_fragments: fragments of other digits on each canvas.
        seed: of all random choices; another seed gives other scenes.
    """
    check_choice("split", split, get_args(Split))
    num_scenes = check_count("num_scenes", num_scenes, 1, 100_000_000)
    size = check_count("size", size, SMALLEST_CANVAS, 4096, "pixels")
    num_fragments = check_count("num_fragments", num_fragments, 0, 1000)
    seed = check_count("seed", seed, 0, 2**63 - 1)
    source = digits(split)
    rng = torch.Generator().manual_seed(seed)
    try:  # all of the memory before a long while of drawing
        scenes = Scenes(
            torch.empty(num_scenes, 3, size, size),
            torch.empty(num_scenes, dtype=torch.int64),
            torch.empty(num_scenes, 4),
            torch.empty(num_scenes, dtype=torch.int64),
            torch.empty(num_scenes, size, size, dtype=torch.bool),
        )
    except RuntimeError as error:
        raise EvoViTError(
            f"{num_scenes} scenes of {size} x {size} pixels do not fit into memory; draw fewer."
        ) from error
    for start in range(0, num_scenes, CHUNK):
        part = _draw(source, min(CHUNK, num_scenes - start), size, num_fragments, rng)
        for whole, drawn in zip(scenes, part, strict=True):
            whole[start : start + CHUNK] = drawn
    return scenes


def _draw(source: Digits, num: int, size: int, num_fragments: int, rng: torch.Generator) -> Scenes:
    """Draw `num` scenes: canvas, fragments, the digit on top, noise."""
    picked = torch.randint(source.ink.shape[0], (num,), generator=rng)
    side = _uniform(rng, num, low=0.42 * size, high=0.60 * size)
    corner = _uniform(rng, num, 2) * (size - side)[:, None]  # left, top
    canvas = _uniform(rng, num, 3, 1, 1, low=0.0, high=0.3).expand(-1, -1, size, size)
    for _ in range(num_fragments):
        canvas = _paint(canvas, _fragment(source, picked, corner + side[:, None] / 2, size, rng), rng)
    ink = _enlarge(source.ink[picked], corner, side, size)
    canvas = _paint(canvas, ink, rng)
    canvas = canvas + 0.06 * torch.randn(canvas.shape, generator=rng)
    boxes = _ink_boxes(source.ink[picked], corner, side)
    images = (canvas - MEAN) / STD
    return Scenes(images, source.labels[picked], boxes, source.source[picked], ink >= 0.5)


def _fragment(source: Digits, digit: Tensor, centre: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Draw a piece of another than `digit` (n,), at that of three places farthest from its centre (n, 2)."""
    num, num_digits = digit.shape[0], source.ink.shape[0]
    other = (digit + torch.randint(1, num_digits, (num,), generator=rng)) % num_digits
    first = torch.randint(1, SOURCE_SIZE - FRAGMENT_SIZE, (num, 2, 1), generator=rng)
    rows, columns = (first + torch.arange(FRAGMENT_SIZE)).unbind(1)  # (n, k) each
    ink = source.ink[other[:, None, None], rows[:, :, None], columns[:, None, :]]  # (n, k, k)
    side = _uniform(rng, num, low=0.16 * size, high=0.22 * size)
    corners = _uniform(rng, num, 3, 2) * (size - side)[:, None, None]
    distance = (corners + side[:, None, None] / 2 - centre[:, None]).norm(dim=2)
    return _enlarge(ink, corners[torch.arange(num), distance.argmax(1)], side, size)


def _uniform(rng: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)


def _enlarge(ink: Tensor, corner: Tensor, side: Tensor, size: int) -> Tensor:
    """Draw (n, k, k) ink bilinearly onto (n, size, size): a small product for rows, one for columns."""
    k = ink.shape[1]

    def weights(first: Tensor) -> Tensor:  # (n, size, k), how much canvas pixel i takes of source pixel j
        pixel = (torch.arange(size) + 0.5 - first[:, None]) * k / side[:, None] - 0.5
        return (1 - (pixel[:, :, None] - torch.arange(k)).abs()).clamp(min=0)

    left, top = corner.unbind(1)
    return weights(top) @ ink @ weights(left).transpose(1, 2)


def _paint(canvas: Tensor, ink: Tensor, rng: torch.Generator) -> Tensor:
    """Lay (n, size, size) ink, in one random bright colour a scene, over the (n, 3, size, size) canvas."""
    colour = _uniform(rng, canvas.shape[0], 3, 1, 1, low=0.6, high=1.0)
    return torch.lerp(canvas, colour, ink[:, None])


def _ink_boxes(ink: Tensor, corner: Tensor, side: Tensor) -> Tensor:
    """Return (n, 4) left, top, right, bottom in pixels of the source pixels that hold ink."""
    pixel = side / SOURCE_SIZE

    def edges(first: Tensor, profile: Tensor) -> tuple[Tensor, Tensor]:
        inked = (profile > 0).float()
        before, after = inked.argmax(1), inked.flip(1).argmax(1)  # empty source pixels on either side
        return first + before * pixel, first + (SOURCE_SIZE - after) * pixel

    (left, right), (top, bottom) = edges(corner[:, 0], ink.amax(1)), edges(corner[:, 1], ink.amax(2))
    return torch.stack((left, top, right, bottom), 1)
