"""The page itself: what stands where, and what happens when something is chosen. Needs gradio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from evovit.app.known import Known
from evovit.app.picked import Picked, samples, thumbnail, uploaded
from evovit.app.shown import (
    KEPT,
    VIEWS,
    answer_parts,
    comparison_parts,
    cost_parts,
    note_parts,
    picture_parts,
    refusal,
    tuned_parts,
)
from evovit.app.workbench import OWN, Seen, Wish, Workbench
from evovit.engines.opening import read_exports
from evovit.errors import EvoViTError
from evovit.report.page import Note, Part, Quiet, fragment
from evovit.tuning.record import read_tuned

LOOK, COMPARE, TUNED = "Look", "Compare methods", "Tuned schedules"  # the tabs
ALONE = ("PyTorch", "")  # the engine where no exported file runs beside
COMPARED = ("evo_vit", "evit", "tome")  # at the start
PREVIEW = 800  # pixels of the longer side of the photograph in its field
NO_SEARCH = (
    "No folder of evovit tune lies here. It finds the schedule that makes a model as fast as you wish: "
    "evovit tune MODEL --target 1.5x --images photos. Then choose its folder."
)
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
COMPUTES = PRIVATE | {"concurrency_limit": 1, "concurrency_id": "compute"}
AT_ONCE = PRIVATE | {"concurrency_limit": None, "show_progress": "hidden"}


class Page:
    """The page of a workbench. What a visitor sees lies in the states of their own session.

    Args:
        workbench: that computes for all visitors.
        known: what is offered to choose.
        published: whether the first model is shown with its published weights.
    """

    def __init__(self, workbench: Workbench, known: Known, published: bool = False) -> None:
        self.workbench, self.known, self.published = workbench, known, published
        self.samples = samples()
        self.free = {"allow_custom_value": workbench.only is None}

    # what stands where

    def build(self) -> gr.Blocks:
        """Return the page, to be launched."""
        with gr.Blocks(title="evovit", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            self.picked, self.tab = gr.State(self.samples[0]), gr.State(LOOK)
            self.seen, self.compared = gr.State(None), gr.State(None)
            _html(
                "head",
                "<h1>evovit</h1><p>See what a vision transformer keeps of your photograph, what it answers "
                "with fewer tokens, and what that saves. Nothing leaves this machine.</p>",
            )
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=3, min_width=280, elem_id="choice") as self.choice:
                    self._choice()
                with gr.Column(scale=9, min_width=320), gr.Tabs():
                    with gr.Tab(LOOK) as look_tab:
                        self._look_tab()
                    with gr.Tab(COMPARE) as compare_tab:
                        self._compare_tab()
                    with gr.Tab(TUNED) as tuned_tab:
                        self._tuned_tab()
            self._wire(blocks, {LOOK: look_tab, COMPARE: compare_tab, TUNED: tuned_tab})
        return blocks

    def _choice(self) -> None:
        self.photograph = gr.Image(
            self.samples[0].picture,
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            label="Photograph",
            height=230,
            buttons=[],
            elem_id="photograph",
        )
        self.photograph_note = _html("photograph-note")
        self.gallery = gr.Gallery(
            [(thumbnail(each), each.title) for each in self.samples],
            show_label=False,
            columns=len(self.samples),
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="samples",
        )
        self.model = gr.Dropdown(
            list(self.known.models),
            value=self.known.models[0],
            label="Model",
            info="timm name, hf: and a name of transformers, or the folder of a run or a saved model",
            elem_id="model",
            **self.free,
        )
        self.weights = gr.Checkbox(
            self.published, label="published weights (downloaded)", container=False, elem_id="published"
        )
        self.notes = _html("notes")

    def _look_tab(self) -> None:
        with gr.Row():
            self.method = gr.Dropdown(
                ["evo_vit"], value="evo_vit", label="Method", min_width=150, elem_id="method"
            )
            self.ratio = _slider("Keep ratio", "ratio")
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self.picture = _html("picture")
                self.block = _slider("Block", "block", 11)
                self.view = _views("view")
            with gr.Column(scale=4, min_width=300):
                self.cost, self.answers = _html("cost"), _html("answers")
        with gr.Accordion("Options of the method, exported engines", open=False, elem_id="more"):
            self.options = gr.Textbox(
                "",
                label="Options",
                placeholder="start_block=4, mode=stage",
                info="option=value, option=value; evovit methods NAME lists them. Enter takes them.",
                elem_id="options",
            )
            with gr.Row():
                self.export = gr.Dropdown(
                    ["", *self.known.exports],
                    value="",
                    label="Folder of evovit export",
                    info="a file of it then runs beside PyTorch",
                    elem_id="export",
                    **self.free,
                )
                self.engine = gr.Dropdown(
                    [ALONE], value=ALONE[1], label="Engine", info="what runs", elem_id="engine"
                )
            self.export_note = _html("export-note")

    def _compare_tab(self) -> None:
        with gr.Row():
            self.methods = gr.Dropdown(
                list(COMPARED),
                value=list(COMPARED),
                multiselect=True,
                allow_custom_value=True,
                label="Methods",
                info="NAME, or NAME:option=value,option=value",
                elem_id="methods",
            )
            self.compare_ratio = _slider("Keep ratio of all", "compare-ratio")
        self.tiles = _html("tiles")
        with gr.Row():
            self.compare_block = _slider("Block", "compare-block", 11)
            with gr.Column(min_width=300):
                self.compare_view = _views("compare-view")
        self.compare_cost, self.compare_answers = _html("compare-cost"), _html("compare-answers")

    def _tuned_tab(self) -> None:
        self.search = gr.Dropdown(
            list(self.known.searches),
            value=next(iter(self.known.searches), None),
            label="Folder of evovit tune",
            info="the same folder is a model of the first tab",
            elem_id="search",
            **self.free,
        )
        self.found = _html("found")

    # what happens when

    def _wire(self, blocks: gr.Blocks, tabs: dict[str, Any]) -> None:
        offered = [self.method, self.block, self.compare_block, self.methods]
        opening = (self.offer, [self.model, self.weights, self.method, self.methods], offered)
        for trigger in (blocks.load, self.model.input, self.weights.input):
            self._refresh(trigger(*opening, **COMPUTES).then)
        photograph = [self.picked, self.photograph, self.photograph_note]
        taken = self.photograph.upload(
            self.take, [self.photograph, self.picked], photograph, preprocess=False, **AT_ONCE
        )
        for event in (taken, self.gallery.select(self.pick, None, photograph, **AT_ONCE)):
            self._refresh(event.then)
        engines = (self.list_engines, self.export, [self.engine, self.export_note])
        self._refresh(self.export.input(*engines, **AT_ONCE).then)
        for trigger in (self.method.input, self.engine.input, self.options.submit, self.methods.input):
            self._refresh(trigger)
        for trigger in (self.ratio.input, self.compare_ratio.input):
            self._refresh(trigger, trigger_mode="always_last")
        for name, tab in tabs.items():
            event = tab.select(
                lambda name=name: (name, gr.Column(visible=name != TUNED)),
                None,
                [self.tab, self.choice],
                **AT_ONCE,
            )
            self._refresh(event.then)
        for draw, seen, block, view, picture in (
            (self.draw, self.seen, self.block, self.view, self.picture),
            (self.draw_several, self.compared, self.compare_block, self.compare_view, self.tiles),
        ):
            for trigger in (block.input, view.input):
                trigger(draw, [seen, block, view], picture, trigger_mode="always_last", **AT_ONCE)
        for trigger in (blocks.load, self.search.input):
            trigger(self.show_search, self.search, self.found, **AT_ONCE)

    def _refresh(self, trigger: Any, **more: Any) -> None:
        """Let a trigger bring the tab that is open up to date: what is seen first, then its times."""
        shared = [self.tab, self.picked, self.model, self.weights]
        looked = trigger(
            self.look,
            [
                *shared,
                self.seen,
                self.method,
                self.options,
                self.ratio,
                self.export,
                self.engine,
                self.block,
                self.view,
            ],
            [self.seen, self.picture, self.cost, self.answers, self.notes],
            **COMPUTES,
            **more,
        )
        compared = looked.then(
            self.look_at_several,
            [*shared, self.compared, self.methods, self.compare_ratio, self.compare_block, self.compare_view],
            [self.compared, self.tiles, self.compare_cost, self.compare_answers, self.notes],
            **COMPUTES,
        )
        compared.then(
            self.time,
            [self.tab, self.seen, self.compared],
            [self.seen, self.cost, self.compared, self.compare_cost],
            show_progress="hidden",
            **COMPUTES,
        )

    def offer(self, model: str, published: bool, method: str, methods: Sequence[str]) -> Any:
        """Return what can be chosen for a model; one that cannot be opened is refused by `look`."""
        try:
            held = self.workbench.open(model or "", published)
        except (EvoViTError, OSError, MemoryError, RuntimeError):
            return [gr.skip()] * 4
        able = list(held.methods)
        first = OWN if OWN in able else method if method in able else able[0]
        block = min(held.depth - 1, round(0.7 * held.depth))
        slider = gr.Slider(maximum=held.depth - 1, value=block)
        several = [each for each in methods if each.partition(":")[0] in able] or able[:2]
        return (
            gr.Dropdown(choices=able, value=first),
            slider,
            slider,
            gr.Dropdown(choices=able, value=several),
        )

    def take(self, file: Any, before: Picked) -> Any:
        """Return an uploaded photograph, or why it is none."""
        try:
            picked = uploaded(file["path"], file.get("orig_name") or "photograph")
        except (EvoViTError, OSError, MemoryError) as error:
            return before, _preview(before), _drawn(refusal(error))
        return picked, _preview(picked), _drawn([Quiet(picked.title)])

    def pick(self, event: gr.SelectData) -> Any:
        """Return a sample."""
        picked = self.samples[event.index]
        return picked, _preview(picked), _drawn([Quiet(picked.title)])

    def list_engines(self, folder: str | None) -> Any:
        """Return the engines of a folder of an export, its first one chosen."""
        try:
            exports = {}
            if folder:
                self.workbench.expect_allowed(folder, "the folder of an export")
                exports = read_exports(folder)
        except (EvoViTError, OSError) as error:
            return gr.Dropdown(choices=[ALONE], value=ALONE[1]), _drawn(refusal(error))
        found = [(f"{each.engine.name}, {each.precision}", target) for target, each in exports.items()]
        return gr.Dropdown(choices=[ALONE, *found], value=[ALONE, *found][min(1, len(found))][1]), ""

    def look(
        self,
        tab: str,
        picked: Picked,
        model: str,
        published: bool,
        before: Seen | None,
        method: str,
        options: str,
        ratio: float,
        export: str,
        target: str,
        block: int,
        view: str,
    ) -> Any:
        """Bring the first tab up to date, if it is open."""
        wish = Wish(
            model=model or "",
            published=published,
            methods=(f"{method}:{options}" if options.strip() else method,),
            keep_ratio=ratio,
            exported=export or "",
            target=target or "",
        )
        if tab != LOOK or is_same(before, wish, picked):
            return [gr.skip()] * 5
        try:
            seen = self.workbench.look(wish, picked)
        except (EvoViTError, OSError, MemoryError, RuntimeError) as error:
            return None, "", "", _drawn(refusal(error)), ""
        parts = (
            picture_parts(seen, int(block), view),
            cost_parts(seen),
            answer_parts(seen),
            note_parts(seen),
        )
        return seen, *map(_drawn, parts)

    def look_at_several(
        self,
        tab: str,
        picked: Picked,
        model: str,
        published: bool,
        before: Seen | None,
        methods: Sequence[str],
        ratio: float,
        block: int,
        view: str,
    ) -> Any:
        """Bring the second tab up to date, if it is open."""
        wish = Wish(model=model or "", published=published, methods=tuple(methods), keep_ratio=ratio)
        if tab != COMPARE or is_same(before, wish, picked):
            return [gr.skip()] * 5
        try:
            seen = self.workbench.look(wish, picked)
        except (EvoViTError, OSError, MemoryError, RuntimeError) as error:
            return None, _drawn(refusal(error)), "", "", ""
        parts = (
            comparison_parts(seen, int(block), view),
            cost_parts(seen),
            answer_parts(seen),
            note_parts(seen),
        )
        return seen, *map(_drawn, parts)

    def time(self, tab: str, seen: Seen | None, compared: Seen | None) -> Any:
        """Return the times of the tab that is open, if they are missing."""
        found: list[Any] = [gr.skip()] * 4
        shown = {LOOK: seen, COMPARE: compared}.get(tab)
        if shown is None or shown.cost.ms is not None:
            return found
        place = 0 if tab == LOOK else 2
        try:
            timed = self.workbench.timed(shown)
            found[place : place + 2] = timed, _drawn(cost_parts(timed))
        except (EvoViTError, OSError, MemoryError, RuntimeError) as error:
            found[place + 1] = _drawn(refusal(error))
        return found

    def draw(self, seen: Seen | None, block: int, view: str) -> Any:
        """Return the picture of another block of the first tab."""
        return gr.skip() if seen is None else _drawn(picture_parts(seen, int(block), view))

    def draw_several(self, seen: Seen | None, block: int, view: str) -> Any:
        """Return the pictures of another block of the second tab."""
        return gr.skip() if seen is None else _drawn(comparison_parts(seen, int(block), view))

    def show_search(self, folder: str | None) -> str:
        """Return what `evovit tune` found."""
        if not folder:
            return _drawn([Quiet(NO_SEARCH)])
        try:
            self.workbench.expect_allowed(folder, "the folder of evovit tune")
            return _drawn(tuned_parts(read_tuned(folder)))
        except (EvoViTError, OSError) as error:
            return _drawn([Note(str(error))])


def is_same(seen: Seen | None, wish: Wish, picked: Picked) -> bool:
    """Tell whether that is what is seen already."""
    return seen is not None and seen.wish == wish and seen.picked is picked


def _drawn(parts: Sequence[Part]) -> str:
    return fragment(parts)


def _preview(picked: Picked) -> Any:
    if picked.picture is None:
        return thumbnail(picked)
    small = picked.picture.copy()
    small.thumbnail((PREVIEW, PREVIEW))
    return small


def _html(name: str, value: str = "") -> gr.HTML:
    return gr.HTML(value, elem_id=name, elem_classes=["parts"], js_on_load=None, apply_default_css=False)


def _slider(label: str, name: str, most: int = 0) -> gr.Slider:
    """Return a slider over ratios, or over blocks up to `most`."""
    low, high, value, step = (0, most, round(0.7 * most), 1) if most else (0.1, 1, 0.5, 0.05)
    return gr.Slider(low, high, value, step=step, label=label, min_width=200, buttons=[], elem_id=name)


def _views(name: str) -> gr.Radio:
    return gr.Radio(list(VIEWS), value=KEPT, show_label=False, container=False, elem_id=name)
