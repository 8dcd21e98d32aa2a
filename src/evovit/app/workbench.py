"""What the page computes, without the page: models are opened once, and one thing is done at a time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evovit.app.picked import Picked
from evovit.backbones import adapt, check_adapter
from evovit.backbones.base import BackboneSpec, evaluating
from evovit.bench.setting import BUDGET, Variant
from evovit.bench.timing import Outside
from evovit.engines.base import Run
from evovit.engines.opening import Exported, read_exports
from evovit.errors import EvoViTError, check_ratio, listed, shown
from evovit.look import Cost, Look, Opened, Subject, answer_of, costs, in_words, open_named, subject_of
from evovit.methods import DENSE, build_config, find_method, list_methods
from evovit.model import ReducedViT
from evovit.options import read_named
from evovit.runtime.files import as_path
from evovit.runtime.seeds import seeded
from evovit.tuning.plans import fitted

OWN = "its_own"  # stands for the method of a model that is reduced already
KEPT = 3  # models, and files of exports, that stay open
LEAST, MOST = 3, 30  # rounds of timing
SAMPLE_SECONDS = 0.02  # a round takes at least so long for each model
COUNTS = ("keep_ratio", "keep_per_block", BUDGET)  # options beside which the slider has no say


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a visitor wants to see."""

    model: str  # what `evovit show --model` takes
    published: bool = False  # with its published weights
    methods: tuple[str, ...] = ("evo_vit",)  # each NAME, NAME:option=value, or `OWN`
    keep_ratio: float = 0.5  # of those that have one, as `ReducedViT.budget` means it
    exported: str = ""  # a folder of `evovit export`
    target: str = ""  # which file of it runs beside PyTorch; empty: none


class Held(NamedTuple):
    """A model that stays open, and what can be done with it."""

    opened: Opened
    host: nn.Module
    methods: tuple[str, ...]  # that run on it, `OWN` first if it is reduced
    sliding: frozenset[str]  # those of them with a keep ratio
    depth: int  # blocks


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a visitor sees."""

    wish: Wish
    picked: Picked
    name: str  # of the model, with its weights
    notes: tuple[str, ...]  # what makes it doubtful
    hints: tuple[str, ...]  # where the keep ratio has no say
    looks: tuple[Look, ...]  # one for each method; then that of the exported file, if any
    depth: int  # blocks

    @property
    def cost(self) -> Cost:
        """That of the first method."""
        return self.looks[0].cost


class Workbench:
    """The models of all visitors. What one of them sees is in the `Seen` they get, and nowhere here.

    Args:
        device: where to compute.
        only: models and folders that may be chosen; None: any.
    """

    def __init__(self, device: torch.device | str = "cpu", only: Sequence[str] | None = None) -> None:
        self.device, self.only = torch.device(device), only
        self._lock = RLock()
        self._held: OrderedDict[tuple[str, bool], Held] = OrderedDict()
        self._files: OrderedDict[tuple[str, int], Run] = OrderedDict()

    def expect_allowed(self, name: str, what: str) -> None:
        """Raise `EvoViTError` for an empty name, no path, or one that is not on offer."""
        if not name.strip():
            raise EvoViTError(f"{what} is empty; choose one, or type a name.")
        as_path(name, what)
        if self.only is not None and name not in self.only:
            raise EvoViTError(
                f"{what} is {shown(name)}, which is not in the list; this page is open to other machines, "
                "so it opens only what is in its list."
            )

    def open(self, model: str, published: bool = False) -> Held:
        """Return a model, opened and proven once.

        Raises:
            EvoViTError: an unknown name, a damaged folder, weights that cannot be had.
        """
        self.expect_allowed(model, "the model")
        with self._lock:
            key = (model, published)
            if key not in self._held:
                self._held[key] = self._opened(model, published)
                while len(self._held) > KEPT:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key]

    def _opened(self, model: str, published: bool) -> Held:
        with seeded("app", model):  # random weights are the same each time
            opened = open_named(model, "", published)
        whole = opened.model.to(self.device).eval()
        reduced = isinstance(whole, ReducedViT)
        host: nn.Module = whole.model if isinstance(whole, ReducedViT) else whole
        if not reduced:
            check_adapter(host)
        spec = adapt(host).spec
        slides = {name: _slides(name, spec) for name in list_methods() if name != DENSE}
        able = [name for name, answer in slides.items() if answer is not None]
        sliding = {name for name in able if slides[name]}
        if isinstance(whole, ReducedViT) and whole.budgets:
            sliding.add(OWN)
        methods = ([OWN] if reduced else []) + able
        return Held(opened, host, tuple(methods), frozenset(sliding), spec.depth)

    def look(self, wish: Wish, picked: Picked) -> Seen:
        """Return what a model does with a photograph, by each method; nothing is timed."""
        with self._lock:
            held = self.open(wish.model, wish.published)
            subject = self._subject(held, wish)
            photograph = picked.photograph(subject.preprocessing)
            (looks,) = subject.look([photograph])
            if wish.target:
                looks.append(self._look_outside(wish, subject, looks[0]))
            return Seen(
                wish=wish,
                picked=picked,
                name=subject.name,
                notes=subject.notes,
                hints=hints_of(held, wish),
                looks=tuple(looks),
                depth=held.depth,
            )

    def timed(self, seen: Seen, seconds: float = 2.0) -> Seen:
        """Return the same with times, all models in turn.

        Args:
            seconds: that the rounds may take, if `LEAST` of them do not take longer.
        """
        wish = seen.wish
        with self._lock:
            held = self.open(wish.model, wish.published)
            subject = self._subject(held, wish)
            models = {"dense": subject.dense} | {str(i): each for i, each in enumerate(subject.reduced)}
            image = seen.looks[0].photograph.image
            images = image[None].to(next(subject.dense.parameters()))
            outside = {}
            if wish.target:
                exported, run = self._file(wish)
                outside["file"] = Outside(lambda _: run(image[None].float()), exported.gmacs)
            rounds = rounds_within(seconds, models, images)
            spent = costs(models, images, rounds, outside)
        looks = [replace(look, cost=cost) for look, cost in zip(seen.looks, spent, strict=True)]
        return replace(seen, looks=tuple(looks))

    def _subject(self, held: Held, wish: Wish) -> Subject:
        """Return the dense model and the reduced ones that are wished, in their order."""
        variants = variants_of(held, wish)
        parts = []
        for variant in variants:
            given = held.opened.model
            if variant is None and isinstance(given, ReducedViT) and given.budgets:
                given.budget = min(given.budgets, key=lambda each: abs(each - wish.keep_ratio))
            model = given if variant is None else held.host
            with seeded("app", str(variant)):  # parameters of a method's own are drawn the same each time
                own = [] if variant is None else [variant]
                parts.append(subject_of(model, own, *held.opened[1:], verify=False))
            parts[-1].reduced[0].to(self.device)
        notes = dict.fromkeys(note for part in parts for note in part.notes)
        return replace(
            parts[0], reduced=tuple(model for part in parts for model in part.reduced), notes=tuple(notes)
        )

    def _file(self, wish: Wish) -> tuple[Exported, Run]:
        """Return a file of an export, loaded once."""
        self.expect_allowed(wish.exported, "the folder of an export")
        exports = read_exports(wish.exported)
        if wish.target not in exports:
            raise EvoViTError(
                f"{shown(wish.exported)} has no file for {shown(wish.target)}; it has {listed(exports)}."
            )
        exported = exports[wish.target]
        if exported.batch not in (None, 1):
            raise EvoViTError(
                f"{shown(exported.path)} takes {exported.batch} images at once; export it with --batch 1 or "
                "dynamic."
            )
        key = (str(exported.path), exported.path.stat().st_mtime_ns if exported.path.is_file() else 0)
        if key not in self._files:
            self._files[key] = exported.load(torch.get_num_threads())
            while len(self._files) > KEPT:
                self._files.popitem(last=False)
        return exported, self._files[key]

    def _look_outside(self, wish: Wish, subject: Subject, beside: Look) -> Look:
        """Return what an exported file answers, as a look without blocks."""
        exported, run = self._file(wish)
        theirs, ours = vars(exported.preprocessing), subject.preprocessing
        same = all(_plain(theirs[key]) == _plain(ours[key]) for key in theirs if key != "class_names")
        vector = run(beside.photograph.image[None].float())[0] if same else torch.empty(0, 0)
        if vector.shape[1] != len(beside.dense.vector):
            raise EvoViTError(
                f"{shown(exported.path)} was exported from another model: it takes other images or has other "
                "classes. Choose the model that it was exported from."
            )
        classes = vector.shape[1] if beside.dense.top else 0
        words = in_words(exported.method, exported.config)
        return replace(
            beside,
            method=f"{words}, {exported.engine.name} {exported.precision}",
            reduced=answer_of(vector, classes, ours["class_names"]),
            blocks=(),
            cost=Cost(dense_gmacs=beside.cost.dense_gmacs, gmacs=exported.gmacs),
        )


def variants_of(held: Held, wish: Wish) -> list[Variant | None]:
    """Return the methods that are wished with their options; None stands for the model's own.

    Raises:
        EvoViTError: none is chosen, an unknown one or a wrong option.
    """
    check_ratio("the keep ratio", wish.keep_ratio)
    found: list[Variant | None] = []
    for text in wish.methods:
        name, options = read_named(text)
        if name == OWN:
            if OWN not in held.methods or options:
                why = (
                    "is as it is and takes no options"
                    if options
                    else "is for a model that is reduced already"
                )
                raise EvoViTError(f"{OWN} {why}; choose a method.")
            found.append(None)
            continue
        options = fitted(find_method(name), options, held.depth)
        if name in held.sliding and not any(key in options for key in COUNTS):
            options |= {BUDGET: wish.keep_ratio}
        variant = Variant(name, options)
        variant.config()
        found.append(variant)
    if not found:
        raise EvoViTError("No method is chosen; choose one.")
    return found


def hints_of(held: Held, wish: Wish) -> tuple[str, ...]:
    """Return for each method where the keep ratio has no say why not."""
    found = []
    for name, options in map(read_named, wish.methods):
        if name not in held.sliding:
            found.append(f"{name} has no keep ratio that one number sets: the slider has no effect.")
        elif any(key in options for key in COUNTS):
            found.append(f"The options set what {name} keeps: the slider has no effect.")
    return tuple(dict.fromkeys(found))


def rounds_within(seconds: float, models: Mapping[str, nn.Module], images: Tensor) -> int:
    """Return how many rounds of timing fit into so many seconds, `LEAST` to `MOST`."""
    spent = 0.0
    for model in models.values():
        start = time.perf_counter()
        with torch.inference_mode(), evaluating(model):
            model(images)
        once = time.perf_counter() - start
        spent += once + max(once, SAMPLE_SECONDS)
    return max(LEAST, min(MOST, int(seconds / spent)))


def _slides(name: str, spec: BackboneSpec) -> bool | None:
    """Tell whether a method has a keep ratio that one number sets; None: it does not run on this host."""
    cls = find_method(name)
    try:
        method = cls(build_config(cls, fitted(cls, {}, spec.depth)), spec)
    except EvoViTError:
        return None
    try:
        method.config_at(0.5)
    except EvoViTError:
        return False
    return True


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
