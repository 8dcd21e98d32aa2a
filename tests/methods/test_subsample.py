"""Sub-sampling rows of Evo-ViT's table 4."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import evovit
from tests.conftest import make_host, pictures


@pytest.mark.parametrize(
    ("kind", "pool"), [("average", F.avg_pool2d), ("max", F.max_pool2d), ("conv", F.avg_pool2d)]
)
def test_the_grid_is_pooled_before_its_block(kind: str, pool: object) -> None:
    """The convolution starts as the average."""
    host, images = make_host("vit"), pictures()
    reduced = evovit.reduce_tokens(host, "subsample", kind=kind, block=2)
    dense = evovit.reduce_tokens(host, "subsample", stride=1, block=2)
    with torch.no_grad():
        before = dense.run(images, record=True).trace[1]
        trace = reduced.run(images, record=True).trace
        grid = before.patches.transpose(1, 2).unflatten(2, (4, 4))
        x = torch.cat((before.prefix, pool(grid, 2).flatten(2).transpose(1, 2)), 1)
        expected = host.blocks[2](x)
    assert torch.allclose(trace[2].x, expected, atol=1e-5)
    assert trace[2].grid == (2, 2)
    assert trace[2].index.tolist() == [[0, 2, 8, 10]] * 2
    assert [t.num_patches for t in trace] == [16, 16, 4, 4]


def test_ragged_edges_are_cut_off() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "subsample", block=0, stride=3)
    assert reduced.run(pictures(), record=True).trace[0].num_patches == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"kind": "median"}, "kind is 'median'"), ({"block": 9}, "block is 9"), ({"stride": 5}, "stride is 5")],
)
def test_wrong_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "subsample", **({"block": 2} | options))
