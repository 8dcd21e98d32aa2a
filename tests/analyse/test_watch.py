"""A watched forward is the model's own; what it tells of attention, ranking and kept patches is true."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import evovit
from evovit.analyse import watch
from evovit.methods import find_method
from evovit.visualize import kept_patches
from tests.conftest import make_host, pairs, pictures
from tests.test_contract import IDS, METHODS, ON_VIT, wrap

RANKS = ("dynamic_vit", "evit", "evo_vit", "idle_vit", "keep")


@pytest.mark.parametrize(("method", "host"), pairs(METHODS))
def test_a_watched_forward_ends_as_the_models_own(method: str, host: str) -> None:
    reduced, images = wrap(make_host(host), method, find_method(method).example), pictures()
    with torch.no_grad():
        seen, outputs = list(watch(reduced, images)), reduced.run(images, record=True)
    assert [each.number for each in seen] == list(range(4))
    for each, tokens in zip(seen, outputs.trace, strict=True):
        assert torch.equal(each.prefix, tokens.prefix)
    whole = reduced.method.finish(outputs.tokens)
    if whole.num_patches == 16:  # all are back
        assert torch.equal(seen[-1].patches, whole.patches)
    if outputs.trace[-1].grid == (4, 4):
        kept = torch.stack([each.kept for each in seen], 1)
        assert torch.equal(kept, kept_patches(reduced, images).flatten(2))


@pytest.mark.parametrize(("method", "options"), ON_VIT, ids=IDS)
def test_what_a_method_ranks_by_is_what_it_keeps_by(method: str, options: dict[str, Any]) -> None:
    reduced, ranked = wrap(make_host("vit"), method, options), 0
    for seen in watch(reduced, pictures(3)):
        if seen.score is None:
            continue
        ranked += 1
        for score, kept in zip(seen.score, seen.kept, strict=True):
            present = ~score.isnan()
            assert not (kept & ~present).any()
            gone = score[present & ~kept]
            assert len(gone) and score[kept].min() >= gone.max()
    assert ranked > 0 or method not in RANKS


@pytest.mark.parametrize("selection", ["probe", "key_norm"])
@pytest.mark.parametrize("method", ["evo_vit", "evit", "idle_vit", "keep"])
def test_hosts_without_class_token_are_watched_by_their_own_selections(method: str, selection: str) -> None:
    options = {"selection": selection} | ({"compared": "active"} if method == "idle_vit" else {})
    reduced = evovit.reduce_tokens(make_host("siglip"), method, **find_method(method).example, **options)
    seen, images = list(watch(reduced, pictures(3))), pictures(3)
    kept = torch.stack([each.kept for each in seen], 1)
    assert torch.equal(kept, kept_patches(reduced, images).flatten(2))
    for each in seen:
        if each.score is not None:
            for score, mask in zip(each.score, each.kept, strict=True):
                assert score[mask].min() >= score[~mask].nan_to_num(-torch.inf).max()


def test_evo_levit_tells_what_it_ranks_by() -> None:
    reduced = evovit.reduce_tokens(make_levit(), "evo_levit", start_block=1)
    seen = list(watch(reduced, pictures(2, 64)))
    assert [each.grid for each in seen] == [(4, 4)] * 2 + [(2, 2)] * 2 + [(1, 1)] * 2
    for number in (1, 2):
        score, kept = seen[number].score, seen[number].kept
        assert score is not None and not score.isnan().any()
        for values, mask in zip(score, kept, strict=True):
            assert values[mask].min() >= values[~mask].max()


def make_levit() -> torch.nn.Module:
    from evovit.models.levit_cls import LevitCls
    from tests.conftest import disturb

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": (16, 24, 32), "num_heads": (2, 3, 4), "depth": (2, 2, 2)}
    return disturb(LevitCls(img_size=64, key_dim=8, num_classes=5, **sizes)).eval()


def naive_attention(host: Any, images: Tensor, number: int) -> Tensor:
    """Return the attention of block `number` of a plain ViT, (B, H, T, T), by eq. 2 and 3."""
    x = host.patch_embed(images)
    x = torch.cat((host.cls_token.expand(len(x), -1, -1), x), 1) + host.pos_embed
    for block in host.blocks[:number]:
        x = block(x)
    attn = host.blocks[number].attn
    q, k, _ = attn.qkv(host.blocks[number].norm1(x)).chunk(3, -1)
    result = torch.zeros(len(x), attn.num_heads, x.shape[1], x.shape[1])
    for image in range(len(x)):
        for head in range(attn.num_heads):
            part = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
            for i in range(x.shape[1]):
                logits = [float(q[image, i, part] @ key[part]) / attn.head_dim**0.5 for key in k[image]]
                result[image, head, i] = torch.tensor(logits).softmax(0)
    return result


def test_class_attention_and_queries_are_the_hosts() -> None:
    host, images = make_host("vit"), pictures()
    with torch.no_grad():
        seen = list(watch(evovit.reduce_tokens(host, "dense"), images))[2]
        expected = naive_attention(host, images, 2)[:, :, 0, 1:].mean(1)
    assert torch.allclose(seen.attention, expected, atol=1e-5)
    assert seen.queries.shape == (2, 16, 32) and seen.present.all() and seen.kept.all()


def test_without_class_token_it_is_the_attention_received() -> None:
    reduced = evovit.reduce_tokens(make_host("siglip"), "dense")
    seen = next(watch(reduced, pictures()))
    assert torch.allclose(seen.attention.sum(1), torch.ones(2), atol=1e-5)  # mean over 16 rows that sum to 1


def test_a_cell_without_a_token_has_no_attention_and_keeps_its_last_value() -> None:
    reduced, images = evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,), rest="drop"), pictures()
    seen = list(watch(reduced, images))
    gone = ~seen[1].kept
    assert gone.sum(1).tolist() == [4, 4] and torch.equal(seen[3].attention.isnan(), gone)
    assert torch.equal(seen[3].patches[gone], seen[0].patches[gone])
    assert not torch.equal(seen[3].patches[~gone], seen[0].patches[~gone])
