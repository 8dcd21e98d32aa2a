"""The baselines: top-K by class attention, random and evenly spaced keep."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch

import evovit
from evovit.macs import gmacs
from tests.conftest import make_host, pictures
from tests.parity import assert_close


@pytest.mark.parametrize("selection", ["class", "column_mean", "random", "even"])
def test_counts_and_macs_are_equal_for_every_selection(selection: str) -> None:
    """int(ratio^j * 196) tokens, as DynamicViT and most re-implementations count."""
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224")
    model = evovit.reduce_tokens(host, "keep", selection=selection)
    trace = model.run(torch.empty(1, 3, 224, 224, device="meta"), record=True).trace
    assert [trace[b].num_patches for b in (3, 6, 9)] == [137, 96, 67]
    plain = evovit.reduce_tokens(host, "evit", rest="drop", keep=(137, 96, 67))
    scored = (197, 138, 97) if selection == "column_mean" else ()  # every query asks every key once more
    extra = sum(rows**2 * 384 for rows in scored) / 1e9
    assert gmacs(model, (3, 224, 224)) == pytest.approx(gmacs(plain, (3, 224, 224)) + extra, rel=1e-9)


def test_top_class_attention_is_evit_without_fusion() -> None:
    host, images = make_host("dinov2_reg"), pictures()
    top = evovit.reduce_tokens(host, "keep", blocks=(1, 2), keep_ratio=0.5)
    evit = evovit.reduce_tokens(host, "evit", blocks=(1, 2), keep=(8, 4), rest="drop")
    with torch.no_grad():
        assert torch.equal(top(images), evit(images))


def test_even_keep_is_evenly_spaced_and_the_same_for_every_image() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "keep", blocks=(1,), keep_ratio=0.5, selection="even")
    with torch.no_grad():
        index = reduced.run(pictures(), record=True).trace[1].index
    assert index.tolist() == [list(range(1, 16, 2))] * 2


def test_random_keep_repeats_in_evaluation_and_draws_afresh_in_training() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "keep", blocks=(1,), keep_ratio=0.5, selection="random")
    for training in (False, True):
        reduced.train(training)
        one, two = (reduced.run(pictures(), record=True).trace[1].index for _ in range(2))
        assert torch.equal(one, two) is not training
        assert training or torch.equal(one[0], one[1])


@pytest.mark.parametrize("host", ["dinov2_reg", "deit_distilled", "siglip", "eva02"])
@pytest.mark.parametrize("selection", ["random", "even"])
def test_kept_tokens_are_what_the_host_makes_of_them_and_prefixes_stay(host: str, selection: str) -> None:
    model, images = make_host(host), pictures()
    reduced = evovit.reduce_tokens(model, "keep", blocks=(0,), keep_ratio=0.5, selection=selection)
    dense = evovit.reduce_tokens(model, "keep", keep_ratio=1.0, blocks=(0,), selection=selection)
    with torch.no_grad():
        ours = reduced.run(images, record=True).trace[0]
        whole = dense.run(images, record=True).trace[0]
    rows = ours.index[..., None].expand_as(ours.patches)
    assert_close(ours.patches, whole.patches.gather(1, rows))
    assert torch.equal(ours.prefix, whole.prefix) or torch.allclose(ours.prefix, whole.prefix, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_ratio": 0}, "keep_ratio is 0; allowed is a number above 0, at most 1"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5; allowed is a number above 0, at most 1"),
        ({"blocks": (4,)}, "blocks is 4; allowed is 0 to 3"),
        ({"selection": "best"}, "selection is 'best'; allowed is class"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "keep", **({"blocks": (1,)} | options))


@pytest.mark.parametrize("host", ["vit", "siglip", "dinov2_reg", "eva02"])
def test_representation_shift_keeps_whom_the_ffn_moves_most_after_it(host: str) -> None:
    model, images = make_host(host), pictures()
    reduced = evovit.reduce_tokens(model, "keep", blocks=(1,), keep_ratio=0.5, selection="shift")
    with torch.no_grad():
        ours = reduced.run(images, record=True).trace[1]
        backbone = evovit.backbones.adapt(model)
        embedded = backbone.embed(images)
        first, second = backbone.stages()[0].blocks[:2]
        before = second.attend(first(embedded))[0]
        after = second.ffn(before)
    for image in range(2):
        rows = zip(before.patches[image], after.patches[image], strict=True)
        shift = [float(((b - a) - a).square().sum().sqrt()) for a, b in rows]  # branch minus its input
        best = sorted(sorted(range(16), key=lambda row: -shift[row])[:8])
        assert ours.index[image].tolist() == best
        assert torch.equal(ours.patches[image], after.patches[image, best])


def test_representation_shift_at_the_published_points_costs_what_is_published() -> None:
    """A fifth goes after each of three blocks: 3.0 GMACs for DeiT-S, layers counted from 1."""
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224")
    model = evovit.reduce_tokens(
        host, "keep", selection="shift", keep_ratio=0.8, blocks=(0, 3, 6), last_block="all"
    )
    assert gmacs(model, (3, 224, 224)) == pytest.approx(2.95, rel=0.01)


@pytest.mark.parametrize(
    ("method", "options"),
    [("keep", {"blocks": (1,)}), ("evit", {"blocks": (1,)}), ("evo_vit", {"start_block": 1})],
)
@pytest.mark.parametrize("host", ["siglip", pytest.param("vit", marks=pytest.mark.slow)])
def test_representation_shift_trains_compiles_and_exports(
    host: str, method: str, options: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    reduced = evovit.reduce_tokens(make_host(host), method, selection="shift", **options).train()
    reduced(pictures()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reduced.parameters())
    reduced.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporter
        compiled = torch.compile(reduced, fullgraph=True, backend="eager")
        assert_close(compiled(pictures()), reduced(pictures()))
        program = torch.export.export(reduced, (pictures(),), dynamic_shapes=({0: batch},)).module()
        for count in (1, 5):
            assert_close(program(pictures(count)), reduced(pictures(count)))
        half = reduced.bfloat16()(pictures().bfloat16())
    assert half.isfinite().all() and half.dtype == torch.bfloat16
