"""The example that serves by deadline, on a simulated clock."""

from __future__ import annotations

import copy

import pytest

from examples.serve_by_deadline import MOST, Planner, Request, rising_load, serve

SECONDS = {
    budget: [0.002 + 0.004 * budget * size for size in range(1, MOST + 1)] for budget in (1.0, 0.7, 0.5, 0.3)
}


@pytest.mark.parametrize("patience", [0.03, 0.06, 0.2])
@pytest.mark.parametrize("most", [150, 400, 900])
def test_no_deadline_is_missed_that_a_lower_budget_could_have_met(patience: float, most: float) -> None:
    requests = rising_load(3.0, 20, most, patience)
    serve(requests, Planner(SECONDS), lambda budget, size: SECONDS[budget][size - 1])
    for request in requests:
        size = sum(other.start == request.start for other in requests)
        if request.missed:
            assert request.start + SECONDS[0.3][size - 1] > request.deadline


def test_who_waits_behind_is_thought_of() -> None:
    """The first batch could afford the largest budget; the second would then be late."""
    now = [Request(0.0, 1.0) for _ in range(MOST)] + [Request(0.0, 1.01) for _ in range(MOST)]
    seconds = {1.0: [0.9] * MOST, 0.5: [0.5] * MOST}
    serve(now, Planner(seconds), lambda budget, size: seconds[budget][size - 1])
    assert not any(request.missed for request in now) and {request.budget for request in now} == {0.5}


def test_budgets_fall_as_the_load_rises() -> None:
    requests = rising_load(3.0, 20, 500, 0.08)
    serve(requests, Planner(SECONDS), lambda budget, size: SECONDS[budget][size - 1])
    third = len(requests) // 3
    early, late = requests[:third], requests[-third:]
    mean = [sum(request.budget or 0 for request in part) / third for part in (early, late)]
    assert mean[0] > 0.9 and mean[1] < mean[0]


def test_it_misses_no_more_than_the_lowest_budget_alone_on_known_requests() -> None:
    requests = [Request(0.0, 0.02 * (place // MOST + 1)) for place in range(5 * MOST)]
    alone = copy.deepcopy(requests)
    serve(requests, Planner(SECONDS), lambda budget, size: SECONDS[budget][size - 1])
    serve(alone, Planner({0.3: SECONDS[0.3]}), lambda budget, size: SECONDS[budget][size - 1])
    assert sum(r.missed for r in requests) <= sum(r.missed for r in alone)
