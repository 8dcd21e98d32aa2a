"""What every comparison with official reference numbers shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import evovit
from tests.conftest import Golden


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare relative to the largest expected value."""
    expected = expected.float() if expected.dtype == torch.uint8 else expected
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def assert_near(
    actual: Tensor, official: Golden, case: dict[str, Any], name: str, floor: float = 1e-5
) -> None:
    """Compare with an output; ten times its recorded distance from float64 is allowed, at least `floor`."""
    expected = official.out(case, name)
    distance = case["checks"]["float64_max_abs_diff"].get(name, 0.0)
    assert_close(actual, expected, max(floor, 10 * distance / expected.abs().max().item()))


def assert_same_traces(official: Golden, case: dict[str, Any], outputs: evovit.Outputs) -> None:
    """Compare logits, and the class token and the mean patch token after every block."""
    assert_close(outputs.logits, official.out(case, "logits"))
    assert_close(torch.stack([t.x[:, 0] for t in outputs.trace]), official.out(case, "cls_trace"))
    means = torch.stack([t.x[:, 1:].mean(1) for t in outputs.trace])
    assert_close(means, official.out(case, "mean_trace"))


def assert_same_gradients(official: Golden, case: dict[str, Any], gradients: dict[str, Tensor]) -> None:
    """Compare the norm of every gradient, and every value of those that are stored."""
    norms = dict(zip(case["grad_norm_names"], official.out(case, "grad_norm"), strict=True))
    largest = max(norms.values())
    assert set(norms) == set(gradients)
    for name, expected in norms.items():
        assert abs(gradients[name].norm() - expected) <= 1e-5 * (expected + 1e-3 * largest), name
    for output in case["outputs"]:
        if output.startswith("grad."):
            assert_close(gradients[output.removeprefix("grad.")], official.out(case, output), 2e-5)


def gradients_of(model: evovit.ReducedViT) -> dict[str, Tensor]:
    """Return the gradient of every parameter of the host by name."""
    return {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}
