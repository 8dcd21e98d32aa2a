"""CKA, correlation and Jaccard index are what their papers write, by naive loops."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import Tensor

from evovit.analyse import correlation_with_mean, jaccard, jaccard_by_chance, linear_cka


def hsic(k: list[list[float]], other: list[list[float]]) -> float:
    """Return tr(KHLH) / (n - 1)^2 (Kornblith et al., eq. 3), H taking the means of rows and columns away."""
    n = len(k)

    def centred(m: list[list[float]]) -> list[list[float]]:
        rows = [sum(row) / n for row in m]
        columns = [sum(m[i][j] for i in range(n)) / n for j in range(n)]
        whole = sum(rows) / n
        return [[m[i][j] - rows[i] - columns[j] + whole for j in range(n)] for i in range(n)]

    a, b = centred(k), centred(other)
    return sum(a[i][j] * b[j][i] for i in range(n) for j in range(n)) / (n - 1) ** 2


def naive_cka(x: Tensor, y: Tensor) -> float:
    """Return HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of the Gram matrices of two representations."""
    grams = [
        [[sum(a * b for a, b in zip(one, two, strict=True)) for two in rows] for one in rows]
        for rows in (x.tolist(), y.tolist())
    ]
    return hsic(*grams) / math.sqrt(hsic(grams[0], grams[0]) * hsic(grams[1], grams[1]))


def test_cka_is_the_papers_by_gram_matrices() -> None:
    x, y = torch.randn(9, 4).double() + 3, torch.randn(9, 6).double()
    y = y + torch.nn.functional.pad(x, (0, 2))
    assert linear_cka(x, y) == pytest.approx(naive_cka(x, y), rel=1e-9)
    assert linear_cka(y, x) == pytest.approx(linear_cka(x, y), rel=1e-12)


def test_cka_ignores_rotation_scale_and_shift_alone() -> None:
    x = torch.randn(40, 5)
    turned = 3 * x @ torch.linalg.qr(torch.randn(5, 5)).Q + 7
    assert linear_cka(x, turned) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, x * torch.tensor([9.0, 1, 1, 1, 1])) < 0.9


def test_cka_of_two_images_is_always_one_and_of_what_does_not_vary_zero() -> None:
    assert linear_cka(torch.randn(2, 5), torch.randn(2, 7)) == pytest.approx(1)
    assert linear_cka(torch.ones(5, 3), torch.randn(5, 2)) == 0


def test_correlation_is_pearsons_with_the_mean_query_of_the_image() -> None:
    queries, present = torch.randn(2, 6, 8) + 1, torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]]).bool()
    found = correlation_with_mean(queries, present)
    for image in range(2):
        tokens = [queries[image, i].double().numpy() for i in range(6) if present[image, i]]
        mean = sum(tokens) / len(tokens)
        each = [numpy.corrcoef(token, mean)[0, 1] for token in tokens]
        average = sum(each) / len(each)
        assert float(found.mean[image]) == pytest.approx(average, rel=1e-9)
        variance = sum((value - average) ** 2 for value in each) / len(each)
        assert float(found.variance[image]) == pytest.approx(variance, rel=1e-9)


def test_equal_queries_correlate_fully() -> None:
    found = correlation_with_mean(torch.randn(3, 1, 8).expand(3, 5, 8), torch.ones(3, 5).bool())
    assert found.mean.tolist() == pytest.approx([1] * 3) and found.variance.tolist() == pytest.approx([0] * 3)


def test_jaccard_is_that_of_python_sets() -> None:
    masks, others = torch.rand(4, 3, 10) < 0.4, torch.rand(4, 2, 10) < 0.6
    found = jaccard(masks, others)
    for k in range(3):
        for j in range(2):
            shares = []
            for image in range(4):
                a, b = ({*m.nonzero().flatten().tolist()} for m in (masks[image, k], others[image, j]))
                shares.append(len(a & b) / len(a | b))
            assert float(found[k, j]) == pytest.approx(sum(shares) / 4)
    assert float(jaccard(torch.zeros(1, 1, 4).bool(), torch.zeros(1, 1, 4).bool())) == 1


@pytest.mark.parametrize(("share", "other"), [(0.5, 0.5), (0.25, 0.75), (1.0, 0.5)])
def test_random_sets_have_about_what_chance_gives(share: float, other: float) -> None:
    sets = [torch.rand(400, 1, 64).argsort(-1) < p * 64 for p in (share, other)]
    assert float(jaccard(*sets)) == pytest.approx(jaccard_by_chance(share, other), abs=0.01)
