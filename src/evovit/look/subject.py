"""A dense model, reduced ones with the same weights, and notes on what makes the results doubtful."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from evovit.bench.setting import Variant, build_models
from evovit.data.photographs import Photograph
from evovit.engines.exporting import preprocessing_of
from evovit.errors import EvoViTError, shown
from evovit.look.one import Cost, Look, costs, described, look_at
from evovit.model import ReducedViT
from evovit.train.tested import open_model

DEFAULT = "deit_small_patch16_224"  # where no model is named
QUICKSTART = Path("runs/quickstart/evo_vit")  # for digits
RANDOM = "Random weights: neither the kept patches nor the answers mean anything here."


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A dense model and reduced ones of the same weights."""

    name: str  # with its weights
    dense: nn.Module
    reduced: tuple[ReducedViT, ...]
    preprocessing: Mapping[str, Any]  # as of `engines.exporting.preprocessing_of`, with class_names
    notes: tuple[str, ...] = ()  # what makes doubtful what is seen
    is_own: bool = False  # the reduced model is one that was given, with the weights it has

    def look(self, photographs: Iterable[Photograph], rounds: int = 0) -> list[list[Look]]:
        """Return for each photograph a look for each reduced model.

        Args:
            rounds: how often each model is timed, on the first photograph, all in turn; 0: none is.
        """
        found: list[list[Look]] = []
        spent: list[Cost] = []
        for photograph in photographs:
            if not spent:
                models = {"dense": self.dense} | {str(i): model for i, model in enumerate(self.reduced)}
                spent = costs(models, photograph.image[None].to(next(self.dense.parameters())), rounds)
            names = self.preprocessing["class_names"]
            pairs = zip(self.reduced, spent, strict=True)
            found.append([look_at(self.dense, model, photograph, names, cost=cost) for model, cost in pairs])
        return found


def subject_of(
    model: nn.Module,
    variants: Sequence[Variant] = (),
    preprocessing: Mapping[str, Any] | None = None,
    name: str = "",
    notes: Sequence[str] = (),
    verify: bool = True,
) -> Subject:
    """Return a model with reduced ones beside it, all with its weights.

    Args:
        model: a host, or a reduced model, which is shown as it is unless there are variants.
        variants: methods; none: the model's own, else evo_vit.
        preprocessing: how it takes images, with class_names; default: as it says itself.
        verify: prove the host's adapter, which takes some forwards; False: it has been proven.
    """
    host: nn.Module = model.model if isinstance(model, ReducedViT) else model
    told, is_own = list(notes), isinstance(model, ReducedViT) and not variants
    if preprocessing is None and not getattr(host, "pretrained_cfg", None):
        told.append(
            "This model does not say how its images are prepared: colours are normalised as for ImageNet. "
            "Give preprocessing if that is wrong."
        )
    if isinstance(model, ReducedViT) and is_own:
        reduced = [model]
        told.append("Here, dense means the reduced model's weights with nothing reduced.")
    else:
        reduced = []
        for own in build_models(host, variants or (Variant("evo_vit"),), False, verify)[1:]:
            assert isinstance(own, ReducedViT)
            reduced.append(own)
            if any(True for _ in own.method.parameters()):
                told.append(
                    f"{described(own)} has parameters of its own, which are untrained: what it keeps means "
                    "nothing. Train it first (docs/training.md)."
                )
    return Subject(
        name=name or type(host).__name__,
        dense=host,
        reduced=tuple(reduced),
        preprocessing=preprocessing or preprocessing_of(model),
        notes=tuple(told),
        is_own=is_own,
    )


class Opened(NamedTuple):
    """A model by its name."""

    model: nn.Module  # a host or a reduced model
    preprocessing: Mapping[str, Any] | None  # with class_names; None: as the model says itself
    name: str  # with its weights
    notes: tuple[str, ...]  # what makes doubtful what is seen of it


def open_named(model: str, weights: str = "", pretrained: bool = False) -> Opened:
    """Return a model by what names it, as `open_model` reads it."""
    opened, preprocessing, warned = open_model(model, weights, pretrained)
    which = "published weights" if pretrained else shown(weights) if weights else "random weights"
    name = f"{model}, {which}" if warned or weights or pretrained else model
    return Opened(opened, preprocessing, name, (RANDOM,) if warned else ())


def open_subject(
    model: str, variants: Sequence[Variant] = (), weights: str = "", pretrained: bool = False
) -> Subject:
    """Return a model by what names it, as `open_model` reads it, with reduced ones beside it."""
    opened = open_named(model, weights, pretrained)
    return subject_of(opened.model, variants, opened.preprocessing, opened.name, opened.notes)


def default_subject(
    images: Sequence[object],
    variants: Sequence[Variant],
    weights: str,
    pretrained: bool,
    log: Callable[[str], None],
) -> Subject:
    """Return a model where none is named: for digits the quickstart's run, else `DEFAULT` as published.

    Where the published weights cannot be had, the weights are random, and the subject's notes say so.

    Args:
        log: gets a line on what takes long.
    """
    if images and all(image == "digits" for image in images):
        if not (QUICKSTART / "recipe.toml").is_file():
            raise EvoViTError(
                f"No model is given, and there is no {shown(QUICKSTART)}; run evovit quickstart first "
                "(a few minutes), or give --model."
            )
        return open_subject(str(QUICKSTART), variants, weights, pretrained)
    if weights:
        return open_subject(DEFAULT, variants, weights, pretrained)
    log(f"No model is given: {DEFAULT} with its published weights, downloaded the first time.")
    try:
        if not pretrained and not _within_reach(DEFAULT):
            raise EvoViTError(f"model: the weights of {DEFAULT} cannot be loaded (the Hub does not answer).")
        return open_subject(DEFAULT, variants, "", True)
    except EvoViTError as error:
        if "cannot be loaded" not in str(error) or pretrained:
            raise
        log(f"{error} Continuing with random weights.")
        subject = open_subject(DEFAULT, variants)
        note = (
            "The published weights could not be downloaded. To see a trained model without a network "
            "connection: evovit quickstart, then evovit show digits."
        )
        return replace(subject, notes=(*subject.notes, note))


def _within_reach(name: str) -> bool:
    """Tell whether the published weights of a timm model are here or the Hub answers.

    Asked once: a download would be tried for most of a minute.
    """
    import timm
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import get_session

    published = timm.get_pretrained_cfg(name)
    if published and isinstance(try_to_load_from_cache(str(published.hf_hub_id), "model.safetensors"), str):
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # which kind, depends on the version's HTTP client
        return False
    return True
