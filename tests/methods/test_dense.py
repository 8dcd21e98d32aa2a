"""Dense: the host through its views; the contract suite compares it with every host."""

from __future__ import annotations

import torch

import evovit
from tests.conftest import make_host, pictures


def test_every_block_keeps_every_token_and_the_map_is_the_hosts() -> None:
    host, images = make_host("vit_avg"), pictures()
    dense = evovit.reduce_tokens(host, "dense")
    with torch.no_grad():
        outputs = dense.run(images, record=True)
        assert [tokens.num_patches for tokens in outputs.trace] == [16] * 4
        assert torch.equal(outputs.logits, host(images))
        features = host.forward_features(images)[:, 1:]
        assert torch.equal(dense.feature_map(images).flatten(2).transpose(1, 2), features)


def test_it_adds_no_parameter_and_no_option() -> None:
    dense = evovit.reduce_tokens(make_host("vit"), "dense")
    assert not list(dense.method.parameters())
    assert not type(dense.method.config).__dataclass_fields__
