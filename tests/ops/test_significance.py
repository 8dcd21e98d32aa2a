"""The significance of a token, against every path of heads walked one by one."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from evovit.ops.significance import own_weight, path_weight, precise_map
from evovit.tokens import QKV

HEADS, TOKENS, CHANNELS = 2, 4, 3


def random_map(queries: int, keys: int) -> Tensor:
    return torch.randn(1, HEADS, queries, keys, dtype=torch.float64).softmax(-1)


def brute_force(first: Tensor, behind: list[Tensor], x: Tensor, kept: list[list[int]]) -> Tensor:
    """s_i = sum over paths of || A[:, i] U[i, :] ||_F^2, maps of all tokens with masked rows of zeros.

    Args:
        first: (H, N, N), of the scored block; x (N, C) enters it.
        behind: (H, N, N) of the blocks behind, first to last; `kept` are the rows each of them has.
    """
    masked = []
    for block, rows in zip(behind, kept, strict=True):
        mask = torch.zeros(TOKENS, 1, dtype=torch.float64)
        mask[rows] = 1
        masked.append(block * mask)
    total = torch.zeros(TOKENS, dtype=torch.float64)
    for path in product(range(HEADS), repeat=len(behind)):
        through = torch.eye(TOKENS, dtype=torch.float64)
        for block, head in zip(masked, path, strict=True):
            through = block[head] @ through
        for head in range(HEADS):
            own = first[head] @ x.abs()
            for i in range(TOKENS):
                total[i] += (through[:, i : i + 1] @ own[i : i + 1]).square().sum()
    return total


def test_the_dynamic_programme_is_the_sum_over_all_paths_of_heads() -> None:
    """Two blocks behind, nested masks: 4 tokens enter, 3 and 1 are left; N = 4, H = 2."""
    x = torch.randn(1, TOKENS, CHANNELS, dtype=torch.float64)
    first, near = random_map(TOKENS, TOKENS), random_map(TOKENS, TOKENS)
    rows = [[0, 1, 3], [0]]
    near_kept = near[:, :, rows[0]]  # its keys are all tokens
    inner = torch.tensor(rows[0])
    far_kept = random_map(1, 3)
    whole_far = torch.zeros(1, HEADS, TOKENS, TOKENS, dtype=torch.float64)
    whole_far[:, :, 0, inner] = far_kept[:, :, 0]
    ours = path_weight([near_kept, far_kept]) * own_weight(first, x)
    expected = brute_force(first[0], [near[0], whole_far[0]], x[0], rows)
    assert torch.allclose(ours[0] * HEADS**2, expected, rtol=1e-12)  # the mean over heads of two blocks
    one = path_weight([near_kept]) * own_weight(first, x)
    assert torch.allclose(one[0] * HEADS, brute_force(first[0], [near[0]], x[0], rows[:1]), rtol=1e-12)


def test_the_map_is_softmax_attention_in_float64() -> None:
    q, k = torch.randn(2, HEADS, 2, 5), torch.randn(2, HEADS, 4, 5)
    bias = torch.randn(1, HEADS, 2, 4)
    found = precise_map(QKV(q, k, k, 0.3, bias))
    assert found.dtype == torch.float64
    for image, head, row in product(range(2), range(HEADS), range(2)):
        logits = [float(q[image, head, row] @ k[image, head, j]) * 0.3 for j in range(4)]
        weights = [torch.tensor(x + float(bias[0, head, row, j])).exp() for j, x in enumerate(logits)]
        expected = torch.tensor(weights) / sum(weights)
        assert torch.allclose(found[image, head, row].float(), expected, atol=1e-6)
