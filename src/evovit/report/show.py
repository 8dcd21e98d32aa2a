"""What `show` writes: a page of photographs, what each block keeps, both answers; and the pictures."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from evovit.bench.setting import parse_variants
from evovit.data.photographs import open_each
from evovit.errors import check_count, check_kind, printable
from evovit.look import BlockLook, Look, Subject, open_subject, subject_of
from evovit.report.page import (
    Bar,
    Bars,
    Heading,
    Note,
    Paragraph,
    Part,
    Picture,
    Quiet,
    Subheading,
    Tile,
    Tiles,
    jpeg,
    page,
)
from evovit.report.show_pictures import (
    LARGE,
    SMALL,
    Drawn,
    counted,
    drawn_blocks,
    film_of,
    framed,
    sheet_of,
)
from evovit.report.tables import Table, cell, speedup_text, table
from evovit.runtime.files import hold_folder, told, write_bytes, write_text
from evovit.visualize import fitted

HEATS = 6  # score maps of a method
COLOURS = 5  # of bars, beside the dense model's
MOST = 1000  # images of a folder
COLUMNS = ("method", "GMACs", "of dense", "ms", "speed-up")


class Shown(NamedTuple):
    """A page and what it shows."""

    page: Path
    looks: list[list[Look]]  # for each photograph one for each method

    def _repr_html_(self) -> str:
        """Return the page for a notebook, in a frame of its own."""
        text = html.escape(self.page.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{text}" style="width: 100%; height: 48rem; border: 0"></iframe>'


def show(
    model: nn.Module | str,
    images: Any = "samples",
    method: str | Sequence[str] = (),
    *,
    keep_ratio: float | Sequence[float] = (),
    budgets: float | Sequence[float] = (),
    weights: str = "",
    pretrained: bool = False,
    preprocessing: Any = None,
    count: int = 6,
    rounds: int = 30,
    gif: bool = False,
    out: str | Path = "runs/show",
) -> Shown:
    """Show what a dense and a reduced model make of photographs, on one page; a notebook displays it.

    Args:
        model: a reduced model, a host, or what `evovit show --model` takes.
        images: a file, a folder, an image of Pillow, "samples" or "digits", or several of them.
        method: one or several, each NAME or NAME:option=value; default: the model's own, else evo_vit.
        keep_ratio, budgets: as for `evovit show`; several are shown side by side.
        weights, pretrained: for a model given by name, as for `evovit show`.
        preprocessing: for a model object: input_size, mean, std, interpolation, crop_pct, crop_mode and
            class_names; default: the model's own.
        count: images of each folder, or digits, at most.
        rounds: how often each model is timed, all in turn; 0: none is.
        gif: also write an animated GIF of the blocks.
        out: folder for show.html and the pictures.

    Raises:
        EvoViTError: an image that cannot be read, an unknown model, method or option.
    """
    check_count("count", count, 1, MOST)
    methods = several(method) or (("evo_vit",) if several(keep_ratio) or several(budgets) else ())
    variants = parse_variants(methods, (), several(keep_ratio), several(budgets))
    if isinstance(model, str):
        subject = open_subject(model, variants, weights, pretrained)
    else:
        check_kind("model", model, nn.Module, "a reduced model, a host, or a name")
        subject = subject_of(model, variants, preprocessing)
    photographs = list(open_each(several(images), subject.preprocessing, count))
    looks = subject.look(photographs, rounds)
    with hold_folder(Path(out)), told(Path(out)):
        return Shown(write_show(Path(out), subject, looks, gif), looks)


def several(given: Any) -> tuple[Any, ...]:
    """Return what was given, one thing or several, as several."""
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def write_show(out: Path, subject: Subject, looks: Sequence[Sequence[Look]], gif: bool = False) -> Path:
    """Write show.html and a picture of each photograph and method; return the page.

    Args:
        looks: for each photograph one for each method.
        gif: also write the blocks as a film.
    """
    names = file_names([each[0].photograph.title for each in looks])
    parts: list[Part] = [*opening(subject, looks[0])]
    for name, each in zip(names, looks, strict=True):
        parts += answers_of(each)
        for number, look in enumerate(each):
            stem = "_".join([name, *([str(number)] if len(each) > 1 else []), look.method.split()[0]])
            drawn = drawn_blocks(look)
            write_bytes(out / f"{stem}.png", sheet_of(look, drawn))
            film = None
            if gif:
                film = Picture(film_of(look, drawn), f"the blocks of {look.method} one after another")
                write_bytes(out / f"{stem}.gif", film.data)
            parts += blocks_of(look, drawn, film)
    path = out / "show.html"
    write_text(path, page("evovit show", parts))
    return path


def file_names(titles: Sequence[str]) -> list[str]:
    """Return names for files, one for each title, all different."""
    found: list[str] = []
    for number, title in enumerate(titles):
        name = re.sub(r"[^\w.-]+", "_", title.rpartition(".")[0] or title).strip("._")[:60] or "image"
        found.append(name if name not in found else f"{name}_{number}")
    return found


def opening(subject: Subject, first: Sequence[Look]) -> list[Part]:
    """Return what holds for all photographs: model, methods, cost."""
    timed = next((look.cost for look in first if look.cost.ms is not None), None)
    parts: list[Part] = [
        Paragraph(f"{subject.name}: each photograph is given to the dense model and to the reduced one.")
    ]
    parts += [Note(note) for note in subject.notes]
    parts += [Paragraph(f"{look.method}: {look.does}") for look in first]
    parts.append(costs_of(first))
    if timed is not None:
        parts.append(
            Quiet(
                f"Times of one image on this machine, in this run: {timed.conditions}. GMACs are 1e9 "
                "multiply-accumulates of one image. Other machines give other times."
            )
        )
        parts += [Note(f"Note: {note}.") for note in timed.notes]
    if not subject.is_own:
        parts.append(
            Quiet(
                "Weights trained without a method lose accuracy with it at first; training with it recovers "
                "most of that (docs/training.md). Methods that merge need no training."
            )
        )
    return parts


def costs_of(looks: Sequence[Look]) -> Table:
    """Return GMACs and times of the dense model and of each method."""
    dense = looks[0].cost
    own = f"{dense.dense_gmacs:.3g}"
    rows = [["dense", own, "1.00", cell(dense.dense_ms, 1), "1" if dense.ms else ""]]
    rows += [
        [
            look.method,
            f"{look.cost.gmacs:.3g}",
            f"{look.cost.gmacs / look.cost.dense_gmacs:.2f}",
            cell(look.cost.ms, 1),
            speedup_text(look.cost.speedup, look.cost.noise),
        ]
        for look in looks
    ]
    return table(COLUMNS, rows)


def answers_of(looks: Sequence[Look]) -> list[Part]:
    """Return the photograph, the fewest patches that each method leaves of it, and what all models answer."""
    photograph = looks[0].photograph
    size = f"{photograph.whole.width} x {photograph.whole.height} pixels"
    detail = size if photograph.box is None else f"{size}; the model sees what is inside the frame"
    large = [Tile(jpeg(framed(looks[0]), photograph.title), "the photograph", detail)]
    for look in looks:
        last = decisive(look)
        if last is not None:
            picture = last.draw(fitted(photograph.seen, LARGE))
            detail = f"block {last.number}: {counted(last)}"
            large.append(Tile(jpeg(picture, f"{look.method}, {detail}"), look.method, detail))
    says = [Paragraph(sentence(look)) for look in looks]
    return [Heading(photograph.title), Tiles(large, large=True), *says, answers(looks)]


def decisive(look: Look) -> BlockLook | None:
    """Return the last block that leaves fewest tokens with places; None: none of them reduces anything."""
    placed = [block for block in look.blocks if block.has_places and block.reduces]
    return min(reversed(placed), key=lambda block: block.tokens) if placed else None


def sentence(look: Look) -> str:
    """Say what both models answer."""
    if not look.dense.top:
        return (
            f"{look.method}: the model gives features, not classes; dense and reduced features have a cosine "
            f"similarity of {look.similarity:.3f} (1: the same)."
        )
    dense, ours = look.dense.top[0], look.reduced.top[0]
    same = look.reduced.share_of(dense.number) - dense.share
    if look.agrees:
        return (
            f"{look.method}: both say {dense.name}, dense with {dense.share:.1%}, reduced with "
            f"{ours.share:.1%} ({points(same)} points)."
        )
    return (
        f"{look.method}: dense says {dense.name} ({dense.share:.1%}), reduced says {ours.name} "
        f"({ours.share:.1%}) and {dense.name} with {look.reduced.share_of(dense.number):.1%}."
    )


def points(share: float) -> str:
    """Return a difference of shares as percentage points, with its sign."""
    text = f"{100 * share:+.1f}"
    return "0.0" if float(text) == 0 else text


def answers(looks: Sequence[Look], dense: int = 4, reduced: int = 2) -> Bars:
    """Return the best classes of all models, a bar for each model; none where nothing is classified.

    Args:
        dense, reduced: so many of the dense model, and of each reduced one.
    """
    numbers = {guess.number: guess.name for guess in looks[0].dense.top[:dense]}
    for look in looks:
        numbers |= {guess.number: guess.name for guess in look.reduced.top[:reduced]}
    groups = []
    for number, name in numbers.items():
        share = looks[0].dense.share_of(number)
        bars = [Bar("dense", share, f"{share:.1%}")]
        for series, (label, look) in enumerate(zip(labels(looks), looks, strict=True)):
            own = look.reduced.share_of(number)
            bars.append(Bar(label, own, f"{own:.1%} ({points(own - share)})", 1 + series % COLOURS))
        groups.append((name, bars))
    return Bars(groups)


def labels(looks: Sequence[Look]) -> list[str]:
    """Return the methods' names, with their options where two are of one name."""
    names = [look.method.split()[0] for look in looks]
    return names if len({*names}) == len(names) else [look.method for look in looks]


def blocks_of(look: Look, drawn: Sequence[Drawn], film: Picture | None) -> list[Part]:
    """Return what each block of one method keeps, and what it ranks by."""
    tiles = [
        Tile(jpeg(each.picture, f"{each.name} of {look.method}"), each.name, each.detail) for each in drawn
    ]
    if film is not None:
        tiles.insert(0, Tile(film, "all blocks", "one after another"))
    parts: list[Part] = [Subheading(f"{look.method}, block by block")]
    if tiles:
        shared = any(len(each.blocks) > 1 for each in drawn)
        as_one = "Successive blocks that keep the same patches share a picture." if shared else ""
        parts += [Paragraph(f"{LEGENDS[kind_of(look)]} {as_one}".strip()), Tiles(tiles)]
    nowhere = [block for block in look.blocks if not block.has_places]
    if nowhere:
        left = ", ".join(dict.fromkeys(str(block.tokens) for block in nowhere))
        parts.append(
            Paragraph(
                f"From block {nowhere[0].number} on, tokens are mixtures of all patches and have no places: "
                f"{left} are left of {nowhere[0].cells}."
            )
        )
    scored = [block for block in look.blocks if block.score is not None]
    small = fitted(look.photograph.seen, SMALL)
    heats = [
        Tile(jpeg(block.draw_heat(small), f"map of block {block.number}"), f"block {block.number}")
        for block in spread(scored or list(look.blocks), HEATS if scored else 4)
    ]
    what = "What it ranks the patches by" if scored else "It ranks no patches; this is what attention reads"
    scale = "from dark to bright between smallest and largest value of each map; a pale patch has no token"
    return [*parts, Paragraph(f"{what}, {scale}."), Tiles(heats)]


LEGENDS = {
    "kept": "Bright patches are kept by the block; dark ones are dropped or wait, depending on the method.",
    "merged": (
        "Patches of one colour within an outline are one token; a patch that is a token of its own is "
        "unchanged, and a dark one is in no token."
    ),
    "all": "Every patch is kept as it is.",
    "nowhere": "",
}


def kind_of(look: Look) -> str:
    """Return which of `LEGENDS` a look needs."""
    placed = [block for block in look.blocks if block.has_places]
    if any(block.groups is not None for block in placed):
        return "merged"
    if all(bool(block.kept.all()) for block in placed):
        return "all" if len(placed) == len(look.blocks) else "nowhere"
    return "kept"


def spread(blocks: Sequence[BlockLook], most: int) -> list[BlockLook]:
    """Return so many blocks at most, evenly spread, the first and the last among them."""
    if len(blocks) <= most:
        return list(blocks)
    return [blocks[round(i * (len(blocks) - 1) / (most - 1))] for i in range(most)]


def said(subject: Subject, looks: Sequence[Sequence[Look]]) -> list[str]:
    """Return what to print: doubts, then a line for each photograph and method."""
    lines = [f"note: {note}" for note in subject.notes]
    for each in looks:
        lines += [f"{each[0].photograph.title}: {sentence(look)}" for look in each]
    costs = [
        f"{look.method}: {look.cost.gmacs / look.cost.dense_gmacs:.2f} of the multiply-accumulates"
        + (f", {look.cost.verdict}" if look.cost.verdict else "")
        for look in looks[0]
    ]
    return [printable(line) for line in [*lines, *costs]]
