"""Evo-ViT: equal to the official DeiT code on its reference numbers, and to a naive loop from the paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import evovit
from tests.conftest import Golden, make_host, pictures
from tests.parity import assert_close

OFFICIAL = Golden("evo_deit")
CASES = [case["name"] for case in OFFICIAL.side["cases"]]
EVAL = [name for name in CASES if name.startswith("eval")]
TRAIN = [name for name in CASES if name.startswith("train")]


def load_case(case: dict[str, Any]) -> evovit.ReducedViT:
    options, new = case["constructor"], case["constructor"]["tradeoff"]
    return evovit.load_official(
        "evo_vit",
        OFFICIAL.state_dict(),
        num_heads=OFFICIAL.side["model"]["num_heads"],
        keep_ratio=options["prune_ratio"],
        trade_off=[1 - t for t in new] if isinstance(new, list) else 1 - new,
        mode="stage" if case["stage_wise_prune"] else "layer",
        rejoin_last=not options["prunecls"],
    )


@pytest.mark.parametrize("name", EVAL)
def test_evaluation_equals_official(name: str) -> None:
    case = OFFICIAL.case(name)
    with torch.no_grad():
        outputs = load_case(case).run(OFFICIAL.images(case), record=True)
    assert_close(outputs.logits, OFFICIAL.out(case, "logits"))
    for number in case["keep"]:
        kept = outputs.trace[int(number)].index.sort(1).values
        assert torch.equal(kept, OFFICIAL.out(case, f"keep_idx.{number}").long().sort(1).values)
    if "cls_trace" in case["outputs"]:
        assert_close(torch.stack([t.x[:, 0] for t in outputs.trace]), OFFICIAL.out(case, "cls_trace"))
        assert_close(
            torch.stack([t.patches.mean(1) for t in outputs.trace]), OFFICIAL.out(case, "mean_trace")
        )


@pytest.mark.parametrize("name", TRAIN)
def test_training_equals_official(name: str) -> None:
    """Logits of both heads, the released loss and the norm of every gradient."""
    case = OFFICIAL.case(name)
    model, labels = load_case(case).train(), torch.tensor(case["labels"])
    outputs = model.run(OFFICIAL.images(case))
    assert_close(outputs.logits, OFFICIAL.out(case, "logits_avg"))
    assert_close(outputs.extra_logits["class_token"], OFFICIAL.out(case, "logits_cls"))
    loss = 0.5 * F.cross_entropy(outputs.logits, labels)
    loss = loss + 0.5 * F.cross_entropy(outputs.extra_logits["class_token"], labels)
    assert_close(loss, OFFICIAL.out(case, "loss")[0])
    if not case.get("backward", True):
        return
    loss.backward()
    norms = dict(zip(case["grad_norm_names"], OFFICIAL.out(case, "grad_norm"), strict=True))
    largest = max(norms.values())
    for official, expected in norms.items():
        actual = official_gradient(model, official).norm()
        assert abs(actual - expected) <= 1e-5 * (expected + 1e-3 * largest), official


def official_gradient(model: evovit.ReducedViT, name: str) -> Tensor:
    """Return the gradient of an official parameter, wherever it lives now."""
    parts, host = name.split("."), dict(model.model.named_parameters())
    if parts[0] in ("norm_cls", "head_cls"):
        return model.method.class_head.get_parameter(name).grad
    if parts[0] in ("norms", "projs"):
        return host[f"blocks.{parts[1]}.{'norm1' if parts[0] == 'norms' else 'attn.proj'}.{parts[2]}"].grad
    if parts[0] in ("qks", "vs"):
        both = host[f"blocks.{parts[1]}.attn.qkv.{parts[-1]}"].grad
        width = both.shape[0] // 3
        return both[: 2 * width] if parts[0] == "qks" else both[2 * width :]
    return host[f"fc_norm.{parts[1]}" if parts[0] == "norm" else name].grad


def test_released_defaults_are_the_loaders_defaults() -> None:
    case = OFFICIAL.case("eval_stage_keep0.5")
    model = evovit.load_official("evo_vit", OFFICIAL.state_dict(), num_heads=3)
    with torch.no_grad():
        assert_close(model(OFFICIAL.images(case)), OFFICIAL.out(case, "logits"))


def test_units_of_the_official_code() -> None:
    """Its gather and its weighted representative token; the losses are in tests/run/test_objective.py."""
    from evovit.ops.select import take
    from evovit.ops.update import representative

    units = Golden("units_evo").tensors
    gathered = take(units["easy_gather.in.x"], units["easy_gather.in.indices"].long())
    assert torch.equal(gathered, units["easy_gather.out.out"])
    dropped, score = units["merge_tokens.in.x_drop"], units["merge_tokens.in.score"]
    nothing_kept = torch.zeros_like(score, dtype=torch.bool)
    assert_close(representative(dropped, score, nothing_kept), units["merge_tokens.out.out"])


# Paper mode against a naive loop: one image at a time, one head at a time, from equations 1 to 7.


def naive_block(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the attention residual, the FFN residual and the class attention of rows x (T, C)."""
    normed = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, block.norm1.eps)
    qkv = normed @ block.attn.qkv.weight.T + block.attn.qkv.bias
    heads, width = block.attn.num_heads, x.shape[1] // block.attn.num_heads
    q, k, v = qkv.split(x.shape[1], dim=1)
    out, attention = [], 0
    for h in range(heads):
        columns = slice(h * width, (h + 1) * width)
        weights = torch.softmax(q[:, columns] @ k[:, columns].T / math.sqrt(width), dim=1)  # eq. 2
        out.append(weights @ v[:, columns])
        attention = attention + weights[0] / heads  # eq. 3
    first = torch.cat(out, 1) @ block.attn.proj.weight.T + block.attn.proj.bias
    return first, block.mlp(block.norm2(x + first)), attention


def naive_evo_vit(host: nn.Module, image: Tensor, keep: int, start: int, length: int, alpha: float) -> Tensor:
    """Return the tokens (1 + N, C) of one image after the last block, in raster order."""
    x = host._pos_embed(host.patch_embed(image[None]))[0]
    cls, patches, score = x[:1], x[1:], None
    for number, block in enumerate(host.blocks):
        if number < start:
            rows = torch.cat((cls, patches))
            first, second, attention = naive_block(block, rows)
            rows = rows + first + second
            cls, patches = rows[:1], rows[1:]
            score = attention[1:] if score is None else alpha * score + (1 - alpha) * attention[1:]  # eq. 4
            continue
        if (number - start) % length == 0:  # a stage begins: split
            order = sorted(range(len(score)), key=lambda n: -score[n].item())
            slow, fast = order[:keep], order[keep:]
            weights = torch.stack([score[n] for n in fast])
            rep = sum(w * patches[n] for w, n in zip(weights / weights.sum(), fast, strict=True))[
                None
            ]  # eq. 5
            residual = torch.zeros_like(rep)
            informative = torch.stack([patches[n] for n in slow])
        rows = torch.cat((cls, informative, rep))
        first, second, attention = naive_block(block, rows)
        rows = rows + first + second  # eq. 6
        residual = residual + first[-1:] + second[-1:]
        cls, informative, rep = rows[:1], rows[1:-1], rows[-1:]
        score = score.clone()
        for place, n in enumerate(slow):
            score[n] = alpha * score[n] + (1 - alpha) * attention[1 + place]
        if (number - start) % length == length - 1 or number == len(host.blocks) - 1:
            patches = patches.clone()
            for n in fast:
                patches[n] = patches[n] + residual[0]  # eq. 7
            for place, n in enumerate(slow):
                patches[n] = informative[place]
    return torch.cat((cls, patches))


@pytest.mark.parametrize("mode", ["stage", "layer"])
@pytest.mark.parametrize(("keep_ratio", "alpha"), [(0.5, 0.5), (0.25, 0.3), (15.5 / 16, 0.7)])
def test_paper_mode_equals_a_naive_loop_from_the_equations(
    mode: str, keep_ratio: float, alpha: float
) -> None:
    """Also with exactly one placeholder left."""
    host = make_host("vit").double()
    options = {
        "start_block": 1,
        "stage_length": 2,
        "trade_off": alpha,
        "keep_ratio": keep_ratio,
        "mode": mode,
    }
    reduced = evovit.reduce_tokens(host, "evo_vit", **options)
    images = pictures().double()
    with torch.no_grad():
        tokens = reduced.method.finish(reduced.run(images).tokens)
        for image, ours in zip(images, tokens.x, strict=True):
            length = 1 if mode == "layer" else 2
            expected = naive_evo_vit(host, image, int(16 * keep_ratio), 1, length, alpha)
            assert_close(ours, expected, 1e-6)  # scores are float32


def test_modes_share_weights_and_switch_between_forwards() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=1, stage_length=2)
    images = pictures()
    with torch.no_grad():
        stage = reduced(images)
        reduced.method.mode = "layer"
        layer = reduced(images)
        reduced.method.mode = "stage"
        assert not torch.equal(stage, layer)
        assert torch.equal(reduced(images), stage)
    with pytest.raises(evovit.EvoViTError, match="mode is 'block'"):
        reduced.method.mode = "block"


def test_layer_to_stage_schedule_follows_the_training() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=1, switch_at=2 / 3)
    modes = []
    for epoch in range(6):
        reduced.method.set_progress(epoch / 6)
        modes.append(reduced.method.mode)
    assert modes == ["layer"] * 4 + ["stage"] * 2


def test_placeholders_wait_unchanged_without_fast_update() -> None:
    reduced = evovit.reduce_tokens(
        make_host("vit"), "evo_vit", start_block=2, stage_length=2, fast_update=False
    )
    with torch.no_grad():
        outputs = reduced.run(pictures(), record=True)
    before, after = outputs.trace[1], reduced.method.finish(outputs.tokens)
    awake = torch.zeros(2, 16, dtype=torch.bool).scatter(1, outputs.trace[2].index, True)
    assert torch.equal(before.patches[~awake], after.patches[~awake])
    assert not torch.isclose(before.patches[awake], after.patches[awake]).all(-1).any()


def test_all_placeholders_change_by_one_vector_with_fast_update() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=2, stage_length=2)
    with torch.no_grad():
        outputs = reduced.run(pictures(), record=True)
    change = reduced.method.finish(outputs.tokens).patches - outputs.trace[1].patches
    for image in range(2):
        waiting = sorted(set(range(16)) - set(outputs.trace[2].index[image].tolist()))
        moved = change[image, waiting]
        assert moved.norm() > 0
        assert_close(moved, moved[:1].expand_as(moved))


@pytest.mark.parametrize("fast_update", [False, True])
def test_rows_of_reduced_blocks_are_multiples_and_the_others_stay(fast_update: bool) -> None:
    options = {"start_block": 1, "stage_length": 2, "multiple_of": 5, "fast_update": fast_update}
    outputs = evovit.reduce_tokens(make_host("vit"), "evo_vit", **options).run(pictures(), record=True)
    assert [tokens.x.shape[1] for tokens in outputs.trace] == [17, 10, 10, 10]


def test_a_multiple_above_all_rows_is_refused() -> None:
    with pytest.raises(
        evovit.EvoViTError, match="multiple_of is 18; allowed is 1 to 17 .rows of an unreduced"
    ):
        evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=1, stage_length=2, multiple_of=18)


def test_an_assisted_head_needs_a_class_token() -> None:
    options = {"start_block": 1, "stage_length": 2, "selection": "column_mean", "assisted_head": True}
    with pytest.raises(
        evovit.EvoViTError, match="assisted_head=True needs a class token.*assisted_head=False"
    ):
        evovit.reduce_tokens(make_host("siglip"), "evo_vit", **options)


def test_dropping_removes_placeholders_for_good() -> None:
    """Table 3, naive selection: counts stay at int(ratio * N) of the first grid."""
    options = {
        "start_block": 1,
        "mode": "layer",
        "preserve": False,
        "fast_update": False,
        "selection": "class",
    }
    outputs = evovit.reduce_tokens(make_host("vit"), "evo_vit", **options).run(pictures(), record=True)
    assert [tokens.num_patches for tokens in outputs.trace] == [16, 8, 8, 8]


def test_a_score_nobody_reads_is_not_computed() -> None:
    from evovit.schedule import KeepSchedule

    schedule = KeepSchedule.from_block(12, 0.5, 4)
    released, paper = (0.0,) * 4 + (0.5,) * 8, (0.5,) * 12
    assert [i for i in range(12) if schedule.reads_score(i, 4, released)] == [3, 4, 5, 6, 7]
    assert [i for i in range(12) if schedule.reads_score(i, 4, paper)] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [i for i in range(12) if schedule.reads_score(i, 1, released)] == list(range(3, 11))


@pytest.mark.parametrize("selection", ["global", "class", "last_class", "column_mean", "random"])
def test_selections_of_table_4_choose_by_their_score(selection: str) -> None:
    host = make_host("vit")
    reduced = evovit.reduce_tokens(host, "evo_vit", start_block=2, stage_length=2, selection=selection)
    dense = evovit.reduce_tokens(host, "evo_vit", keep_ratio=1.0, start_block=2)
    images = pictures()
    with torch.no_grad():
        kept = reduced.run(images, record=True).trace[2].index[:, :8]
        trace = dense.run(images, record=True).trace
    number = 3 if selection == "last_class" else 1
    x = host._pos_embed(host.patch_embed(images)) if number == 0 else trace[number - 1].x
    score = torch.zeros(2, 16)
    for image in range(2):
        normed = host.blocks[number].norm1(x[image])
        q, k, _ = host.blocks[number].attn.qkv(normed).unflatten(-1, (3, 2, 16)).unbind(1)
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, k) / 4, dim=-1).mean(0)
        score[image] = weights.mean(0)[1:] if selection == "column_mean" else weights[0, 1:]
    best = score.topk(8).indices.sort(1).values
    if selection in ("class", "last_class", "column_mean"):
        assert torch.equal(kept, best)
    elif selection == "random":
        assert not torch.equal(kept, best)
        assert torch.equal(kept[0], kept[1])  # in evaluation every image keeps the same positions
    else:
        assert kept.shape == best.shape


def test_random_selection_draws_afresh_in_training() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=1, selection="random").train()
    first, second = (reduced.run(pictures(), record=True).trace[1].index for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_ratio": 0}, "keep_ratio is 0; allowed is a number above 0, at most 1"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5; allowed is a number above 0, at most 1"),
        ({"keep_ratio": "half"}, "keep_ratio is 'half'; allowed is a number"),
        ({"keep_ratio": [0.5, 0.5]}, "keep_ratio has 2 values for 4 blocks"),
        ({"keep_ratio": [0.5, 0.5, 1, 1]}, "keep_ratio is below 1 before start_block 1"),
        ({"start_block": 4}, "start_block is 4; allowed is 1 to 3"),
        ({"start_block": 0}, "start_block is 0; allowed is 1 to 3"),
        ({"stage_length": 0}, "stage_length is 0; allowed is a whole number, 1 or more"),
        ({"trade_off": -0.1}, "trade_off is -0.1; allowed is a number from 0 to 1"),
        ({"mode": "both"}, "mode is 'both'; allowed is stage or layer"),
        ({"selection": "best"}, "selection is 'best'; allowed is global"),
        ({"preserve": False}, "fast_update updates the placeholders that preserve=False drops"),
        ({"keep_ration": 0.5}, "has no option 'keep_ration'.*Did you mean 'keep_ratio'"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "evo_vit", **({"start_block": 1} | options))


def test_a_host_without_class_token_needs_a_chosen_score() -> None:
    with pytest.raises(
        evovit.EvoViTError, match="needs a class token and this host has none; choose 'column_mean'"
    ):
        evovit.reduce_tokens(make_host("siglip"), "evo_vit", start_block=1)


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_representation_shift_scores_by_the_ffn_of_those_who_took_part(name: str) -> None:
    """Each selection is by the last FFN of every token: of the awake anew, of the others as it was."""
    host, images = make_host(name), pictures()
    options = {"start_block": 1, "stage_length": 1, "selection": "shift", "fast_update": False}
    reduced = evovit.reduce_tokens(host, "evo_vit", **options)
    prefix = reduced.method.spec.num_prefix
    with torch.no_grad():
        trace = reduced.run(images, record=True).trace
        x = evovit.backbones.adapt(host).embed(images).x
        score = torch.zeros(2, 16)
        for number, block in enumerate(host.blocks[:3]):
            kept = score.topk(8).indices.sort(1).values if number else torch.arange(16).expand(2, -1)
            assert torch.equal(trace[number].index, kept)
            for image in range(2):
                rows = [*range(prefix), *(prefix + cell for cell in kept[image].tolist())]
                y = x[image, rows] + block.attn(block.norm1(x[image, rows])[None])[0]
                branch = block.mlp(block.norm2(y))
                score[image, kept[image]] = (branch - y).norm(dim=-1)[prefix:]
                x[image, rows] = y + branch
