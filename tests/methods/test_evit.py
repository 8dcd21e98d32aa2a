"""EViT: equal to the official code on its reference numbers, and right on hosts it was not written for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn
from torch.nn import functional as F

import evovit
from evovit.backbones.timm_blocks import PreNormBlock
from evovit.checkpoints.reduced import load_reduced, save_reduced
from evovit.macs import gmacs
from evovit.ops.score import class_attention
from evovit.ops.select import split_top
from evovit.ops.update import weighted_sum
from evovit.tokens import QKV, Tokens
from tests.conftest import GOLDEN, Golden, make_host, pictures
from tests.parity import assert_close, assert_same_gradients, assert_same_traces, gradients_of

OFFICIAL = Golden("evit")
CASES = [case["name"] for case in OFFICIAL.side["cases"]]


def load_case(case: dict[str, Any]) -> evovit.ReducedViT:
    options, call = case["constructor"], case.get("forward", {})
    blocks = options["drop_loc"]
    return evovit.load_official(
        "evit",
        OFFICIAL.state_dict(),
        num_heads=OFFICIAL.side["model"]["num_heads"],
        img_size=256 if case["name"].endswith("256") else 224,
        blocks=blocks,
        keep_ratio=call.get("keep_rate", tuple(options["keep_rates"])),
        keep=tuple(call["tokens"][b] for b in blocks) if "tokens" in call else None,
        rest="fuse" if options["fuse_token"] else "drop",
    )


@pytest.mark.parametrize("name", CASES)
def test_equals_official(name: str) -> None:
    """Logits, kept patches, fused tokens and traces; in training also the loss and every gradient."""
    case = OFFICIAL.case(name)
    model = load_case(case).train(case["mode"] == "train")
    outputs = model.run(OFFICIAL.images(case), record=True)
    assert_same_traces(OFFICIAL, case, outputs)
    assert [t.x.shape[1] for t in outputs.trace] == case["tokens_after_block"]
    fuse = case["constructor"]["fuse_token"]
    for number in case["selecting_blocks"]:
        tokens = outputs.trace[number]
        kept = tokens.index[:, :-1] if fuse else tokens.index
        expected = OFFICIAL.out(case, f"keep_idx.{number}").long()
        assert torch.equal(kept.sort(1).values, expected.sort(1).values)
        if fuse:
            assert (tokens.index[:, -1] == -1).all()
            assert_close(tokens.x[:, -1], OFFICIAL.out(case, f"fused_token.{number}"))
    if "labels" in case:
        loss = F.cross_entropy(outputs.logits, torch.tensor(case["labels"]))
        assert_close(loss, OFFICIAL.out(case, "loss")[0])
        loss.backward()
        assert_same_gradients(OFFICIAL, case, gradients_of(model))


def test_released_defaults_are_the_loaders_defaults() -> None:
    case = OFFICIAL.case("eval_keep0.7_fuse")
    model = evovit.load_official("evit", OFFICIAL.state_dict(), num_heads=3)
    with torch.no_grad():
        assert_close(model(OFFICIAL.images(case)), OFFICIAL.out(case, "logits"))


def test_another_layout_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        evovit.EvoViTError, match="not an official evit checkpoint.*'blocks.0.attn.qkv.weight'"
    ):
        evovit.load_official("evit", Golden("evo_deit").state_dict(), num_heads=3)
    with pytest.raises(evovit.EvoViTError, match="num_heads is 5; give the number of attention heads"):
        evovit.load_official("evit", OFFICIAL.state_dict(), num_heads=5)
    broken = OFFICIAL.state_dict()
    del broken["blocks.7.norm2.bias"]
    with pytest.raises(evovit.EvoViTError, match="incomplete or inconsistent"):
        evovit.load_official("evit", broken, num_heads=3)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("count", [None, 5])
def test_one_block_equals_the_official_unit(fuse: bool, count: int | None) -> None:
    units = load_file(GOLDEN / "units_evit.safetensors")
    name = f"block_fuse{fuse}_tokens{count}"
    block = TimmBlock(8, 2, mlp_ratio=2.0, qkv_bias=True, norm_layer=nn.LayerNorm).eval()
    start = f"{name}.in.w."
    block.load_state_dict({k.removeprefix(start): v for k, v in units.items() if k.startswith(start)})
    host = make_host("vit")
    keep = None if count is None else (count,)
    rest = "fuse" if fuse else "drop"
    method = evovit.reduce_tokens(host, "evit", blocks=(0,), keep_ratio=0.6, rest=rest, keep=keep).method
    x = units[f"{name}.in.x"]
    index = torch.arange(12).expand(2, 12)
    with torch.no_grad():
        tokens = method.run_block(PreNormBlock(block, 0), Tokens(x, index, 1, (3, 4)))
    expected, order = units[f"{name}.out.out"], units[f"{name}.out.idx"].long()
    ours = order.argsort(1)  # the official rows, brought from score order to raster order
    expected = torch.cat(
        (expected[:, :1], expected[:, 1:][torch.arange(2)[:, None], ours], expected[:, -1:]), 1
    )
    assert_close(tokens.x, expected if fuse else expected[:, :-1])
    assert torch.equal(tokens.index[:, : order.shape[1]], order.sort(1).values)


def test_indices_for_pictures_equal_the_official_composition() -> None:
    """`get_real_idx` composes positions block by block; here the same from `Tokens.index`."""
    units = load_file(GOLDEN / "units_evit.safetensors")
    for name, fuse in (("get_real_idx_fuse", True), ("get_real_idx_nofuse", False)):
        index = torch.arange(64).expand(2, 64)
        for step in range(3):
            rows = units[f"{name}.in.idx{step}"].long()
            index = index.gather(1, rows)
            official = units[f"{name}.out.real{step}"].long()
            assert torch.equal(index.clamp(min=0), official)  # the official code reports a fused token as 0
            index = F.pad(index, (0, 1), value=-1) if fuse else index


def test_kept_and_fused_partition_and_the_weights_sum_to_what_is_left() -> None:
    """Fused weight = 1 - A(class, class) - sum of the kept scores."""
    q, k, v = torch.randn(3, 2, 3, 13, 4)
    qkv = QKV(q, k, v, 0.5)
    score, own = class_attention(qkv, 1), class_attention(qkv, 0)[:, 0]
    split = split_top(score, 5)
    fused = weighted_sum(torch.ones(2, 12, 1), score, split.kept)[:, 0, 0]
    assert_close(fused, 1 - own - score.gather(1, split.rows).sum(1))
    rest = (~split.kept).nonzero()[:, 1].view(2, 7)
    assert torch.equal(torch.cat((split.rows, rest), 1).sort(1).values, torch.arange(12).expand(2, 12))


COUNTS = {  # methods' table: patch tokens after each reducing block, N = 196
    0.9: ([178, 162, 147], [177, 160, 144]),
    0.8: ([158, 128, 104], [157, 126, 101]),
    0.7: ([139, 99, 71], [138, 97, 68]),
    0.6: ([119, 73, 45], [118, 71, 43]),
    0.5: ([99, 51, 27], [98, 49, 25]),
}
WORK = {  # GMACs of DeiT-S fused, DeiT-S dropping, DeiT-B fused, DeiT-T fused
    0.9: (4.02, 3.99, 15.40, 1.09),
    0.8: (3.48, 3.44, 13.33, 0.94),
    0.7: (3.03, 3.00, 11.61, 0.82),
    0.6: (2.64, 2.61, 10.09, 0.72),
    0.5: (2.31, 2.28, 8.82, 0.63),
}


@pytest.mark.parametrize("ratio", COUNTS)
def test_token_counts_and_macs_equal_the_table(ratio: float) -> None:
    fused, dropped, base, tiny = WORK[ratio]
    rows = (
        ("small", "fuse", fused),
        ("small", "drop", dropped),
        ("base", "fuse", base),
        ("tiny", "fuse", tiny),
    )
    for size, rest, expected in rows:
        with torch.device("meta"):
            host = timm.create_model(f"deit_{size}_patch16_224")
        model = evovit.reduce_tokens(host, "evit", keep_ratio=ratio, rest=rest, last_block="all")
        work = gmacs(model, (3, 224, 224))
        assert work == pytest.approx(expected, rel=5e-3 if expected > 2 else 7e-3)  # two decimals printed
        with torch.no_grad():
            trace = model.run(torch.empty(1, 3, 224, 224, device="meta"), record=True).trace
        assert [trace[b].num_patches for b in (3, 6, 9)] == COUNTS[ratio][rest == "drop"]


def test_counts_of_the_initial_grid_are_the_other_spelling() -> None:
    with torch.device("meta"):
        host = timm.create_model("deit_tiny_patch16_224")
    model = evovit.reduce_tokens(host, "evit", counts="initial")
    trace = model.run(torch.empty(1, 3, 224, 224, device="meta"), record=True).trace
    assert [trace[b].num_patches for b in (3, 6, 9)] == [int(196 * 0.7**j) + 1 for j in (1, 2, 3)]


def test_keep_ratio_falls_as_in_the_official_training() -> None:
    official = OFFICIAL.side["keep_rate_schedule"]
    assert official["arguments"]["ITERS_PER_EPOCH"] == 10
    model = evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1, 2), shrink=(2 / 10, 6 / 10))
    for row in official["rows"]:
        model.method.set_progress(row["iters"] / 100)
        for number in (1, 2):
            assert math.isclose(model.method.schedule.ratios[number], row["keep_rate"], rel_tol=1e-12)
        assert model.method.schedule.ratios[0] == model.method.schedule.ratios[3] == 1
    model.method.set_progress(1.0)
    assert model.method.schedule.ratios[1] == 0.7
    model.method.set_progress(0.0)
    images = pictures()
    with torch.no_grad():
        assert_close(model(images), model.model(images))


def test_gradient_reaches_the_scores_through_the_fused_token_alone() -> None:
    x = torch.randn(2, 6, 4)
    score = torch.rand(2, 6, requires_grad=True)
    split = split_top(score, 2)
    weighted_sum(x, score, split.kept).sum().backward()
    assert torch.equal(score.grad != 0, ~split.kept)


@pytest.mark.parametrize("host", ["dinov2_reg", "deit3", "deit_distilled", "qk_norm", "eva02"])
def test_scores_patches_alone_and_keeps_every_prefix_token(host: str) -> None:
    """Registers and the distillation token are no patches: never scored, dropped or fused.

    The kept patches are those of the host's own attention: LayerScale, q/k norm and rotation included.
    """
    model = make_host(host)
    prefix, images = model.num_prefix_tokens, pictures()
    reduced = evovit.reduce_tokens(model, "evit", blocks=(1,), keep_ratio=0.5)
    seen: list[torch.Tensor] = []
    model.blocks[1].attn.fused_attn = False
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        trace = reduced.run(images, record=True).trace
        model(images)
        attention = seen[-1].mean(1)[:, 0, prefix:]  # (B, N)
    assert [t.x.shape[1] for t in trace] == [prefix + 16] + [prefix + 9] * 3
    best = attention.topk(8).indices.sort(1).values
    assert torch.equal(trace[1].index[:, :-1], best)


def test_the_fused_token_is_the_weighted_sum_after_attention() -> None:
    """A naive loop over 2 images, on a host with registers and LayerScale."""
    host, images = make_host("dinov2_reg"), pictures()
    reduced = evovit.reduce_tokens(host, "evit", blocks=(0,), keep_ratio=0.5)
    block = host.blocks[0]
    with torch.no_grad():
        out = reduced.run(images, record=True).trace[0]
        x = host._pos_embed(host.patch_embed(images))
        y = x + block.ls1(block.attn(block.norm1(x)))
        q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / 4).softmax(-1).mean(1)[:, 0, 5:]
        for image in range(2):
            order = sorted(range(16), key=lambda n: -attention[image, n].item())
            fused = sum(attention[image, n] * y[image, 5 + n] for n in order[8:])
            rows = torch.cat((y[image, :5], y[image, [5 + n for n in sorted(order[:8])]], fused[None]))
            expected = rows + block.ls2(block.mlp(block.norm2(rows)))
            assert_close(out.x[image], expected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_ratio": 0}, "keep_ratio is 0; allowed is a number above 0, at most 1"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5; allowed is a number above 0, at most 1"),
        ({"keep_ratio": [0.5, 0.5]}, "keep_ratio has 2 values for 1 reducing blocks"),
        ({"blocks": (4,)}, "blocks is 4; allowed is 0 to 3"),
        ({"blocks": (2, 1)}, r"blocks is \(2, 1\); list each reducing block once"),
        ({"keep": (17,)}, "keep is 17; allowed is 1 to 16"),
        ({"keep": (8, 8)}, "give one count per block"),
        ({"shrink": (0.5, 0.2)}, "shrink is .* give two rising shares"),
        ({"counts": "all"}, "counts is 'all'; allowed is current or initial"),
        (
            {"selection": "best"},
            "selection is 'best'; allowed is class, column_mean, key_norm, probe or shift",
        ),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "evit", **({"blocks": (1,)} | options))


@pytest.mark.parametrize("counts", ["current", "initial"])
def test_a_ramp_is_of_each_blocks_ratio_and_saved_as_it_is(counts: str, tmp_path: Path) -> None:
    options = {"blocks": (1, 2), "keep_ratio": (0.5, 0.8), "counts": counts}
    reduced = evovit.reduce_tokens(make_host("vit"), "evit", **options)
    reduced.method.set_reduction(0.5)
    second = 0.9 if counts == "current" else 0.75 * 0.9
    assert reduced.method.schedule.ratios == pytest.approx((1, 0.75, second, 1))
    save_reduced(reduced, tmp_path)
    loaded = load_reduced(tmp_path, make_host("vit")).method
    assert loaded.schedule == reduced.method.schedule
    assert loaded.config.keep_ratio == pytest.approx((0.75, 0.9)) and loaded.config.shrink is None
    reduced.method.set_reduction(1.0)
    assert reduced.method.current_config() == reduced.method.config


def test_a_shrinking_ratio_is_not_ramped_as_well() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,), shrink=(0.1, 0.5))
    with pytest.raises(evovit.EvoViTError, match=r"shrink.* run.reduce_from_epoch .* choose one"):
        reduced.method.set_reduction(1.0)


def test_explicit_counts_have_no_ratio_to_ramp() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,), keep=(8,))
    with pytest.raises(evovit.EvoViTError, match="has no keep ratio"):
        reduced.method.set_reduction(0.5)


def test_a_host_without_class_token_needs_a_chosen_score() -> None:
    with pytest.raises(evovit.EvoViTError, match="needs a class token.*choose 'column_mean'"):
        evovit.reduce_tokens(make_host("siglip"), "evit", blocks=(1,))


def test_representation_shift_ranks_after_the_ffn_and_weighs_as_a_share() -> None:
    """The fused token is the sum of the others, each times its share of all shifts."""
    host, images = make_host("siglip"), pictures()
    reduced = evovit.reduce_tokens(host, "evit", blocks=(1,), keep=(8,), selection="shift")
    block = host.blocks[1]
    with torch.no_grad():
        x = evovit.reduce_tokens(host, "dense").run(images, record=True).trace[0].x
        x = x + block.attn(block.norm1(x))
        branch = block.mlp(block.norm2(x))
        after, out = x + branch, reduced.run(images, record=True).trace[1]
        for image in range(2):
            shift = [(branch[image, row] - x[image, row]).norm().item() for row in range(16)]
            order = sorted(range(16), key=lambda row: -shift[row])
            assert out.index[image].tolist() == [*sorted(order[:8]), -1]
            fused = sum(after[image, row] * shift[row] / sum(shift) for row in order[8:])
            assert_close(out.x[image], torch.cat((after[image, sorted(order[:8])], fused[None])))
