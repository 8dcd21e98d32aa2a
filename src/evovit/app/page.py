"""The page itself: its layout, and what each control updates. Needs gradio."""

from __future__ import annotations

from typing import Any

import gradio as gr

from evovit.app.desk import ALONE, COMPARE, LOOK, TUNED, Desk, Offered, drawn, offer, preview
from evovit.app.known import Known
from evovit.app.picked import first_of, thumbnail
from evovit.app.shown import KEPT, VIEWS, picked_parts
from evovit.app.workbench import Workbench

PRIVATE: dict[str, Any] = {
    "api_visibility": "private",
    "preprocess": False,  # what comes is checked by the desk, in sentences of ours
}
COMPUTES = PRIVATE | {"concurrency_limit": 1, "concurrency_id": "compute"}
AT_ONCE = PRIVATE | {"concurrency_limit": None, "show_progress": "hidden"}


class Page:
    """The page of a workbench. What a visitor sees lies in the states of their own session.

    Args:
        workbench: that computes for all visitors.
        known: what is offered to choose.
        published: whether the first model is shown with its published weights.

    Raises:
        EvoViTError: the first model cannot be opened.
    """

    def __init__(self, workbench: Workbench, known: Known, published: bool = False) -> None:
        self.desk, self.known, self.published = Desk(workbench), known, published
        held = workbench.open(known.models[0], published)
        self.first = first_of(self.desk.samples, (held.opened.preprocessing or {}).get("class_names", ()))
        self.offered = offer(held)
        self.free = {"allow_custom_value": workbench.only is None}

    # what stands where

    def build(self) -> gr.Blocks:
        """Return the page, to be launched."""
        with gr.Blocks(title="evovit", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            self.picked, self.tab = gr.State(self.first), gr.State(LOOK)
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
            preview(self.first),
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            label="Photograph",
            height=230,
            buttons=[],
            elem_id="photograph",
        )
        self.photograph_note = _html("photograph-note", drawn(picked_parts(self.first)))
        self.gallery = gr.Gallery(
            [(thumbnail(each), each.title) for each in self.desk.samples],
            show_label=False,
            columns=len(self.desk.samples),
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
            info="a timm name, hf: and a Hub name, or the folder of a run or a saved model",
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
                self.offered.methods,
                value=self.offered.method,
                label="Method",
                min_width=150,
                elem_id="method",
            )
            self.ratio = _slider("Keep ratio", "ratio")
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self.picture = _html("picture")
                self.block = _slider("Block", "block", self.offered)
                self.view = _views("view")
            with gr.Column(scale=4, min_width=300):
                self.cost, self.answers = _html("cost"), _html("answers")
                self.conditions = _html("conditions")
        with gr.Accordion("Options, exported engines", open=False, elem_id="more"):
            self.options = gr.Textbox(
                "",
                label="Options",
                placeholder="start_block=4, mode=stage",
                info="option=value, option=value; evovit methods NAME lists them. Press Enter to apply.",
                elem_id="options",
            )
            with gr.Row():
                self.export = gr.Dropdown(
                    ["", *self.known.exports],
                    value="",
                    label="Folder of evovit export",
                    info="one of its files then runs beside PyTorch",
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
                self.offered.methods,
                value=self.offered.several,
                multiselect=True,
                allow_custom_value=True,
                label="Methods",
                info="NAME, or NAME:option=value,option=value",
                elem_id="methods",
            )
            self.compare_ratio = _slider("Keep ratio of all", "compare-ratio")
        self.tiles = _html("tiles")
        with gr.Row():
            self.compare_block = _slider("Block", "compare-block", self.offered)
            with gr.Column(min_width=300):
                self.compare_view = _views("compare-view")
        self.compare_cost = _html("compare-cost")
        self.compare_answers, self.compare_conditions = _html("compare-answers"), _html("compare-conditions")

    def _tuned_tab(self) -> None:
        self.search = gr.Dropdown(
            list(self.known.searches),
            value=next(iter(self.known.searches), None),
            label="Folder of evovit tune",
            info="the same folder can be chosen as a model in the first tab",
            elem_id="search",
            **self.free,
        )
        self.found = _html("found")

    # what happens when

    def _wire(self, blocks: gr.Blocks, tabs: dict[str, Any]) -> None:
        offered = [self.method, self.block, self.compare_block, self.methods]
        opening = (self.desk.offer, [self.model, self.weights, self.method, self.methods], offered)
        self._refresh(blocks.load)
        for trigger in (self.model.input, self.weights.input):
            self._refresh(trigger(*opening, **COMPUTES).then)
        photograph = [self.picked, self.photograph, self.photograph_note]
        taken = self.photograph.upload(self.desk.take, [self.photograph, self.picked], photograph, **AT_ONCE)
        for event in (taken, self.gallery.select(self.desk.pick, None, photograph, **AT_ONCE)):
            self._refresh(event.then)
        engines = (self.desk.list_engines, self.export, [self.engine, self.export_note])
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
            (self.desk.draw, self.seen, self.block, self.view, self.picture),
            (self.desk.draw_several, self.compared, self.compare_block, self.compare_view, self.tiles),
        ):
            for trigger in (block.input, view.input):
                trigger(draw, [seen, block, view], picture, trigger_mode="always_last", **AT_ONCE)
        for trigger in (tabs[TUNED].select, self.search.input):  # one at a time: Matplotlib wants it so
            trigger(self.desk.show_search, self.search, self.found, **COMPUTES)

    def _refresh(self, trigger: Any, **more: Any) -> None:
        """Let a trigger bring the tab that is open up to date: what is seen, its picture, then its times.

        The picture is of the block that is chosen when it is drawn, which may have changed meanwhile.
        """
        shared = [self.tab, self.picked, self.model, self.weights]
        wish = [self.method, self.options, self.ratio, self.export, self.engine]
        answer = [self.cost, self.answers, self.conditions, self.notes]
        looked = trigger(
            self.desk.look,
            [*shared, self.seen, *wish],
            [self.seen, self.picture, *answer],
            **COMPUTES,
            **more,
        ).then(self.desk.draw, [self.seen, self.block, self.view], self.picture, **AT_ONCE)
        answer = [self.compare_cost, self.compare_answers, self.compare_conditions, self.notes]
        compared = looked.then(
            self.desk.look_at_several,
            [*shared, self.compared, self.methods, self.compare_ratio],
            [self.compared, self.tiles, *answer],
            **COMPUTES,
        ).then(
            self.desk.draw_several,
            [self.compared, self.compare_block, self.compare_view],
            self.tiles,
            **AT_ONCE,
        )
        compared.then(
            self.desk.time,
            [self.tab, self.seen, self.compared],
            [
                *(self.seen, self.cost, self.conditions),
                *(self.compared, self.compare_cost, self.compare_conditions),
            ],
            show_progress="hidden",
            **COMPUTES,
        )


def _html(name: str, value: str = "") -> gr.HTML:
    return gr.HTML(value, elem_id=name, elem_classes=["parts"], js_on_load=None, apply_default_css=False)


def _slider(label: str, name: str, blocks: Offered | None = None) -> gr.Slider:
    """Return a slider over ratios, or over blocks."""
    low, high, value, step = (0.1, 1.0, 0.5, 0.05) if blocks is None else (0, blocks.last, blocks.block, 1)
    return gr.Slider(low, high, value, step=step, label=label, min_width=200, buttons=[], elem_id=name)


def _views(name: str) -> gr.Radio:
    return gr.Radio(list(VIEWS), value=KEPT, show_label=False, container=False, elem_id=name)
