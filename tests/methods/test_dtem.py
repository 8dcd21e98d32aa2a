"""DTEM: relaxed merging by naive loops, ToMe's merging as its cold limit, a metric that learns alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import evovit
from evovit.backbones import adapt
from evovit.macs import gmacs
from evovit.methods.dtem import DTEM
from evovit.ops.merge import match_tokens, relaxed_top, soft_match
from tests.conftest import HOSTS, make_host, pictures
from tests.parity import assert_close


def naive_choice(score: list[list[float]], count: int, temperature: float) -> list[list[float]]:
    """Relaxed draws without replacement over rows, in plain Python."""
    rows, columns = range(len(score)), range(len(score[0]))
    score, total = [row[:] for row in score], [[0.0] * len(score[0]) for _ in score]
    for _ in range(count):
        top = max(score[i][j] for i in rows for j in columns)
        weight = [[math.exp((score[i][j] - top) / temperature) for j in columns] for i in rows]
        whole = sum(map(sum, weight))
        for i in rows:
            row = [weight[i][j] / whole for j in columns]
            for j in columns:
                total[i][j] += row[j]
            left = max(1 - sum(row), torch.finfo(torch.float32).tiny)
            score[i] = [value + math.log(left) for value in score[i]]
    return total


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_relaxed_choice_equals_a_naive_loop(count: int) -> None:
    score = torch.randn(2, 3, 2)
    ours = relaxed_top(score, count, 0.5)
    for image in range(2):
        expected = torch.tensor(naive_choice(score[image].tolist(), count, 0.5))
        assert torch.allclose(ours[image], expected, atol=1e-5)
    assert torch.allclose(ours.sum((1, 2)), torch.full((2,), float(count)))


def naive_merge(x: Tensor, metric: Tensor, size: list[float], left: int, removed: int) -> Any:
    """One image, plain Python: values, sizes and first rows of all N after soft merging, in the new order.

    Rows 0, 2, 4, .. of the `left` first give, rows 1, 3, 5, .. take.
    """
    a, b = list(range(0, left, 2)), list(range(1, left, 2))
    near: dict[int, list[int]] = {}
    score = []
    for i in a:
        cosine = {j: F.cosine_similarity(metric[i], metric[j], 0).item() for j in b}
        near[i] = sorted(b, key=lambda j: -cosine[j])[:3]
        score.append([cosine[j] / 0.4 for j in near[i]])
    chosen = naive_choice(score, removed, 0.6)
    value, weight = {j: x[j] * size[j] for j in b}, {j: size[j] for j in b}
    kept = list(size)
    for row, i in zip(chosen, a, strict=True):
        share = [each / (1 + max(sum(row) - 1, 0)) for each in row]
        for j, each in zip(near[i], share, strict=True):
            value[j] = value[j] + each * size[i] * x[i]
            weight[j] += each * size[i]
        kept[i] = size[i] * min(max(1 - sum(share), 0), 1)
    after = [value[i] / weight[i] if i in b else x[i] for i in range(len(x))]
    sizes = [weight[i] if i in b else kept[i] for i in range(len(x))]
    order = [*sorted(range(left), key=lambda i: -sizes[i]), *range(left, len(x))]
    return torch.stack([after[i] for i in order]), [sizes[i] for i in order], order


@pytest.mark.parametrize("patches", [7, 8])
def test_soft_merging_equals_a_naive_loop_over_two_blocks(patches: int) -> None:
    warm = {"pair_temperature": 0.4, "choice_temperature": 0.6}  # few sizes are nearly equal
    method: Any = evovit.reduce_tokens(make_host("vit"), "dtem", r=2, **warm).method.train()
    x, metrics = torch.randn(2, 1 + patches, 5), [torch.randn(2, patches, 3) for _ in range(2)]
    tokens = method.begin(evovit.backbones.base.raster_tokens(x, 1, (1, patches)), ())
    for metric in metrics:
        tokens = method.merge_softly(tokens, metric, 2)
    for image in range(2):
        values, sizes, left, places = x[image, 1:], [1.0] * patches, patches, list(range(patches))
        for metric in metrics:
            values, sizes, order = naive_merge(values, metric[image], sizes, left, 2)
            places, left = [places[i] for i in order], left - 2
        assert_close(tokens.patches[image], values)
        assert torch.allclose(tokens.size[image], torch.tensor(sizes), atol=1e-5)
        assert tokens.index[image].tolist() == places
    assert tokens.carry.left == left
    assert torch.allclose(tokens.size.sum(1), torch.full((2,), float(patches)))  # nothing is lost
    assert torch.allclose(tokens.carry.shares.sum(1), tokens.size, atol=1e-5)
    assert torch.allclose(tokens.carry.shares.sum(2), torch.ones(2, patches), atol=1e-5)
    whole = method.finish(tokens)
    mean = (tokens.patches * tokens.size[..., None]).sum(1) / patches  # as a head that pools would see it
    assert_close(whole.patches.mean(1), mean)
    assert whole.index.tolist() == [list(range(patches))] * 2 and whole.size is None


def test_cold_choices_are_tomes_matching() -> None:
    """Temperatures near 0: each of the best pairs goes over whole, the others stay."""
    metric = torch.randn(3, 9, 4)
    moved = soft_match(metric[:, ::2], metric[:, 1::2], 3, 3, 1e-2, 1e-2)
    match = match_tokens(metric, 3, first=0)
    for image in range(3):
        pairs = {(int(i), int(j)) for i, j in (moved[image] > 0.5).nonzero().tolist()}
        sources, targets = match.sources[image].tolist(), match.targets[image].tolist()
        assert pairs == {(i // 2, j // 2) for i, j in zip(sources, targets, strict=True)}
    assert torch.allclose(moved.sum((1, 2)), torch.full((3,), 3.0), atol=1e-3)


@pytest.mark.parametrize("name", HOSTS)
def test_evaluation_is_tome_on_the_learnt_metric(name: str) -> None:
    """First block: the pairs are those of the linear layer on what attention reads."""
    host, images = make_host(name), pictures()
    reduced, backbone = evovit.reduce_tokens(host, "dtem", r=(4,)), adapt(host)
    method: Any = reduced.method
    with torch.no_grad():
        tokens = backbone.embed(images)
        block = backbone.stages()[0].blocks[0]
        ours = method.run_block(block, tokens)
        metric = method.metric[0](block.attention_input(tokens))[:, tokens.num_prefix :]
        match = match_tokens(metric, 4, tokens.num_prefix % 2)
    assert torch.equal(ours.index, tokens.index.gather(1, match.rows))
    assert ours.num_patches == 12 and (ours.size.sum(1) == 16).all()
    if name == "vit":
        assert torch.equal(block.attention_input(tokens), host.blocks[0].norm1(tokens.x))


@pytest.mark.parametrize("name", ["vit", "vit_avg", "siglip", "lv_vit"])
def test_the_metric_learns_from_the_loss_and_the_host_gets_none_of_it(name: str) -> None:
    """With the host frozen, a few steps on one batch lower the loss."""
    host, images, labels = make_host(name), pictures(8), torch.arange(8) % 5
    host.requires_grad_(False)
    reduced: Any = evovit.reduce_tokens(host, "dtem", r=3).train()
    before = {key: value.clone() for key, value in host.state_dict().items()}
    optimizer = torch.optim.AdamW(reduced.method.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(reduced.run(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses[1:]) < losses[0] and all(map(math.isfinite, losses))
    assert all(torch.equal(value, before[key]) for key, value in host.named_parameters())


def test_the_metric_sends_no_gradient_to_what_it_reads() -> None:
    reduced: Any = evovit.reduce_tokens(make_host("vit"), "dtem", r=3)
    backbone = adapt(reduced.model)
    tokens = backbone.embed(pictures())
    block = backbone.stages()[0].blocks[0]
    x = tokens.x.detach().requires_grad_()
    method = reduced.method.train()
    after = method.merge_softly(
        method.begin(tokens, ()),
        method.metric[0](block.attention_input(tokens.with_x(x)).detach())[:, 1:],
        3,
    )
    assert torch.autograd.grad(after.x.sum(), x, allow_unused=True) == (None,)


def test_r_may_differ_between_training_and_evaluation() -> None:
    one: Any = evovit.reduce_tokens(make_host("vit"), "dtem", r=3)
    other: Any = evovit.reduce_tokens(make_host("vit"), "dtem", r=(2, 0, 5))
    other.method.load_state_dict(one.method.state_dict())
    with torch.no_grad():
        trace = other.run(pictures(), record=True).trace
    assert [tokens.num_patches for tokens in trace] == [14, 14, 9, 9]


def test_multiply_accumulates_are_tomes_and_the_metrics() -> None:
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224").eval()
        tome = evovit.reduce_tokens(host, "tome", r=16, last_block="all")
        dtem: Any = evovit.reduce_tokens(host, "dtem", last_block="all")
    assert isinstance(dtem.method, DTEM) and dtem.method.metric[0].out_features == 64
    shape = (3, 224, 224)
    trace = dtem.run(torch.empty(1, *shape, device="meta"), record=True).trace
    rows = [197, *(1 + tokens.num_patches for tokens in trace[:-1])]
    metric = sum(rows) * 384 * 64  # and the similarities, over 64 channels as ToMe's keys are
    assert gmacs(dtem, shape) - gmacs(tome, shape) == pytest.approx(metric / 1e9, rel=1e-9)
    with torch.device("meta"):
        twelve = evovit.reduce_tokens(host, "dtem", r=12, last_block="all")
        dense = evovit.reduce_tokens(host, "dense", last_block="all")
    assert gmacs(twelve, shape) == pytest.approx(2.89, abs=0.005)  # published, 37.2 % below dense
    assert gmacs(twelve, shape) / gmacs(dense, shape) == pytest.approx(1 - 0.372, abs=5e-4)


def test_wide_hosts_get_a_wider_metric() -> None:
    with torch.device("meta"):
        host = timm.create_model("vit_large_patch16_224").eval()
        reduced: Any = evovit.reduce_tokens(host, "dtem")
        narrow: Any = evovit.reduce_tokens(host, "dtem", metric_dim=32)
    assert reduced.method.metric[0].out_features == 128 and narrow.method.metric[0].out_features == 32


def test_tokens_that_gave_all_away_stay_finite() -> None:
    """Sizes of exactly 0 among those that take part: gradients and values are finite."""
    reduced: Any = evovit.reduce_tokens(
        make_host("vit"), "dtem", r=8, pair_temperature=1e-3, choice_temperature=1e-3
    ).train()
    reduced(pictures()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reduced.parameters())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metric_dim": 0}, "metric_dim is 0; allowed is a whole number from 1 to 4096, or none"),
        ({"r": 99}, "r is 99; allowed is 0 to 16"),
        ({"choice_temperature": 0}, "choice_temperature is 0; allowed is a number above 0"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "dtem", **options)
