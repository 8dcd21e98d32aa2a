"""What a visitor sees, as parts of a page: the picture of a block, answers, cost; a search for a schedule."""

from __future__ import annotations

from collections.abc import Sequence

from evovit.app.picked import Picked
from evovit.app.workbench import Seen
from evovit.look import Cost, Look
from evovit.report.page import Note, Number, Numbers, Paragraph, Part, Quiet, Tile, Tiles, drawn, jpeg
from evovit.report.show import LEGENDS, answers, costs_of, kind_of, sentence
from evovit.report.show_pictures import LARGE, counted, framed
from evovit.report.tables import cell, speedup_text, table
from evovit.report.tune import answer_of, candidates_table, draw_pareto
from evovit.tuning.tune import Tuned
from evovit.visualize import fitted

KEPT, RANKED, WHOLE = "what it keeps", "what it ranks by", "the photograph"
VIEWS = (KEPT, RANKED, WHOLE)
PHONE = (4.2, 5.2)  # inches of a plot on a narrow page
DISTURBED = (
    "Timed now, in turn, in the process that serves this page: other visitors and other programs on this "
    "machine disturb it. Use evovit bench for undisturbed times."
)


def picked_parts(picked: Picked) -> list[Part]:
    """Return what is picked, in words."""
    own = "" if picked.picture is not None else ", drawn at each model's image size"
    return [Quiet(f"{picked.title}{own}")]


def picture_parts(seen: Seen, number: int, view: str) -> list[Part]:
    """Return what one block does with the photograph, large.

    Args:
        number: of the block; beyond the last one it is the last.
        view: one of `VIEWS`.
    """
    look = seen.looks[0]
    if view == WHOLE:
        whole = look.photograph.whole
        detail = f"{whole.width} x {whole.height} pixels"
        if look.photograph.box is not None:
            detail += "; the model sees what is inside the frame"
        return [
            Tiles([Tile(jpeg(framed(look), "the photograph"), look.photograph.title, detail)], large=True)
        ]
    return [Tiles([block_tile(look, number, view)], large=True), Quiet(legend(look, number, view))]


def block_tile(look: Look, number: int, view: str, named: bool = False) -> Tile:
    """Return one block's picture.

    Args:
        named: the method's name stands below it, too.
    """
    block = look.blocks[min(number, len(look.blocks) - 1)]
    picture = fitted(look.photograph.seen, LARGE)
    picture = block.draw_heat(picture) if view == RANKED else block.draw(picture)
    caption = f"block {block.number}"
    what = f"{look.photograph.title}, {view}, {caption}"
    return Tile(jpeg(picture, what), look.method if named else caption, counted(block))


def legend(look: Look, number: int, view: str) -> str:
    """Say what bright and dark mean."""
    block = look.blocks[min(number, len(look.blocks) - 1)]
    if view != RANKED:
        return LEGENDS[kind_of(look)] if block.has_places else "Here, its tokens are mixtures of all patches."
    what = (
        "What attention reads; the method ranks nothing here" if block.score is None else "What it ranks by"
    )
    return f"{what}, from least (dark) to most (bright); a pale patch has no token."


def note_parts(seen: Seen) -> list[Part]:
    """Return the model's name, what the methods do, and what makes it all doubtful."""
    does = dict.fromkeys(f"{look.method}: {look.does}" for look in seen.looks if look.blocks)
    return [*map(Note, seen.notes), Quiet(seen.name), *map(Quiet, [*seen.hints, *does])]


def answer_parts(seen: Seen) -> list[Part]:
    """Return what dense and reduced models answer."""
    return [*(Paragraph(sentence(look)) for look in seen.looks), answers(seen.looks)]


def cost_parts(seen: Seen) -> list[Part]:
    """Return GMACs and milliseconds, of one method as large numbers."""
    return [Numbers(numbers_of(seen.cost)) if len(seen.looks) == 1 else costs_of(seen.looks)]


def condition_parts(seen: Seen) -> list[Part]:
    """Return under which conditions the times were taken, and what makes them doubtful."""
    cost = seen.cost
    if cost.ms is None:
        return [Quiet("Timing ...")]
    said = Quiet(f"{DISTURBED} {cost.conditions}. GMACs are 1e9 multiply-accumulates of one image.")
    return [*(Note(f"Note: {note}.") for note in cost.notes), said]


def numbers_of(cost: Cost) -> list[Number]:
    """Return the numbers of a reduced model beside the dense one."""
    share = cost.gmacs / cost.dense_gmacs
    found = [Number("GMACs", f"{cost.gmacs:.3g}", f"dense {cost.dense_gmacs:.3g}, {share:.0%} of it")]
    if cost.ms is None:
        return [*found, Number("milliseconds", "..."), Number("speed-up", "...")]
    found.append(Number("milliseconds", cell(cost.ms, 1), f"dense {cell(cost.dense_ms, 1)}"))
    text, _, noise = speedup_text(cost.speedup, cost.noise).partition(" ± ")
    return [*found, Number("speed-up", text if text.startswith("about") else f"{text}x", f"± {noise}")]


def comparison_parts(seen: Seen, number: int, view: str) -> list[Part]:
    """Return the same block of several methods side by side."""
    looks = [look for look in seen.looks if look.blocks]
    if view == WHOLE:
        return picture_parts(seen, number, view)
    return [Tiles([block_tile(look, number, view, named=True) for look in looks])]


def tuned_parts(found: Tuned) -> list[Part]:
    """Return what a search found, and how its candidates lie."""
    small = draw_pareto(found, PHONE)
    plot = drawn(draw_pareto(found), "damage against measured speed-up of all plans", small)
    whole = candidates_table(found, predicted=False)
    shown = [whole.columns.index(name) for name in ("plan", "ms", "speed-up", "damage")]
    rows = [[row[place] for place in shown] for row in whole.rows]
    return [*answer_of(found), plot, table([whole.columns[place] for place in shown], rows, whole.bold)]


def refusal(sentence: object) -> Sequence[Part]:
    """Return why nothing is shown."""
    return [Note(str(sentence))]
