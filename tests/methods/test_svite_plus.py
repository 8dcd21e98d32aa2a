"""SViTE+: the selector by naive loops, training masks as evaluation drops, the released zero tokens."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import evovit
from evovit.macs import gmacs
from evovit.methods import svite_plus
from evovit.ops.mask import gumbel_top
from tests.conftest import HOSTS, make_host, pictures
from tests.parity import assert_close


def selecting(name: str, **options: Any) -> Any:
    """Return a reduced host whose selector is not at its start."""
    reduced: Any = evovit.reduce_tokens(make_host(name), "svite_plus", **({"keep_ratio": 0.5} | options))
    with torch.no_grad():
        reduced.method.gumbel.weight.normal_(generator=torch.Generator().manual_seed(3))
    return reduced


def test_a_draw_equals_a_naive_loop_and_has_the_gradient_of_its_softmax() -> None:
    log_p, noise = torch.randn(2, 6).log_softmax(-1).requires_grad_(), torch.randn(2, 6)
    weight, tau = torch.randn(2, 6), torch.tensor(0.7)
    drawn = gumbel_top(log_p, noise, 2, tau)
    (drawn * weight).sum().backward()
    for image in range(2):
        noisy = [(float(log_p.detach()[image, i]) + float(noise[image, i])) / 0.7 for i in range(6)]
        best = sorted(range(6), key=lambda i: -noisy[i])[:2]
        assert torch.allclose(drawn[image].detach(), torch.tensor([float(i in best) for i in range(6)]))
    again = log_p.detach().requires_grad_()
    (((again + noise) / 0.7).softmax(-1) * weight).sum().backward()
    assert torch.allclose(log_p.grad, again.grad, atol=1e-6)


def test_evaluation_drops_all_but_the_best() -> None:
    reduced = selecting("vit")
    with torch.no_grad():
        tokens = evovit.backbones.adapt(reduced.model).embed(pictures())
        score = reduced.method.gumbel(tokens.x)[:, 1:, 0]
        index = reduced.run(pictures(), record=True).trace[0].index
    for image in range(2):
        assert set(index[image].tolist()) == set(score[image].topk(8).indices.tolist())
        assert index[image].tolist() == sorted(index[image].tolist())


@pytest.mark.parametrize("name", HOSTS)
def test_training_masks_as_evaluation_drops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise both take the same tokens, and the logits are equal but for eps of the masked softmax."""
    reduced = selecting(name)
    monkeypatch.setattr(svite_plus, "gumbel_noise", torch.zeros_like)
    with torch.no_grad():
        expected = reduced(pictures())
        reduced.method.train()  # a host may have dropout of its own
        assert_close(reduced(pictures()), expected, 1e-5)


def test_the_loss_reaches_the_selector() -> None:
    reduced = selecting("vit", keep_ratio=0.25)
    reduced.train()(pictures()).square().mean().backward()
    gradient = reduced.method.gumbel.weight.grad
    assert gradient.abs().max() > 0 and gradient.isfinite().all()


def naive_zero_tokens(host: Any, selector: Any, images: Tensor, keep: int) -> Tensor:
    """Return logits of a timm ViT after the released selection: zero vectors stay in the sequence."""
    x = host._pos_embed(host.patch_embed(images))
    for image in range(x.shape[0]):
        score = [float(selector(row)) for row in x[image]]
        best = sorted(range(x.shape[1]), key=lambda i: -score[i])[:keep]
        for row in range(1, x.shape[1]):  # the class token always stays
            if row not in best:
                x[image, row] = 0
    for block in host.blocks:
        x = block(x)
    return host.forward_head(host.norm(x))  # type: ignore[no-any-return]


def test_zero_tokens_are_the_released_ones() -> None:
    reduced = selecting("vit", faithful_zero_tokens=True)
    with torch.no_grad():
        expected = naive_zero_tokens(reduced.model, reduced.method.gumbel, pictures(), keep=9)
        assert_close(reduced(pictures()), expected)
        dropped = selecting("vit")
        assert (dropped(pictures()) - expected).abs().max() > 1e-3 * expected.abs().max()
        assert reduced.run(pictures()).tokens.num_patches == 16


@pytest.mark.parametrize(("ratio", "number"), [(0.95, 187), (0.9, 177), (0.7, 138)])
def test_counts_are_the_released_token_numbers(ratio: float, number: int) -> None:
    """`--token_number` counts the class token."""
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224").eval()
        reduced = evovit.reduce_tokens(host, "svite_plus", keep_ratio=ratio, last_block="all")
    trace = reduced.run(torch.empty(1, 3, 224, 224, device="meta"), record=True).trace
    assert trace[0].x.shape[1] == number
    width, shape = 384, (3, 224, 224)
    blocks = 12 * (12 * number * width**2 + 2 * number**2 * width)
    selector = 197 * width
    assert gmacs(reduced, shape) * 1e9 == pytest.approx(
        196 * 768 * width + blocks + 1000 * width + selector, rel=1e-6
    )


def test_the_temperature_falls_with_the_training() -> None:
    method: Any = selecting("vit").method
    for fraction, expected in ((0.0, 10.0), (0.5, 5.05), (1.0, 0.1)):
        method.set_progress(fraction)
        assert float(method.tau) == pytest.approx(expected)


def test_reduction_can_start_late() -> None:
    reduced = selecting("vit")
    for share, expected in ((0.0, 16), (0.5, 12), (1.0, 8)):
        reduced.method.set_reduction(share)
        with torch.no_grad():
            assert reduced.run(pictures()).tokens.num_patches == expected
        reduced.train()(pictures()).sum().backward()
        assert reduced.method.gumbel.weight.grad is not None
        reduced.eval()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_ratio": 0}, "keep_ratio is 0; allowed is a number above 0, at most 1"),
        ({"temperature": 0}, "temperature is 0; allowed is a number above 0"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "svite_plus", **options)
