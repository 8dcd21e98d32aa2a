"""What a method is: a module that decides how a block runs. One verb, `run_block`, and hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from evovit.backbones.base import BackboneSpec, Block, Stage
from evovit.errors import EvoViTError, check_count
from evovit.ops.restore import rows_by_place
from evovit.options import Options
from evovit.schedule import KeepSchedule
from evovit.tokens import Outputs, Tokens


class Method(nn.Module, ABC):
    """A token-reduction method for one host; holds its own parameters, never the host's.

    Args:
        config: the method's options.
        spec: what the host is; a method refuses here, in a sentence, what it cannot do.
    """

    needs_class_token: ClassVar[bool] = True
    crosses_stages: ClassVar[bool] = False  # fit for hosts that down-sample between stages
    keeps_grid: bool = False  # every patch token leaves `finish`, in raster order; options may turn it off
    learns_from_teacher: bool = False  # `losses` reads the teacher's features; options may turn it off
    reads_teacher_trace: bool = False  # `losses` compares with the teacher after every block
    needs_teacher: bool = False  # some parameters learn through such `losses` alone
    merges: ClassVar[bool] = False  # a patch token that goes lives on in another; `row_of_cell` tells which
    keeps_places: bool = True  # some patch tokens left keep a place of their own on the grid
    trains_twice: bool = False  # `second_start` gives a second pass for each training step
    samples_in_training: ClassVar[bool] = False  # each training forward draws anew; evaluation never does
    keep_all: ClassVar[dict[str, Any]] = {}  # options under which nothing is reduced: the host, exactly
    example: ClassVar[dict[str, Any]] = {}  # options that reduce a host of four blocks
    schedule: KeepSchedule  # of a method that keeps a set share of tokens
    reduction: float = 1.0  # share in force of what the options say, see `set_reduction`

    @dataclass(frozen=True, kw_only=True)
    class Config(Options):
        """The method's options, as a recipe's [method] table has them."""

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

        Default: the token with that place.

        Args:
            grid: (rows, columns) when the stage began.
        """
        return rows_by_place(tokens.index, grid[0] * grid[1])

    def extra_logits(self, tokens: Tokens) -> dict[str, Tensor]:
        """Return logits (B, classes) for the training loss by name; default: the assisted head's, if any."""
        return {"class_token": self.class_head(tokens)} if self.class_head else {}

    def reset_classifier(self, num_classes: int) -> None:
        """Give the assisted head, if any, another number of classes."""
        if self.class_head:
            self.class_head.reset(num_classes)

    def current_config(self) -> Any:
        """Return the options under which a fresh method does what this one does now."""
        return self.config if self.reduction == 1 else replace(self.config, keep_ratio=self.ratios_now())

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

        Asked in each training step; what is drawn here belongs to this pass alone.
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


def require_class_token(spec: BackboneSpec, what: str, instead: str) -> None:
    """Raise `EvoViTError` where the host has no class token; `instead` is what to choose."""
    if not spec.has_class_token:
        raise EvoViTError(f"{what} needs a class token and this host has none; choose {instead}.")


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
