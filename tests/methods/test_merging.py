"""What all methods that merge promise: sizes, places and the way back fit together. From the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import evovit
from evovit.methods import find_method, list_methods
from evovit.methods.merging import CountedMerging, Merging, unmerge
from evovit.ops.merge import follow, join
from tests.conftest import make_host, pictures
from tests.parity import assert_close

MERGERS = [name for name in list_methods() if issubclass(find_method(name), Merging)]
POOLED = {"ppt": {"threshold": 1.0}}  # options under which every token lives on


def reduced(name: str, host: str = "vit", **options: Any) -> evovit.ReducedViT:
    cls = find_method(name)
    given = cls.example | POOLED.get(name, {}) | options
    if host == "siglip" and hasattr(cls.Config, "selection"):
        given["selection"] = "column_mean"
    return evovit.reduce_tokens(make_host(host), name, **given)


def test_there_are_some() -> None:
    assert {"tome", "ppt"} <= set(MERGERS)


@pytest.mark.parametrize("host", ["vit", "dinov2_reg", "siglip"])
@pytest.mark.parametrize("name", MERGERS)
def test_sizes_places_and_sources_tell_the_same(name: str, host: str) -> None:
    """Every cell is in one token, a token's size counts its cells, and it stands on one of them."""
    with torch.no_grad():
        trace = reduced(name, host).run(pictures(3), record=True).trace
    assert trace[-1].num_patches < 16
    for tokens in trace:
        if tokens.size is None:
            continue
        source, rows = tokens.carry.source, torch.arange(tokens.num_patches).expand(3, -1)
        assert torch.equal(F.one_hot(source, tokens.num_patches).sum(1), tokens.size.long())
        assert torch.equal(source.gather(1, tokens.index), rows)


@pytest.mark.parametrize("name", MERGERS)
def test_the_way_back_is_in_raster_order(name: str) -> None:
    model = reduced(name)
    with torch.no_grad():
        tokens = model.run(pictures()).tokens
        whole = unmerge(tokens)
    assert whole.index.tolist() == [list(range(16))] * 2 and whole.size is whole.carry is None
    for image in range(2):
        for cell, row in enumerate(tokens.carry.source[image].tolist()):
            assert torch.equal(whole.patches[image, cell], tokens.patches[image, row])
    assert model.feature_map(pictures()).shape == (2, 32, 4, 4)


@pytest.mark.parametrize("name", MERGERS)
def test_a_head_that_averages_weighs_by_size(name: str) -> None:
    model = reduced(name, "vit_avg")
    with torch.no_grad():
        outputs = model.run(pictures())
        mean = (outputs.tokens.patches * outputs.tokens.size[..., None]).sum(1) / 16
        assert_close(outputs.logits, model.model.head(model.model.fc_norm(mean)))


@pytest.mark.parametrize("name", MERGERS)
def test_without_proportional_attention_keys_have_no_bias(name: str) -> None:
    for proportional in (True, False):
        model = reduced(name, proportional_attention=proportional)
        with torch.no_grad():
            tokens = model.run(pictures()).tokens
        bias = model.method.size_bias(tokens)
        assert (bias is None) != proportional
        if bias is not None:
            assert_close(bias[:, 0, 0], F.pad(tokens.size.log(), (1, 0)))


def test_a_dropped_cell_stays_dropped() -> None:
    def rows(*numbers: int) -> Tensor:
        return torch.tensor([numbers])

    merged = join(rows(0), rows(2, 3), rows(1), rows(1))  # row 1 becomes part of row 3
    assert follow(None, merged).tolist() == [[0, 2, 1, 2]]
    dropped = type(merged)(**(vars(merged) | {"dropped": torch.tensor([[False, False, False, True]])}))
    assert follow(None, dropped).tolist() == [[0, -1, 1, 2]]
    assert follow(rows(3, -1, 1, 0), dropped).tolist() == [[2, -1, -1, 0]]
    assert join(rows(0), rows(2, 3), rows(1), rows(1), targets_first=True).moved.tolist() == [[2, 1, 0, 1]]


@pytest.mark.parametrize("name", [n for n in MERGERS if issubclass(find_method(n), CountedMerging)])
def test_counts_follow_a_ramp(name: str) -> None:
    method = reduced(name, r=4).method
    for share, expected in ((0.0, 0), (0.5, 2), (1.0, 4)):
        method.set_reduction(share)
        assert method.removed == (expected,) * 4
