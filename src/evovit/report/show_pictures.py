"""The pictures of `show`: what each block keeps, each drawn once, as tiles, as one sheet, as a film."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from evovit.look import BlockLook, Look
from evovit.visualize import fitted, sheet

SMALL, LARGE = 320, 720  # pixels of the longer side
FRAME_MS = 700  # of a film


class Drawn(NamedTuple):
    """Neighbouring blocks that keep the same, and a picture of what they keep."""

    blocks: Sequence[BlockLook]
    picture: Image.Image

    @property
    def name(self) -> str:
        """Their numbers in words."""
        first, last = self.blocks[0].number, self.blocks[-1].number
        return f"block {first}" if first == last else f"blocks {first} to {last}"

    @property
    def detail(self) -> str:
        """How many patches they keep, or into how many tokens they merge them."""
        return counted(self.blocks[0])


def drawn_blocks(look: Look) -> list[Drawn]:
    """Return what the blocks keep whose tokens have places, neighbours that keep the same as one."""
    small = fitted(look.photograph.seen, SMALL)
    runs: list[list[BlockLook]] = []
    for block in (block for block in look.blocks if block.has_places):
        if runs and block.does_as(runs[-1][0]):
            runs[-1].append(block)
        else:
            runs.append([block])
    return [Drawn(run, run[0].draw(small)) for run in runs]


def counted(block: BlockLook) -> str:
    """Say how many patches a block keeps, or into how many tokens it merges them."""
    if not block.has_places:
        return f"{block.tokens} tokens without places"
    kept = int(block.kept.sum())
    if block.groups is None:
        return f"{'all' if kept == block.cells else kept} of {block.cells} patches"
    return f"{block.cells} patches in {block.tokens} tokens"


def framed(look: Look) -> Image.Image:
    """Return the whole photograph, at most `LARGE` pixels a side, with a frame around what the model sees."""
    picture, box = look.photograph.whole, look.photograph.box
    small = (look.photograph.seen if box is None else picture).copy()
    small.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    if box is not None:
        scale = small.width / picture.width
        corners = [min(max(scale * end, 0), side - 1) for end, side in zip(box, small.size * 2, strict=True)]
        pen = ImageDraw.Draw(small)
        pen.rectangle(corners, outline="black", width=4)
        pen.rectangle(corners, outline="white", width=2)
    return small


def sheet_of(look: Look, drawn: Sequence[Drawn]) -> bytes:
    """Return one PNG: what the model sees, and what its blocks keep."""
    tiles = [look.photograph.seen, *(each.picture for each in drawn)]
    titles = [look.photograph.title, *(f"{each.name}: {each.detail}" for each in drawn)]
    return png_of(sheet(tiles, titles, columns=4, side=SMALL))


def png_of(picture: Image.Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def film_of(look: Look, drawn: Sequence[Drawn]) -> bytes:
    """Return a GIF: what the model sees, then the blocks one after another."""
    tiles = [look.photograph.seen, *(each.picture for each in drawn)]
    titles = ["what the model sees", *(f"{each.name}: {each.detail}" for each in drawn)]
    first, *others = [
        sheet([tile], [title], 1, side=SMALL) for tile, title in zip(tiles, titles, strict=True)
    ]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=FRAME_MS, loop=0)
    return buffer.getvalue()
