"""What a method's page shows of the code: facts, picture, options, cost. A new method needs no entry here."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from reference import option_list, plain
from torch import nn

import evovit
from evovit.backbones import adapt
from evovit.data.photographs import Photograph, prepared, sample
from evovit.engines.exporting import preprocessing_of
from evovit.errors import EvoViTError
from evovit.look.one import BlockLook, blocks_of
from evovit.methods import build_config, find_method, list_methods

DOCS = Path(__file__).parent.parent.parent / "docs"
PICTURED = "deit_tiny_patch16_224"  # of random weights: nothing is downloaded
COUNTED = "deit_small_patch16_224"
SHARES = (0.7, 0.5, 0.3)
KINDS = {  # a host of each kind, by what its users would call it
    "Hosts with a class token (ViT, DeiT, CLIP, DINO)": "deit_tiny_patch16_224",
    "Hosts without (SigLIP)": "vit_base_patch16_siglip_224",
    "Hosts with stages (LeViT)": "levit_128s",
}
COLUMNS = 5  # blocks drawn
GREY = "#808080"  # legible on a light page and on a dark one


def summary(name: str) -> str:
    """Return the first sentence of a method's docstring."""
    return (find_method(name).__doc__ or "").strip().splitlines()[0]


def unwritten_page(name: str) -> str:
    """Return the page of a method for which nobody wrote one."""
    cls = find_method(name)
    module = __import__(cls.__module__, fromlist=["_"]).__doc__ or ""
    return f"# {cls.__name__}\n\n{summary(name)}\n\n{module}\n\n" + "\n\n".join(
        f"<!-- site: {part} -->" for part in ("picture", "measured", "cost", "facts", "options")
    )


def method_table() -> str:
    """Return the table of all methods: what it does, and what its default costs on a DeiT-S."""
    dense = _dense_gmacs()
    rows = []
    for name in list_methods():
        found = _gmacs(name)
        cost = f"{found:.2f} ({found / dense:.0%})" if found else "needs another host"
        rows.append(f"| [`{name}`]({name}.md) | {summary(name)} | {cost} |")
    head = ["| method | what it does | GMACs of DeiT-S, default options |", "|---|---|--:|"]
    return "\n".join([*head, *rows])


def facts(name: str) -> str:
    """Return what holds of a method whatever its options: where it runs, what it adds, what it leaves."""
    cls = find_method(name)
    own = _own_parameters(name)
    rows = {kind: _verdict(name, host) for kind, host in KINDS.items()} | {
        "Parameters it adds to a DeiT-S": f"{own:,}" if own else "none",
        "After the last block": "every patch has its token"
        if cls.keeps_grid
        else "fewer tokens than patches",
    }
    return "\n".join(["## Where it runs\n", *(f"- **{what}**: {says}" for what, says in rows.items())])


def _verdict(name: str, host: str) -> str:
    cls = find_method(name)
    try:
        cls(build_config(cls, {}), adapt(_on_meta(host)).spec)
    except EvoViTError as error:
        return f"not by default. *{plain(str(error))}*"
    return "yes"


def measured(name: str) -> str:
    """Return the rows of a method in the newest table of docs/speed.md that has any."""
    for section in (DOCS / "speed.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, rows = section.splitlines()[0], re.findall(r"^\|.*\|$", section, re.MULTILINE)
        own = [row for row in rows if re.match(rf"\| `{name}`", row)]
        if own and rows[0].startswith("| method |") and "eager" in rows[0]:
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            dense = [row for row in rows if row.startswith("| dense |")][:1]
            table = "\n".join([*rows[:2], *dense, *own])
            return f"Measured here, [{title}](../speed.md#{anchor}):\n\n{table}"
    return ""


def options(name: str) -> str:
    """Return the options of a method."""
    return f"## Options\n\n{option_list(find_method(name).Config)}"


def cost(name: str) -> str:
    """Return the multiply-accumulates of a DeiT-S with a method, by default and at a few shares."""
    dense = _dense_gmacs()
    head = "## Cost\n\nMultiply-accumulates of one 224-pixel image, counted by PyTorch. To time it on "
    head += f"your machine: `evovit bench {COUNTED} --method {name}`.\n\n"
    found = _gmacs(name)
    if found is None:
        return ""
    rows = [("dense", dense), ("default options", found)]
    rows += [(f"budget {share:g}", gmacs) for share in SHARES if (gmacs := _gmacs(name, share))]
    lines = [f"| {what} | {gmacs:.2f} | {gmacs / dense:.0%} |" for what, gmacs in rows]
    return head + "\n".join(["| DeiT-S | GMACs | of dense |", "|---|--:|--:|", *lines])


@cache
def _on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


@cache
def _dense_gmacs() -> float:
    return evovit.gmacs(_on_meta(COUNTED), (3, 224, 224))


@cache
def _gmacs(name: str, share: float | None = None) -> float | None:
    """Return GMACs, None where the method does not take the host, or no share."""
    try:
        with torch.device("meta"):
            reduced = evovit.reduce_tokens(_on_meta(COUNTED), name, verify=False)
            if share is not None:
                reduced.budget = share
        return evovit.gmacs(reduced, (3, 224, 224))
    except EvoViTError:
        return None


def _own_parameters(name: str) -> int:
    cls = find_method(name)
    try:
        with torch.device("meta"):
            method = cls(build_config(cls, {}), adapt(_on_meta(COUNTED)).spec)
    except EvoViTError:
        return 0
    return sum(p.numel() for p in method.parameters())


# pictures


@cache
def _pictured() -> tuple[nn.Module, list[Photograph]]:
    """Return a host of random weights and scikit-learn's photographs as it takes them."""
    torch.manual_seed(0)
    host = timm.create_model(PICTURED).eval()
    return host, [prepared(sample(title), preprocessing_of(host), title) for title in ("china", "flower")]


def picture(name: str) -> bytes | None:
    """Return what a method makes of scikit-learn's photographs, PNG; None if there is nothing to draw."""
    host, photographs = _pictured()
    try:
        reduced = evovit.reduce_tokens(host, name, verify=False).eval()
    except EvoViTError:
        return None
    with torch.no_grad():
        looks = [blocks_of(reduced, photograph.image[None]) for photograph in photographs]
    reducing = [block for block in looks[0] if block.reduces]
    if not reducing or not all(block.has_places for block in reducing):
        return None
    return _drawn(photographs, looks)


def _drawn(photographs: Sequence[Photograph], looks: Sequence[Sequence[BlockLook]]) -> bytes:
    depth = len(looks[0])
    chosen = sorted({round(part * (depth - 1) / COLUMNS) for part in range(1, COLUMNS + 1)})
    size = len(photographs), len(chosen) + 1
    figure = Figure(figsize=(1.75 * size[1], 1.75 * size[0] + 0.2))
    figure.patch.set_alpha(0)
    place = {"left": 0, "right": 1, "bottom": 0, "top": 1 - 0.2 / figure.get_figheight()}
    panels = figure.subplots(*size, squeeze=False, gridspec_kw=place | {"wspace": 0.03, "hspace": 0.03})
    for title, panel in zip(["photograph", *(f"after block {n}" for n in chosen)], panels[0], strict=True):
        panel.set_title(title, fontsize=11, color=GREY)
    for row, photograph, blocks in zip(panels, photographs, looks, strict=True):
        tiles = [photograph.seen, *(blocks[n].draw(photograph.seen) for n in chosen)]
        for panel, tile in zip(row, tiles, strict=True):
            panel.imshow(np.asarray(tile))
            panel.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def picture_section(name: str, has_picture: bool) -> str:
    """Return the section with the picture, and how to read it."""
    if not has_picture:
        return ""
    merges = find_method(name).merges
    rule = (
        "patches within an outline are one token, dark ones none" if merges else "dark patches take no part"
    )
    return (
        "## What it does to a photograph\n\n"
        f"[![{name}, block by block]({name}.png){{ .wide }}]({name}.png)\n\n"
        f"The photographs are scikit-learn's; {rule}. Drawn when this page was built, with default options "
        "on a DeiT-T with random weights: it shows how tokens are treated, not what a trained model sees. "
        "[`evovit show`](../show.md) draws your own photograph and model.\n"
    )
