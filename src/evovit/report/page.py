"""One HTML page of typed parts; it runs no script and fetches nothing. `page.html` is its template."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import Environment, StrictUndefined
from PIL import Image

from evovit.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Heading(NamedTuple):
    """Opens a section."""

    text: str


class Subheading(NamedTuple):
    """Opens a part of a section."""

    text: str


class Paragraph(NamedTuple):
    """Plain text."""

    text: str


class Note(NamedTuple):
    """Text that warns: what makes a number doubtful."""

    text: str


class Quiet(NamedTuple):
    """Text of less weight: under which conditions something was measured."""

    text: str


class Picture(NamedTuple):
    """An image file's bytes, PNG, JPEG or GIF, and what they show, for who cannot see it."""

    data: bytes
    what: str

    @property
    def source(self) -> str:
        """The bytes as an address that needs no file."""
        kind = "png" if self.data[:4] == b"\x89PNG" else "gif" if self.data[:3] == b"GIF" else "jpeg"
        return f"data:image/{kind};base64,{b64encode(self.data).decode('ascii')}"

    @property
    def width(self) -> int:
        """Width in pixels."""
        return Image.open(io.BytesIO(self.data)).width


class Tile(NamedTuple):
    """A small picture with words below it."""

    picture: Picture
    caption: str
    detail: str = ""


class Tiles(NamedTuple):
    """Pictures side by side, as many in a row as fit."""

    tiles: Sequence[Tile]
    large: bool = False


class Bar(NamedTuple):
    """One number as a length."""

    name: str
    share: float  # of the whole width, 0 to 1
    text: str  # the number
    series: int = 0  # its colour; 0 is that of the dense model
    low: float | None = None  # ends of its uncertainty, as shares of the width
    high: float | None = None


class Bars(NamedTuple):
    """Groups of bars below a heading each; all lengths begin at 0."""

    groups: Sequence[tuple[str, Sequence[Bar]]]


class Command(NamedTuple):
    """A line for a terminal, and what it does."""

    line: str
    what: str


class Beside(NamedTuple):
    """Parts beside each other where there is room."""

    parts: Sequence[Part]

    @property
    def named(self) -> list[tuple[str, Part]]:
        """The parts with their kinds."""
        return kinds(self.parts)


Part = Heading | Subheading | Paragraph | Note | Quiet | Picture | Tiles | Bars | Command | Beside | Table


def kinds(parts: Sequence[Part]) -> list[tuple[str, Part]]:
    """Return parts with their kinds, by which the template draws them."""
    return [(type(part).__name__, part) for part in parts]


def jpeg(picture: Image.Image, what: str) -> Picture:
    """Return a picture as JPEG."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=88)
    return Picture(buffer.getvalue(), what)


def drawn(figure: Figure, what: str) -> Picture:
    """Return a figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Picture(buffer.getvalue(), what)


def page(title: str, parts: Sequence[Part]) -> str:
    """Return one HTML document; all text in it is escaped."""
    text = files("evovit.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(text)
    return template.render(title=title, parts=kinds(parts))
