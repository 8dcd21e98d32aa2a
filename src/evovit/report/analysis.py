"""What an analysis writes: one page, its pictures, and the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evovit.analyse import BlockMeasures, Measures, Views, jaccard_by_chance
from evovit.analyse.measures import LEAST
from evovit.errors import printable
from evovit.report.analysis_plots import draw_agreement, draw_cka, draw_correlation, draw_maps
from evovit.report.page import Heading, Note, Paragraph, Part, Picture, Quiet, drawn, page
from evovit.report.tables import Table, table
from evovit.runtime.files import write_bytes, write_text
from evovit.study import Shown
from evovit.visualize import draw_kept, draw_side_by_side

COLUMNS = (
    *("block", "kept", "CKA", "informative", "placeholder", "CKA by chance", "correlation", "variance"),
    *("Jaccard with the block before", "in the other mode", "Jaccard by chance"),
)


class Moment(NamedTuple):
    """What a training had learnt to keep at one of its checkpoints."""

    name: str  # such as "epoch 3"
    kept: Tensor  # (B, rows, columns) bool, of the images shown, in `Analysis.first_block`
    agreement: float  # Jaccard with what the last checkpoint keeps there, mean over many images


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """All that is shown of one model."""

    model: str
    method: str  # with its options; "" where nothing is reduced
    images: str  # what they are
    has_class_token: bool
    measures: Measures
    shown: Shown
    views: Views
    blocks: tuple[int, ...]  # whose maps are drawn
    first_block: int | None  # the first that reduces
    mode: str = ""  # of Evo-ViT
    other_mode: str = ""
    other_measures: Measures | None = None
    other_views: Views | None = None
    unreduced: Tensor | None = None  # `Measures.jaccard` of the same weights with nothing reduced
    moments: tuple[Moment, ...] = ()  # of a run, oldest first

    def beside(self, mode: str, measures: Measures, views: Views) -> Analysis:
        """Return the same with what Evo-ViT does in its other mode."""
        return replace(self, other_mode=mode, other_measures=measures, other_views=views)


def write_analysis(out: Path, found: Analysis) -> str:
    """Write analysis.html, analysis.json and the pictures; return what to print."""
    pictures = pictures_of(found)
    for name, picture in pictures.items():
        write_bytes(out / f"{name}.png", picture.data)
    sentences = findings(found)
    write_text(out / "analysis.json", json.dumps(numbers_of(found), indent=1) + "\n")
    write_text(
        out / "analysis.html", page(f"evovit analyse: {found.model}", parts_of(found, sentences, pictures))
    )
    return "\n".join(map(printable, [*sentences, f"{out / 'analysis.html'} written"]))


def placed_blocks(found: Measures) -> list[int]:
    """Return the blocks whose tokens have places, so that one can tell which are kept."""
    return [block.number for block in found.blocks if block.kept > 0]


def pictures_of(found: Analysis) -> dict[str, Picture]:
    """Return the pictures by name."""
    views, shown, measures = found.views, found.shown, found.measures
    attention = {f"block {number}": views.attention[number] for number in found.blocks}
    scores = {f"block {number}": values for number, values in views.scores.items()}
    what = f"{score_name(found)} of some blocks over the images"
    pictures = {"attention": drawn(draw_maps(shown.colours, attention, shown.titles), what)}
    if scores and found.method:
        chosen = dict(list(scores.items())[:: max(1, -(-len(scores) // 6))])
        pictures["scores"] = drawn(draw_maps(shown.colours, chosen, shown.titles), "what the method ranks by")
    if measures.blocks[0].cka is not None:
        pictures["cka"] = drawn(draw_cka(measures.blocks), "CKA with the final class token by block")
    pictures["correlation"] = drawn(draw_correlation(measures.blocks), "correlation of queries by block")
    blocks = placed_blocks(measures)
    kept = bright(views.kept if found.method else views.informative)
    pictures["kept"] = drawn(draw_kept(shown.colours, kept, titles=shown.titles), "kept patches by block")
    if found.other_views is not None:
        figure = draw_kept(shown.colours, bright(found.other_views.kept), titles=shown.titles)
        pictures[f"kept_{found.other_mode}"] = drawn(
            figure, f"kept patches by block, {found.other_mode} mode"
        )
    if found.moments:
        course = {moment.name: moment.kept for moment in found.moments}
        figure = draw_side_by_side(shown.colours, course, shown.titles)
        pictures["training"] = drawn(figure, f"kept patches of block {found.first_block} by epoch")
    if len(blocks) > 1:
        rows = torch.tensor(blocks)
        matrices = {f"{found.mode} mode" if found.mode else "": measures.jaccard[rows][:, rows]}
        if found.other_measures is not None:
            matrices[f"{found.other_mode} mode"] = found.other_measures.jaccard[rows][:, rows]
        if found.unreduced is not None:
            matrices["nothing reduced"] = found.unreduced[rows][:, rows]
        pictures["agreement"] = drawn(draw_agreement(matrices, blocks), "Jaccard index of each two blocks")
    return pictures


def bright(kept: Tensor) -> Tensor:
    """Return masks (B, blocks, rows, columns) with those all bright that no token has a place in."""
    return kept | ~kept.flatten(2).any(2)[:, :, None, None]


def score_name(found: Analysis) -> str:
    """Return what the maps of figure 2 show."""
    return "class attention" if found.has_class_token else "attention received, mean over all tokens"


def rows_of(found: Analysis) -> Table:
    """Return the numbers, a row per block."""
    rows = []
    for place, block in enumerate(found.measures.blocks):
        before = found.measures.blocks[place - 1] if place else None
        ckas = (block.cka, block.cka_informative, block.cka_placeholder, block.cka_by_chance)
        agreement = ["", "", ""]
        if before is not None and block.kept > 0:
            own, other = found.measures.jaccard, found.other_measures
            sizes = [float(found.measures.informative[:, i].float().mean()) for i in (place - 1, place)]
            agreement[0] = f"{float(own[place - 1, place]):.2f}"
            agreement[1] = "" if other is None else f"{float(other.jaccard[place - 1, place]):.2f}"
            agreement[2] = f"{jaccard_by_chance(sizes[0], sizes[1]):.2f}"
        rows.append(
            [
                *(str(block.number), f"{block.kept:.0%}"),
                *("" if value is None else f"{value:.2f}" for value in ckas),
                *(f"{block.correlation:.2f}", f"{block.variance:.3f}"),
                *agreement,
            ]
        )
    return table(COLUMNS, rows)


def numbers_of(found: Analysis) -> dict[str, Any]:
    """Return what analysis.json holds."""
    other = found.other_measures
    return {
        "model": found.model,
        "method": found.method,
        "images": found.images,
        "num_images": found.measures.images,
        "blocks": [block._asdict() for block in found.measures.blocks],
        "jaccard": found.measures.jaccard.tolist(),
        "mode": found.mode,
        "other_mode": found.other_mode,
        "other_jaccard": None if other is None else other.jaccard.tolist(),
        "unreduced_jaccard": None if found.unreduced is None else found.unreduced.tolist(),
        "training": {moment.name: moment.agreement for moment in found.moments},
    }


def findings(found: Analysis) -> list[str]:
    """Say what was measured, a sentence each."""
    blocks, said = (
        found.measures.blocks,
        [f"{found.model} on {found.measures.images} images ({found.images})."],
    )
    if blocks[0].cka is None:
        why = f"fewer than {LEAST} images" if found.has_class_token else "the model has no class token"
        said.append(f"No CKA with the final class token: {why}.")
    else:
        said.append(cka_sentence(blocks))
    low, high = min(blocks, key=lambda b: b.correlation), max(blocks, key=lambda b: b.correlation)
    said.append(
        f"Queries correlate with their mean least in block {low.number} ({low.correlation:.2f}) and most in "
        f"block {high.number} ({high.correlation:.2f})."
    )
    matrix, where = found.measures.jaccard, placed_blocks(found.measures)
    if found.first_block is not None:
        where = [number for number in where if number >= found.first_block]
    if len(where) > 1:
        said.append(agreement_sentence(found, matrix, where))
    else:
        said.append("The selections cannot be compared: fewer than two blocks select tokens with places.")
    if len(found.moments) > 1:
        first = found.moments[0]
        said.append(
            f"In block {found.first_block} the selection of {first.name} has a Jaccard index of "
            f"{first.agreement:.2f} with that of {found.moments[-1].name}."
        )
    return said


def cka_sentence(blocks: Sequence[BlockMeasures]) -> str:
    """Say how CKA goes through the blocks."""
    first, last = blocks[0], blocks[-1]
    parts = [
        f"CKA of the mean patch token with the final class token goes from {first.cka:.2f} to {last.cka:.2f}"
    ]
    both = [b for b in blocks if b.cka_informative is not None and b.cka_placeholder is not None]
    if both:
        ahead = sum((b.cka_informative or 0) > (b.cka_placeholder or 0) for b in both)
        parts.append(f"informative tokens are above placeholders after {ahead} of {len(both)} blocks")
    chance = max(b.cka_by_chance or 0 for b in blocks)
    return f"{'; '.join(parts)}; by chance at most {chance:.2f}."


def agreement_sentence(found: Analysis, matrix: Tensor, where: Sequence[int]) -> str:
    """Say how alike the selections of neighbouring blocks, and of all, are."""

    def told(values: Tensor) -> str:
        rows = torch.tensor(where)
        inside = values[rows][:, rows]
        apart = inside[~torch.eye(len(where), dtype=torch.bool)]
        return (
            f"{float(inside.diagonal(1).mean()):.2f} for neighbours, {float(apart.mean()):.2f} for all pairs"
        )

    sizes = found.measures.informative[:, torch.tensor(where)].float().mean((0, 2)).tolist()
    pairs = [jaccard_by_chance(a, b) for a, b in pairwise(sizes)]
    what = "Selections" if found.method else "The halves that class attention would choose"
    text = f"{what} of blocks {where[0]} to {where[-1]} have a Jaccard index of {told(matrix)}"
    if found.mode:
        text += f" in {found.mode} mode"
    if found.other_measures is not None:
        text += f", in {found.other_mode} mode {told(found.other_measures.jaccard)}"
    if found.unreduced is not None:
        text += (
            f"; the halves that class attention would choose with nothing reduced: {told(found.unreduced)}"
        )
    return f"{text}; by chance about {sum(pairs) / len(pairs):.2f}."


def parts_of(found: Analysis, sentences: Sequence[str], pictures: dict[str, Picture]) -> list[Part]:
    """Return the page, a section per figure of the paper."""
    model = f"{found.method}. " if found.method else "Nothing is reduced. "
    parts: list[Part] = [
        *map(Paragraph, sentences),
        Quiet(f"{model}Figures and equations are those of Evo-ViT."),
    ]
    parts += [
        Heading(f"Figure 2: {score_name(found)}"),
        Paragraph(attention_text(found)),
        pictures["attention"],
    ]
    if "scores" in pictures:
        parts += [
            Paragraph(
                "What the method itself ranks the patches by, in the blocks that select; grey patches "
                "have no score there."
            ),
            pictures["scores"],
        ]
    elif found.method:
        parts.append(Note("This method ranks no patches, so it has no score of its own to show."))
    parts.append(Heading("Figure 4a: mean patch tokens and the final class token"))
    if "cka" in pictures:
        parts += [Paragraph(CKA_TEXT), pictures["cka"]]
    elif found.has_class_token:
        parts.append(Note(f"Left out: linear CKA over fewer than {LEAST} images is high for any images."))
    else:
        parts.append(Note("Left out: this model has no class token to compare with."))
    parts += [Heading("Figure 4b: how alike the queries are"), Paragraph(QUERY_TEXT), pictures["correlation"]]
    parts += [Heading("Figure 5: what is kept"), Paragraph(kept_text(found)), pictures["kept"]]
    nowhere = [block.number for block in found.measures.blocks if block.kept == 0]
    if nowhere:
        parts.append(Note(f"From block {nowhere[0]} on, tokens have no places; no patch is darkened there."))
    if found.other_views is not None:
        parts += [
            Paragraph(f"The same weights in {found.other_mode} mode, whatever mode they were trained in."),
            pictures[f"kept_{found.other_mode}"],
        ]
    if found.moments:
        lines = [[moment.name, f"{moment.agreement:.2f}"] for moment in found.moments]
        last = found.moments[-1].name
        parts += [
            Paragraph(f"Block {found.first_block}, with the weights of the run's checkpoints."),
            pictures["training"],
            table(("checkpoint", f"Jaccard with {last}"), lines),
        ]
    parts.append(Heading("How alike the selections of the blocks are"))
    if "agreement" in pictures:
        parts += [Paragraph(AGREEMENT_TEXT), pictures["agreement"]]
    else:
        parts.append(Note("Left out: the tokens of this method have no places."))
    return [*parts, Heading("All numbers"), rows_of(found)]


CKA_TEXT = (
    "Linear CKA over the images, after each block. Informative: the tokens a block keeps; where it keeps "
    "all, the half with the highest global class attention (eq. 4, alpha 0.5) up to this block. Placeholder: "
    "all others, with their current or last values. By chance: the same with the class tokens of other "
    "images, for as many images and channels; only values above it mean anything."
)
QUERY_TEXT = (
    "Pearson correlation, over channels, of each patch token's query with the mean query of its image; mean "
    "and variance over tokens, then the mean over images."
)
AGREEMENT_TEXT = (
    "Jaccard index of the informative tokens of each two blocks, mean over images: 1 is the same patches. "
    "Blocks that share one selection (stage mode) have 1 by construction. Nothing reduced: the same weights "
    "with all tokens in every block, and the half that class attention up to each block would choose. Where "
    "only tokens that take part get new scores, selections can agree more than the attention does."
)


def attention_text(found: Analysis) -> str:
    """Say what the first maps are."""
    scaled = "Each map is scaled to its own largest value."
    if not found.has_class_token:
        return (
            "This model has no class token; the maps show the attention that each patch receives, mean over "
            f"heads and over all queries (table 4, column mean). {scaled}"
        )
    absent = " A grey patch takes no part in the block." if found.method else ""
    return f"Attention of the class token to the patches (eq. 3), mean over heads. {scaled}{absent}"


def kept_text(found: Analysis) -> str:
    """Say what the pictures of kept patches are."""
    if found.method:
        mode = f", in {found.mode} mode" if found.mode else ""
        return f"Bright patches take part in the block{mode}; dark ones wait or were dropped."
    half = "global class attention" if found.has_class_token else "attention received"
    return f"Nothing is reduced; the bright half is what {half} up to each block would choose."
