"""One HTML page of typed parts; it runs no script and fetches nothing. `page.html` is its template."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import Environment, StrictUndefined

from evovit.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Heading(NamedTuple):
    """Opens a section."""

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
    """A PNG file's bytes, and what they show, for who cannot see it."""

    png: bytes
    what: str

    @property
    def base64(self) -> str:
        """The bytes as text."""
        return b64encode(self.png).decode("ascii")

    @property
    def width(self) -> int:
        """Width in pixels, from the PNG's header."""
        return int.from_bytes(self.png[16:20], "big")


Part = Heading | Paragraph | Note | Quiet | Picture | Table


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
    return template.render(title=title, parts=[(type(part).__name__, part) for part in parts])
