"""Heads and channels removed for good: exact to the masked model; masks that regrow; published sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

import evovit
from evovit.macs import gmacs
from evovit.slimming import BlockMask, StructuredMasks, death_rate, slim, turned
from tests.conftest import TINY, disturb, make_host, pictures
from tests.parity import assert_close

SIZES: dict[str, Any] = TINY | {"num_heads": 4}


def small(**options: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return disturb(VisionTransformer(**(SIZES | options))).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": False},
        {"proj_bias": False},
        {"qk_norm": True, "init_values": 0.1},
        {"reg_tokens": 2, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
    ],
)
def test_the_smaller_model_is_the_masked_one_exactly(options: dict[str, Any]) -> None:
    """In double precision, to its last digits; and token reduction runs on it as on any host."""
    host = small(**options).double()
    masks = StructuredMasks(host, heads=0.5, channels=0.4, seed=3)
    slimmed: Any = masks.slim()
    images = pictures().double()
    with torch.no_grad():
        expected = host(images)
        assert (slimmed(images) - expected).abs().max() <= 1e-13 * expected.abs().max()
        told: dict[str, Any] = {"blocks": (1, 2), "selection": "even"}  # scores are means over heads
        reduced, masked = (evovit.reduce_tokens(model, "keep", **told) for model in (slimmed, host))
        assert_close(reduced(images), masked(images), 1e-12)
    assert [block.attn.num_heads for block in slimmed.blocks] == [2] * 4
    assert [block.mlp.fc1.out_features for block in slimmed.blocks] == [51] * 4
    assert slimmed.blocks[0].attn.proj.weight.shape == (32, 16)
    assert host.blocks[0].attn.qkv.weight.shape == (96, 32)  # the model itself stays
    before, after = (sum(p.numel() for p in model.parameters()) for model in (host, slimmed))
    assert after < 0.65 * before and gmacs(slimmed, (3, 32, 32)) < 0.65 * gmacs(host, (3, 32, 32))


def test_masks_may_differ_from_block_to_block_and_the_result_trains() -> None:
    host = small()
    masks = [
        BlockMask(torch.tensor([True, False, block > 1, True]), torch.arange(128) % (block + 2) == 0)
        for block in range(4)
    ]
    slimmed: Any = slim(host, masks)
    assert [block.attn.num_heads for block in slimmed.blocks] == [2, 2, 3, 3]
    slimmed.train()(pictures()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in slimmed.parameters())
    keys = list(host.state_dict())
    assert list(slimmed.state_dict()) == keys
    again = slim(host, masks)
    again.load_state_dict(slimmed.state_dict())


PUBLISHED = {  # heads, channels, million parameters, GMACs (3.5 of the specification)
    "deit_tiny_patch16_224": (0.7, 0.7, 4.2, 0.95),
    "deit_small_patch16_224": (0.7, 0.6, 14.6, 3.14),
    "deit_base_patch16_224": (0.7, 0.6, 56.8, 11.8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_those_before_the_projections_zero_columns_go(name: str) -> None:
    """The published counts are of heads padded with zeros to the full width, in the projection and in
    attention; the smaller model has neither.
    """
    heads, channels, millions, work = PUBLISHED[name]
    with torch.device("meta"):
        host: Any = timm.create_model(name).eval()
    with torch.device("meta"):  # masks have values wherever they are made
        assert StructuredMasks(host, heads, channels).slim() is not host
    listed = {"deit_tiny_patch16_224": 2, "deit_small_patch16_224": 4, "deit_base_patch16_224": 8}
    masks = StructuredMasks(host, heads, channels)
    slimmed: Any = masks.slim()
    assert {block.attn.num_heads for block in slimmed.blocks} == {listed[name]}
    width, dead = host.embed_dim, host.embed_dim - slimmed.blocks[0].attn.attn_dim
    own = sum(p.numel() for p in slimmed.parameters())
    padded = own + 12 * dead * width
    assert padded / 1e6 == pytest.approx(millions, rel=5e-3)
    full = gmacs(slimmed, (3, 224, 224)) + 12 * (197 * dead * width + 2 * 197**2 * dead) / 1e9
    assert full == pytest.approx(work, rel=0.01)
    assert gmacs(slimmed, (3, 224, 224)) < full


def test_masked_weights_stay_zero_and_so_does_what_the_optimiser_remembers() -> None:
    host = small().train()
    masks = StructuredMasks(host, heads=0.5, channels=0.5)
    optimizer = torch.optim.AdamW(host.parameters(), 1e-2)
    for _ in range(3):
        host(pictures()).square().mean().backward()
        optimizer.step()
        masks.apply([optimizer])
        optimizer.zero_grad()
    for block, mask in zip(host.blocks, masks.masks, strict=True):
        rows = ~mask.heads.repeat_interleave(8).repeat(3)
        for p, dead in (
            (block.attn.qkv.weight, (rows,)),
            (block.mlp.fc1.weight, (~mask.channels,)),
            (block.mlp.fc2.weight, (slice(None), ~mask.channels)),
        ):
            assert not p[dead].any() and not optimizer.state[p]["exp_avg"][dead].any()
            assert p.any()
    with torch.no_grad():
        assert_close(masks.slim().eval()(pictures()), host.eval()(pictures()))


def naive_turn(alive: list[bool], worth: list[float], pull: list[float], rate: float) -> list[bool]:
    living = [i for i, is_alive in enumerate(alive) if is_alive]
    count = math.ceil(rate * len(living))
    alive = list(alive)
    for i in sorted(living, key=lambda i: worth[i])[:count]:
        alive[i] = False
    for i in sorted((i for i, is_alive in enumerate(alive) if not is_alive), key=lambda i: -pull[i])[:count]:
        alive[i] = True
    return alive


@pytest.mark.parametrize("rate", [0.005, 0.3, 0.5])
def test_dying_and_growing_equal_a_naive_loop(rate: float) -> None:
    for _ in range(20):
        mask, worth, pull = torch.rand(12) < 0.6, torch.rand(12), torch.rand(12)
        mask[0] = True
        expected = naive_turn(mask.tolist(), worth.tolist(), pull.tolist(), rate)
        found = turned(mask, worth, pull, rate)
        assert found.tolist() == expected and found.sum() == mask.sum()


def test_heads_and_channels_regrow_by_gradients() -> None:
    """Importance and pull against loops over images, tokens and channels; the numbers of a block stay."""
    host: Any = small().train()
    masks = StructuredMasks(host, heads=0.5, channels=0.5)
    before = [(mask.heads.clone(), mask.channels.clone()) for mask in masks.masks]
    seen: list[Any] = []

    def listen(layer: nn.Module, given: tuple[Any, ...]) -> None:
        given[0].retain_grad()
        seen.append(given[0])

    host.blocks[2].attn.proj.register_forward_pre_hook(listen)
    host(pictures()).square().mean().backward()
    value, gradient = seen[0].detach(), seen[0].grad  # (B, T, 32)
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        products = [float((value[image, :, part] * gradient[image, :, part]).sum()) for image in range(2)]
        assert float(masks.felt[2].importance[head]) == pytest.approx(sum(map(abs, products)) / 2, rel=1e-4)
        assert float(masks.felt[2].pull[head]) == pytest.approx(
            float(gradient[..., part].abs().sum()), rel=1e-4
        )
    fc1, fc2 = host.blocks[2].mlp.fc1.weight, host.blocks[2].mlp.fc2.weight
    size = [float((fc1[i].abs().sum() + fc2[:, i].abs().sum()).detach()) for i in range(128)]
    pull = [float(fc1.grad[i].abs().sum() + fc2.grad[:, i].abs().sum()) for i in range(128)]
    masks.regrow(0.0)
    assert masks.masks[2].channels.tolist() == naive_turn(before[2][1].tolist(), size, pull, 0.5)
    felt = masks.felt[2]
    expected = naive_turn(before[2][0].tolist(), felt.importance.tolist(), felt.pull.tolist(), 0.5)
    assert masks.masks[2].heads.tolist() == expected
    for mask, (heads, channels) in zip(masks.masks, before, strict=True):
        assert mask.heads.sum() == heads.sum() and mask.channels.sum() == channels.sum()
    now = [mask.channels.clone() for mask in masks.masks]
    masks.regrow(0.8)
    assert all(torch.equal(mask.channels, was) for mask, was in zip(masks.masks, now, strict=True))


def test_the_death_rate_is_half_a_cosine() -> None:
    assert death_rate(0.0) == 0.5 and death_rate(1.0) == pytest.approx(0.005)
    assert death_rate(0.5) == pytest.approx(0.2525)


def test_masks_train_within_a_reduced_model() -> None:
    host: Any = small()
    reduced = evovit.reduce_tokens(host, "keep", blocks=(1,), selection="even").train()
    masks = StructuredMasks(host, heads=0.5, channels=0.5)
    optimizer = torch.optim.SGD(reduced.parameters(), 1e-2)
    for step in range(4):
        reduced(pictures()).square().mean().backward()
        optimizer.step()
        masks.regrow(step / 4)
        masks.apply([optimizer])
        optimizer.zero_grad()
    smaller = evovit.reduce_tokens(masks.slim().eval(), "keep", blocks=(1,), selection="even")
    with torch.no_grad():
        assert_close(smaller(pictures()), reduced.eval()(pictures()))


def test_wrong_input_is_one_sentence() -> None:
    with pytest.raises(evovit.EvoViTError, match="The model is a Eva of timm.models.eva"):
        StructuredMasks(make_host("eva02"))
    with pytest.raises(evovit.EvoViTError, match="normalises or gates its heads or channels together"):
        StructuredMasks(small(scale_attn_norm=True))
    with pytest.raises(evovit.EvoViTError, match="heads is 0; allowed is a number above 0, at most 1"):
        StructuredMasks(small(), heads=0)
    masks = StructuredMasks(small())
    with pytest.raises(
        evovit.EvoViTError, match="Block 0 has no gradient; call regrow after a backward pass"
    ):
        masks.regrow(0.1)
    with pytest.raises(evovit.EvoViTError, match="masks has 1 entries for 4 blocks"):
        slim(small(), masks.masks[:1])
    none = [mask._replace(heads=torch.zeros(4, dtype=torch.bool)) for mask in masks.masks]
    with pytest.raises(evovit.EvoViTError, match="heads of block 0: .* at least one of them True"):
        slim(small(), none)
