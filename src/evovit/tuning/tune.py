"""`tune`: finds the schedule that reaches a target speed with the least damage, by measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from evovit.backbones import adapt, check_adapter, read_host
from evovit.backbones.base import BackboneSpec
from evovit.bench.row import compare
from evovit.bench.setting import Setting
from evovit.errors import EvoViTError, check_count, shown
from evovit.macs import gmacs
from evovit.methods import find_method
from evovit.model import ReducedViT
from evovit.runtime.files import make_folder, read_json, told, write_text
from evovit.tuning.clock import Clock, EngineClock, median
from evovit.tuning.latency import LatencyTable, blank, measure_latency, row_grid
from evovit.tuning.plans import (
    PLACES,
    Plan,
    by_chance,
    choose_methods,
    defaults,
    points_of,
    rows_of,
    with_budget,
    with_counts,
)
from evovit.tuning.search import Costs, search
from evovit.tuning.sensitivity import SensitivityTable, answers, block_grid, count_grid, damage

MARGIN = 0.03  # below the target that still counts as met
DENSE_IS_FASTER = 1.03  # a best speed-up below this is none
TABLES = "tables.json"
SEARCHED = 7  # schedules that a round measures, beside the own knob of each method
ROUNDS = 3  # of searching and measuring; each learns from the times before
OWN_BUDGETS = (0.7, 0.5)  # at which a method's own knob is a point of the plot


class Candidate(NamedTuple):
    """A plan with what was measured of it."""

    plan: Plan
    ms: float
    dense_ms: float  # in the same rounds
    speedup: float  # median over the rounds of dense / this
    noise: float  # of the speed-up, relative
    damage: float  # see `sensitivity.damage`; on all images
    gmacs: float
    predicted_ms: float  # by the latency table alone
    points: int  # blocks that reduce
    predicted_damage: float | None = None


class Asked(NamedTuple):
    """A plan to be measured, and what is predicted of it."""

    plan: Plan
    ms: float  # by the latency table alone
    points: int  # blocks that reduce
    damage: float | None = None


@dataclass
class Tuned:
    """What a search found."""

    model: ReducedViT | None  # the winner; None where dense is faster
    best: Candidate | None
    target: float  # target speed-up
    met: bool
    sentence: str  # the answer in words
    dense_ms: float
    candidates: list[Candidate]  # everything measured
    latency: LatencyTable
    sensitivity: dict[str, SensitivityTable]  # by method
    conditions: dict[str, Any] = field(default_factory=dict)


def tune(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    speedup: float | None = None,
    latency_ms: float | None = None,
    methods: Sequence[str] = (),
    engine: str = "eager",
    precision: str = "fp32",
    batch: int = 1,
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 20,
    tables: str | Path | None = None,
    clock: Clock | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Find the schedule that reaches a target speed with the least damage; nothing is trained.

    Args:
        model: a supported host of one stage, with its weights.
        images: (N, channels, height, width) without labels, as the model takes them, a few hundred; None:
            random ones, which say little about damage.
        speedup: target speed-up over the host on the same engine.
        latency_ms: target time of a batch in milliseconds, instead of speedup.
        methods: each NAME or NAME:option=value; default: evo_vit, evit, tome and evenly spaced tokens.
        engine, precision, batch, device, threads: how the model will run, as `evovit bench` names them.
        rounds: how often each final candidate is timed.
        tables: folder in which both tables and all measured times are saved and found again.
        clock: measures instead of the real time.

    Raises:
        EvoViTError: no target or two, an unsupported host, a method that has to be trained first.
    """
    expect_wish(speedup, latency_ms)
    if isinstance(model, ReducedViT):
        raise EvoViTError("model is reduced already; tune its host, model.model.")
    spec = read_host(model).spec
    check_adapter(model)
    setting = Setting(
        model=type(model).__name__,
        device=device,
        dtype=precision,
        batch=check_count("batch", batch, 1, 4096),
        engines=(engine,),
        threads=threads,
        rounds=check_count("rounds", rounds, 4, 10_000),
    )
    calibration = blank(model, 16) if images is None else images
    bases = choose_methods(methods, spec)
    others = [] if methods else defaults(spec)
    work = _Search(
        model, spec, calibration, bases, others, clock or EngineClock(setting), setting, tables, log
    )
    return work.run(speedup, latency_ms, images is None)


def expect_wish(speedup: Any, latency_ms: Any) -> None:
    """Raise `EvoViTError` unless one target speed, and a possible one, is given."""
    if (speedup is None) == (latency_ms is None):
        raise EvoViTError("Give either a speed-up, such as 1.5, or a latency in milliseconds.")
    for name, value, low in (("speedup", speedup, 1), ("latency_ms", latency_ms, 0)):
        good = isinstance(value, int | float) and not isinstance(value, bool) and low < value < 1000 * 1000
        if value is not None and not good:
            raise EvoViTError(f"{name} is {shown(value)}; allowed is a number above {low}.")


class _Search:
    """The steps of one search, each kept on disk once it is done."""

    def __init__(
        self,
        model: nn.Module,
        spec: BackboneSpec,
        images: Tensor,
        bases: Sequence[Plan],
        others: Sequence[Plan],
        clock: Clock,
        setting: Setting,
        tables: str | Path | None,
        log: Callable[[str], None],
    ) -> None:
        self.model, self.spec, self.images, self.bases = model, spec, images, bases
        self.others = others
        self.clock, self.setting, self.log = clock, setting, log
        self.backbone = adapt(model)
        shape = self.backbone.image_shape
        if tuple(images.shape[1:]) != tuple(shape):
            raise EvoViTError(
                f"images are {tuple(images.shape)}; this host takes (N, {', '.join(map(str, shape))})."
            )
        self.num_patches = spec.grid[0] * spec.grid[1]
        self.has_head = spec.num_classes > 0
        self.batch = blank(model, setting.batch)
        self.dense = answers(model, images)
        self.path = None if tables is None else Path(tables) / TABLES
        self.of = self.stamp()
        self.kept: dict[str, Any] = {}
        if self.path is not None:
            make_folder(self.path.parent)
            self.kept = read_json(self.path, "evovit") if self.path.is_file() else {}

    # what is kept on disk

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what is kept under a key, or make it and keep it."""
        if key not in self.kept:
            self.kept[key] = make()
            if self.path is not None:
                with told(self.path.parent):
                    write_text(self.path, json.dumps(self.kept))
        return self.kept[key]

    def stamp(self) -> str:
        """Return a text that stands for this host with its weights and images."""
        digest = blake2b(digest_size=12)
        for name, value in self.model.state_dict().items():
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
        digest.update(self.images.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    # the two tables

    def measure_latency(self) -> LatencyTable:
        rows = row_grid(self.spec.num_prefix, self.num_patches)
        kept = self.once(
            f"latency {self.clock.name()} {self.of}",
            lambda: asdict(measure_latency(self.model, self.batch, rows, self.clock, 12, self.log)),
        )
        tuples = {part: {key: tuple(value) for key, value in kept[part].items()} for part in ("ms", "noise")}
        return LatencyTable(**kept | tuples | {"rows": tuple(kept["rows"])})

    def measure_sensitivity(self, base: Plan) -> SensitivityTable:
        blocks, counts = block_grid(self.spec.depth), count_grid(self.num_patches)
        self.log(
            f"sensitivity of {base}: {len(blocks)} blocks x {len(counts)} counts, {len(self.images)} images"
        )
        values = []
        for block in blocks:
            row = []
            for count in counts:
                plan = self.single(base, block, count)
                row.append(self.damage_of(plan))
            values.append((*row, 0.0))
        return SensitivityTable(blocks, (*counts, self.num_patches), tuple(values))

    def single(self, base: Plan, block: int, count: int) -> Plan:
        """Return the plan that reduces at one block alone, in as few blocks as the method can."""
        counts = [self.num_patches] * self.spec.depth
        now = self.num_patches
        for number in range(block, self.spec.depth):
            least = now - now // 2 if find_method(base.method).merges else 1
            now = max(count, least)
            counts[number] = now
        return with_counts(base, counts)

    def damage_of(self, plan: Plan) -> float:
        """Return how far a plan moves the outputs on all images."""

        def make() -> float:
            return damage(self.dense, answers(plan.build(self.model), self.images), self.has_head)

        return float(self.once(f"damage {plan.key} {self.of}", make))

    # the search

    def run(self, wish: float | None, latency_ms: float | None, random: bool) -> Tuned:
        latency = self.measure_latency()
        target = wish if wish is not None else latency.dense_ms / float(latency_ms or 1)
        tables = {base.key: self.measure_sensitivity(base) for base in self.bases}
        self.latency = latency
        own = [with_budget(base, budget, self.spec) for base in self.bases for budget in OWN_BUDGETS]
        known = {plan.key for plan in own}
        own += [plan for plan in self.others if plan.key not in known]
        pool = self.measure([self.predicted(plan) for plan in own], "own knobs and defaults")
        costs = {base.key: self.costs(base, tables[base.key], pool) for base in self.bases}
        for turn in range(ROUNDS):
            known = {one.plan.key for one in pool}
            asked = [one for one in self.proposals(costs, target) if one.plan.key not in known]
            if not asked:
                break
            pool += self.measure(asked, f"round {turn + 1}")
            costs = {base.key: self.corrected(base, costs[base.key], pool) for base in self.bases}
        if all(one.speedup < target for one in pool):  # predictions were too hopeful
            known = {one.plan.key for one in pool}
            quickest = [one for one in self.proposals(costs, math.inf) if one.plan.key not in known]
            pool += self.measure(quickest, "the fastest there are") if quickest else []
        best, met = self.choose(pool, target)
        conditions = {
            "clock": self.clock.name(),
            "images": len(self.images),
            "random_images": random,
            "measure": "KL divergence of the classes" if self.has_head else "relative feature distance",
        }
        dense_ms = latency.dense_ms if best is None else best.dense_ms
        found = Tuned(None, best, target, met, "", dense_ms, pool, latency, {}, conditions)
        found.sensitivity = {str(base): tables[base.key] for base in self.bases}
        if best is not None:
            found.model = best.plan.build(self.model)
            chance = by_chance(best.plan)
            if chance is not None:
                conditions["damage_by_chance"] = self.damage_of(chance)
        found.sentence = answer(found)
        return found

    def costs(self, base: Plan, table: SensitivityTable, pool: Sequence[Candidate]) -> Costs:
        """Return what the search knows of a method before any of its schedules is measured."""
        cls = find_method(base.method)
        counts = [self.num_patches] * (self.spec.depth - 2) + [self.num_patches // 2] * 2
        trace = rows_of(with_counts(base, counts).build(self.model), self.batch[:1])
        extra = trace[1][-2] - self.spec.num_prefix - self.num_patches // 2
        parks = trace[0] == trace[1]
        costs = Costs(self.latency, table, parks, extra, merges=cls.merges)
        return self.corrected(base, costs, pool)

    def corrected(self, base: Plan, costs: Costs, pool: Sequence[Candidate]) -> Costs:
        """Return the costs with the overhead that the newest measured plans of this method show."""
        own = [one for one in pool if self.is_of(one.plan, base)][-SEARCHED:]
        if not own:
            return costs
        over = [(self.settled_ms(one) - one.predicted_ms) / one.points for one in own]
        return replace(costs, overhead_ms=max(0.0, median(over)))

    def settled_ms(self, one: Candidate) -> float:
        """Return a measured time as it were when the latency table was measured: machines slow down."""
        return one.ms * self.latency.dense_ms / one.dense_ms

    def is_of(self, plan: Plan, base: Plan) -> bool:
        shared = {key: value for key, value in base.options.items() if key not in ("keep_ratio", *PLACES)}
        return plan.method == base.method and all(
            plan.options.get(key) == value for key, value in shared.items()
        )

    def predicted(self, plan: Plan) -> Asked:
        """Return a plan with its time by the latency table."""
        attention, ffn = rows_of(plan.build(self.model), self.batch[:1])
        return Asked(plan, self.latency.predict(attention, ffn), points_of(ffn))

    def proposals(self, costs: Mapping[str, Costs], target: float) -> list[Asked]:
        """Return the plans of a round: the best schedules over all methods, and each method's own knob.

        Args:
            target: speed-up; infinite: the fastest schedules there are.
        """
        wanted = self.latency.dense_ms / (target * (1 + MARGIN / 3))
        rows = [count for count in self.latency.rows if count > self.spec.num_prefix + 1]
        found: list[tuple[float, str, Asked]] = []  # what is to be small, of which method
        knobs: list[Asked] = []
        for base in self.bases:
            cost = costs[base.key]
            least = min(cost.sensitivity.counts)
            kept = {row - self.spec.num_prefix - cost.extra for row in rows[:-1]}
            counts = [self.num_patches, *sorted((n for n in kept if n >= least), reverse=True)]
            for one in search(cost, counts, self.spec.num_prefix, wanted, SEARCHED):
                points = points_of(one.counts)
                ms = one.ms - points * cost.overhead_ms
                asked = Asked(with_counts(base, one.counts), ms, points, one.damage)
                found.append((one.damage if math.isfinite(target) else one.ms, base.key, asked))
            knobs += self.own_knob(base, wanted, cost.overhead_ms)
        chosen: list[Asked] = []
        taken: dict[str, int] = {}
        for _, method, asked in sorted(found, key=lambda entry: (entry[0], entry[2].plan.key)):
            if (
                taken.get(method, 0) < max(2, SEARCHED // 2) and len(chosen) < SEARCHED
            ):  # not all of one method
                taken[method] = taken.get(method, 0) + 1
                chosen.append(asked)
        return chosen + knobs

    def own_knob(self, base: Plan, wanted_ms: float, overhead_ms: float) -> list[Asked]:
        """Return the largest budget of a method's own knob that is fast enough, if any, found by halving."""
        low, high, best = 0.02, 1.0, None
        for _ in range(7):
            middle = (low + high) / 2
            asked = self.predicted(with_budget(base, round(middle, 3), self.spec))
            if asked.ms + asked.points * overhead_ms <= wanted_ms:
                low, best = middle, asked
            else:
                high = middle
        return [] if best is None else [best]

    def measure(self, asked: Sequence[Asked], what: str, rounds: int | None = None) -> list[Candidate]:
        """Time plans in turn with the host, and see what each does to all images."""
        rounds = rounds or max(4, self.setting.rounds // 2)
        key = blake2b("".join(one.plan.key for one in asked).encode(), digest_size=12).hexdigest()
        self.log(f"{what}: {len(asked)} plans in turn with dense, {rounds} rounds")

        def make() -> dict[str, list[float]]:
            models: dict[str, nn.Module] = {"dense": self.model}
            models |= {one.plan.key: one.plan.build(self.model) for one in asked}
            return self.clock.times(models, dict.fromkeys(models, self.batch), rounds)

        times = self.once(f"times {self.clock.name()} {rounds} {key} {self.of}", make)
        dense_ms = median(times["dense"])
        found = []
        for plan, predicted_ms, points, predicted_damage in asked:
            ratio = compare(times["dense"], times[plan.key])
            found.append(
                Candidate(
                    plan,
                    ms=median(times[plan.key]),
                    dense_ms=dense_ms,
                    speedup=ratio.value,
                    noise=ratio.noise,
                    damage=self.damage_of(plan),
                    gmacs=gmacs(plan.build(self.model), self.backbone.image_shape),
                    predicted_ms=predicted_ms,
                    points=points,
                    predicted_damage=predicted_damage,
                )
            )
        return found

    def choose(self, pool: list[Candidate], target: float) -> tuple[Candidate | None, bool]:
        """Time the best once more, longer; return the winner, and whether it is fast enough."""
        nearly = target * (1 - MARGIN)
        by_damage = sorted(pool, key=lambda one: one.damage)
        fast = [one for one in by_damage if one.speedup >= target]
        near = [one for one in by_damage if one.speedup >= nearly]
        quick = max(pool, key=lambda one: one.speedup)
        few = {one.plan.key: one for one in (*fast[:4], *near[:2], quick)}
        asked = [Asked(one.plan, one.predicted_ms, one.points, one.predicted_damage) for one in few.values()]
        again = self.measure(asked[:6], "finalists", self.setting.rounds)
        final = {one.plan.key: one for one in again}
        pool[:] = [final.get(one.plan.key, one) for one in pool]
        for least in (target, nearly):
            able = [one for one in again if one.speedup >= least]
            if able:
                return min(able, key=lambda one: one.damage), True
        best = max(again, key=lambda one: one.speedup)
        return (best if best.speedup >= DENSE_IS_FASTER else None), False


def answer(found: Tuned) -> str:
    """Say in words what a search came to."""
    if found.best is None:
        fastest = max((one.speedup for one in found.candidates), default=0.0)
        return (
            f"Dense is faster here: the best found is {fastest:.2f}x ({found.conditions['clock']}); nothing "
            "was chosen."
        )
    best = found.best
    times = f"{found.dense_ms:.2f} to {best.ms:.2f} ms, {found.conditions['clock']}"
    speed = f"{best.speedup:.2f}x ± {best.noise:.1%} ({times})"
    sentence = f"{best.plan}: {speed}, {found.conditions['measure']} {best.damage:.4g}."
    if not found.met:
        sentence = f"The target, {found.target:.2f}x, cannot be met here; the best found is {sentence}"
    chance = found.conditions.get("damage_by_chance", math.inf)
    if chance <= best.damage and not found.conditions["random_images"]:
        sentence += (
            f" Random patches on the same schedule do no more damage ({chance:.4g}): on these images the "
            "selection is no better than chance."
        )
    return sentence
