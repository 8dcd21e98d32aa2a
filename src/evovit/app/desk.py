"""What happens when something is chosen on the page: from the choice to what is shown. Needs gradio.

Everything a visitor sees goes through the states of their own session; a desk remembers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr

from evovit.app.picked import Picked, samples, thumbnail, uploaded
from evovit.app.shown import (
    answer_parts,
    comparison_parts,
    condition_parts,
    cost_parts,
    note_parts,
    picked_parts,
    picture_parts,
    refusal,
    tuned_parts,
)
from evovit.app.workbench import OWN, Held, Seen, Wish, Workbench
from evovit.engines.opening import read_exports
from evovit.errors import EvoViTError, is_out_of_memory
from evovit.report.page import Part, Quiet, fragment
from evovit.tuning.record import read_tuned

LOOK, COMPARE, TUNED = "Look", "Compare", "Tuned"  # the tabs
USUAL = ("evo_vit", "evit", "tome")  # methods chosen at first
ALONE = ("PyTorch", "")  # the engine where no exported file runs beside
PREVIEW = 800  # pixels of the longer side of the photograph in its field
NO_SEARCH = (
    "There is no folder of evovit tune here. This command finds the schedule that makes a model as fast as "
    "you want: evovit tune MODEL --target 1.5x --images photos. Then choose its folder."
)
FAILS = (EvoViTError, OSError, MemoryError, RuntimeError)  # what `_said` makes a sentence of


class Desk:
    """What the page needs from a workbench."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self.samples = samples()

    def offer(self, model: str, published: bool, method: str, methods: Sequence[str]) -> Any:
        """Return what can be chosen for a model; one that cannot be opened is refused by `look`."""
        try:
            offered = offer(self.workbench.open(model or "", published), method, methods)
        except FAILS:
            return [gr.skip()] * 4
        slider = gr.Slider(maximum=offered.last, value=offered.block)
        one = gr.Dropdown(choices=offered.methods, value=offered.method)
        return one, slider, slider, gr.Dropdown(choices=offered.methods, value=offered.several)

    def take(self, file: Any, before: Picked) -> Any:
        """Return an uploaded photograph, or why it is none and what was there before."""
        try:
            picked = uploaded(file["path"], file.get("orig_name") or "photograph")
        except FAILS as error:
            return before, preview(before), drawn(refusal(_said(error)))
        return picked, preview(picked), drawn(picked_parts(picked))

    def pick(self, event: gr.SelectData) -> Any:
        """Return a sample."""
        picked = self.samples[event.index]
        return picked, preview(picked), drawn(picked_parts(picked))

    def list_engines(self, folder: str | None) -> Any:
        """Return the engines of a folder of an export, its first one chosen."""
        try:
            exports = {}
            if folder:
                self.workbench.expect_allowed(folder, "the folder of an export")
                exports = read_exports(folder)
        except FAILS as error:
            return gr.Dropdown(choices=[ALONE], value=ALONE[1]), drawn(refusal(_said(error)))
        found = [ALONE, *((f"{each.engine.name}, {each.precision}", name) for name, each in exports.items())]
        return gr.Dropdown(choices=found, value=found[min(1, len(exports))][1]), ""

    def look(
        self,
        tab: str,
        picked: Picked,
        model: str | None,
        published: bool,
        before: Seen | None,
        method: str | None,
        options: str,
        ratio: float,
        export: str | None,
        target: str | None,
    ) -> Any:
        """Bring the first tab up to date, if it is open; `draw` then draws the picture."""
        wish = Wish(
            model=model or "",
            published=published,
            methods=(f"{method or ''}:{options}".removesuffix(":"),),
            keep_ratio=ratio,
            exported=export or "",
            target=target or "",
        )
        if tab != LOOK or is_same(before, wish, picked):
            return [gr.skip()] * 6
        return self._seen(wish, picked)

    def look_at_several(
        self,
        tab: str,
        picked: Picked,
        model: str | None,
        published: bool,
        before: Seen | None,
        methods: Sequence[str],
        ratio: float,
    ) -> Any:
        """Bring the second tab up to date, if it is open; `draw_several` then draws the pictures."""
        wish = Wish(model=model or "", published=published, methods=tuple(methods), keep_ratio=ratio)
        if tab != COMPARE or is_same(before, wish, picked):
            return [gr.skip()] * 6
        return self._seen(wish, picked)

    def _seen(self, wish: Wish, picked: Picked) -> Any:
        """Return what is seen, in place of a picture why there is none, cost, answers, conditions, notes."""
        try:
            seen = self.workbench.look(wish, picked)
        except FAILS as error:
            return None, drawn(refusal(_said(error))), "", "", "", ""
        parts = (cost_parts(seen), answer_parts(seen), condition_parts(seen), note_parts(seen))
        return seen, gr.skip(), *map(drawn, parts)

    def time(self, tab: str, seen: Seen | None, compared: Seen | None) -> Any:
        """Return the times of the tab that is open, if they are missing: what is seen, cost, conditions."""
        found: list[Any] = [gr.skip()] * 6
        shown = {LOOK: seen, COMPARE: compared}.get(tab)
        if shown is None or shown.cost.ms is not None:
            return found
        place = 0 if tab == LOOK else 3
        try:
            timed = self.workbench.timed(shown)
            found[place : place + 3] = timed, drawn(cost_parts(timed)), drawn(condition_parts(timed))
        except FAILS as error:
            found[place + 2] = drawn(refusal(_said(error)))
        return found

    def draw(self, seen: Seen | None, block: int, view: str) -> Any:
        """Return the picture of another block of the first tab."""
        return gr.skip() if seen is None else drawn(picture_parts(seen, int(block), view))

    def draw_several(self, seen: Seen | None, block: int, view: str) -> Any:
        """Return the pictures of another block of the second tab."""
        return gr.skip() if seen is None else drawn(comparison_parts(seen, int(block), view))

    def show_search(self, folder: str | None) -> str:
        """Return what `evovit tune` found."""
        if not folder:
            return drawn([Quiet(NO_SEARCH)])
        try:
            self.workbench.expect_allowed(folder, "the folder of evovit tune")
            return drawn(tuned_parts(read_tuned(folder)))
        except FAILS as error:
            return drawn(refusal(_said(error)))


class Offered(NamedTuple):
    """What can be chosen for a model, and what is chosen at first."""

    methods: list[str]
    method: str | None
    several: list[str]  # for the second tab
    block: int
    last: int  # block


def offer(held: Held, method: str | None = None, several: Sequence[str] = ()) -> Offered:
    """Return what can be chosen for a model.

    Args:
        method, several: that were chosen, and are again if they can be.
    """
    able = list(held.methods)
    first = next((each for each in (OWN, method, *USUAL, *able) if each in able), None)
    chosen = [each for each in several or USUAL if each.partition(":")[0] in able] or able[:2]
    return Offered(able, first, chosen, min(held.depth - 1, round(0.7 * held.depth)), held.depth - 1)


def is_same(seen: Seen | None, wish: Wish, picked: Picked) -> bool:
    """Tell whether that is what is seen already."""
    return seen is not None and seen.wish == wish and seen.picked is picked


def drawn(parts: Sequence[Part]) -> str:
    """Return parts as the page has them."""
    return fragment(parts)


def preview(picked: Picked) -> Any:
    """Return the picture for the field of the photograph."""
    if picked.picture is None:
        return thumbnail(picked)
    small = picked.picture.copy()
    small.thumbnail((PREVIEW, PREVIEW))
    return small


def _said(error: Exception) -> str:
    """Return an error of `FAILS` in one sentence; one that is a fault of ours goes on."""
    if isinstance(error, EvoViTError):
        return str(error)
    if is_out_of_memory(error):
        return "There is not enough memory; choose a smaller model or photograph."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'a file'}; choose another."
    raise error
