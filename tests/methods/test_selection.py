"""The scores by which models without a class token are ranked, on every method that has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evovit
from evovit.errors import EvoViTError
from evovit.methods import find_method
from tests.conftest import make_host, pictures

SCORED = [name for name in evovit.list_methods() if hasattr(find_method(name).Config, "selection")]
CLASSLESS = ["column_mean", "key_norm", "probe"]


def reduced_by(host: nn.Module, method: str, selection: str, **options: Any) -> evovit.ReducedViT:
    cls = find_method(method)
    fitting = {"compared": "active"} if hasattr(cls.Config, "compared") else {}
    return evovit.reduce_tokens(host, method, **cls.example | fitting | options, selection=selection)


def probe_weights(host: Any, x: Tensor) -> Tensor:
    """Return the attention (B, N) that the pooling head of timm's SigLIP pays tokens x (B, N, C)."""
    pool, seen = host.attn_pool, []
    asking = pool.q(pool.latent)[0, 0].unflatten(0, (pool.num_heads, -1))
    keys = pool.kv(host.norm(x))[..., : x.shape[2]].unflatten(2, (pool.num_heads, -1))  # (B, N, H, D)
    for head in range(pool.num_heads):
        seen.append((keys[:, :, head] @ asking[head] * pool.scale).softmax(-1))
    return torch.stack(seen).mean(0)


def test_every_method_that_scores_offers_the_three() -> None:
    assert {"evit", "evo_levit", "evo_vit", "idle_vit", "keep"} <= set(SCORED)
    for method in SCORED:
        with pytest.raises(EvoViTError, match="column_mean, key_norm"):
            reduced_by(make_host("siglip"), method, "best")


@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("selection", CLASSLESS)
def test_nothing_reduced_is_the_host_and_reducing_ignores_the_batch(method: str, selection: str) -> None:
    host, images = make_host("siglip"), pictures(3)
    whole = reduced_by(host, method, selection, **find_method(method).keep_all)
    with torch.no_grad():
        expected = host(images)
        assert (whole(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
        reduced = reduced_by(host, method, selection)
        outputs, alone = reduced.run(images, record=True), reduced(images[1:2])
    assert min(tokens.num_patches for tokens in outputs.trace) < 16
    assert torch.allclose(outputs.logits[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs.logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", SCORED)
@pytest.mark.parametrize("selection", ["key_norm", "probe"])
def test_compiles_exports_copies_and_trains(method: str, selection: str) -> None:
    torch._dynamo.reset()
    reduced, images = reduced_by(make_host("siglip"), method, selection), pictures(3)
    with torch.no_grad():
        expected = reduced(images)
        compiled = torch.compile(reduced, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(images), expected, rtol=1e-4, atol=1e-5)
        batch = {"images": {0: torch.export.Dim("batch", min=2, max=8)}}
        program = torch.export.export(reduced, (pictures(2),), dynamic_shapes=batch).module()
        assert torch.allclose(program(images), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(copy.deepcopy(reduced)(images), expected)
    reduced.train()(images).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in reduced.parameters())


@pytest.mark.parametrize("place", [0, 2])
def test_the_tokens_that_the_probe_would_read_stay(place: int) -> None:
    host, images = make_host("siglip"), pictures()
    reduced = evovit.reduce_tokens(host, "keep", blocks=(place,), keep_ratio=0.5, selection="probe")
    with torch.no_grad():
        trace = reduced.run(images, record=True).trace
        found = host.pos_drop(host.patch_embed(images) + host.pos_embed) if place == 0 else trace[place - 1].x
        best = probe_weights(host, found).topk(8).indices.sort().values
    assert torch.equal(trace[place].index, best)


def test_the_tokens_with_the_longest_keys_stay() -> None:
    host, images = make_host("vit"), pictures()  # with a class token it may be chosen too
    reduced = evovit.reduce_tokens(host, "keep", blocks=(1,), keep_ratio=0.5, selection="key_norm")
    with torch.no_grad():
        trace = reduced.run(images, record=True).trace
        keys = host.blocks[1].attn.qkv(host.blocks[1].norm1(trace[0].x)).chunk(3, dim=-1)[1]
        length = keys[:, 1:].unflatten(2, (2, -1)).norm(dim=-1).mean(-1)
    assert torch.equal(trace[1].index, length.topk(8).indices.sort().values)


def test_the_pooling_of_a_host_with_prefix_tokens_is_followed() -> None:
    """timm's Eva pools its class token too: the probe's attention is shared with it."""
    from timm.models.eva import Eva

    from evovit.backbones import adapt
    from tests.conftest import TINY, disturb

    host = disturb(Eva(**TINY, use_rot_pos_emb=True, global_pool="map")).eval()
    backbone = adapt(host)
    assert backbone.spec.has_probe and backbone.spec.num_prefix == 1
    tokens = backbone.embed(pictures())
    with torch.no_grad():
        seen = backbone.probe_qkv(tokens)
        assert seen.k.shape[2] == 17
        expected = probe_weights(host, tokens.x)[:, 1:]
        from evovit.ops.score import probe_attention

        assert torch.allclose(probe_attention(seen, 16), expected, atol=1e-6)
        reduced = evovit.reduce_tokens(host, "evo_vit", start_block=1, selection="probe")
        assert min(tokens.num_patches for tokens in reduced.run(pictures(), record=True).trace) < 16


@pytest.mark.parametrize("method", SCORED)
def test_a_host_without_probe_or_class_token_is_told_what_it_has(method: str) -> None:
    with pytest.raises(EvoViTError, match=r"selection='probe' needs a head .* 'column_mean' or 'key_norm'\."):
        reduced_by(make_host("vit"), method, "probe")
    with pytest.raises(EvoViTError, match=r"choose 'column_mean', 'key_norm'(,| or) 'probe'"):
        reduced_by(make_host("siglip"), method, "class")


def test_scores_that_weigh_tokens_weigh_them_as_attention_does() -> None:
    """EViT's fused token is a weighted sum, not normalised: a score must not blow it up."""
    host, images = make_host("siglip"), pictures()
    sizes = {}
    for selection in CLASSLESS:
        reduced = evovit.reduce_tokens(host, "evit", blocks=(1,), keep_ratio=0.5, selection=selection)
        with torch.no_grad():
            trace = reduced.run(images, record=True).trace
        sizes[selection] = trace[1].x[:, -1].norm().item() / trace[1].x[:, :-1].norm(dim=-1).mean().item()
    assert max(sizes.values()) < 3 * min(sizes.values())
