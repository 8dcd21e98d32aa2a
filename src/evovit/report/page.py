"""One HTML page that fetches nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; }
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """Return one HTML document of parts, which fetches nothing."""
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    """Return a heading."""
    return f"<h2>{escape(text)}</h2>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; every row has one cell per column."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", columns) + "".join(line("td", row) for row in rows) + "</table>"


def picture(path: Path, what: str) -> str:
    """Return a PNG file as part of the page.

    Args:
        path: the PNG file.
        what: what it shows, for who cannot see it.
    """
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'


def _image(figure: Any, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
