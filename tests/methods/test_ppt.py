"""PPT: equal to the official code on its reference numbers, and right where that code does not reach."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import evovit
from evovit.analyse.watch import watch
from evovit.backbones.base import BackboneSpec
from evovit.backbones.timm_blocks import PreNormBlock
from evovit.macs import gmacs
from evovit.methods import ppt
from evovit.methods.ppt import PPT
from evovit.ops.merge import Match, drop_where, match_tokens, merge_sizes, merge_tokens
from evovit.ops.select import descending
from evovit.tokens import QKV, Tokens
from tests.conftest import Golden, make_host, pictures
from tests.parity import assert_close, assert_same_gradients, assert_same_traces, gradients_of

OFFICIAL, UNITS = Golden("ppt"), Golden("units_ppt")
NORM = partial(nn.LayerNorm, eps=1e-6)
SPEC = BackboneSpec((12,), (24,), (3,), (14, 14), num_prefix=1, has_class_token=True, num_classes=5)


def load_case(case: dict[str, Any]) -> evovit.ReducedViT:
    host = VisionTransformer(**OFFICIAL.side["model"]).eval()
    host.load_state_dict(OFFICIAL.state_dict())
    options = {"r": case["r"], "threshold": case["threshold"], "blocks": case["pp_loc_list"]}
    proportional = case.get("prop_attn", True)
    return evovit.reduce_tokens(host, "ppt", **options, proportional_attention=proportional, verify=False)


@pytest.mark.parametrize("name", [case["name"] for case in OFFICIAL.side["cases"]])
def test_equals_official(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, scores, choices, pairs, kept tokens in their order, sizes, traces; loss and every gradient."""
    case = OFFICIAL.case(name)
    model = load_case(case)
    matches, scores = list[tuple[Match, Match, Tensor]](), list[Tensor]()
    real = PPT.score

    def noted(match: Match, drops: Tensor, order: Tensor) -> Match:
        matches.append((match, drop_where(match, drops, order), drops[:, 0]))
        return matches[-1][1]

    def scored(self: PPT, *arguments: Any) -> Tensor:
        scores.append(real(self, *arguments))
        return scores[-1]

    monkeypatch.setattr(ppt, "drop_where", noted)
    monkeypatch.setattr(PPT, "score", scored)
    outputs = model.run(OFFICIAL.images(case), record=True)
    assert_same_traces(OFFICIAL, case, outputs)
    assert [t.x.shape[1] for t in outputs.trace] == case["tokens_after_block"]
    for number, (pooled, chosen, drops), score in zip(case["pp_loc_list"], matches, scores, strict=True):
        found = {key: OFFICIAL.out(case, key) for key in case["outputs"] if key.endswith(f".{number}")}
        assert_close(score, found[f"score.{number}"])
        assert_close(score.var(-1), found[f"var.{number}"])
        assert torch.equal(~drops, found[f"pooled.{number}"].bool())
        assert pooled.sources.shape[1] == case["r_per_reducing_block"][case["pp_loc_list"].index(number)]
        for image, dropped in enumerate(drops.tolist()):
            if dropped:
                rows = F.pad(chosen.rows[image] + 1, (1, 0))
                assert torch.equal(rows, found[f"keep.{number}"][image].long())
                continue
            order = pooled.sources[image].argsort()
            assert torch.equal(pooled.sources[image][order] + 1, found[f"src.{number}"][image].long())
            assert torch.equal(pooled.targets[image][order] + 1, found[f"dst.{number}"][image].long())
        if f"size.{number}" in found:
            assert torch.equal(outputs.trace[number].size, found[f"size.{number}"].float()[:, 1:])
        if f"tokens.{number}" in found:
            assert_close(outputs.trace[number].x, found[f"tokens.{number}"])
    if "source" in case["outputs"]:
        source = OFFICIAL.out(case, "source")[:, 1:, 1:].float().argmax(1)
        assert torch.equal(outputs.tokens.carry.source, source)
    if "labels" in case:
        loss = F.cross_entropy(outputs.logits, torch.tensor(case["labels"]))
        assert_close(loss, OFFICIAL.out(case, "loss")[0])
        loss.backward()
        assert_same_gradients(OFFICIAL, case, gradients_of(model))


def unit_tensors(name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in UNITS.tensors.items() if k.startswith(f"{name}.")}


def score_of(qkv: QKV) -> Tensor:
    """Return the scores of one class token and patch tokens, (B, N)."""
    batch, num = qkv.k.shape[0], qkv.k.shape[2] - 1
    tokens = Tokens(torch.zeros(batch, num + 1, 4), torch.arange(num).expand(batch, -1), 1, (1, num))
    return PPT(PPT.Config(), SPEC).score(qkv, tokens)


def test_scores_equal_the_official_unit() -> None:
    tensors = unit_tensors("scores")
    logits, v = tensors["in.logits"], tensors["in.v"]
    # any attention: the class row's logits as queries of a basis
    qkv = QKV(logits, torch.eye(18).expand_as(logits), v, 1.0)
    score = score_of(qkv)
    assert_close(score, tensors["out.score"])
    assert_close(score.var(-1), tensors["out.var"])


@pytest.mark.parametrize(
    "unit", [u for u in UNITS.side["units"] if u["kind"] == "block"], ids=lambda unit: unit["name"]
)
def test_a_block_equals_the_official_unit(unit: dict[str, Any]) -> None:
    tensors, options = unit_tensors(unit["name"]), unit["parameters"]
    own = TimmBlock(24, options["num_heads"], mlp_ratio=2, qkv_bias=True, norm_layer=NORM)
    own.load_state_dict({k.removeprefix("in.w."): v for k, v in tensors.items() if k.startswith("in.w.")})
    config = PPT.Config(
        r=options["r"], threshold=options["threshold"], proportional_attention=options["prop_attn"]
    )
    method = PPT(config, SPEC)
    x, size = tensors["in.x"], tensors.get("in.size")
    # the unit gives the class token a size too, where ours counts once: only ratios matter
    whole = torch.ones(x.shape[0], 1, 1) if size is None or not options["prop_attn"] else size[:, :1].float()
    carried = None if size is None or not options["prop_attn"] else (size / whole)[:, 1:, 0]
    index = torch.arange(x.shape[1] - 1).expand(x.shape[0], -1)
    with torch.no_grad():
        after = method.run_block(PreNormBlock(own.eval(), 3), Tokens(x, index, 1, (14, 14), carried))
    assert_close(after.x, tensors["out.y"])
    left = torch.ones_like(after.index).float() if after.size is None else after.size
    if options["prop_attn"]:
        assert_close(left * whole[:, 0], tensors["out.size_after"][:, 1:, 0].float())
    else:
        assert after.size is None


def test_macs_equal_the_published_ones() -> None:
    """2.941 G without the matching; it and the merging are counted apart."""
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224")
    model = evovit.reduce_tokens(host, "ppt", last_block="all")
    trace = model.run(torch.empty(1, 3, 224, 224, device="meta"), record=True).trace
    patches = [196, *(tokens.num_patches for tokens in trace)]
    matching = sum(
        n // 2 * ((n + 1) // 2) * 64 + (n + 1) // 2 * (n - left) * 384
        for n, left in pairwise(patches)
        if left < n
    )
    work = gmacs(model, (3, 224, 224))
    assert work - matching / 1e9 == pytest.approx(2.941, rel=1e-3)
    assert work == pytest.approx(2.944, rel=5e-3)  # as printed, with matching


def test_counts_at_224_are_the_published_ones() -> None:
    host = VisionTransformer(img_size=56, patch_size=4, embed_dim=24, num_heads=2, num_classes=3).eval()
    reduced = evovit.reduce_tokens(host, "ppt", verify=False)
    with torch.no_grad():
        trace = reduced.run(pictures(2, 56), record=True).trace
    assert [t.x.shape[1] for t in trace] == [197] * 3 + [147] * 3 + [97] * 3 + [49] * 3


def naive(
    x: Tensor, v: Tensor, attention: Tensor, metric: Tensor, size: Tensor, removed: int, limit: float
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """One image in plain Python, rows counted with the class token: tokens left, sizes, who they are."""
    num = x.shape[0]
    score = torch.tensor([(attention[:, j].sum() * v[:, j].flatten().norm()).item() for j in range(1, num)])
    score = score / score.sum()
    if score.var() >= limit:
        kept = [0, *(1 + j for j in sorted(range(num - 1), key=lambda j: -score[j]))][: num - removed]
        return x[kept], size[kept], [[j] for j in kept]
    a, b, best = range(0, num, 2), range(1, num, 2), {}
    for i in a[1:]:
        cosine = [F.cosine_similarity(metric[i], metric[j], 0).item() for j in b]
        best[i] = b[cosine.index(max(cosine))], max(cosine)
    gone = sorted(best, key=lambda i: -best[i][1])[:removed]
    kept = [i for i in (*a, *b) if i not in gone]
    groups = [[j, *(i for i in gone if best[i][0] == j)] for j in kept]
    sizes = torch.stack([size[g].sum() for g in groups])
    return torch.stack([(x[g] * size[g, None]).sum(0) for g in groups]) / sizes[:, None], sizes, groups


@pytest.mark.parametrize("num", [3, 4, 5, 8, 9])
def test_reducing_equals_a_naive_loop(num: int) -> None:
    """Odd and even counts, down to two patch tokens; images of both kinds in one batch."""
    q, k, v = (torch.randn(12, 2, num, 4) for _ in range(3))
    x, size = torch.randn(12, num, 6), torch.randint(1, 4, (12, num)).float()
    size[:, 0] = 1
    tokens = Tokens(x, torch.arange(num - 1).expand(12, -1), 1, (1, num - 1), size[:, 1:])
    qkv, kinds = QKV(q, k, v, 0.5), set()
    middle = score_of(qkv).var(-1).sort().values[5:7].mean().item()
    method = PPT(PPT.Config(threshold=middle), SPEC)
    attention = (q[:, :, 0:1] @ k.transpose(-2, -1) * 0.5).softmax(-1)[:, :, 0]
    for removed in range(1, (num - 1) // 2 + 1):
        after = method.reduce(tokens, qkv.k, score_of(qkv), removed)
        for image in range(12):
            expected, sizes, groups = naive(
                x[image], v[image], attention[image], k[image].mean(0), size[image], removed, middle
            )
            assert_close(after.x[image], expected)
            assert torch.equal(after.size[image], sizes[1:])
            row_of = {j - 1: row - 1 for row, group in enumerate(groups) for j in group if j}
            assert after.carry.source[image].tolist() == [row_of.get(cell, -1) for cell in range(num - 1)]
            kinds.add(any(len(group) > 1 for group in groups))
    assert kinds == {True, False}


def test_a_token_dropped_or_left_alone_has_its_bits_and_no_other() -> None:
    x, metric, order = torch.randn(2, 8, 3), torch.randn(2, 8, 4), torch.randperm(8).expand(2, -1)
    match = drop_where(match_tokens(metric, 3, 1), torch.tensor([[True], [False]]), order)
    share = merge_sizes(torch.rand(2, 8) + 1, match)[1]
    assert torch.equal(merge_tokens(x, share, match)[0], x[0, order[0, :5]])
    assert match.moved[0].tolist() == [
        order[0, :5].tolist().index(row) if row in order[0, :5] else -1 for row in range(8)
    ]
    assert torch.equal(match.moved[1], match_tokens(metric, 3, 1).moved[1])


def test_equal_scores_and_equal_keys_choose_the_lower_rows() -> None:
    method = PPT(PPT.Config(threshold=0.0), SPEC)
    tokens = Tokens(torch.randn(1, 9, 4), torch.arange(8)[None], 1, (2, 4))
    qkv = QKV(torch.zeros(1, 1, 9, 2), torch.zeros(1, 1, 9, 2), torch.ones(1, 1, 9, 2), 1.0)
    assert method.reduce(tokens, qkv.k, score_of(qkv), 3).index.tolist() == [
        [0, 1, 2, 3, 4]
    ]  # the variance is 0, not below 0
    pooling = PPT(PPT.Config(threshold=1e-9), SPEC)
    assert pooling.reduce(tokens, qkv.k, score_of(qkv), 3).size.sum() == 8


def test_values_of_zero_length_score_nothing() -> None:
    score = score_of(QKV(*(torch.zeros(1, 1, 5, 2),) * 3, 1.0))
    assert torch.equal(score, torch.zeros(1, 4))


def test_a_relative_threshold_is_of_the_squared_coefficient_of_variation() -> None:
    spec, score = SPEC, torch.rand(50, 30)
    score = score / score.sum(-1, keepdim=True)
    spread = (score.std(-1) / score.mean(-1)) ** 2
    limit = spread.median().item()
    found = PPT(PPT.Config(threshold=limit, relative=True), spec).pools(score)[:, 0]
    same = PPT(PPT.Config(threshold=limit / 30**2), spec).pools(score)[:, 0]
    apart = (spread - limit).abs() > 1e-5
    assert torch.equal(found[apart], (spread < limit)[apart]) and torch.equal(found, same)


@pytest.mark.parametrize("host", ["dinov2_reg", "deit_distilled", "eva02", "siglip"])
def test_prefix_tokens_stay_and_cells_know_their_token(host: str) -> None:
    """The released code scores a distillation token like a patch, and may drop it."""
    selection = "column_mean" if host == "siglip" else "class"
    for threshold in (0.0, 1e-3, 1.0):
        options = {"r": 4, "blocks": (1, 2), "threshold": threshold, "selection": selection}
        reduced = evovit.reduce_tokens(make_host(host), "ppt", **options)
        with torch.no_grad():
            tokens = reduced.run(pictures(4)).tokens
        assert tokens.num_prefix == reduced.method.spec.num_prefix and tokens.num_patches == 8
        source = tokens.carry.source
        counts = F.one_hot(source + 1, 9)[:, :, 1:].sum(1)
        assert torch.equal(counts, tokens.size.long())
        assert threshold != 1 or (source >= 0).all()
        if threshold == 0:
            assert ((source >= 0).sum(1) == 8).all() and (tokens.size == 1).all()
        assert torch.equal(source.gather(1, tokens.index), torch.arange(8).expand(4, -1))


def test_pooling_alone_brings_every_cell_back() -> None:
    model, images = make_host("vit_avg"), pictures()
    pooled = evovit.reduce_tokens(model, "ppt", r=4, blocks=(1, 2), threshold=1.0)
    assert pooled.feature_map(images).shape == (2, 32, 4, 4)
    with torch.no_grad():
        tokens = pooled.run(images).tokens
        mean = (tokens.patches * tokens.size[..., None]).sum(1) / 16
        assert_close(pooled(images), model.head(model.fc_norm(mean)))
    mixed = evovit.reduce_tokens(model, "ppt", r=4, blocks=(1, 2))
    with pytest.raises(evovit.EvoViTError, match="leaves 8 of 16 patches"):
        mixed.feature_map(images)


def test_pruning_alone_tells_what_it_ranks_by_and_pooling_has_nothing_to_tell() -> None:
    for threshold, told in ((0.0, [False, True, True, False]), (1e-3, [False] * 4)):
        reduced = evovit.reduce_tokens(make_host("vit"), "ppt", r=4, blocks=(1, 2), threshold=threshold)
        seen = list(watch(reduced, pictures(3)))
        assert [each.score is not None for each in seen] == told
        for each in seen:
            if each.score is not None:
                for score, kept in zip(each.score, each.kept, strict=True):
                    assert score[kept].min() >= score[~kept].nan_to_num(-torch.inf).max()


def test_three_points_with_pooling_alone_are_tome_at_these() -> None:
    images, host = pictures(3), make_host("vit")
    ours = evovit.reduce_tokens(host, "ppt", r=(4, 3), blocks=(1, 2), threshold=1.0)
    tome = evovit.reduce_tokens(host, "tome", r=(0, 4, 3))
    with torch.no_grad():
        assert torch.equal(ours(images), tome(images))


def test_reduction_can_start_late_and_ramp() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "ppt", r=4, blocks=(1, 2))
    for share, expected in ((0.0, 0), (0.5, 2), (1.0, 4)):
        reduced.method.set_reduction(share)
        assert [reduced.method.count(number, 16) for number in range(4)] == [0, expected, expected, 0]
    assert [reduced.method.count(1, present) for present in (9, 8, 3, 2, 1, 0)] == [4, 4, 1, 1, 0, 0]


def test_a_ramp_of_counts_is_read_by_the_reducing_blocks_in_turn() -> None:
    """As released: the k-th of them takes the k-th entry of a ramp as long as the host is deep."""
    method = PPT(PPT.Config(r=10, inflection=-1.0), SPEC)
    assert [method.count(number, 196) for number in (3, 6, 9, 10)] == [20, 18, 16, 0]
    assert [PPT(PPT.Config(r=(9, 5)), SPEC).count(number, 196) for number in (3, 6, 9)] == [9, 5, 0]


def test_scores_have_no_gradient_and_values_have() -> None:
    q, k, v = (torch.randn(2, 2, 9, 4, requires_grad=True) for _ in range(3))
    score = score_of(QKV(q, k, v, 1.0))
    assert not score.requires_grad


def test_counted_order_is_the_sorted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What engines run instead of a sort."""
    score = torch.randint(0, 5, (6, 40)).float() * torch.tensor([1.0, -0.0] * 20)
    expected = score.argsort(dim=-1, descending=True, stable=True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(descending(score), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": -1e-5}, "threshold is -1e-05; allowed is a number, 0 or more"),
        ({"blocks": (3, 1)}, "list each reducing block once, in rising order"),
        ({"blocks": (4,)}, "blocks is 4; allowed is 0 to 3"),
        ({"blocks": (1,), "r": (1, 2, 3, 4, 5)}, "r lists 5 values for 4 blocks"),
        ({"selection": "classes"}, "Did you mean 'class'"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=words):
        evovit.reduce_tokens(make_host("vit"), "ppt", **options)


def test_without_class_token_it_asks_for_another_score() -> None:
    with pytest.raises(evovit.EvoViTError, match="needs a class token and this host has none"):
        evovit.reduce_tokens(make_host("siglip"), "ppt", blocks=(1,))
