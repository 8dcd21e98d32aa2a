"""`tune`: tables, search and choice, under a clock that counts operations instead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import evovit
from evovit.backbones import read_host
from evovit.errors import EvoViTError
from evovit.report.tune import write_report
from evovit.tuning.latency import LatencyTable, blank, measure_latency, row_grid
from evovit.tuning.plans import Plan, choose_methods, rows_of, with_counts
from evovit.tuning.record import TUNED, read_tuned, write_tuned
from evovit.tuning.search import Costs, search
from evovit.tuning.sensitivity import SensitivityTable, damage
from evovit.tuning.tune import answer, tune
from tests.conftest import HOSTS, disturb, make_host, pictures
from tests.tuning.counting import CountingClock


@pytest.fixture(scope="module")
def host() -> nn.Module:
    return disturb(HOSTS["vit"](img_size=64)).eval()  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def test_the_latency_table_predicts_whole_models(host: nn.Module) -> None:
    clock, batch = CountingClock(), blank(host, 1)
    rows = row_grid(1, 64)
    table = measure_latency(host, batch, rows, clock, 4, lambda line: None)
    for plan in (
        Plan("evit", {"keep_per_block": (64, 47, 47, 31), "rest": "drop"}),
        Plan("evo_vit", {"keep_per_block": (64, 64, 31, 31), "fast_update": False}),
        Plan("keep", {"keep_per_block": (64, 31, 31, 15)}),
    ):
        model = plan.build(host)
        real = clock.times({"it": model}, {"it": batch}, 1)["it"][0]
        assert table.predict(*rows_of(model, batch)) == pytest.approx(real, rel=0.02), plan
    assert table.predict([65] * 4, [65] * 4) == pytest.approx(table.plain_ms, rel=1e-6)


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_every_flat_host_has_a_latency_table(name: str) -> None:
    model = make_host(name).eval()
    try:
        choose_methods((), evovit.reduce_tokens(model, "dense").method.spec)
    except EvoViTError as error:
        assert "one stage" in str(error)
        return
    spec = evovit.reduce_tokens(model, "dense").method.spec
    rows = row_grid(spec.num_prefix, spec.grid[0] * spec.grid[1])
    table = measure_latency(model, blank(model, 1), rows, CountingClock(), 4, lambda line: None)
    assert table.at("attention", rows[-1]) > table.at("attention", rows[0])


def test_damage_is_the_divergence_of_the_classes() -> None:
    a, b = torch.randn(6, 5), torch.randn(6, 5)
    p, q = a.softmax(1), b.softmax(1)
    naive = sum(float(p[i, c] * (p[i, c] / q[i, c]).log()) for i in range(6) for c in range(5)) / 6
    assert damage(a, b, True) == pytest.approx(naive, rel=1e-4)
    assert damage(a, b, False) == pytest.approx(
        sum(float(((a[i] - b[i]) ** 2).sum() / (a[i] ** 2).sum()) for i in range(6)) / 6, rel=1e-4
    )
    assert damage(a, a, True) == pytest.approx(0, abs=1e-9)


def tables(depth: int, counts: tuple[int, ...]) -> tuple[LatencyTable, SensitivityTable]:
    rows = tuple(sorted(count + 1 for count in counts))
    ms = {part: tuple(0.1 * row + 0.001 * row**2 for row in rows) for part in ("attention", "ffn", "last")}
    noise = {part: (0.0,) * len(rows) for part in ms}
    latency = LatencyTable(rows, ms, noise, depth, 100.0, 99.0)
    rng = np.random.default_rng(0)
    values = np.sort(rng.random((depth - 1, len(counts))), axis=1)[:, ::-1].copy()
    values[:, -1] = 0.0
    blocks = tuple(range(1, depth))
    return latency, SensitivityTable(blocks, tuple(sorted(counts)), tuple(map(tuple, values)))


@pytest.mark.parametrize("parks", [False, True])
def test_the_search_finds_what_a_loop_over_all_schedules_finds(parks: bool) -> None:
    depth, counts = 5, (16, 11, 7, 3)
    latency, sensitivity = tables(depth, counts)
    costs = Costs(latency, sensitivity, parks, extra=1, overhead_ms=0.2)
    wanted, found = latency.rest_ms + 0.85 * (latency.plain_ms - latency.rest_ms), []
    for points in (1, 2, 3, 4):
        for blocks in combinations(range(1, depth), points):
            for levels in combinations(range(1, len(counts)), points):
                kept, now = [], 16
                for number in range(depth):
                    now = counts[levels[blocks.index(number)]] if number in blocks else now
                    kept.append(now)
                rows = [n + 1 + (n < 16) for n in kept]
                before = rows if parks else [17, *rows[:-1]]
                ms = latency.predict(before, rows) + 0.2 * points
                hurt, old = 0.0, 16
                for block, level in zip(blocks, levels, strict=True):
                    row = dict(zip(sensitivity.counts, sensitivity.values[block - 1], strict=True))
                    hurt, old = hurt + max(0.0, row[counts[level]] - row[old]), counts[level]
                if ms <= wanted:
                    found.append((hurt, ms, tuple(kept)))
    best = search(costs, counts, 1, wanted, 10)
    expected = sorted(found)[:10]
    assert len(best) == len(expected) >= 5 and [one.damage for one in best] == pytest.approx(
        [one[0] for one in expected]
    )
    assert best[0].counts == expected[0][2] and best[0].ms == pytest.approx(expected[0][1])


def test_where_no_schedule_is_fast_enough_the_fastest_are_found() -> None:
    latency, sensitivity = tables(5, (16, 11, 7, 3))
    costs = Costs(latency, sensitivity, True, 0)
    found = search(costs, (16, 11, 7, 3), 1, 0.0, 3)
    assert found[0].counts == (16, 3, 3, 3, 3)  # at once and as few as can be
    assert [one.ms for one in found] == sorted(one.ms for one in found)


def test_a_merging_method_never_halves_more_than_once_a_block() -> None:
    latency, sensitivity = tables(5, (16, 8, 7, 3))
    costs = Costs(latency, sensitivity, False, 0, merges=True)
    for one in search(costs, (16, 8, 7, 3), 1, 1e9, 50):
        evovit.reduce_tokens(HOSTS["vit"](depth=5), "tome", keep_per_block=one.counts, verify=False)


def test_it_meets_the_target_and_is_the_best_measured(host: nn.Module, images: Tensor) -> None:
    found = tune(host, images, speedup=1.3, clock=CountingClock(), rounds=4)
    assert found.met and found.best is not None and found.best.speedup >= 1.3
    assert found.model is not None and found.model(images).shape == (8, 5)
    able = [one for one in found.candidates if one.speedup >= 1.3]
    assert found.best.damage == min(one.damage for one in able)
    assert "1.3" in found.sentence
    own = [one for one in able if "keep_per_block" not in one.plan.options]
    assert own, "every method's own knob stands beside the schedules"


def test_a_selection_no_better_than_chance_is_said(host: nn.Module, images: Tensor) -> None:
    found = tune(host, images, speedup=1.3, methods=["evo_vit"], clock=CountingClock(), rounds=4)
    assert found.best is not None
    options = {**found.best.plan.options, "selection": "random"}
    chance = evovit.reduce_tokens(host, "evo_vit", **options)
    with torch.inference_mode():
        by_hand = damage(host(images), chance(images), True)
    assert found.conditions["damage_by_chance"] == pytest.approx(by_hand, rel=1e-4)
    for worse, said in ((0.5, False), (2.0, True)):
        now = replace(found, best=found.best._replace(damage=worse * by_hand))
        assert ("no better than chance" in answer(now)) == said
    now.conditions["random_images"] = True
    assert "chance" not in answer(now)
    even = tune(host, images, speedup=1.3, methods=["tome"], clock=CountingClock(), rounds=4)
    assert "damage_by_chance" not in even.conditions, "merging has no selection"


def test_a_latency_may_be_wished(host: nn.Module, images: Tensor) -> None:
    clock = CountingClock()
    dense = clock.times({"it": host}, {"it": blank(host, 1)}, 1)["it"][0]
    found = tune(host, images, latency_ms=dense / 1.25, clock=clock, methods=("evit",), rounds=4)
    assert found.met and found.best is not None and found.best.ms <= dense / 1.25


def test_what_cannot_be_met_is_said_with_the_best_found(host: nn.Module, images: Tensor) -> None:
    found = tune(host, images, speedup=50.0, clock=CountingClock(), methods=("evit",), rounds=4)
    assert not found.met and found.best is not None
    assert "cannot be met here; the best found is evit" in found.sentence


class Sluggish(CountingClock):
    """Whole reduced models gain less than their parts promise."""

    def times(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], rounds: int
    ) -> dict[str, list[float]]:
        found = super().times(models, inputs, rounds)
        if "dense" not in found:
            return found
        dense = found["dense"][0]
        return {name: [dense - 0.6 * (dense - ms) for ms in times] for name, times in found.items()}


def test_what_only_the_fastest_schedule_meets_is_met(
    host: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evovit.tuning.tune.ROUNDS", 1)  # no second round that would know better
    (base,) = choose_methods(("evit",), read_host(host).spec)
    least = min(n for n in (row - 2 for row in row_grid(1, 64)) if n > 0)
    fastest = with_counts(base, (64, *(least,) * 3)).build(host)
    times = Sluggish().times(
        {"dense": host, "fastest": fastest}, dict.fromkeys(("dense", "fastest"), blank(host, 1)), 1
    )
    reachable = times["dense"][0] / times["fastest"][0]
    found = tune(host, images, speedup=0.99 * reachable, clock=Sluggish(), methods=("evit",), rounds=4)
    assert found.met, found.sentence


def test_where_dense_is_faster_it_says_so(host: nn.Module, images: Tensor) -> None:
    found = tune(host, images, speedup=1.2, clock=CountingClock(penalty=1e6), methods=("tome",), rounds=4)
    assert found.best is None and found.model is None and found.sentence.startswith("Dense is faster here")


def test_tables_are_kept_and_a_second_search_measures_nothing(
    host: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"speedup": 1.3, "methods": ("evit", "tome"), "rounds": 4, "tables": tmp_path}
    first = tune(host, images, clock=CountingClock(), **options)
    idle = CountingClock()
    again = tune(host, images, clock=idle, **options)
    assert idle.timed == 0 and again.best == first.best
    other = CountingClock()
    tune(host, images + 0.1, clock=other, **options)  # other images, other damage: nothing is taken over
    assert other.timed > 0


def test_a_search_cut_off_anywhere_ends_the_same(host: nn.Module, images: Tensor, tmp_path: Path) -> None:
    options: dict[str, Any] = {"speedup": 1.3, "methods": ("evit", "tome"), "rounds": 4}
    whole = tune(host, images, clock=CountingClock(), **options)

    class Dies(CountingClock):
        left = 0

        def times(self, *arguments: Any) -> dict[str, list[float]]:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            return super().times(*arguments)

    for left in (0, 1, 2):
        clock = Dies()
        clock.left = left
        with pytest.raises(KeyboardInterrupt):
            tune(host, images, clock=clock, tables=tmp_path, **options)
    again = tune(host, images, clock=CountingClock(), tables=tmp_path, **options)
    assert again.best == whole.best and again.candidates == whole.candidates


def test_the_page_has_the_answer_and_both_tables(host: nn.Module, images: Tensor, tmp_path: Path) -> None:
    found = tune(host, images, speedup=1.3, clock=CountingClock(), methods=("evit",), rounds=4)
    text = write_report(tmp_path, found).read_text()
    assert "Damage against speed-up" in text and "Latency table" in text and "Sensitivity of evit" in text
    write_tuned(tmp_path, found)
    assert read_tuned(tmp_path) == replace(found, model=None)  # what the page of evovit app shows
    (tmp_path / TUNED).write_text((tmp_path / TUNED).read_text().replace('"best": ', '"best": 9'))
    with pytest.raises(EvoViTError, match="is damaged"):
        read_tuned(tmp_path)
    with pytest.raises(EvoViTError, match=r"no '.*tuned\.json'.*run the same command again"):
        read_tuned(tmp_path / "nowhere")


def test_real_time_works(host: nn.Module) -> None:
    found = tune(host, None, speedup=1.2, methods=("evit",), rounds=4)
    assert found.conditions["random_images"] and found.sentence


def test_hosts_without_class_token_get_methods_that_need_none() -> None:
    model = make_host("siglip").eval()
    found = tune(model, pictures(), speedup=1.2, clock=CountingClock(), rounds=4)
    assert found.best is not None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Give either"),
        ({"speedup": 1.5, "latency_ms": 3.0}, "Give either"),
        ({"speedup": 0.9}, "above 1"),
        ({"speedup": "fast"}, "above 1"),
        ({"speedup": float("nan")}, "above 1"),
        ({"latency_ms": -1}, "above 0"),
        ({"speedup": 1.5, "methods": ("dynamic_vit",)}, "train it first"),
        ({"speedup": 1.5, "methods": ("dense",)}, "cannot take one count per block"),
        ({"speedup": 1.5, "methods": ("evo_vitt",)}, "Did you mean"),
        ({"speedup": 1.5, "engine": "warp"}, "engine"),
        ({"speedup": 1.5, "batch": 0}, "batch"),
        ({"speedup": 1.5, "rounds": 1}, "rounds"),
        ({"speedup": 1.5, "precision": "int3"}, "precision"),
    ],
)
def test_wrong_wishes_are_one_sentence(host: nn.Module, options: dict[str, Any], words: str) -> None:
    with pytest.raises(EvoViTError, match=words):
        tune(host, None, **options)


def test_wrong_images_are_one_sentence(host: nn.Module) -> None:
    with pytest.raises(EvoViTError, match="this host takes"):
        tune(host, torch.randn(2, 3, 32, 32), speedup=1.5)


def test_a_reduced_model_is_not_tuned(host: nn.Module) -> None:
    with pytest.raises(EvoViTError, match=r"model\.model"):
        tune(evovit.reduce_tokens(host, "evit", blocks=(1,)), None, speedup=1.5)


def test_a_plan_reads_as_words() -> None:
    assert str(with_counts(Plan("evit"), (16, 16, 8, 4))) == "evit (8 from block 2, 4 from block 3)"
    assert str(Plan("tome", {"r": 4})) == "tome (r=4)"
