"""MCTF: equal to the official code on its reference numbers, in training too; naive loops elsewhere."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

import evovit
from evovit.backbones.base import BackboneSpec
from evovit.checkpoints.reduced import load_reduced, save_reduced
from evovit.macs import gmacs
from evovit.methods import mctf
from evovit.methods.mctf import MCTF, Fused, count_removed, draw
from evovit.ops.distance import confidence, confident_distance
from evovit.ops.fusion import Fusion, aggregated
from evovit.ops.merge import Match, match_both_ways, match_by
from evovit.recipe.tables import ObjectiveTable
from evovit.tokens import QKV, Outputs, Tokens
from evovit.train.objective import Objective
from tests.conftest import Golden, make_host, pictures
from tests.parity import assert_close, assert_same_gradients, assert_same_traces, gradients_of

OFFICIAL, UNITS = Golden("mctf"), Golden("units_mctf")
SPEC = BackboneSpec((12,), (24,), (3,), (14, 14), num_prefix=1, has_class_token=True, num_classes=5)
AHEAD, POOLING = (
    {0: "off", 1: "aggregate", 2: "recompute"},
    {0: "size", 1: "attention", 2: "largest", 3: "mean"},
)
EVERY = tuple(range(1, 12))


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    """Return our options for the official list of settings."""
    r, teacher, _, proportional, ahead, similarity, information, size, both, pooling = case["mctf_type"]
    return {
        "r": case.get("r", r), "r_teacher": teacher, "blocks": case["activate_layer"],
        "proportional_attention": bool(proportional), "ahead": AHEAD[ahead], "pooling": POOLING[pooling],
        "tau_similarity": similarity, "tau_information": information, "tau_size": size,
        "bidirectional": bool(both),
    }  # fmt: skip


def load_case(case: dict[str, Any], **options: Any) -> evovit.ReducedViT:
    given = dict(OFFICIAL.side["model"])
    host = VisionTransformer(img_size=given.pop("input_size"), **given).eval()
    host.load_state_dict(OFFICIAL.state_dict())
    return evovit.reduce_tokens(host, "mctf", **(options_of(case) | options), verify=False)


def steps_of(matches: list[Match], both: bool) -> list[tuple[Match | None, Match | None]]:
    """Return the matches of each block, from the first side and back."""
    if not both:
        return [(match, None) for match in matches]
    found: list[tuple[Match | None, Match | None]] = []
    rest = list(matches)
    while rest:
        first = None if rest[0].start == 0 else rest.pop(0)  # those that go back have their targets first
        found.append((first, rest.pop(0)))
    return found


def original(first: Match | None, rows: Tensor) -> Tensor:
    """Return rows of the tokens that the first match leaves as rows of those before it."""
    return rows if first is None else first.rows.gather(1, rows)


def assert_same_pairs(theirs: dict[str, Tensor], first: Match | None, back: Match | None) -> None:
    """Compare sources and targets as pairs; official positions count the class token."""
    for side, match in (("a", first), ("b", back)):
        if match is None:
            assert f"src_{side}" not in theirs or theirs[f"src_{side}"].shape[1] == 0
            continue
        before = first if side == "b" else None
        ours = [original(before, rows) + 1 for rows in (match.sources, match.targets)]
        for image in range(len(match.order)):
            pairs = {tuple(pair) for pair in zip(*(x[image].tolist() for x in ours), strict=True)}
            official = (theirs[f"{name}_{side}"][image].tolist() for name in ("src", "dst"))
            assert pairs == set(zip(*official, strict=True))
    if "order_b" in theirs and back is not None:
        left = original(first, back.rows)[:, back.joins.shape[1] :] + 1
        assert torch.equal(left, theirs["order_b"].long())


def noting(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Match], list[tuple[QKV, Fusion, int]]]:
    """Note all matches, and what the maps are aggregated from."""
    matches, maps = list[Match](), list[tuple[QKV, Fusion, int]]()

    def both(*arguments: Any) -> list[Match]:
        found = match_both_ways(*arguments)
        matches.extend(found)
        return found

    def one(*arguments: Any) -> Match:
        matches.append(match_by(*arguments))
        return matches[-1]

    def mixed(qkv: QKV, bias: Tensor | None, fusion: Fusion, num_prefix: int) -> Tensor:
        maps.append((qkv, fusion, num_prefix))
        return aggregated(qkv, bias, fusion, num_prefix)

    monkeypatch.setattr(mctf, "match_both_ways", both)
    monkeypatch.setattr(mctf, "match_by", one)
    monkeypatch.setattr(mctf, "aggregated", mixed)
    return matches, maps


def whole_map(qkv: QKV, fusion: Fusion, num_prefix: int = 1) -> Tensor:
    """Return the aggregated map (B, H, rows, rows): what values that tell their rows become."""
    left = qkv.q.shape[2] - sum(match.joins.shape[2] for match in fusion.matches)
    eye = torch.eye(left).expand(*qkv.q.shape[:2], -1, -1)
    return aggregated(qkv._replace(v=eye), None, fusion, num_prefix)


@pytest.mark.parametrize("name", [c["name"] for c in OFFICIAL.side["cases"] if c["mode"] == "eval"])
def test_equals_official(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, pairs of both steps, their order, sizes, aggregated maps, tokens, traces."""
    case = OFFICIAL.case(name)
    model, (matches, maps) = load_case(case), noting(monkeypatch)
    with torch.no_grad():
        outputs = model.run(OFFICIAL.images(case), record=True)
    assert_same_traces(OFFICIAL, case, outputs)
    assert [t.x.shape[1] for t in outputs.trace] == case["tokens_after_block"]
    steps = steps_of(matches, model.method.config.bidirectional)
    before = [50, *case["tokens_after_block"]]
    fusing = [n for n in case["activate_layer"] if before[n] > before[n + 1]]
    assert len(steps) == len(fusing)
    for number, (first, back) in zip(fusing, steps, strict=True):
        found = {k.split(".")[0]: OFFICIAL.out(case, k) for k in case["outputs"] if k.endswith(f".{number}")}
        assert_same_pairs(found, first, back)
        if "size" in found:
            assert torch.equal(outputs.trace[number].size, found["size"].float()[:, 1:])
        if "tokens" in found:
            assert_close(outputs.trace[number].x, found["tokens"])
        if "attn" in found:
            assert_close(whole_map(*maps[fusing.index(number)]), found["attn"])


@pytest.mark.parametrize("name", [c["name"] for c in OFFICIAL.side["cases"] if c["mode"] == "train"])
def test_training_equals_official(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes, losses, confidence, consistency, and every gradient, from the trainer's objective."""
    case = OFFICIAL.case(name)
    weights = case["task_weight"]
    model = load_case(
        case, pass_weights=weights[:2], consistency_weight=weights[2], confidence=case["task_type"][2]
    ).train()
    ran, real = list[Outputs](), evovit.ReducedViT.run
    monkeypatch.setattr(
        evovit.ReducedViT, "run", lambda *a, **k: ran.append(real(*a, **(k | {"record": True}))) or ran[-1]
    )
    images, targets = OFFICIAL.images(case), torch.tensor(case["labels"])
    if "mixup_lambda" in case:  # of the labels alone: the images are recorded as they enter
        share = case["mixup_lambda"]
        hot = F.one_hot(targets, 10).float()
        targets = share * hot + (1 - share) * hot.flip(0)
    torch.manual_seed(case["torch_seed"])
    terms = Objective(model, ObjectiveTable())(images, targets)
    student, teacher = ran
    assert student.tokens.carry.r == options_of(case)["r"] and teacher.tokens.carry.r == case["r_teacher"]
    assert_same_traces(OFFICIAL, case, student)
    assert [t.x.shape[1] for t in student.trace] == case["tokens_after_block"]
    assert [t.x.shape[1] for t in teacher.trace] == case["tokens_after_block_teacher"]
    assert_close(teacher.logits, OFFICIAL.out(case, "logits_teacher"))
    assert_close(confidence(student.logits, targets), OFFICIAL.out(case, "confidence"))
    counted = confidence(student.logits, targets) > case["task_type"][2]
    assert counted.tolist() == [bool(each) for each in case["confident"]]
    apart = (teacher.features[:, 0] - student.features[:, 0]).square().mean(-1)
    assert_close(apart, OFFICIAL.out(case, "consistency"))
    assert_close(terms["class"], weights[0] * OFFICIAL.out(case, "loss_student")[0])
    assert_close(terms["class_teacher"], weights[1] * OFFICIAL.out(case, "loss_teacher")[0])
    assert_close(terms["consistency"], OFFICIAL.out(case, "loss_consistency")[0])
    loss = sum(terms.values())
    assert_close(loss, OFFICIAL.out(case, "loss")[0])
    loss.backward()
    assert_same_gradients(OFFICIAL, case, gradients_of(model))


@pytest.mark.parametrize("unit", UNITS.side["units"], ids=lambda unit: unit["name"])
def test_fusing_equals_the_official_unit(unit: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name, options = unit["name"], unit["parameters"]
    tensors = {k.removeprefix(f"{name}."): v for k, v in UNITS.tensors.items() if k.startswith(f"{name}.")}
    config = MCTF.Config(
        tau_similarity=options["tau_sim"],
        tau_information=options["tau_info"],
        tau_size=options["tau_size"],
        bidirectional=bool(options["bidirection"]),
        pooling=POOLING[options["pooling_type"]],
    )
    method, (matches, _) = MCTF(config, SPEC), noting(monkeypatch)
    x, attention = tensors["in.x"], tensors["in.attn_logits"].softmax(-1)
    size = tensors["in.size"][:, 1:, 0].float() if options["with_size"] else None
    tokens = Tokens(
        x, torch.arange(x.shape[1] - 1).expand(2, -1), 1, (1, x.shape[1] - 1), size, carry=Fused(0)
    )
    fused, fusion = method.fuse(tokens, attention.mean((1, 2)), options["r"])
    assert_close(fused.x, tensors["out.y"])
    assert torch.equal(fused.size, tensors["out.size"][:, 1:, 0].float())
    assert_close(whole_map(QKV(attention, x, x, 1.0), fusion), tensors["out.attn_fused"])
    members = F.one_hot(fusion.moved, fused.num_patches).transpose(1, 2)
    assert torch.equal(members, tensors["out.source"][:, 1:, 1:].long())
    ((first, back),) = steps_of(matches, config.bidirectional)
    assert_same_pairs(
        {k.removeprefix("out."): v for k, v in tensors.items() if k.startswith("out.")}, first, back
    )


@pytest.mark.parametrize("row", UNITS.side["r_rule"], ids=str)
def test_counts_equal_the_official_rule(row: dict[str, Any]) -> None:
    assert row["tokens"] - count_removed(row["tokens"], row["r"]) == row["tokens_after"]


def test_few_tokens_stay_as_they_are() -> None:
    """There the released code asks for a negative number, and fails."""
    assert [count_removed(n, r) for n in range(1, 11) for r in (16, 0.35, 1)] == [0] * 30


@pytest.mark.parametrize("number", [3, 8])
def test_a_draw_is_torch_randint(number: int) -> None:
    torch.manual_seed(number)
    expected = [torch.randint(0, 8, (1,)).item() for _ in range(5)]
    torch.manual_seed(number)
    assert [draw(8) for _ in range(5)] == expected


PUBLISHED = {
    "fast": ({}, [129, 85, 56], 2.744),
    "every": ({"blocks": EVERY, "r": 16}, [181, 165, 149, 133], 2.577),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_equal_the_published_ones(name: str) -> None:
    """Without the matching: similarities, merging, and rows of the map that are averaged after mixing."""
    options, left, expected = PUBLISHED[name]
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224")
    model = evovit.reduce_tokens(host, "mctf", **options, last_block="all")
    with torch.no_grad():
        trace = model.run(torch.empty(1, 3, 224, 224, device="meta"), record=True).trace
    counts = [197, *(tokens.x.shape[1] for tokens in trace)]
    assert sorted(set(counts), reverse=True)[1 : len(left) + 1] == left
    own = 0
    for before, after in pairwise(counts):
        if after < before:
            n, half = before - 1, (before - after) // 2
            rest, (ours, theirs) = before - after - half, (n // 2, (n + 1) // 2)
            merging = theirs * half + (ours - half) * rest
            own += ours * theirs * 384 + merging * 2 * 384 + (before**2 - after**2) * 384
    work = gmacs(model, (3, 224, 224))
    assert work - own / 1e9 == pytest.approx(expected, rel=5e-4)
    assert work == pytest.approx({"fast": 2.76, "every": 2.60}[name], rel=1e-2)  # as printed, with matching


def test_rows_of_the_aggregated_map_sum_to_one() -> None:
    """Also where the class token's row comes first, and for every pooling but the largest."""
    attention = torch.randn(2, 3, 20, 20).softmax(-1)
    tokens = Tokens(torch.randn(2, 20, 8), torch.arange(19).expand(2, -1), 1, (1, 19), carry=Fused(0))
    for pooling in ("attention", "size", "mean"):
        method = MCTF(MCTF.Config(pooling=pooling), SPEC)
        _, fusion = method.fuse(tokens, attention.mean((1, 2)), 9)
        found = whole_map(QKV(attention, attention, attention, 1.0), fusion)
        assert found.shape == (2, 3, 11, 11)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 11))


def naive_fuse(
    x: Tensor, attention: Tensor, size: Tensor, removed: int, taus: tuple[float, float, float], protected: int
) -> tuple[list[list[int]], list[int]]:
    """One image in plain Python, rows counted with the prefix: groups of rows in order, their leaders."""
    rows = range(x.shape[0])
    info = [1 / attention[j].item() for j in rows]
    small = [1 / size[j].item() for j in rows]
    info, small = [i / max(info) for i in info], [z / max(small) for z in small]
    a, b = [i for i in rows if i % 2 == 0], [i for i in rows if i % 2 == 1]
    prefix = [i for i in rows if i < protected]
    a, b = [i for i in a if i >= protected], [i for i in b if i >= protected]

    def weight(i: int, j: int) -> float:
        alike = (F.cosine_similarity(x[i], x[j], 0).item() + 1) / 2
        return (
            alike ** (1 / taus[0])
            * (info[i] * info[j]) ** (1 / taus[1])
            * (small[i] * small[j]) ** (1 / taus[2])
        )

    group = {i: [i] for i in rows}
    half = removed // 2
    best = {i: max(b, key=lambda j: weight(i, j)) for i in a}
    for i in sorted(a, key=lambda i: -weight(i, best[i]))[:half]:
        group[best[i]] = group[best[i]] + group.pop(i)
    a = [i for i in a if i in group]
    back = {j: max(a, key=lambda i: weight(i, j)) for j in b}
    ranked = sorted(b, key=lambda j: -weight(back[j], j))
    for j in ranked[: removed - half]:
        group[back[j]] = group[back[j]] + group.pop(j)
    order = [*prefix, *a, *ranked[removed - half :]]
    return [group[i] for i in order], order


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("patches", [2, 3, 6, 9])
def test_fusing_equals_a_naive_loop_for_every_number_of_prefix_tokens(protected: int, patches: int) -> None:
    spec = BackboneSpec((12,), (8,), (2,), (14, 14), protected, has_class_token=protected > 0, num_classes=5)
    method = MCTF(MCTF.Config(tau_similarity=1.5, tau_information=3.0, tau_size=2.0), spec)
    num = protected + patches
    x, attention = torch.randn(2, num, 8), torch.randn(2, 2, num, num).softmax(-1)
    received, size = attention.mean((1, 2)), torch.randint(1, 4, (2, patches)).float()
    tokens = Tokens(x, torch.arange(patches).expand(2, -1), protected, (1, patches), size, carry=Fused(0))
    whole = F.pad(size, (protected, 0), value=1.0)
    for removed in range(1, patches // 2 + 1):
        fused, fusion = method.fuse(tokens, received, removed)
        found = whole_map(QKV(attention, x[:, None], x[:, None], 1.0), fusion, protected)
        for image in range(2):
            groups, order = naive_fuse(
                x[image], received[image], whole[image], removed, (1.5, 3, 2), protected
            )
            weight = received[image] * whole[image]
            expected = [(x[image, g] * weight[g, None]).sum(0) / weight[g].sum() for g in groups]
            assert_close(fused.x[image], torch.stack(expected))
            assert fused.index[image].tolist() == [i - protected for i in order[protected:]]
            assert fused.size[image].tolist() == [whole[image, g].sum() for g in groups[protected:]]
            columns = torch.stack([attention[image][:, :, g].sum(-1) for g in groups], dim=-1)
            rows = [(columns[:, g] * weight[g, None]).sum(1) / weight[g].sum() for g in groups]
            assert_close(found[image], torch.stack(rows, dim=1))


def test_a_temperature_of_zero_leaves_its_criterion_out() -> None:
    x, received = torch.randn(1, 11, 6), torch.rand(1, 11) + 0.1
    tokens = Tokens(
        x, torch.arange(10)[None], 1, (1, 10), torch.randint(1, 5, (1, 10)).float(), carry=Fused(0)
    )
    off = {"tau_similarity": 0.0, "tau_information": 0.0, "tau_size": 0.0}
    assert (MCTF(MCTF.Config(**off), SPEC).weights(tokens, received) == 1).all()
    alike = MCTF(MCTF.Config(**(off | {"tau_similarity": 1.0})), SPEC).weights(tokens, received)
    cosine = F.cosine_similarity(x[0, 2::2, None], x[0, None, 1::2], -1)
    assert_close(alike[0], (cosine + 1) / 2)
    small = MCTF(MCTF.Config(**(off | {"tau_size": 2.0})), SPEC).weights(tokens, received)
    assert_close(small[0], (tokens.size[0, 1::2, None] * tokens.size[0, None, 0::2]) ** -0.5)


def test_equal_tokens_fuse_the_lower_rows_and_unseen_ones_are_finite() -> None:
    tokens = Tokens(torch.ones(1, 9, 4), torch.arange(8)[None], 1, (2, 4), carry=Fused(0))
    fused, fusion = MCTF(MCTF.Config(), SPEC).fuse(tokens, torch.zeros(1, 9), 4)
    assert fused.x.isfinite().all() and (fused.x == 1).all()
    assert [match.sources[0].tolist() for match in fusion.matches] == [[1, 3], [2, 3]]
    assert fusion.moved[0].tolist() == [0, 0, 0, 0, 2, 0, 3, 1] or fusion.moved.shape == (1, 8)


@pytest.mark.parametrize("ahead", ["aggregate", "recompute", "off"])
@pytest.mark.parametrize(
    "host", ["dinov2_reg", "deit_distilled", "siglip", "beit", "parallel_things", "qk_norm"]
)
def test_every_road_keeps_the_prefix_and_every_cell(host: str, ahead: str) -> None:
    reduced = evovit.reduce_tokens(make_host(host), "mctf", r=3, blocks=(1, 2), ahead=ahead)
    with torch.no_grad():
        outputs = reduced.run(pictures(), record=True)
    tokens = outputs.tokens
    assert tokens.num_prefix == reduced.method.spec.num_prefix and tokens.num_patches == 10
    assert torch.equal(F.one_hot(tokens.carry.source, 10).sum(1), tokens.size.long())
    assert torch.equal(tokens.carry.source.gather(1, tokens.index), torch.arange(10).expand(2, -1))
    assert outputs.logits.isfinite().all()


@pytest.mark.parametrize(
    "host", ["vit", "beit", "qk_norm", "parallel_scaling", "post_norm", "dinov2_reg", "eva02"]
)
def test_fused_tokens_attend_as_their_tokens_did(host: str) -> None:
    """Attention output of a fused token: the weighted mean of what its tokens mix, of the fused values."""
    backbone = evovit.backbones.adapt(make_host(host))
    with torch.no_grad():
        tokens = backbone.embed(pictures())
        block = backbone.stages()[0].blocks[1]
        whole, parts, values = block.qkv(tokens), block.queries_keys(tokens), block.values(tokens)
        for name in ("q", "k", "bias"):
            ours, theirs = getattr(parts, name), getattr(whole, name)
            assert ours is theirs is None or torch.allclose(ours, theirs, atol=1e-6)
        assert torch.allclose(values.v, whole.v, atol=1e-6)
        assert values.extra is whole.extra is None or torch.allclose(values.extra, whole.extra, atol=1e-6)
        attention = mctf.attention_map(parts)
        mixed = F.scaled_dot_product_attention(whole.q, whole.k, whole.v, whole.bias, scale=whole.scale)
        assert_close(attention @ whole.v, mixed)


@pytest.mark.parametrize("ahead", ["aggregate", "recompute", "off"])
def test_matching_stays_in_float32_under_autocast(ahead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever precision the host computes in, attention received and similarities are summed in float32."""
    seen, real = list[Tensor](), MCTF.fuse

    def noted(self: MCTF, tokens: Tokens, attention: Tensor, removed: int) -> Any:
        seen.append(attention)
        return real(self, tokens, attention, removed)

    monkeypatch.setattr(MCTF, "fuse", noted)
    model = evovit.reduce_tokens(make_host("vit"), "mctf", r=3, blocks=(0,), ahead=ahead)
    backbone = evovit.backbones.adapt(model.model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        qkv = backbone.stages()[0].blocks[0].qkv(backbone.embed(pictures()))
        model(pictures())
    exact = (qkv.q.double() * qkv.scale @ qkv.k.double().transpose(-2, -1)).softmax(-1).mean((1, 2))
    assert seen[0].dtype == torch.float32
    assert_close(seen[0].double(), exact, 1e-6)


def test_the_default_of_the_paper_has_the_other_variant() -> None:
    host = VisionTransformer(img_size=56, patch_size=4, embed_dim=24, num_heads=2, num_classes=3).eval()
    for options, left in (
        ({}, [197, 129, 85, 56]),
        ({"blocks": EVERY, "r": 16}, [197 - 16 * i for i in range(12)]),
    ):
        reduced = evovit.reduce_tokens(host, "mctf", **options, verify=False)
        with torch.no_grad():
            trace = reduced.run(pictures(2, 56), record=True).trace
        assert sorted({t.x.shape[1] for t in trace}, reverse=True) == left


def test_one_checkpoint_works_at_several_r_and_passes_may_interleave() -> None:
    host, images = make_host("vit"), pictures()
    few, many = (evovit.reduce_tokens(host, "mctf", r=r, blocks=(1, 2)) for r in (1, 5))
    with torch.no_grad():
        first = many(images)
        few(images)
        assert torch.equal(many(images), first)


def test_a_second_pass_may_be_recomputed_in_the_backward_pass() -> None:
    """Each pass knows its r, also where blocks run again later."""
    gradients = []
    for recompute in (False, True):
        model = evovit.reduce_tokens(make_host("vit"), "mctf", r=5, blocks=(1, 2), r_teacher=4).train()
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(1)
        sum(Objective(model, ObjectiveTable())(pictures(), torch.tensor([0, 1])).values()).backward()
        gradients.append(gradients_of(model))
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


def test_without_r_teacher_and_in_evaluation_there_is_one_pass() -> None:
    images, labels = pictures(), torch.tensor([0, 1])
    for options, training in (({"r_teacher": 0}, True), ({}, False)):
        model = evovit.reduce_tokens(make_host("vit"), "mctf", r=3, blocks=(1,), **options).train(training)
        terms = Objective(model, ObjectiveTable()).train(training)(images, labels)
        assert set(terms) == {"class"}
    both = evovit.reduce_tokens(make_host("vit"), "mctf", r=3, blocks=(1,)).train()
    assert set(Objective(both, ObjectiveTable())(images, labels)) == {"class", "class_teacher", "consistency"}


def test_the_second_pass_draws_below_its_bound() -> None:
    for bound, allowed in (
        (8, set(range(8))),
        (1, {0}),
        (0.15, {i / 100 for i in range(15)}),
        (0.001, {0.0}),
    ):
        method = MCTF(MCTF.Config(r_teacher=bound), SPEC)
        drawn = {method.second_start()(TOKENS).carry.r for _ in range(200)}
        assert drawn <= allowed and len(drawn) >= min(5, len(allowed))


TOKENS = Tokens(torch.zeros(1, 5, 4), torch.arange(4)[None], 1, (2, 2))


def test_no_confident_image_no_consistency() -> None:
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    loss = confident_distance(student, teacher, torch.tensor([False] * 3))
    loss.backward()
    assert loss == 0 and (student.grad == 0).all() and teacher.grad is None
    some = confident_distance(student, teacher, torch.tensor([True, False, True]))
    assert_close(some, (student - teacher)[[0, 2]].square().mean())


def test_confidence_is_of_the_label_or_of_both_that_mix() -> None:
    logits, labels = torch.randn(4, 6), torch.tensor([1, 2, 3, 5])
    each = logits.softmax(-1)
    assert_close(confidence(logits, labels), each[range(4), labels])
    hot = F.one_hot(labels, 6) * 0.9 + 0.1 / 6
    mixed = 0.3 * hot + 0.7 * hot.flip(0)
    assert_close(confidence(logits, mixed), each[range(4), labels] + each[range(4), labels.flip(0)])


def test_token_labels_are_refused() -> None:
    model = evovit.reduce_tokens(make_host("lv_vit"), "mctf", r=3, blocks=(1,))
    for goal in (ObjectiveTable(mix_token=True), ObjectiveTable(token_label_weight=1.0)):
        with pytest.raises(evovit.EvoViTError, match="trains by two passes.* set r_teacher=0"):
            Objective(model, goal)


def test_a_ramp_is_saved_as_it_is(tmp_path: Path) -> None:
    for r, half in ((6, 3), (0.4, 0.2)):
        reduced = evovit.reduce_tokens(make_host("vit"), "mctf", r=r, blocks=(1, 2))
        reduced.method.set_reduction(0.5)
        assert reduced.method.current_config().r == half
        save_reduced(reduced, tmp_path / "it")
        loaded = load_reduced(tmp_path / "it", make_host("vit"))
        with torch.no_grad():
            assert torch.equal(loaded.eval()(pictures()), reduced.eval()(pictures()))
        reduced.method.set_reduction(1.0)
        assert reduced.method.current_config() == reduced.method.config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 1.5}, "r is 1.5; allowed is a whole number, 0 or more, or a number, 0 or more, below 1"),
        ({"r": -1}, "r is -1; allowed is"),
        ({"ahead": "recomputed"}, "Did you mean 'recompute'"),
        ({"pooling": "max"}, "pooling is 'max'; allowed is attention, size, mean or largest"),
        ({"blocks": (2, 1)}, "list each reducing block once, in rising order"),
        ({"pass_weights": (1.0,)}, "allowed is a list of 2"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=words):
        evovit.reduce_tokens(make_host("vit"), "mctf", **({"blocks": (1,)} | options))


@pytest.mark.slow
def test_a_compiled_objective_draws_and_computes_the_same() -> None:
    torch.compiler.reset()
    model = evovit.reduce_tokens(make_host("vit"), "mctf", r=5, blocks=(1, 2), r_teacher=4).train()
    objective, labels = Objective(model, ObjectiveTable()), torch.tensor([0, 1])

    def terms(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return objective(pictures(), labels)  # type: ignore[no-any-return]

    expected = [terms(seed) for seed in range(4)]
    objective.compile(backend="eager")
    for seed, theirs in enumerate(expected):
        ours = terms(seed)
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value)
    assert len({theirs["class_teacher"].detach().item() for theirs in expected}) > 1
