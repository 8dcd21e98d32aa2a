"""KeepSchedule: how many patch tokens each block keeps, as Python integers fixed before the forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evovit.errors import EvoViTError, check_count


def per_block(
    value: float | Sequence[float], count: int, name: str, what: str = "blocks"
) -> tuple[float, ...]:
    """Return one value for each of `count` blocks from a number or one each."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    if len(values) != count:
        raise EvoViTError(f"{name} has {len(values)} values for {count} {what}; give a number, or one each.")
    return values


def check_start(ratios: Sequence[float], start_block: int) -> None:
    """Raise `EvoViTError` where a block before `start_block` reduces."""
    if min(ratios[:start_block], default=1) < 1:
        raise EvoViTError(
            f"keep_ratio is below 1 before start_block {start_block}; set it to the first that reduces."
        )


@dataclass(frozen=True)
class KeepSchedule:
    """Share of the stage's patch tokens that each block updates; counts follow from it for any resolution.

    Args:
        ratios: one per block, in (0, 1]; 1 leaves the block alone.
        rounding: how a count comes from ratio * N: `math.floor` or `math.ceil`; `int` would fix the image
            size at export.
        start: first block that may reduce; stages are counted from it.
        multiple_of: the rows that enter a reduced block are rounded to the nearest multiple of this; to the
            next above where the nearest has less than half of the kept; a multiple of all rows keeps all.
        changes: blocks where a stage begins whatever its length.
    """

    ratios: tuple[float, ...]
    rounding: Callable[[float], int] = math.floor
    start: int = 0
    multiple_of: int = 1
    changes: tuple[int, ...] = ()

    @classmethod
    def from_block(
        cls, depth: int, keep_ratio: float | Sequence[float], start_block: int, multiple_of: int = 1
    ) -> KeepSchedule:
        """Build from a number, used from `start_block` on, or from one ratio per block, used as it stands."""
        check_count(
            "start_block", start_block, 1, depth - 1, "blocks count from 0, and block 0 has no earlier score"
        )
        ratios = per_block(keep_ratio, depth, "keep_ratio")
        if not isinstance(keep_ratio, Sequence):
            ratios = (1.0,) * start_block + ratios[start_block:]
        check_start(ratios, start_block)
        return cls(ratios, start=start_block, multiple_of=multiple_of)

    @classmethod
    def at_blocks(
        cls, depth: int, keep_ratio: float | Sequence[float], blocks: Sequence[int]
    ) -> KeepSchedule:
        """Build from the share of all patches that each of `blocks` leaves; a number r: r, r^2, and so on."""
        count = len(blocks)
        ratios = per_block(keep_ratio, count, "keep_ratio", "reducing blocks")
        if not isinstance(keep_ratio, Sequence):
            ratios = tuple(keep_ratio ** (step + 1) for step in range(count))
        left = dict(zip(blocks, ratios, strict=True))
        return cls(tuple(left.get(number, 1.0) for number in range(depth)))

    @classmethod
    def from_counts(cls, depth: int, counts: Sequence[int], num_patches: int) -> KeepSchedule:
        """Build from the patch tokens that each block keeps of `num_patches`; other numbers in proportion.

        A stage begins wherever the count changes. Block 0 keeps all.
        """
        if len(counts) != depth:
            raise EvoViTError(f"keep_per_block has {len(counts)} values for {depth} blocks; give one each.")
        for count in counts:
            check_count("keep_per_block", count, 1, num_patches, "patch tokens of this host")
        if counts[0] != num_patches:
            raise EvoViTError(
                f"keep_per_block begins with {counts[0]}; block 0 has no earlier score and "
                f"keeps all {num_patches}."
            )
        # a hair above the share, so that rounding down gives the count back
        ratios = tuple(1.0 if count == num_patches else (count + 1e-3) / num_patches for count in counts)
        changes = tuple(number for number in range(1, depth) if counts[number] != counts[number - 1])
        return cls(ratios, start=min(changes, default=depth - 1), changes=changes)

    def counts(self, num_patches: int) -> tuple[int, ...]:
        """Return how many of `num_patches` each block keeps: what `from_counts` takes."""
        return tuple(self.count(number, num_patches) or num_patches for number in range(len(self.ratios)))

    def count(self, number: int, num_patches: int, others: int = 0) -> int | None:
        """Return how many of `num_patches` block `number` keeps, at least 1; None where it keeps all.

        `others` is the number of rows that enter beside the kept: prefix tokens, a representative token.
        """
        if self.ratios[number] == 1:
            return None
        keep = max(1, self.rounding(num_patches * self.ratios[number]))
        if self.multiple_of > 1:
            nearest = round((keep + others) / self.multiple_of) * self.multiple_of - others
            keep = nearest if nearest >= keep / 2 else nearest + self.multiple_of
        return None if keep >= num_patches else keep

    def stage_start(self, number: int, length: int) -> int:
        """Return the first block of the stage, `length` blocks long, that block `number` lies in."""
        if number < self.start:
            return number
        past = [change for change in self.changes if change <= number]
        start = max(past) if past else self.start  # written for torch 2.9, which compiles no other form
        return number - (number - start) % length

    def starts_stage(self, number: int, length: int) -> bool:
        """Tell whether tokens are selected anew before block `number`."""
        return self.stage_start(number, length) == number

    def reads_score(self, number: int, length: int, trade_off: Sequence[float]) -> bool:
        """Tell whether a later selection depends on the score of block `number`.

        `trade_off` is the weight of the old score in each block.
        """
        for later in range(number + 1, len(self.ratios)):
            reduces = self.ratios[self.stage_start(later, length)] < 1
            if reduces and self.starts_stage(later, length):
                return True
            if not reduces and trade_off[later] == 0:
                return False  # every token is scored afresh there
        return False


def removed_per_block(
    r: int | Sequence[int], inflection: float, depth: int, most: int, total: int | None = None
) -> tuple[int, ...]:
    """Return how many tokens each block removes, before a method's cap (ToMe, appendix; released `parse_r`).

    Args:
        r: of every block, or a list, which may end early: the rest is 0.
        inflection: -1 lets a number r fall from 2r to 0; 1 rise.
        most: what r may be at most.
        total: what all blocks remove together, by a change of the last, or of the first where r falls.
    """
    if isinstance(r, Sequence):
        if len(r) > depth or inflection != 0:
            raise EvoViTError(
                f"r lists {len(r)} values for {depth} blocks; give at most one each, and no inflection."
            )
        for removed in r:
            check_count("r", removed, 0, most)
        counts = [*r, *(0,) * (depth - len(r))]
    else:
        check_count("r", r, 0, most, "tokens removed by a block")
        low = int(r * (1 - inflection))
        step = (2 * r - 2 * low) / max(1, depth - 1)
        counts = [int(low + step * number) for number in range(depth)]
    if total is not None:
        changed = 0 if inflection < 0 else -1
        rest = sum(counts) - counts[changed]
        check_count("total", total, rest, rest + most, f"the other blocks remove {rest}")
        counts[changed] = total - rest
    return tuple(counts)
