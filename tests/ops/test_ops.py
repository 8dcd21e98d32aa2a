"""The operators against plain Python on 2 images of 6 tokens."""

from __future__ import annotations

import math

import pytest
import torch

from evovit.ops.mask import mask_bias, masked_max, masked_mean
from evovit.ops.score import (
    attention_column_mean,
    class_attention,
    key_norm,
    probe_attention,
    random_score,
    representation_shift,
    running_score,
)
from evovit.ops.select import (
    best_by_count,
    best_by_threshold,
    keep_rows,
    put,
    split_top,
    take,
    with_prefix,
)
from evovit.ops.update import representative
from evovit.tokens import QKV, Tokens


def some_qkv(prefix: int = 1, patches: int = 6) -> QKV:
    q, k, v = torch.randn(3, 2, 3, prefix + patches, 4)
    return QKV(q, k, v, 0.5)


@pytest.mark.parametrize("bias", [False, True])
def test_class_attention_is_the_class_row_of_the_full_matrix(bias: bool) -> None:
    qkv = some_qkv(prefix=2)
    qkv = qkv._replace(bias=torch.randn(1, 3, 8, 8)) if bias else qkv
    full = qkv.q @ qkv.k.transpose(-2, -1) * qkv.scale + (qkv.bias if bias else 0)
    expected = full.softmax(-1).mean(1)[:, 0, 2:]
    assert torch.allclose(class_attention(qkv, 2), expected, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_column_mean_is_the_attention_a_token_receives(bias: bool) -> None:
    qkv = some_qkv()
    qkv = qkv._replace(bias=torch.randn(1, 3, 7, 7)) if bias else qkv
    full = qkv.q @ qkv.k.transpose(-2, -1) * qkv.scale + (qkv.bias if bias else 0)
    expected = full.softmax(-1).mean((1, 2))[:, 1:]
    assert torch.allclose(attention_column_mean(qkv, 1), expected, atol=1e-6)


def test_key_norm_is_the_mean_length_of_a_tokens_keys_as_a_share() -> None:
    qkv = some_qkv(prefix=2)
    length = [
        [sum(math.sqrt(sum(x * x for x in key)) for key in image[:, row].tolist()) for row in range(2, 8)]
        for image in qkv.k
    ]
    expected = torch.tensor([[x / sum(row) for x in row] for row in length])
    assert torch.allclose(key_norm(qkv, 2), expected, atol=1e-6)
    few = key_norm(qkv, 2, 4)
    assert torch.allclose(few, expected[:, :4] / expected[:, :4].sum(1, keepdim=True), atol=1e-6)
    assert torch.equal(key_norm(qkv._replace(k=torch.zeros_like(qkv.k)), 2), torch.zeros(2, 6))
    given = qkv._replace(key_length=torch.ones(2, 3, 8))
    assert torch.allclose(key_norm(given, 2), torch.full((2, 6), 1 / 6))


def test_probe_attention_is_the_probes_row_of_its_head() -> None:
    qkv = some_qkv(prefix=1)
    qkv = qkv._replace(q=qkv.q[:, :, :1])
    full = (qkv.q @ qkv.k.transpose(-2, -1) * qkv.scale).softmax(-1).mean(1)[:, 0]
    assert torch.allclose(probe_attention(qkv, 7), full, atol=1e-6)
    assert torch.allclose(probe_attention(qkv, 6, 3), full[:, 1:4], atol=1e-6)


def test_representation_shift_is_the_distance_of_the_branch_from_its_input() -> None:
    before, branch = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    found = representation_shift(before, before + branch)
    for image in range(2):
        for row in range(5):
            shift = sum(
                (float(b) - float(a)) ** 2
                for a, b in zip(before[image, row], branch[image, row], strict=True)
            )
            assert float(found[image, row]) == pytest.approx(shift**0.5, rel=1e-5)
    assert representation_shift(before.bfloat16(), before.bfloat16()).dtype == torch.float32


def test_scores_are_float32_for_every_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        qkv = QKV(*(x.to(dtype) for x in some_qkv()[:3]), 0.5)
        assert class_attention(qkv, 1).dtype == key_norm(qkv, 1).dtype == torch.float32


def test_the_running_score_weighs_the_old_score_with_the_trade_off() -> None:
    old, new = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert torch.allclose(running_score(old, new, 0.75), torch.tensor([[0.75, 0.5]]))
    assert torch.equal(running_score(None, new, 0.75), new)


def test_kept_rows_take_place_size_and_mask_along_and_the_prefix_stays() -> None:
    index, size = torch.arange(6).flip(0).expand(2, 6), torch.rand(2, 6)
    tokens = Tokens(torch.randn(2, 8, 3), index, 2, (2, 3), size, mask=(size > 0.5).float())
    rows = torch.tensor([[0, 3], [4, 5]])
    kept = keep_rows(tokens, rows)
    for image, own in enumerate(rows.tolist()):
        assert torch.equal(kept.x[image], tokens.x[image][[0, 1, *(2 + row for row in own)]])
        for name in ("index", "size", "mask"):
            assert torch.equal(getattr(kept, name)[image], getattr(tokens, name)[image][own])
    assert torch.equal(keep_rows(tokens, rows, with_prefix(rows, 2)).x, kept.x)
    plain = keep_rows(tokens.change(size=None, mask=None), rows)
    assert plain.size is None and plain.mask is None


def test_random_score_is_fixed_by_position_and_salt() -> None:
    index = torch.arange(196).expand(2, 196)
    one = random_score(index, 3)
    assert torch.equal(one, random_score(index.flip(1), 3).flip(1))
    assert not torch.equal(one, random_score(index, 4))
    assert one.min() >= 0 and one.max() < 1 and 0.4 < one.mean() < 0.6


@pytest.mark.parametrize("keep", [1, 2, 5, 6])
def test_split_keeps_the_best_in_raster_order(keep: int) -> None:
    score = torch.randn(2, 6)
    split = split_top(score, keep)
    for image in range(2):
        best = sorted(sorted(range(6), key=lambda n: -score[image, n].item())[:keep])
        assert split.rows[image].tolist() == best
        assert split.kept[image].nonzero().flatten().tolist() == best


def test_equal_scores_fall_to_the_lower_position() -> None:
    score = torch.tensor([[0.5, 1.0, 0.5, 0.5, 0.0, -0.0], [0.0] * 6])
    assert split_top(score, 3).rows.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert split_top(score, 5).rows[0].tolist() == [0, 1, 2, 3, 4]


def test_split_orders_negative_tiny_and_huge_scores() -> None:
    score = torch.tensor([[-1e30, 3e38, -1e-30, 1e-38, -2.0, math.inf]])
    assert split_top(score, 2).rows.tolist() == [[1, 5]]
    assert split_top(score, 4).rows.tolist() == [[1, 2, 3, 5]]


def reference(score: torch.Tensor, keep: int) -> torch.Tensor:
    """Return who is kept by a stable sort: equal scores, the lower position first."""
    order = score.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order[:, :keep], True)


@pytest.mark.parametrize("num", [1, 7, 196, 1025])
def test_threshold_and_count_find_what_a_stable_sort_finds(num: int) -> None:
    """With ties, signed zeros and numbers below the normal ones."""
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38])
    for score in (
        torch.randn(3, num),
        torch.randint(-2, 2, (3, num)) * 0.5,
        -torch.zeros(3, num),
        tiny[torch.randint(5, (3, num))],
    ):
        for keep in {1, (num + 1) // 2, num}:
            kept = reference(score, keep)
            assert torch.equal(best_by_count(score, keep), kept)
            assert torch.equal(best_by_threshold(score, keep), kept)


def test_the_first_patch_tokens_can_be_asked_for_alone() -> None:
    qkv = some_qkv(prefix=2, patches=6)
    for measure in (class_attention, attention_column_mean):
        assert torch.equal(measure(qkv, 2, 4), measure(qkv, 2)[:, :4])


def test_put_undoes_take_and_leaves_its_input() -> None:
    x, rows = torch.randn(2, 6, 3), torch.tensor([[0, 2, 5], [1, 2, 3]])
    before = x.clone()
    taken = take(x, rows)
    assert torch.equal(taken[1, 0], x[1, 1])
    assert torch.equal(put(x, rows, taken), x)
    changed = put(x, rows, taken + 1)
    assert torch.equal(x, before)
    assert torch.equal(take(changed, rows), taken + 1)
    assert torch.equal(changed[0, 1], x[0, 1])


def test_prefix_rows_come_first() -> None:
    assert with_prefix(torch.tensor([[1, 4]]), 2).tolist() == [[0, 1, 3, 6]]


def test_representative_is_the_score_weighted_mean_of_the_waiting() -> None:
    patches, score = torch.randn(2, 6, 3), torch.rand(2, 6)
    split = split_top(score, 5)
    rep = representative(patches, score, split.kept)
    for image in range(2):
        only = (~split.kept[image]).nonzero().item()
        assert torch.allclose(rep[image, 0], patches[image, only], atol=1e-6)
    two = representative(patches, score, split_top(score, 4).kept)
    waiting = (~split_top(score, 4).kept[0]).nonzero().flatten().tolist()
    weights = [score[0, n] / sum(score[0, m] for m in waiting) for n in waiting]
    expected = sum(w * patches[0, n] for w, n in zip(weights, waiting, strict=True))
    assert torch.allclose(two[0, 0], expected, atol=1e-6)


def test_masked_pooling_reads_the_rows_that_take_part() -> None:
    x, mask = torch.randn(2, 6, 3), torch.tensor([[1.0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]])
    weights = (torch.randn(2, 1, 1, 6) + mask_bias(mask)).softmax(-1)
    for image in range(2):
        kept = x[image, mask[image].bool()]
        assert torch.allclose(masked_mean(x, mask)[image], kept.mean(0), atol=1e-6)
        assert torch.equal(masked_max(x, mask)[image], kept.amax(0))
        assert (weights[image, 0, 0, ~mask[image].bool()] < 1e-9).all()
    none = torch.zeros(2, 6)
    for pool in (masked_mean, masked_max):
        assert pool(x, none).isfinite().all()
        assert pool(x.bfloat16(), mask).dtype == torch.bfloat16


def test_masked_pooling_has_the_gradient_of_a_share() -> None:
    """Of the mask as a number, at 0 and at 1, by finite differences where the formula goes on beyond them."""
    x, logits = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 1, 1, 6, dtype=torch.float64)
    mask = torch.tensor([[1.0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]], dtype=torch.float64)

    def attention(share: torch.Tensor) -> torch.Tensor:
        weight = logits.exp() * share[:, None, None]
        return (weight / weight.sum(-1, keepdim=True))[:, 0] @ x

    def mean(share: torch.Tensor) -> torch.Tensor:
        return (x * share[:, :, None]).sum(1) / share.sum(1, keepdim=True)

    share = mask.float().requires_grad_()
    pooled = (logits.float() + mask_bias(share)).softmax(-1)[:, 0] @ x.float()
    for ours, formula in ((pooled, attention), (masked_mean(x.float(), share), mean)):
        (found,) = torch.autograd.grad(ours.sum(), share)
        for place in range(6):
            step = torch.zeros_like(mask)
            step[:, place] = 1e-6
            rise = (formula(mask + step) - formula(mask - step)) / 2e-6
            assert torch.allclose(found[:, place].double(), rise.flatten(1).sum(1), rtol=1e-3, atol=1e-5)
    largest = masked_max(x.float(), share)
    (found,) = torch.autograd.grad(largest.sum(), share)
    assert (found >= 0).all() and (found[mask == 0] == 0).all() and (found.sum(1) > 0).all()
