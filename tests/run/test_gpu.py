"""What needs a GPU: every engine works, and what is said of memory and kernels is true there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evovit.bench import step as step_module
from evovit.bench.profile import profile
from evovit.bench.setting import Setting, Variant
from evovit.bench.timing import Extras, measure
from evovit.ops.select import split_top

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # some PyTorchs warn of TF32 left off
EVO = Variant("evo_vit", {"keep_ratio": 0.5})


def setting(**changes: Any) -> Setting:
    shared: dict[str, Any] = {"model": "test_vit", "device": "cuda", "dtype": "bf16", "batch": 2, "rounds": 2}
    return Setting(**shared | changes)


@pytest.mark.parametrize("num", [7, 196, 1025])
def test_a_gpu_keeps_the_tokens_a_cpu_keeps(num: int) -> None:
    score = torch.randint(-50, 50, (3, num)) / 50
    compiled = torch.compile(split_top, fullgraph=True, dynamic=False)
    for find in (split_top, compiled):
        found, expected = find(score.cuda(), (num + 1) // 2), split_top(score, (num + 1) // 2)
        assert torch.equal(found.kept.cpu(), expected.kept) and torch.equal(found.rows.cpu(), expected.rows)


@pytest.mark.parametrize("train", [False, True])
def test_all_engines_work_on_a_gpu(train: bool) -> None:
    rows = measure(setting(engines=("eager", "compiled", "graphs"), train=train), [EVO])
    assert [row.skipped for row in rows] == [""] * 6
    assert all(row.median_ms and row.peak_memory_mb and row.kernels for row in rows)


def test_a_capture_that_fails_leaves_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(model: Any, batch: Any) -> torch.Tensor:
        out = model(batch.images).sum()
        if torch.cuda.is_current_stream_capturing():
            out.item()
        return out

    monkeypatch.setattr(step_module, "loss_of", waits)
    monkeypatch.setattr(step_module, "compiled", lambda forward, name: forward)
    home = torch.cuda.current_stream()
    rows = measure(setting(engines=("graphs",), train=True), [], Extras(kernels=False))
    assert "the capture failed" in rows[0].skipped and torch.cuda.current_stream() == home
    assert torch.ones(2, device="cuda").sum().item() == 2


def test_a_profile_counts_every_kernel_of_the_step_and_no_other() -> None:
    value = torch.ones(8, device="cuda")
    found = profile(lambda i: [value.add_(1) for _ in range(50)], "cuda")
    assert found.kernels == 50 and len(found.names) == 1
