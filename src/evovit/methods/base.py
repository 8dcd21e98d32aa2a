"""What a method is: a module that decides how a block runs, by `run_block` and a few hooks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones.base import BackboneSpec, Block, Stage
from evovit.errors import EvoViTError, check_count
from evovit.ops.mask import masked_attention
from evovit.ops.restore import rows_by_place
from evovit.ops.squeeze import Squeezed
from evovit.options import Count, Options, option
from evovit.schedule import KeepSchedule
from evovit.tokens import Outputs, Tokens


class Ranking(NamedTuple):
    """What a selection ranks patch tokens by."""

    score: Tensor  # (B, N) float32; the highest stay
    index: Tensor  # type: ignore[assignment]  # (B, N) int64, the raster position of each; -1 without one


class Method(nn.Module, ABC):
    """A token-reduction method for one host; it has its own parameters, never the host's.

    Args:
        config: the method's options.
        spec: facts about the host; what the method cannot do with it is refused here.
    """

    needs_class_token: ClassVar[bool] = True
    crosses_stages: ClassVar[bool] = False  # fit for hosts that down-sample between stages
    keeps_grid: bool = False  # every patch token leaves `finish`, in raster order; options may turn it off
    learns_from_teacher: bool = False  # `losses` reads the teacher's features; options may turn it off
    reads_teacher_trace: bool = False  # `losses` compares with the teacher after every block
    needs_teacher: bool = False  # some parameters learn through such `losses` alone
    merges: bool = False  # a dropped patch token is merged into another; `row_of_cell` says which
    keeps_places: bool = True  # some patch tokens left keep a place of their own on the grid
    trains_twice: bool = False  # `second_start` gives a second pass for each training step
    samples_in_training: ClassVar[bool] = False  # each training forward draws anew; evaluation never does
    relaxes_in_training: ClassVar[bool] = False  # training computes a smooth form of what evaluation does
    keep_all: ClassVar[dict[str, Any]] = {}  # options under which nothing is reduced: the host, exactly
    example: ClassVar[dict[str, Any]] = {}  # options that reduce a host of four blocks
    schedule: KeepSchedule  # of a method that keeps a set share of tokens
    reduction: float = 1.0  # share in force of what the options say, see `set_reduction`

    @dataclass(frozen=True, kw_only=True)
    class Config(Options):
        """The method's options, as a recipe's [method] table has them."""

        @classmethod
        def renamed(cls, options: Mapping[str, Any]) -> Mapping[str, Any]:
            """Return options by today's names; saved folders and recipes may be of an older version."""
            return options

    def __init__(self, config: Any, spec: BackboneSpec) -> None:
        super().__init__()
        if self.needs_class_token:
            require_class_token(spec, type(self).__name__, "a method that scores without it")
        if len(spec.depths) > 1 and not self.crosses_stages:
            raise EvoViTError(
                f"{type(self).__name__} does not follow the {len(spec.depths)} stages of this host, which "
                "down-samples a whole grid in between; choose evo_levit or idle_vit, or a host of one stage."
            )
        self.config, self.spec = config, spec
        self.class_head: ClassTokenHead | None = None
        self.full_schedule: KeepSchedule | None = None  # `schedule` as first given, once `set_reduction` ran

    def extra_repr(self) -> str:
        """Return the options in force."""
        config = self.current_config()
        return ", ".join(f"{name}={getattr(config, name)!r}" for name in config.__dataclass_fields__)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in getattr(self.Config, "__dataclass_fields__", {}) and not hasattr(type(self), name):
            raise EvoViTError(
                f"{name} is an option of {type(self).__name__}, which is fixed once a model is wrapped; wrap "
                f"the host again: evovit.reduce_tokens(reduced.model, ..., {name}={value!r})."
            )
        super().__setattr__(name, value)

    def plan(self, config: Any) -> None:
        """Set the counts that follow from these options; methods with `keep_ratio` or the like do."""

    def config_at(self, budget: float) -> Any:
        """Return the options under which the method keeps this share, (0, 1]; default: of `keep_ratio`."""
        name = type(self).__name__
        if not hasattr(self.config, "keep_ratio") or type(self).plan is Method.plan:
            raise EvoViTError(f"{name} has no keep ratio that a budget could set.")
        if getattr(self.config, "keep_per_block", None) is not None:
            raise EvoViTError(f"keep_per_block already says what {name} keeps; budgets need keep_ratio.")
        return replace(self.config, keep_ratio=budget)

    def set_budget(self, budget: float | None) -> None:
        """Reduce as with `config_at(budget)`, or with None as the options say; weights stay as they are."""
        self.full_schedule, self.reduction = None, 1.0
        self.plan(self.config if budget is None else self.config_at(budget))

    @abstractmethod
    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        """Run one block, reducing as the method does. THE method."""

    def begin(self, tokens: Tokens, stages: Sequence[Stage]) -> Tokens:
        """Prepare the embedded tokens; default: unchanged."""
        return tokens

    def enter_stage(self, stage: Stage, tokens: Tokens) -> Tokens:
        """Enter a stage; default: bring back what waits, then the host's own down-sampling, if any."""
        return stage.enter(self.finish(tokens)) if stage.enter else tokens

    def finish(self, tokens: Tokens) -> Tokens:
        """Bring back what waits before a head that reads patch tokens; default: unchanged."""
        return tokens

    def row_of_cell(self, tokens: Tokens, grid: tuple[int, int]) -> Tensor:
        """Return the row of the patch token that each cell is part of, (B, cells) int64, -1: of none.

        Default: the token with that place, or the one that it was squeezed into.

        Args:
            grid: (rows, columns) when the stage began.
        """
        if isinstance(tokens.carry, Squeezed):
            return tokens.carry.source
        return rows_by_place(tokens.index, grid[0] * grid[1])

    def ranking(self, block: Block, tokens: Tokens) -> Ranking | None:
        """Return what the selection in this block ranks by, for pictures; default: None, it has none.

        Args:
            tokens: as `run_block` gets them, in evaluation.
        """
        return None

    def extra_logits(self, tokens: Tokens) -> dict[str, Tensor]:
        """Return logits (B, classes) for the training loss by name; default: the assisted head's, if any."""
        return {"class_token": self.class_head(tokens)} if self.class_head else {}

    def reset_classifier(self, num_classes: int) -> None:
        """Give the assisted head, if any, another number of classes."""
        if self.class_head:
            self.class_head.reset(num_classes)

    def current_config(self) -> Any:
        """Return the options under which a fresh method does what this one does now."""
        if self.reduction == 1:
            return self.config
        if getattr(self.config, "keep_per_block", None) is not None:
            return replace(self.config, keep_per_block=self.schedule.counts(math.prod(self.spec.grid)))
        return replace(self.config, keep_ratio=self.ratios_now())

    def ratios_now(self) -> tuple[float, ...]:
        """Return the list that the option `keep_ratio` would be now; default: one per block."""
        return self.schedule.ratios

    def losses(self, outputs: Any, teacher: Any) -> dict[str, Tensor]:
        """Return further terms of the training loss by name, weighted; default: none.

        Args:
            outputs: `evovit.tokens.Outputs` of this training forward.
            teacher: `evovit.tokens.Taught` of the same images, None without a teacher.
        """
        return {}

    def second_start(self) -> Callable[[Tokens], Tokens] | None:
        """Return how the embedded tokens of a second training pass begin; None, the default: there is none.

        Called in each training step; what is drawn here is for this pass only.
        """
        return None

    def pair_losses(
        self,
        first: tuple[dict[str, Tensor], Outputs],
        second: tuple[dict[str, Tensor], Outputs],
        targets: Tensor,
    ) -> dict[str, Tensor]:
        """Return the terms of the training loss of two passes by name, weighted; default: both as they are.

        Args:
            first: terms from labels and teacher, and outputs, of the pass as configured.
            second: the same of the other.
            targets: (B,) classes or (B, classes) shares.
        """
        return first[0] | {f"{name}_second": term for name, term in second[0].items()}

    def set_progress(self, fraction: float) -> None:
        """Follow the training, `fraction` of the epochs done, 0 to 1; default: nothing changes."""

    def set_reduction(self, share: float) -> None:
        """Reduce only this share of what the options say, for late starts and ramps; 0: nothing, 1: all."""
        if "schedule" not in vars(self):
            raise EvoViTError(f"{type(self).__name__} has no keep ratio that could start late or ramp.")
        self.full_schedule, self.reduction = self.full_schedule or self.schedule, share
        ratios = tuple(1 - share * (1 - ratio) for ratio in self.full_schedule.ratios)
        self.schedule = self.full_schedule if share == 1 else replace(self.full_schedule, ratios=ratios)


@dataclass(frozen=True, kw_only=True)
class ScheduledConfig(Method.Config):
    """Options of a method that takes its schedule as one count per block, too."""

    keep_per_block: tuple[Count, ...] | None = option(
        None,
        "patch tokens that each block keeps at the host's image size, instead of keep_ratio; one per block",
    )


def falling(counts: Sequence[int]) -> tuple[int, ...]:
    """Return the blocks where counts fall; raises `EvoViTError` where they rise, for methods that drop."""
    for number in range(1, len(counts)):
        if counts[number] > counts[number - 1]:
            raise EvoViTError(
                f"keep_per_block rises from {counts[number - 1]} to {counts[number]} at block {number}; "
                "dropped tokens do not come back: give counts that never rise."
            )
    return tuple(number for number in range(1, len(counts)) if counts[number] < counts[number - 1])


def schedule_at_blocks(config: Any, spec: BackboneSpec) -> tuple[KeepSchedule, tuple[int, ...]]:
    """Return the schedule, and the blocks that reduce, of a method that drops at a few `blocks`."""
    if config.keep_per_block is None:
        check_blocks(config.blocks, spec.depth)
        return KeepSchedule.at_blocks(spec.depth, config.keep_ratio, config.blocks), config.blocks
    counts = config.keep_per_block
    return KeepSchedule.from_counts(spec.depth, counts, math.prod(spec.grid)), falling(counts)


def run_masked(block: Block, tokens: Tokens) -> Tokens:
    """Run a block on all rows, those masked out hidden from the attention of the others (training)."""
    mask = F.pad(tokens.taking_part, (tokens.num_prefix, 0), value=1.0)
    mix = partial(masked_attention, mask=mask)
    return block.ffn(block.attention(tokens, block.qkv(tokens), mix=mix))


def require_class_token(spec: BackboneSpec, what: str, instead: str) -> None:
    """Raise `EvoViTError` where the host has no class token; `instead` is what to choose."""
    if not spec.has_class_token:
        raise EvoViTError(f"{what} needs a class token and this host has none; choose {instead}.")


def expect_grid(tokens: Tokens, spec: BackboneSpec, what: str) -> None:
    """Raise `EvoViTError` unless the tokens lie on the host's own grid; `what` begins the sentence."""
    if tokens.grid != spec.grid:
        raise EvoViTError(
            f"{what} made for a grid of {spec.grid[0]} x {spec.grid[1]} patches, but these images have "
            f"{tokens.grid[0]} x {tokens.grid[1]}; wrap a host of this image size."
        )


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Raise `EvoViTError` unless the blocks exist and rise."""
    for number in blocks:
        check_count("blocks", number, 0, depth - 1, "blocks count from 0")
    if list(blocks) != sorted(set(blocks)):
        raise EvoViTError(f"blocks is {tuple(blocks)!r}; list each reducing block once, in rising order.")


class ClassTokenHead(nn.Module):
    """A second classifier, on the class token, for the training loss alone (Evo-ViT eq. 8)."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.dim = spec.dims[-1]
        self.norm_cls = nn.LayerNorm(self.dim, eps=1e-6)
        self.head_cls: nn.Module = nn.Identity()
        self.reset(spec.num_classes)

    def reset(self, num_classes: int) -> None:
        """Start a fresh classifier for `num_classes`; 0: features pass."""
        self.head_cls = nn.Identity()
        if num_classes > 0:
            self.head_cls = linear = nn.Linear(self.dim, num_classes).to(self.norm_cls.weight)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tokens) -> Tensor:
        """Return logits (B, classes)."""
        return self.head_cls(self.norm_cls(tokens.x[:, 0]))  # type: ignore[no-any-return]
