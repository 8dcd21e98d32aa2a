"""Every method that takes a schedule takes the same one: a count of patch tokens per block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import evovit
from evovit.errors import EvoViTError
from evovit.methods import find_method
from evovit.methods.base import ScheduledConfig
from tests.conftest import HOSTS, disturb, make_host, pictures

COUNTS = (16, 12, 12, 7)
SCHEDULED = [m for m in evovit.list_methods() if issubclass(find_method(m).Config, ScheduledConfig)]


def kept(model: evovit.ReducedViT) -> list[int]:
    """Return how many patch tokens with a place each block leaves, or works on."""
    with torch.no_grad():
        trace = model.run(pictures(), record=True).trace
    return [t.num_patches - int(t.index[0, -1] < 0) for t in trace]  # a fused or representative token is last


def test_the_usual_methods_are_among_them() -> None:
    assert {"evo_vit", "evit", "keep", "dynamic_vit", "idle_vit", "tome"} <= set(SCHEDULED)


@pytest.mark.parametrize("method", SCHEDULED)
def test_each_block_keeps_what_was_asked_and_a_save_remembers(method: str, tmp_path: Path) -> None:
    model = evovit.reduce_tokens(make_host("vit"), method, keep_per_block=COUNTS).eval()
    assert kept(model) == list(COUNTS)
    evovit.save_reduced(model, tmp_path)
    again = evovit.load_reduced(tmp_path, make_host("vit"))
    assert again.method.config.keep_per_block == COUNTS
    assert torch.equal(model(pictures()), again.eval()(pictures()))


@pytest.mark.parametrize("method", SCHEDULED)
def test_keeping_all_is_the_host(method: str) -> None:
    host = make_host("vit").eval()
    model = evovit.reduce_tokens(host, method, keep_per_block=(16, 16, 16, 16)).eval()
    assert torch.allclose(model(pictures()), host(pictures()), atol=1e-5)


@pytest.mark.parametrize("method", SCHEDULED)
def test_a_late_start_scales_the_schedule(method: str) -> None:
    model = evovit.reduce_tokens(make_host("vit"), method, keep_per_block=COUNTS).eval()
    model.method.set_reduction(0.0)
    assert kept(model) == [16, 16, 16, 16]
    model.method.set_reduction(0.5)
    half = kept(model)
    assert all(few <= now <= 16 for few, now in zip(COUNTS, half, strict=True)) and half != [16] * 4
    fresh = evovit.reduce_tokens(make_host("vit"), model.method.current_config()).eval()
    assert kept(fresh) == half
    model.method.set_reduction(1.0)
    assert kept(model) == list(COUNTS)


@pytest.mark.parametrize("method", SCHEDULED)
@pytest.mark.parametrize(
    "counts", [(16, 8), (8, 8, 8, 8), (16, 0, 0, 0), (16, 99, 16, 16), "many", (16, "a", 2, 2)]
)
def test_what_is_no_schedule_is_one_sentence(method: str, counts: object) -> None:
    with pytest.raises(EvoViTError, match="keep_per_block"):
        evovit.reduce_tokens(make_host("vit"), method, keep_per_block=counts)


@pytest.mark.parametrize("method", sorted(set(SCHEDULED) - {"evo_vit", "idle_vit"}))
def test_dropped_tokens_do_not_come_back(method: str) -> None:
    with pytest.raises(EvoViTError, match="keep_per_block rises"):
        evovit.reduce_tokens(make_host("vit"), method, keep_per_block=(16, 8, 9, 8))


def test_parked_tokens_come_back() -> None:
    model = evovit.reduce_tokens(make_host("vit"), "evo_vit", keep_per_block=(16, 8, 12, 4)).eval()
    assert kept(model) == [16, 8, 12, 4]


def test_a_block_merges_half_at_most() -> None:
    with pytest.raises(EvoViTError, match="at most half"):
        evovit.reduce_tokens(make_host("vit"), "tome", keep_per_block=(16, 7, 7, 7))


def test_other_image_sizes_keep_the_same_share() -> None:
    host = disturb(HOSTS["vit"](dynamic_img_size=True)).eval()  # type: ignore[call-arg]
    model = evovit.reduce_tokens(host, "evit", keep_per_block=COUNTS).eval()
    with torch.no_grad():
        trace = model.run(torch.randn(1, 3, 64, 64), record=True).trace
    assert [t.num_patches - int(t.index[0, -1] < 0) for t in trace] == [64, 48, 48, 28]
