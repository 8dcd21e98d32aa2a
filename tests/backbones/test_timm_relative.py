"""Hosts with a relative position bias: a token keeps its own wherever it sits, compiled and exported too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

import evovit
from evovit.backbones import adapt
from evovit.backbones.timm_relative import placed_bias
from evovit.tokens import Tokens
from tests.conftest import TINY, disturb, pictures

HOSTS: dict[str, Callable[[], nn.Module]] = {
    "beit": lambda: Beit(**TINY, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    "beit_shared": lambda: Beit(**TINY, use_shared_rel_pos_bias=True, use_rel_pos_bias=True),
    "relpos": lambda: VisionTransformerRelPos(**TINY, class_token=True, init_values=0.1),
    "relpos_shared": lambda: VisionTransformerRelPos(
        **TINY, rel_pos_type="bias", shared_rel_pos=True, class_token=True
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "evo_vit": {"start_block": 1, "stage_length": 2},
    "tome": {"r": 3},
    "evit": {"blocks": (1,)},
}


def made(name: str) -> Any:
    return disturb(HOSTS[name](), 0.5).eval()


def shuffled(tokens: Tokens, order: Tensor) -> Tokens:
    patches = tokens.patches.take_along_dim(order[:, :, None], 1)
    return tokens.change(x=torch.cat((tokens.prefix, patches), dim=1), index=order)


@pytest.mark.parametrize("name", HOSTS)
def test_a_token_keeps_its_bias_wherever_it_sits(name: str) -> None:
    backbone = adapt(made(name))
    with torch.no_grad():
        tokens = backbone.embed(pictures())
        order = torch.stack([torch.randperm(tokens.num_patches) for _ in range(2)])
        for block in backbone.stages()[0].blocks:
            straight, mixed = block(tokens), block(shuffled(tokens, order))
            torch.testing.assert_close(mixed.prefix, straight.prefix)
            torch.testing.assert_close(mixed.patches, straight.patches.take_along_dim(order[:, :, None], 1))
            misplaced = block(tokens.change(index=order))
            assert (misplaced.patches - straight.patches).abs().max() > 1e-3  # places matter


@pytest.mark.parametrize("name", HOSTS)
def test_the_same_index_under_another_name_gives_the_same(name: str) -> None:
    """The bias of freshly embedded tokens is not gathered, which shows in nothing but time."""
    backbone = adapt(made(name))
    with torch.no_grad():
        tokens = backbone.embed(pictures())
        for block in backbone.stages()[0].blocks:
            gathered = block.qkv(tokens.change(index=tokens.index.clone())).bias
            plain = block.qkv(tokens).bias
            assert gathered is not None and plain is not None and plain.shape[0] == 1
            assert torch.equal(gathered, plain.expand_as(gathered))


def test_placed_bias_is_a_look_up_and_without_a_place_the_mean() -> None:
    """By a naive loop over 2 images, 1 prefix and 5 patch tokens of a 2 x 3 grid."""
    bias, index = torch.randn(1, 2, 7, 7), torch.tensor([[4, 0, 5, -1, 2], [-1, 3, -1, 1, 0]])
    tokens = Tokens(torch.zeros(2, 6, 8), index, 1, (2, 3))
    found = placed_bias(bias, tokens, torch.arange(6).expand(2, 6))
    assert found.shape == (2, 2, 6, 6)
    for image in range(2):
        places = [[0]] + [[p + 1] if p >= 0 else list(range(1, 7)) for p in index[image].tolist()]
        for head in range(2):
            for row in range(6):
                for column in range(6):
                    pairs = [bias[0, head, a, b] for a in places[row] for b in places[column]]
                    torch.testing.assert_close(found[image, head, row, column], sum(pairs) / len(pairs))


@pytest.mark.parametrize(
    ("name", "method"), [("beit_shared", "evo_vit"), pytest.param("relpos", "tome", marks=pytest.mark.slow)]
)
def test_reduced_compiles_in_one_graph_and_exports(name: str, method: str) -> None:
    torch._dynamo.reset()
    reduced = evovit.reduce_tokens(made(name), method, **METHODS[method])
    images, batch = pictures(2), torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        compiled = torch.compile(reduced, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(images), reduced(images), rtol=1e-4, atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own exporter
            program = torch.export.export(reduced, (images,), dynamic_shapes=({0: batch},)).module()
        for count in (1, 3):
            assert torch.allclose(program(pictures(count)), reduced(pictures(count)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_runs_in_half_precision_and_under_autocast(name: str) -> None:
    images = pictures()
    for method, options in METHODS.items():
        with torch.no_grad():
            reduced = evovit.reduce_tokens(made(name), method, **options)
            with torch.autocast("cpu", torch.bfloat16):
                assert reduced(images).isfinite().all()
            for kind in (torch.bfloat16, torch.float16):
                assert reduced.to(kind)(images.to(kind)).isfinite().all()


@pytest.mark.parametrize("name", HOSTS)
def test_the_position_bias_learns_through_a_reduced_model(name: str) -> None:
    reduced = evovit.reduce_tokens(made(name), "evo_vit", keep_ratio=0.3, start_block=1).train()
    reduced(pictures()).square().mean().backward()
    learnt = {key: p.grad for key, p in reduced.named_parameters() if "pos" in key}
    assert learnt and all(grad is not None and grad.abs().max() > 0 for grad in learnt.values())


def test_images_of_another_size_are_refused_in_a_sentence() -> None:
    for name in ("beit", "relpos"):
        reduced = evovit.reduce_tokens(made(name), "dense")
        with pytest.raises(evovit.EvoViTError, match="the host takes 32 x 32"):
            reduced(pictures(size=48))
