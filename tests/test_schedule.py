"""How many tokens each block keeps."""

from __future__ import annotations

import math

import pytest

from evovit.errors import EvoViTError
from evovit.methods.evo_vit import EvoViT
from evovit.schedule import KeepSchedule


def test_counts_follow_the_ratio_for_any_grid() -> None:
    schedule = KeepSchedule.from_block(12, 0.5, 4)
    assert [schedule.count(i, 196) for i in (3, 4, 11)] == [None, 98, 98]
    assert schedule.count(4, 577) == 288  # int truncates
    assert KeepSchedule((0.7,), math.ceil).count(0, 196) == 138


def test_at_least_one_token_is_kept_and_a_full_count_is_no_reduction() -> None:
    assert KeepSchedule((0.01,)).count(0, 16) == 1
    assert KeepSchedule((1.0,)).count(0, 16) is None


@pytest.mark.parametrize(("multiple", "keep"), [(1, 98), (8, 94), (16, 94), (64, 126)])
def test_rows_that_enter_a_block_are_rounded_to_a_multiple(multiple: int, keep: int) -> None:
    """With a class token and a representative token, 100 rows at ratio 0.5."""
    schedule = KeepSchedule.from_block(12, 0.5, 4, multiple)
    count = schedule.count(4, 196, others=2)
    assert count == keep
    assert (count + 2) % multiple == 0


@pytest.mark.parametrize(
    ("multiple", "ratio", "others", "keep"),
    [
        (64, 0.15, 2, 62),  # 31 rows are nearest to none
        (8, 0.01, 2, 6),  # 3 rows
        (8, 0.03, 6, 10),  # 11 rows are nearest to 8, which leaves 2 patches of 5
        (16, 0.5, 2, 94),  # 100 rows, nearest to 96
        (64, 0.5, 2, 126),
        (256, 0.5, 2, None),  # nothing is left to reduce
    ],
)
def test_rounding_never_takes_more_than_half_of_the_kept(
    multiple: int, ratio: float, others: int, keep: int | None
) -> None:
    assert KeepSchedule.from_block(12, ratio, 4, multiple).count(4, 196, others) == keep


def test_every_count_is_a_multiple_and_never_far_below_the_ratio() -> None:
    for multiple in range(2, 200, 7):
        for percent in range(1, 100):
            for others in (1, 2, 6):
                schedule = KeepSchedule.from_block(2, percent / 100, 1, multiple)
                keep, asked = schedule.count(1, 196, others), max(1, int(196 * (percent / 100)))
                if keep is not None:
                    assert (keep + others) % multiple == 0 and keep >= asked / 2
                    assert keep < asked + multiple


def test_a_block_that_keeps_all_is_not_rounded() -> None:
    schedule = KeepSchedule.from_block(12, 0.5, 4, 16)
    assert schedule.count(3, 196, others=1) is None
    assert KeepSchedule.from_block(12, 1.0, 4, 16).count(4, 196, others=1) is None


def test_stages_are_counted_from_the_first_reducing_block() -> None:
    schedule = KeepSchedule.from_block(12, 0.5, 4)
    assert [i for i in range(12) if i >= 4 and schedule.starts_stage(i, 4)] == [4, 8]
    assert [schedule.stage_start(i, 4) for i in (3, 4, 7, 8, 11)] == [3, 4, 4, 8, 8]


def test_a_multiple_out_of_range_is_refused() -> None:
    with pytest.raises(EvoViTError, match="multiple_of is 0; allowed is a whole number from 1 to 256"):
        EvoViT.Config(multiple_of=0)


@pytest.mark.parametrize("whole", [16, 49, 196, 197, 576])
def test_counts_per_block_come_back_as_they_were_given(whole: int) -> None:
    counts = (whole, *(max(1, whole * share // 100) for share in (100, 71, 71, 33, 7, 1)))
    schedule = KeepSchedule.from_counts(7, counts, whole)
    assert schedule.counts(whole) == counts
    assert schedule.start == next(i for i, count in enumerate(counts) if count < whole)


def test_a_stage_begins_where_the_count_changes() -> None:
    schedule = KeepSchedule.from_counts(9, (16, 16, 8, 8, 8, 8, 8, 4, 4), 16)
    assert [number for number in range(9) if schedule.starts_stage(number, 4)] == [0, 1, 2, 6, 7]


@pytest.mark.parametrize(
    ("counts", "words"),
    [((16, 8), "one each"), ((8, 8, 8), "block 0"), ((16, 0, 4), "1 to 16"), ((16, 17, 4), "1 to 16")],
)
def test_counts_that_are_no_schedule_are_one_sentence(counts: tuple[int, ...], words: str) -> None:
    with pytest.raises(EvoViTError, match=words):
        KeepSchedule.from_counts(3, counts, 16)
