"""One photograph, dense and reduced: what each block keeps, what both models answer, what both cost."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from evovit.analyse import as_reduced, watch
from evovit.backbones.base import evaluating
from evovit.bench.row import Row
from evovit.bench.setting import BUDGET, Variant
from evovit.bench.timing import in_turn
from evovit.data.photographs import Photograph
from evovit.errors import check_count, printable
from evovit.macs import gmacs
from evovit.methods import name_of
from evovit.model import ReducedViT, backbone_of
from evovit.runtime.environment import device_name
from evovit.tokens import logits_of
from evovit.visualize import heat, overlay

TOP = 5  # classes shown


class Guess(NamedTuple):
    """A class and how much of the answer it has."""

    number: int
    name: str
    share: float  # softmax of the logits, 0 to 1


class Answer(NamedTuple):
    """What a model says of an image."""

    vector: Tensor  # (classes,) logits, or features of a model that classifies nothing
    top: tuple[Guess, ...]  # best first; empty where nothing is classified

    def share_of(self, number: int) -> float:
        """Return how much of the answer a class has, 0 to 1."""
        return float(self.vector.softmax(0)[number])


@dataclass(frozen=True, kw_only=True)
class BlockLook:
    """What one block of the reduced model does with an image; cells are those of the first grid."""

    number: int  # from 0
    tokens: int  # patch tokens after the block, those without a place among them
    kept: Tensor  # (rows, columns) bool, whose own token goes on; none where no token has a place
    groups: (
        Tensor | None
    )  # (rows, columns) int64, equal numbers are one token, -1: none; None: none is shared
    score: Tensor | None  # (rows, columns) float32, what the method ranked by here; NaN: no token
    attention: Tensor  # (rows, columns) float32, what the class token attends to, or all do; NaN: no token

    @property
    def has_places(self) -> bool:
        """Tell whether one can say which patches the tokens are."""
        return bool(self.kept.any()) or self.groups is not None

    @property
    def reduces(self) -> bool:
        """Tell whether some patch has no token of its own."""
        return self.groups is not None or not bool(self.kept.all())

    @property
    def cells(self) -> int:
        """Patches of the image."""
        return self.kept.numel()

    def draw(self, picture: Image.Image) -> Image.Image:
        """Return what the block keeps or merges, over what the model sees."""
        return overlay(picture, self.kept, self.groups)

    def draw_heat(self, picture: Image.Image) -> Image.Image:
        """Return what the method ranks by in this block, or where it ranks nothing the attention."""
        return heat(picture, self.attention if self.score is None else self.score)

    def does_as(self, other: BlockLook) -> bool:
        """Tell whether another block keeps or merges the same patches."""
        ours, theirs = self.groups, other.groups
        same = ours is theirs if ours is None or theirs is None else torch.equal(ours, theirs)
        return same and torch.equal(self.kept, other.kept) and self.tokens == other.tokens


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a reduced model costs beside the dense one; times are of one image, taken in turn."""

    dense_gmacs: float  # 1e9 multiply-accumulates of an image
    gmacs: float
    dense_ms: float | None = None  # None: not timed
    ms: float | None = None
    speedup: float | None = None  # median over the rounds of dense time / reduced time
    noise: float | None = None  # of `speedup`, relative
    verdict: str = ""  # what the times show, in words
    conditions: str = ""  # under which they were taken
    notes: tuple[str, ...] = ()  # what makes them doubtful


@dataclass(frozen=True, kw_only=True)
class Look:
    """One photograph through a dense and a reduced model."""

    photograph: Photograph
    method: str  # with the options that are not the defaults
    does: str  # what the method does, in a sentence
    dense: Answer
    reduced: Answer
    blocks: tuple[BlockLook, ...]
    cost: Cost

    @property
    def agrees(self) -> bool:
        """Tell whether both give the same class; of models that classify nothing, features nearly alike."""
        if not self.dense.top:
            return self.similarity > 0.99
        return self.dense.top[0].number == self.reduced.top[0].number

    @property
    def similarity(self) -> float:
        """Cosine of the two answers, -1 to 1."""
        dense, reduced = self.dense.vector.double(), self.reduced.vector.double()
        return float(torch.nn.functional.cosine_similarity(dense, reduced, dim=0))


def look_at(
    dense: nn.Module,
    reduced: nn.Module,
    photograph: Photograph,
    names: Sequence[str] = (),
    rounds: int = 0,
    cost: Cost | None = None,
) -> Look:
    """Look at one photograph with a dense and a reduced model; both evaluate, whatever their mode.

    Args:
        dense: a host.
        reduced: what `reduce_tokens` returns; a host counts as one that reduces nothing.
        photograph: from `evovit.data.photographs`.
        names: of the classes; where there are none, such as "class 7".
        rounds: how often each is timed; 0: times are left out.
        cost: where it is known already.
    """
    check_count("rounds", rounds, 0, 100_000)
    watched = as_reduced(reduced)
    images = photograph.image[None].to(next(reduced.parameters()))
    with evaluating(dense), evaluating(watched):
        with torch.no_grad():
            classes = backbone_of(dense).spec.num_classes
            answers = [answer_of(model(images), classes, names) for model in (dense, watched)]
            blocks = blocks_of(watched, images)
        if cost is None:
            (cost,) = costs({"dense": dense, "reduced": watched}, images, rounds)
    method = watched.method
    return Look(
        photograph=photograph,
        method=described(watched),
        does=inspect.getdoc(type(method)).partition("\n")[0],  # type: ignore[union-attr]
        dense=answers[0],
        reduced=answers[1],
        blocks=blocks,
        cost=cost,
    )


def answer_of(answer: object, classes: int, names: Sequence[str] = ()) -> Answer:
    """Return a model's answer to one image, with its best classes.

    Args:
        answer: of the model, for a batch of one.
        classes: that it tells apart; 0: it gives features.
        names: of the classes.
    """
    vector: Tensor = logits_of(answer)[0].detach().float().flatten().cpu()
    return Answer(vector, guesses(vector, names) if len(vector) == classes else ())


def guesses(vector: Tensor, names: Sequence[str], count: int = TOP) -> tuple[Guess, ...]:
    """Return the best classes of logits (classes,), best first; names stop at the first comma."""
    shares, numbers = vector.softmax(0).topk(min(count, len(vector)))
    return tuple(
        Guess(number, class_name(names, number), share)
        for number, share in zip(numbers.tolist(), shares.tolist(), strict=True)
    )


def class_name(names: Sequence[str], number: int) -> str:
    """Return the name of a class, up to its first comma; "class 7" where it has none."""
    name = printable(names[number]).partition(",")[0] if number < len(names) else ""
    return name or f"class {number}"


def blocks_of(reduced: ReducedViT, images: Tensor) -> tuple[BlockLook, ...]:
    """Return what each block does with one image, (1, channels, height, width)."""
    found: list[BlockLook] = []
    first: tuple[int, int] | None = None
    for seen in watch(reduced, images):
        first = first or seen.grid
        groups = groups_of(seen.rows[0])
        maps = (seen.kept[0], groups, seen.score, seen.attention)
        kept, shared, score, attention = (
            None if each is None else on_grid(each.reshape(seen.grid).cpu(), first) for each in maps
        )
        assert kept is not None and attention is not None
        found.append(
            BlockLook(
                number=seen.number,
                tokens=int(seen.tokens[0]),
                kept=kept,
                groups=shared,
                score=score,
                attention=attention,
            )
        )
    return tuple(found)


def groups_of(rows: Tensor) -> Tensor | None:
    """Return for each cell the first cell of the token that it is part of, -1: none; None: no token has two.

    Args:
        rows: (cells,) int64, the row of the cell's token, -1 where it has none.
    """
    present = rows[rows >= 0]
    if len(present) == len({*present.tolist()}):
        return None
    cells = torch.arange(len(rows), device=rows.device)
    firsts = torch.full((int(rows.max()) + 2,), len(rows), device=rows.device)
    firsts = firsts.scatter_reduce(0, rows + 1, cells, "amin")
    return firsts[rows + 1].where(rows >= 0, -1)


def on_grid(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return values (rows, columns) on a finer grid: all cells that a cell covers are as it is."""
    y, x = (torch.arange(fine) * coarse // fine for fine, coarse in zip(grid, cells.shape, strict=True))
    return cells[y[:, None], x]


def costs(models: Mapping[str, nn.Module], images: Tensor, rounds: int = 30) -> list[Cost]:
    """Return what each model but the first, the dense one, costs beside it.

    Args:
        images: (B, channels, height, width) on the models' device.
        rounds: how often each is timed; they take turns. 0: none is.
    """
    if rounds == 0:
        work = [gmacs(model, images.shape[1:]) for model in models.values()]
        return [Cost(dense_gmacs=work[0], gmacs=each) for each in work[1:]]
    dense, *others = in_turn(models, images, rounds=rounds)
    return [cost_of(dense, row) for row in others]


def cost_of(dense: Row, row: Row) -> Cost:
    """Return the rows of a dense and a reduced model, timed in turn, in short."""
    threads = f", {row.threads} thread{'s' * (row.threads > 1)}" if row.device == "cpu" else ""
    return Cost(
        dense_gmacs=dense.gmacs,
        gmacs=row.gmacs,
        dense_ms=dense.median_ms,
        ms=row.median_ms,
        speedup=row.speedup,
        noise=row.noise,
        verdict=row.verdict,
        conditions=(
            f"{device_name(row.device)}{threads}, {row.types}, batch {row.batch}, {row.engine} PyTorch, "
            f"{row.rounds} rounds in turn, medians"
        ),
        notes=row.notes,
    )


def described(model: ReducedViT) -> str:
    """Return a model's method with the options that are not the defaults."""
    config = model.method.current_config()
    own = {
        name: getattr(config, name)
        for name, each in config.__dataclass_fields__.items()
        if getattr(config, name) != each.default
    }
    own |= {} if model.budget is None else {BUDGET: model.budget}
    return str(Variant(name_of(model.method), own))
