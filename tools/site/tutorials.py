"""A tutorial: a Python file of cells, which becomes a notebook, is run, and becomes a page.

Cells begin with `# %%`, or `# %% [markdown]` for text in comment lines, as editors and Jupytext know them.
A cell whose lines begin with `# !` holds commands of the shell, and a line `# %matplotlib` is IPython's.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from base64 import b64decode
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from traitlets.config import Config

SECONDS = 600  # of one cell, before the build fails
SHELL = "%%script env -u FORCE_COLOR bash -e"  # no progress bars; a command that fails ends the build
TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r(?=\n)")


class Page(NamedTuple):
    """A tutorial as the site shows it."""

    markdown: str
    pictures: dict[str, bytes]  # PNG by file name
    notebook: str  # to download; without outputs


def make_page(path: Path, execute: bool = True) -> Page:
    """Return the page of a tutorial, run in a folder of its own; a cell that raises ends the build.

    Args:
        execute: False leaves all outputs out, for who writes another page.
    """
    notebook = as_notebook(path.read_text(encoding="utf-8"))
    plain = nbformat.writes(notebook)
    if execute:
        _run(notebook)
    link = f"[Download this page as a notebook]({path.stem}.ipynb){{ .md-button download }}"
    markdown, pictures = _render(notebook, path.stem)
    return Page(f"{markdown}\n\n{link}\n", pictures, plain)


def as_notebook(text: str) -> Any:
    """Return a notebook of the cells of a file."""
    parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    cells = []
    for kind, source in zip(parts[1::2], parts[2::2], strict=True):
        if kind.strip() == "[markdown]":
            cells.append(new_markdown_cell(re.sub(r"^# ?", "", source, flags=re.MULTILINE).strip()))
        elif source.startswith("# !"):
            commands = re.sub(r"^# !", "", source, flags=re.MULTILINE)
            cells.append(new_code_cell(f"{SHELL}\n{commands.strip()}"))
        else:
            cells.append(new_code_cell(re.sub(r"^# (?=%\w)", "", source, flags=re.MULTILINE).strip()))
    for number, cell in enumerate(cells):
        cell["id"] = str(number)  # the same file is the same notebook
    return new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})


def _run(notebook: Any) -> None:
    """Run a notebook in this Python's own environment; its outputs are in it afterwards."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "COLUMNS": "140", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as sockets, tempfile.TemporaryDirectory() as folder:
        near = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        place = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook, kernel_name="python3", timeout=SECONDS, resources=place, config=near
        )
        client.execute(env=environment)


def _render(notebook: Any, name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures."""
    parts, pictures = list[str](), dict[str, bytes]()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        source = re.sub(r"^%.*\n?", "", cell.source, flags=re.MULTILINE).strip()
        parts.append(_fenced(source, "bash" if cell.source.startswith(SHELL) else "python"))
        said = [output for output in cell.outputs if output.get("name") != "stderr"]  # progress, warnings
        printed = "".join(output.get("text", "") for output in said)
        values = [output.data for output in said if "data" in output]
        drawn = [b64decode(value["image/png"]) for value in values if "image/png" in value]
        printed += "".join(value["text/plain"] for value in values if "image/png" not in value)
        if text := TERMINAL.sub("", printed).rstrip():
            parts.append(_fenced(text, "{ .text .prints }"))
        for png in drawn:
            file = f"{name}-{len(pictures) + 1}.png"
            pictures[file] = png
            parts.append(f"![What the cell above draws]({file}){{ .wide }}")
    return "\n\n".join(parts), pictures


def _fenced(text: str, kind: str) -> str:
    """Return text as a block of code that no line in it can end."""
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{ticks}{kind}\n{text}\n{ticks}"
