"""What a quickstart writes: the numbers of both models, what they mean, pictures, and one page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from evovit.bench.row import Row
from evovit.data.digits import MEAN, NUM_CLASSES, STD, Scenes
from evovit.data.images import TEST_BATCH
from evovit.data.photographs import SAMPLES, as_photograph, prepared, sample
from evovit.errors import printable
from evovit.look import Look, Subject
from evovit.model import ReducedViT
from evovit.models.small_vit import IMAGE_SIZE, NAME
from evovit.recipe.tables import Recipe
from evovit.report.page import (
    Bar,
    Bars,
    Beside,
    Command,
    Heading,
    Note,
    Paragraph,
    Part,
    Quiet,
    Subheading,
    Tile,
    Tiles,
    jpeg,
    page,
)
from evovit.report.show import answers
from evovit.report.show_pictures import SMALL, drawn_blocks, png_of
from evovit.report.tables import as_printed, table
from evovit.runtime.environment import device_name
from evovit.runtime.files import write_bytes, write_text
from evovit.study import Standing
from evovit.train.evaluate import Paired, paired
from evovit.train.records import EPOCHS, read_lines
from evovit.visualize import (
    OnBox,
    fitted,
    kept_on_box,
    kept_patches,
    outlined,
    patches_on_box,
    several_classes,
    sheet,
)

PICTURES = 4  # test scenes shown
PREPARE = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "mean": (MEAN,) * 3,
    "std": (STD,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "class_names": [str(digit) for digit in range(NUM_CLASSES)],
}
COLUMNS = ("method", "keep ratio", "top-1 %", "GMACs", "images/s", "training s", "parameters")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model's numbers: a row of results.json."""

    model: str
    method: str
    keep_ratio: float
    top1: float  # percent of the test scenes
    gmacs: float  # 1e9 multiply-accumulates of one image
    images_per_second: float  # median, inference
    train_seconds: float
    parameters: int
    device: str
    dtype: str
    batch_size: int  # of the speed measurement

    def cells(self) -> list[str]:
        """Return the row as text, one cell per `COLUMNS`."""
        return [
            self.method,
            f"{self.keep_ratio:g}",
            f"{self.top1:.2f}",
            f"{self.gmacs:.4f}",
            f"{self.images_per_second:.0f}",
            f"{self.train_seconds:.0f}",
            f"{self.parameters}",
        ]


def write_report(
    out: Path,
    recipe: Recipe,
    found: Sequence[Standing],
    rows: Sequence[Row],
    scenes: Scenes,
    console: Console,
) -> None:
    """Write results.json, report.html and the pictures, and print the table.

    Args:
        recipe: of Evo-ViT.
        found: the dense model and Evo-ViT, and `rows` their speeds.
        scenes: of the test.
    """
    evo, place = found[1].model, next(found[1].model.parameters()).device
    assert isinstance(evo, ReducedViT)
    batches = torch.split(scenes.images, TEST_BATCH)
    kept = torch.cat([kept_patches(evo, images.to(place)).cpu() for images in batches])
    on_box = patches_on_box(scenes.boxes, (kept.shape[2], kept.shape[3]), (IMAGE_SIZE, IMAGE_SIZE))
    shares = kept_on_box(kept, on_box)
    results = results_of(out, recipe, found, rows)
    right = found[1].right[-1], found[0].right[-1]
    sentences = findings(results, rows[1], shares, paired(*right))
    chosen = chosen_scenes(scenes, *right)
    shown = [as_photograph(scenes.images[row], PREPARE, f"digit {scenes.labels[row]}") for row in chosen]
    subject = Subject(name=NAME, dense=found[0].model, reduced=(evo,), preprocessing=PREPARE)
    digits = [looks[0] for looks in subject.look(shown)]
    photographs = [
        looks[0] for looks in subject.look(prepared(sample(title), PREPARE, title) for title in SAMPLES)
    ]
    boxes = [tuple((scenes.boxes[row] / IMAGE_SIZE).tolist()) for row in chosen]
    drawn = [tiles_of(look, box) for look, box in zip(digits, boxes, strict=True)]
    write_bytes(out / "kept_patches.png", sheet_of_tiles(drawn))
    write_text(out / "results.json", json.dumps([asdict(result) for result in results], indent=2) + "\n")
    parts = [
        *opening(sentences, results, rows[1], recipe, len(scenes.labels)),
        *digits_part(digits, drawn),
        *photographs_part(photographs),
        *numbers_part(results, shares),
        *next_part(out),
    ]
    write_text(out / "report.html", page("evovit quickstart", parts))
    console.print(as_printed(table(COLUMNS, [result.cells() for result in results])))
    for sentence in sentences:
        console.print(sentence)
    console.print(f"Report: {(out / 'report.html').resolve()}", soft_wrap=True)


def chosen_scenes(scenes: Scenes, ours: Tensor, theirs: Tensor) -> list[int]:
    """Return the positions of a few test scenes of different digits; the last is one where the models differ.

    Args:
        ours, theirs: (scenes,) bool, whether each model is right.
    """
    apart = (ours != theirs).nonzero().flatten()[:1].tolist()
    others = [row for row in several_classes(scenes.labels, PICTURES) if row not in apart]
    return [*others[: PICTURES - len(apart)], *apart]


def results_of(out: Path, recipe: Recipe, found: Sequence[Standing], rows: Sequence[Row]) -> list[Result]:
    """Return the numbers of the dense model and of Evo-ViT, whose runs are in `out`."""
    results = []
    for each, row, ratio in zip(found, rows, (1.0, recipe.method.options["keep_ratio"]), strict=True):
        epochs = read_lines(out / each.name / EPOCHS)
        result = Result(
            model=NAME,
            method=each.name,
            keep_ratio=ratio,
            top1=epochs[-1]["top1"],
            gmacs=row.gmacs,
            images_per_second=row.images_per_second or 0.0,
            train_seconds=sum(epoch["train_seconds"] for epoch in epochs),
            parameters=sum(weight.numel() for weight in each.model.parameters()),
            device=device_name(row.device) + (f", {row.threads} threads" if row.device == "cpu" else ""),
            dtype="float32",
            batch_size=row.batch,
        )
        results.append(result)
    return results


def findings(results: Sequence[Result], speed: Row, shares: Sequence[OnBox], beside: Paired) -> list[str]:
    """Say what was measured, a sentence each.

    Args:
        results: of the dense model and of Evo-ViT, whose speed beside it is `speed`.
        shares: one per block of Evo-ViT.
        beside: its accuracy beside the dense model's, scene by scene.
    """
    dense, evo = results
    top1 = f"top-1 {beside.difference:+.2f} ± {beside.error:.2f} points"
    work = f"{evo.gmacs / dense.gmacs:.2f} of the multiply-accumulates"
    found = [f"Evo-ViT at keep ratio {evo.keep_ratio:g}: {top1}, {work}, speed {speed.verdict}."]
    reducing = [share for share in shares if share.kept < 1]
    if reducing:
        covered, kept, on_box, box = (sum(c) / len(reducing) for c in zip(*reducing, strict=True))
        found.append(
            f"Of the patches on the digit, {covered:.0%} are kept (by chance {kept:.0%}); of the kept "
            f"patches, {on_box:.0%} lie on the digit (by chance {box:.0%})."
        )
    return found


def opening(
    sentences: Sequence[str], results: Sequence[Result], speed: Row, recipe: Recipe, scenes: int
) -> list[Part]:
    """Return what was done and found, as bars; every bar begins at 0."""
    fastest = max(result.images_per_second for result in results)
    names = ["dense", "Evo-ViT"]
    accuracy, work, pace = list[Bar](), list[Bar](), list[Bar]()
    for series, (name, result) in enumerate(zip(names, results, strict=True)):
        share = result.top1 / 100
        error = (share * (1 - share) / scenes) ** 0.5
        ends = max(0.0, share - error), min(1.0, share + error)
        accuracy.append(Bar(name, share, f"{result.top1:.2f} ± {100 * error:.2f} %", series, *ends))
        ratio = result.gmacs / results[0].gmacs
        work.append(Bar(name, ratio, f"{result.gmacs:.4f} GMACs", series))
        pace.append(
            Bar(name, result.images_per_second / fastest, f"{result.images_per_second:.0f} images/s", series)
        )
    return [
        Paragraph(
            "A small vision transformer, dense and with Evo-ViT, both trained from scratch by one recipe: "
            "same initial weights, same scenes, same order. A scene shows one real handwritten digit among "
            "fragments of others; accuracy is measured on scenes of digits never seen in training."
        ),
        *map(Paragraph, sentences),
        Bars(
            [
                ("Top-1 accuracy (more is better)", accuracy),
                ("Work for one image (less is better)", work),
                ("Speed (more is better)", pace),
            ]
        ),
        Quiet(
            f"Each was trained once, with seed {recipe.run.seed}; the whiskers are the standard error over "
            f"{scenes} test scenes. Another seed changes both by about a point: try --seed 1 --out FOLDER."
        ),
        Quiet(
            f"{NAME} on {results[0].device}, {results[0].dtype}; speed at batch {results[0].batch_size}, "
            f"{speed.engine} PyTorch, the models timed in turn, medians of {speed.rounds} rounds. Other "
            "machines give other figures."
        ),
        *(Note(f"Note: {note}.") for note in speed.notes),
    ]


def tiles_of(look: Look, box: Sequence[float] | None = None) -> list[tuple[Image.Image, str, str]]:
    """Return what the model sees, what its reducing blocks keep and the first score, with two captions each.

    Args:
        box: of the digit, as shares of the sides.
    """
    found: list[tuple[Image.Image, str, str]] = [
        (fitted(look.photograph.seen, SMALL), look.photograph.title, "what the model sees")
    ]
    reducing = [each for each in drawn_blocks(look) if each.blocks[0].reduces]
    found += [(each.picture, each.name, each.detail) for each in reducing]
    scored = next((block for block in look.blocks if block.score is not None), None)
    if scored is not None:
        found.append((scored.draw_heat(found[0][0]), f"block {scored.number}", "the score it ranks by"))
    if box is None:
        return found
    return [(outlined(picture, box), name, detail) for picture, name, detail in found]


def as_tiles(drawn: Sequence[tuple[Image.Image, str, str]]) -> Tiles:
    """Return pictures with their words as tiles of the page."""
    return Tiles([Tile(jpeg(picture, f"{name}: {detail}"), name, detail) for picture, name, detail in drawn])


def sheet_of_tiles(drawn: Sequence[Sequence[tuple[Image.Image, str, str]]]) -> bytes:
    """Return one PNG with a row for each scene."""
    columns = max(map(len, drawn))
    blank = Image.new("RGB", (1, 1), "white")
    rows = [[*row, *[(blank, "", "")] * (columns - len(row))] for row in drawn]
    tiles = [
        (picture, f"{name}: {detail}" if detail else name) for row in rows for picture, name, detail in row
    ]
    return png_of(sheet([tile for tile, _ in tiles], [title for _, title in tiles], columns, side=SMALL))


def digits_part(looks: Sequence[Look], drawn: Sequence[Sequence[tuple[Image.Image, str, str]]]) -> list[Part]:
    """Return a few test scenes: what the blocks keep, and both answers."""
    parts: list[Part] = [
        Heading("What it keeps, and what it answers"),
        Paragraph(
            "Bright patches take part in the blocks named; dark ones are placeholders and wait. The red box "
            "marks the digit; no model ever sees it. The bars show what both models answer."
        ),
    ]
    for look, tiles in zip(looks, drawn, strict=True):
        parts.append(Subheading(f"{look.photograph.title}: {verdict(look)}"))
        parts.append(Beside([as_tiles(tiles), answers([look], 2, 2)]))
    return parts


def verdict(look: Look) -> str:
    """Say what both models answer in few words."""
    dense, evo = look.dense.top[0].name, look.reduced.top[0].name
    return f"both answer {dense}" if look.agrees else f"dense answers {dense}, Evo-ViT {evo}"


def photographs_part(looks: Sequence[Look]) -> list[Part]:
    """Return the sample photographs through the same model, which has seen digits alone."""
    return [
        Heading("The same on photographs"),
        Paragraph(
            f"The model was trained on digits only and sees {IMAGE_SIZE} x {IMAGE_SIZE} pixels of each "
            "photograph: its answers mean nothing here, and it keeps what looks like parts of digits. For "
            "models trained on photographs, see the commands at the end of this page."
        ),
        Beside([as_tiles(tiles_of(look)) for look in looks]),
    ]


def numbers_part(results: Sequence[Result], shares: Sequence[OnBox]) -> list[Part]:
    """Return all numbers as tables."""
    blocks = [[str(i), *(f"{share:.1%}" for share in block)] for i, block in enumerate(shares)]
    return [
        Heading("All numbers"),
        table(COLUMNS, [result.cells() for result in results]),
        Paragraph(
            "A patch lies on the digit if its centre lies in the digit's box; the shares are means over all "
            "test scenes."
        ),
        table(("block", "digit patches kept", "chance", "kept patches on digit", "chance"), blocks),
    ]


def next_part(out: Path) -> list[Part]:
    """Return three commands to go on with."""
    run = printable(out / "evo_vit")
    return [
        Heading("What to do next"),
        Command(
            "evovit show photo.jpg --model deit_small_patch16_224 --pretrained",
            "Show your own photograph to a model trained on ImageNet (downloaded the first time).",
        ),
        Command(
            "evovit bench deit_small_patch16_224 --keep-ratio 0.3 0.5 0.7",
            "Measure how much faster a larger model becomes on this machine.",
        ),
        Command(
            f"evovit eval {run} --method tome:r=4 idle_vit",
            "Try other methods on the weights just trained; evovit methods lists them all.",
        ),
    ]
