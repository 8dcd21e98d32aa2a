"""Which patches a method keeps: as masks, as numbers beside a known box, and as a picture per block."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evovit.errors import check_kind, printable
from evovit.model import ReducedViT
from evovit.tokens import Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIM = 0.25  # brightness left of a patch that is not kept
GREY = 217  # of a patch without a value
LINE, LONGEST = 24, 72  # characters of a name in a picture: of a line, of all


class OnBox(NamedTuple):
    """How the kept patches of one block lie to the boxes; each a share, 0 to 1, mean over images."""

    covered: float  # patches on the box that are kept; by chance this is `kept`
    kept: float  # patches kept
    on_box: float  # kept patches that lie on the box; by chance this is `box`
    box: float  # patches that lie on the box


@torch.inference_mode()
def kept_patches(model: ReducedViT, images: Tensor) -> Tensor:
    """Return (B, blocks, rows, columns) bool, True where a patch token takes part in a block.

    The grid is the first block's; where a later one is coarser, a token stands for all cells it covers.

    Args:
        model: in evaluation mode.
        images: (B, channels, height, width).
    """
    check_kind("model", model, ReducedViT, "what reduce_tokens returns")
    trace = model.run(images, record=True).trace
    return torch.stack([on_cells(kept_cells(tokens), trace[0].grid) for tokens in trace], 1)


def kept_cells(tokens: Tokens) -> Tensor:
    """Return (B, rows, columns) bool of the tokens' own grid, True where a patch token has its place."""
    rows, columns = tokens.grid
    spare = rows * columns  # one more column, where tokens without a place go
    placed = tokens.index >= 0
    kept = tokens.index.new_zeros(tokens.index.shape[0], spare + 1)
    if tokens.num_patches == spare and placed.all():  # also after pooling: its index is of the finer grid
        kept = kept + 1
    else:
        kept = kept.scatter(1, tokens.index.where(placed, spare), 1)
    return kept[:, :-1].reshape(-1, rows, columns).bool()


def on_cells(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return masks (B, rows, columns) on a finer grid: all cells that a cell covers are as it is."""
    return torch.nn.functional.interpolate(masks[:, None].float(), size=grid, mode="nearest")[:, 0].bool()


def patches_on_box(boxes: Tensor, grid: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Return (B, rows, columns) bool, True where the centre of a patch lies in the box.

    Args:
        boxes: (B, 4) left, top, right, bottom in pixels.
        grid: (rows, columns) of patches.
        image_size: (height, width) in pixels.
    """
    left, top, right, bottom = (side[:, None] for side in boxes.unbind(1))
    y = (torch.arange(grid[0], device=boxes.device) + 0.5) * image_size[0] / grid[0]
    x = (torch.arange(grid[1], device=boxes.device) + 0.5) * image_size[1] / grid[1]
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]


def kept_on_box(kept: Tensor, on_box: Tensor) -> list[OnBox]:
    """Compare kept patches with the patches on the box, block by block.

    Args:
        kept: (B, blocks, rows, columns) bool, from `kept_patches`.
        on_box: (B, rows, columns) bool, from `patches_on_box`; images without any are left out.
    """
    seen = on_box.flatten(1).any(1)
    kept, box = kept[seen].flatten(2).float(), on_box[seen].flatten(1)[:, None].float()
    both = (kept * box).sum(2)  # (B, blocks)
    shares = (both / box.sum(2), kept.mean(2), both / kept.sum(2), box.mean(2).expand_as(both))
    columns = [share.mean(0).tolist() for share in shares]
    return [OnBox(*values) for values in zip(*columns, strict=True)]


def shade(image: Tensor, kept: Tensor) -> Tensor:
    """Darken the patches of (3, height, width) colours in [0, 1] that are not kept, (rows, columns) bool."""
    light = DIM + (1 - DIM) * kept.float()
    mask = torch.nn.functional.interpolate(light[None, None], size=image.shape[1:], mode="nearest")[0]
    return image * mask


def several_classes(labels: Tensor, count: int) -> list[int]:
    """Return the positions of `count` images, of as many classes as possible; earlier ones first.

    Args:
        labels: (n,) int64; all positions are returned where n is below `count`.
    """
    seen: dict[int, int] = {}
    turns = []
    for position, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], position))
    return [position for _, position in sorted(turns)[:count]]


def plain(name: str, line: int = LINE) -> str:
    """Return a name as a picture's text: in short lines, cut where it is long, a dollar sign no formula."""
    text = printable(name)
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    return textwrap.fill(text, line).replace("$", r"\$")


def draw_kept(
    images: Tensor, kept: Tensor, boxes: Tensor | None = None, titles: list[str] | None = None
) -> Figure:
    """Draw a row per image: the image, then what each block keeps, the other patches darkened.

    Args:
        images: (B, 3, height, width) colours in [0, 1].
        kept: (B, blocks, rows, columns) bool, from `kept_patches`.
        boxes: (B, 4) left, top, right, bottom in pixels, outlined in every picture.
        titles: one per image.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    images, kept = images.cpu(), kept.cpu()
    num_images, num_blocks = kept.shape[:2]
    figure = Figure(figsize=(1.2 * (num_blocks + 1), 1.32 * num_images), layout="constrained")
    panels = figure.subplots(num_images, num_blocks + 1, squeeze=False)
    for i in range(num_images):
        pictures = [images[i], *(shade(images[i], kept[i, block]) for block in range(num_blocks))]
        for block, (panel, picture) in enumerate(zip(panels[i], pictures, strict=True), start=-1):
            panel.imshow(picture.permute(1, 2, 0).numpy())
            panel.set_axis_off()
            if i == 0 and block >= 0:
                panel.set_title(f"block {block}", fontsize=8)
            if block < 0 and titles is not None:
                panel.set_title(plain(titles[i]), fontsize=8)
            if boxes is not None:
                left, top, right, bottom = boxes[i].tolist()
                corner = (left - 0.5, top - 0.5)  # imshow centres pixel 0 on 0
                panel.add_patch(
                    Rectangle(corner, right - left, bottom - top, fill=False, edgecolor="red", linewidth=0.8)
                )
    return figure


def draw_side_by_side(images: Tensor, kept: dict[str, Tensor], titles: Sequence[str]) -> Figure:
    """Draw a row per image: the image, then what each of several models keeps, the other patches darkened.

    Args:
        images: (B, 3, height, width) colours in [0, 1].
        kept: by the model's name, (B, rows, columns) bool; one that keeps no place is not darkened.
        titles: one per image.
    """
    from matplotlib.figure import Figure

    images, columns = images.cpu(), len(kept) + 1
    figure = Figure(figsize=(1.5 * columns, 1.6 * images.shape[0]), layout="constrained")
    panels = figure.subplots(images.shape[0], columns, squeeze=False)
    for i, image in enumerate(images):
        masks = [(name, mask[i].cpu()) for name, mask in kept.items()]
        shaded = [(name, shade(image, mask) if mask.any() else image) for name, mask in masks]
        for panel, (name, shown) in zip(panels[i], [(titles[i], image), *shaded], strict=True):
            panel.imshow(shown.permute(1, 2, 0).numpy())
            panel.set_axis_off()
            if i == 0 or panel is panels[i][0]:
                panel.set_title(plain(name), fontsize=8)
    return figure


def overlay(picture: Image.Image, kept: Tensor, groups: Tensor | None = None) -> Image.Image:
    """Return a picture of what one block keeps: patches that take no part are dark and grey.

    Args:
        picture: RGB, what the model sees.
        kept: (rows, columns) bool; where none is kept, no token has a place and nothing is darkened.
        groups: (rows, columns) int64, equal numbers are one token, -1: none; each group of several patches
            gets its mean colour and an outline in a colour of its own. `kept` then does not matter.
    """
    colours = numpy.asarray(picture, dtype=numpy.float32)
    if groups is None:
        return _as_picture(_darkened(colours, _per_pixel(kept, picture)) if kept.any() else colours)
    cells = _per_pixel(groups, picture)
    names, label = numpy.unique(cells, return_inverse=True)
    label = label.reshape(cells.shape)
    members = numpy.array([int((groups == name).sum()) for name in names.tolist()])
    pixels = numpy.bincount(label.ravel())
    means = numpy.stack(
        [numpy.bincount(label.ravel(), colours[..., part].ravel()) / pixels for part in range(3)], 1
    )
    several = (members > 1)[label][..., None]
    drawn = numpy.where(several, means[label], colours)
    drawn = _darkened(drawn, cells >= 0)
    width = max(1, max(picture.size) // 300)
    edge = _edges(label, width) & (several[..., 0] | _edges(several[..., 0], width))
    drawn[edge] = numpy.array([_hue(name) for name in names.tolist()])[label][edge]
    return _as_picture(drawn)


def heat(picture: Image.Image, values: Tensor) -> Image.Image:
    """Return a map over a picture, dark to bright up to the map's own largest value; NaN is grey.

    Args:
        values: (rows, columns) float.
    """
    from matplotlib import colormaps

    known = values[~values.isnan()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    shares = _per_pixel((values - low) / (high - low if high > low else 1.0), picture)
    colours = numpy.asarray(picture, dtype=numpy.float32)
    hot = colormaps["inferno"](numpy.nan_to_num(shares))[..., :3] * 255
    light = colours.mean(2, keepdims=True)
    drawn = numpy.where(numpy.isnan(shares)[..., None], GREY + 0.15 * (light - 128), 0.7 * hot + 0.3 * light)
    return _as_picture(drawn)


def outlined(picture: Image.Image, box: Sequence[float]) -> Image.Image:
    """Return a picture with a red frame.

    Args:
        box: left, top, right, bottom as shares of the picture's sides.
    """
    framed = picture.copy()
    corners = [share * side for share, side in zip(box, framed.size * 2, strict=True)]
    ImageDraw.Draw(framed).rectangle(corners, outline="red", width=max(1, max(framed.size) // 120))
    return framed


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """Return a picture whose longer side has so many pixels."""
    scale = side / max(picture.size)
    size = max(1, round(scale * picture.width)), max(1, round(scale * picture.height))
    return picture.resize(size, Image.Resampling.LANCZOS)


def sheet(tiles: Sequence[Image.Image], titles: Sequence[str], columns: int, side: int = 224) -> Image.Image:
    """Return pictures side by side, with a title above each, as one picture.

    Args:
        columns: pictures in a row.
        side: pixels of the longer side of each.
    """
    columns, gap = min(columns, len(tiles)), 8
    font = ImageFont.load_default(max(12, side // 16))
    text = 2 * font.getbbox("Ag")[3]
    small = [fitted(tile, side) for tile in tiles]
    wide, high = max(tile.width for tile in small) + gap, max(tile.height for tile in small) + gap + int(text)
    whole = Image.new("RGB", (columns * wide + gap, -(-len(tiles) // columns) * high + gap), "white")
    pen = ImageDraw.Draw(whole)
    for number, (tile, title) in enumerate(zip(small, titles, strict=True)):
        left, top = gap + number % columns * wide, gap + number // columns * high
        shown = printable(title)
        while shown and pen.textlength(shown, font) > wide - gap:
            shown = f"{shown.removesuffix('...')[:-1]}..." if len(shown) > 4 else ""
        pen.text((left, top + text // 6), shown, fill="black", font=font)
        whole.paste(tile, (left, top + int(text) - 2))
    return whole


def _per_pixel(cells: Tensor, picture: Image.Image) -> Any:
    """Return values (rows, columns) for each pixel, an array (height, width)."""
    rows, columns = cells.shape
    y = numpy.arange(picture.height) * rows // picture.height
    x = numpy.arange(picture.width) * columns // picture.width
    return cells.cpu().numpy()[y[:, None], x]


def _darkened(colours: Any, kept: Any) -> Any:
    """Return colours (height, width, 3), dark and grey where `kept` (height, width) is false."""
    grey = colours.mean(2, keepdims=True)
    return numpy.where(kept[..., None], colours, DIM * (0.7 * grey + 0.3 * colours))


def _edges(label: Any, width: int) -> Any:
    """Return where (height, width) pixels, or those `width` to the left or above, have another label."""
    edge = numpy.zeros(label.shape, bool)
    for step in range(1, width + 1):
        edge[step:] |= label[step:] != label[:-step]
        edge[:, step:] |= label[:, step:] != label[:, :-step]
    return edge


def _hue(name: int) -> tuple[float, float, float]:
    """Return a colour for a number, far from those of the numbers beside it."""
    from colorsys import hsv_to_rgb

    red, green, blue = hsv_to_rgb(name * 0.618034 % 1, 0.55, 1.0)
    return 255 * red, 255 * green, 255 * blue


def _as_picture(colours: Any) -> Image.Image:
    return Image.fromarray(colours.round().clip(0, 255).astype(numpy.uint8))
