"""ATS: equal to the official code on its reference numbers, with fixed lengths, and right on other hosts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

import evovit
from evovit.backbones import adapt
from evovit.backbones.timm_blocks import PreNormBlock
from evovit.checkpoints.reduced import load_reduced, save_reduced
from evovit.macs import gmacs
from evovit.methods import ats
from evovit.ops.mask import masked_softmax
from evovit.ops.sample import cumulate, nearest_ranks, points_of, sample, value_score
from evovit.tokens import Tokens
from tests.conftest import Golden, make_host, pictures
from tests.parity import assert_close

OFFICIAL, UNITS = Golden("ats"), Golden("units_ats")
CASES = [case["name"] for case in OFFICIAL.side["cases"]]


def shorten_of(options: dict[str, Any]) -> str:
    return "batch" if options["drop_tokens"] else "never"


def load_case(case: dict[str, Any], **options: Any) -> evovit.ReducedViT:
    return evovit.load_official(
        "ats",
        OFFICIAL.state_dict() | {"blocks.1.attn.out_zero_mask": torch.zeros(1, 48)},
        num_heads=OFFICIAL.side["model"]["num_heads"],
        blocks=case["ats_blocks"],
        **({"shorten": shorten_of(case)} | options),
    )


def noting(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return what fills with what each sampling is given: score, present, padded, number of points."""
    noted: list[tuple[Any, ...]] = []

    def note(*given: Any) -> Tensor:
        noted.append(given)
        return sample(*given)

    monkeypatch.setattr(ats, "sample", note)
    return noted


def check_sampling(
    case: dict[str, Any], number: int, given: tuple[Any, ...], index: Tensor, before: Tensor
) -> None:
    """Compare scores, cumulated shares and points of one block.

    Args:
        index: (B, N) our places on entering.
        before: (B, M) official token numbers on entering, class 0 first, -1 padding.
    """
    score, present, padded, count = given
    ranked = cumulate(score, present, padded)
    assert_close(points_of(ranked.share, count), OFFICIAL.out(case, f"points.{number}"))
    for image in range(len(index)):
        there = int(present[image].sum())
        assert_close(ranked.share[image, -there:], OFFICIAL.out(case, f"cdf.{number}")[image, -there:])
        ours = dict(zip(index[image].tolist(), score[image].tolist(), strict=True))
        official = [token - 1 for token in before[image, 1:].tolist() if token > 0]
        expected = OFFICIAL.out(case, f"score.{number}")[image, :there]
        assert_close(torch.tensor([ours[token] for token in official]), expected)


@pytest.mark.parametrize("softmax", ["released", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_equals_official(name: str, softmax: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, cumulated shares, points, picked tokens, counts, logits and traces."""
    case, noted = OFFICIAL.case(name), noting(monkeypatch)
    model = load_case(case, softmax=softmax)
    with torch.no_grad():
        outputs = model.run(OFFICIAL.images(case), record=True)
    assert_close(outputs.logits, OFFICIAL.out(case, "logits"))
    assert_close(torch.stack([t.x[:, 0] for t in outputs.trace]), OFFICIAL.out(case, "cls_trace"))
    parts = [t.taking_part.unsqueeze(-1) for t in outputs.trace]
    pairs = zip(outputs.trace, parts, strict=True)
    means = torch.stack([(t.patches * part).sum(1) / part.sum(1) for t, part in pairs])
    assert_close(means, OFFICIAL.out(case, "mean_trace"))
    counts = [(1 + part.sum((1, 2))).int().tolist() for part in parts]
    assert counts == case["tokens_present_after_block"]
    before, index = torch.arange(50).expand(len(means[0]), 50), torch.arange(49).expand(len(means[0]), 49)
    for number, given in zip(case["ats_blocks"], noted, strict=True):
        check_sampling(case, number, given, index, before)
        before, index = OFFICIAL.out(case, f"token.{number}").long(), outputs.trace[number].index
        for ours, theirs in zip(index.tolist(), before.tolist(), strict=True):
            picked = sorted(token - 1 for token in theirs if token > 0)
            assert ours == picked + [-1] * (len(ours) - len(picked))
    for number in case.get("token_layers", []):
        tokens, theirs = outputs.trace[number], OFFICIAL.out(case, f"tokens.{number}")
        order = OFFICIAL.out(case, f"token.{number}").long()
        for image, count in enumerate(counts[number]):
            rows = order[image, 1:count].argsort() + 1
            assert_close(tokens.patches[image, : count - 1], theirs[image, rows])


def test_the_defaults_of_the_loader_are_released_and_alone_is_a_batch_of_one() -> None:
    case = OFFICIAL.case("eval_one_image")
    for shorten in ("alone", "batch"):
        with torch.no_grad():
            assert_close(
                load_case(case, shorten=shorten)(OFFICIAL.images(case)), OFFICIAL.out(case, "logits")
            )
    case = OFFICIAL.case("eval_three_blocks")
    images, alone = OFFICIAL.images(case), load_case(case, shorten="alone")
    batch = load_case(case)
    with torch.no_grad():
        each = torch.cat([batch(image[None]) for image in images])
        assert_close(alone(images), each)
        assert not torch.allclose(batch(images), each, atol=1e-3)  # as released: it depends on the batch


def unit_tensors(unit: dict[str, Any]) -> dict[str, Tensor]:
    start = f"{unit['name']}."
    return {k.removeprefix(start): v for k, v in UNITS.tensors.items() if k.startswith(start)}


def units(kind: str) -> list[dict[str, Any]]:
    found = [unit for unit in UNITS.side["units"] if unit["kind"] == kind]
    assert found
    return found


@pytest.mark.parametrize("unit", units("softmax"), ids=lambda unit: unit["name"])
def test_masked_softmax_equals_the_official_unit(unit: dict[str, Any]) -> None:
    tensors = unit_tensors(unit)
    assert_close(masked_softmax(tensors["in.logits"], tensors["in.policy"][..., 0]), tensors["out.attn"])


@pytest.mark.parametrize("unit", units("scores"), ids=lambda unit: unit["name"])
def test_scores_equal_the_official_unit(unit: dict[str, Any]) -> None:
    tensors = unit_tensors(unit)
    policy = tensors["in.policy"][..., 0]
    hidden = torch.zeros_like(policy).masked_fill(policy == 0, -torch.inf)[:, None, None]
    weight = (tensors["in.logits"] + hidden).softmax(-1)[:, :, 0, 1:].mean(1)  # ours: no eps is spread
    score = value_score(weight, tensors["in.v"], 1)
    ranked = cumulate(score, policy[:, 1:] > 0, torch.zeros(len(policy), dtype=torch.bool))
    assert_close(torch.zeros_like(score).scatter(1, ranked.rank, score), tensors["out.sorted_scores"])
    order = tensors["out.order"].long()
    known = order >= 0
    ours = ranked.rank.argsort(1)
    assert torch.equal(ours[known], order[known])


@pytest.mark.parametrize("unit", units("sampling"), ids=lambda unit: unit["name"])
def test_sampling_equals_the_official_unit(unit: dict[str, Any]) -> None:
    """But for the released loss of rank 1 where it is the largest one picked."""
    tensors = unit_tensors(unit)
    score = tensors["in.raw"] / tensors["in.raw"].sum(-1, keepdim=True)
    present, count = score > 0, unit["parameters"]["n_ref_tokens"] - 1
    ranked = cumulate(score, present, ~present.all(-1))
    assert_close(ranked.share, tensors["out.cdf"])
    points = points_of(ranked.share, count)
    assert_close(points, tensors["out.points"])
    assert torch.equal(nearest_ranks(ranked.share, points), tensors["out.picked"].long())
    chosen = sample(score, present, ~present.all(-1), count)
    picked = [sorted(set(row)) for row in tensors["out.picked"].tolist()]
    assert [sorted(ranked.rank[i][chosen[i]].tolist()) for i in range(len(chosen))] == picked
    if not unit["name"].endswith("source_defect"):
        assert torch.equal(chosen.sum(-1), tensors["out.policy"][:, 1:, 0].sum(-1).long())


@pytest.mark.parametrize("unit", units("block"), ids=lambda unit: unit["name"])
def test_one_block_equals_the_official_unit(unit: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options, noted = unit_tensors(unit), unit["parameters"], noting(monkeypatch)
    block = TimmBlock(12, 3, mlp_ratio=2.0, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    block.load_state_dict({k.removeprefix("in.w."): v for k, v in tensors.items() if k.startswith("in.w.")})
    told = {"blocks": (0,), "keep_ratio": 1.0, "shorten": shorten_of(options), "softmax": "released"}
    method = evovit.reduce_tokens(make_host("vit"), "ats", **told).method
    x, mask = tensors["in.x"], tensors["in.policy"][:, 1:, 0].float()
    index = torch.arange(mask.shape[1]).expand_as(mask).masked_fill(mask == 0, -1)
    tokens = Tokens(x, index, 1, (1, options["n_ref_tokens"] - 1), mask=mask if (mask == 0).any() else None)
    with torch.no_grad():
        after = method.run_block(PreNormBlock(block.eval(), 0), tokens)
    ranked, policy = cumulate(*noted[0][:3]), tensors["out.policy_after"][..., 0]
    assert torch.equal(after.mask.sum(1), policy.sum(1) - 1)
    for image, count in enumerate(after.mask.sum(1).int().tolist()):
        order = ranked.rank[image, after.index[image, :count]].argsort()  # official: ascending score
        ours = torch.cat((after.x[image, :1], after.patches[image, order]))
        assert_close(ours, tensors["out.y"][image, : count + 1])


def naive(score: list[float], count: int, padded: bool) -> set[int]:
    """Return who is picked among present tokens, by the paper's words (unpadded: the lowest goes)."""
    order = sorted(range(len(score)), key=lambda n: (score[n], n))
    total, shares = 0.0, []
    for n in order:
        total += score[n]
        shares.append(total)
    low = 0.0 if padded else shares[0]
    shares = [(share - low) / (shares[-1] - low) if shares[-1] > low else 1.0 for share in shares]
    first = min(share for share in shares if share > 0)
    steps = [m / (count - 1) for m in range(count)] if count > 1 else [1.0]
    points = [first + step * (1 - first) for step in steps]
    near = [min(range(len(order)), key=lambda j: (abs(point - shares[j]), j)) for point in points]
    return {order[j] for j in near}


@pytest.mark.parametrize("count", [1, 2, 5, 11])
@pytest.mark.parametrize("there", [1, 2, 3, 8, 11])
def test_sampling_by_a_loop(there: int, count: int) -> None:
    score = torch.rand(6, 11, dtype=torch.float64).float() ** 3
    present = torch.stack([torch.randperm(11) < there for _ in range(6)])
    score = score * present
    score = score / score.sum(-1, keepdim=True)
    for padded in (False, True):
        chosen = sample(score, present, torch.full((6,), padded), count)
        for image in range(6):
            rows = present[image].nonzero()[:, 0].tolist()
            expected = naive([score[image, row].item() for row in rows], count, padded)
            assert set(chosen[image].nonzero()[:, 0].tolist()) == {rows[n] for n in expected}
            assert 1 <= len(expected) <= min(count, there)


def test_equal_and_zero_scores_leave_one_token_at_least() -> None:
    there = torch.ones(1, 6, dtype=torch.bool)
    for score in (torch.zeros(1, 6), torch.full((1, 6), 1 / 6)):
        for padded in (False, True):
            chosen = sample(score, there, torch.tensor([padded]), 6)
            assert chosen[0, -1] and chosen.any()  # equal scores: the last one ranks highest
    assert sample(torch.zeros(1, 6), there & (torch.arange(6) == 2), torch.tensor([False]), 3)[0, 2]


@pytest.mark.parametrize(
    "host", ["vit", "vit_avg", "deit_distilled", "dinov2_reg", "siglip", "eva02", "beit"]
)
def test_padded_masked_tokens_are_those_of_an_image_without_padding(host: str) -> None:
    """Each image by itself, gathered block by block without padding or masks."""
    options: dict[str, Any] = {"blocks": (0, 2), "keep_ratio": (0.9, 0.9)}
    if host == "siglip":
        options["selection"] = "column_mean"
    model, images = make_host(host), pictures(3)
    reduced = evovit.reduce_tokens(model, "ats", **options)
    with torch.no_grad():
        outputs = reduced.run(images, record=True)
        for image in range(3):
            backbone = adapt(model)
            tokens = backbone.embed(images[image : image + 1])
            for number, block in enumerate(backbone.stages()[0].blocks):
                padded = outputs.trace[number]
                if number in options["blocks"]:
                    tokens = exact(reduced.method, block, tokens, number)
                else:
                    tokens = block(tokens)
                count = int(padded.mask[image].sum())
                assert padded.index[image, :count].tolist() == tokens.index[0].tolist()
                ours = torch.cat((padded.prefix[image], padded.patches[image, :count]))
                assert_close(ours, tokens.x[0])
    assert (outputs.trace[2].mask == 0).any()


def exact(method: Any, block: Any, tokens: Tokens, number: int) -> Tokens:
    """Run a sampling block on one image, whose tokens are all there: full attention, then the rows picked."""
    qkv = block.qkv(tokens)
    score = method.score(tokens, qkv, None)
    points = method.schedule.count(number, 16) or 16
    there = torch.ones_like(score, dtype=torch.bool)
    rows = sample(score, there, torch.tensor([False]), points).nonzero()[:, 1]
    whole = block.attention(tokens, qkv)
    x = torch.cat((whole.prefix, whole.patches[:, rows]), dim=1)
    return block.ffn(tokens.change(x=x, index=tokens.index[:, rows]))


def test_who_is_left_out_is_as_it_was_for_heads_and_maps_that_read_it() -> None:
    reduced, images = evovit.reduce_tokens(make_host("vit_avg"), "ats", blocks=(1, 2)), pictures()
    with torch.no_grad():
        outputs = reduced.run(images, record=True)
        maps = reduced.forward_intermediates(images, intermediates_only=True)
    held = outputs.trace[0].patches.clone()
    for tokens, found in zip(outputs.trace, maps, strict=True):
        for image in range(2):
            for row, place in enumerate(tokens.index[image].tolist()):
                if place >= 0:
                    held[image, place] = tokens.patches[image, row]
        assert torch.equal(found.flatten(2).transpose(1, 2), held)
    features = reduced.model.norm(torch.cat((outputs.tokens.prefix, held), dim=1))
    assert_close(outputs.logits, reduced.model.forward_head(features))


def test_a_cap_shortens_the_tensor_and_the_work() -> None:
    host = timm.create_model("deit_tiny_patch16_224", depth=4)
    whole, half = (
        evovit.reduce_tokens(host, "ats", blocks=(1,), keep_ratio=ratio, last_block="all")
        for ratio in (1.0, 0.5)
    )
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert [t.num_patches for t in whole.run(images, record=True).trace] == [196] * 4
        assert [t.num_patches for t in half.run(images, record=True).trace] == [196, 98, 98, 98]
    rows, width = 99, 192
    sampling = 3 * 197 * width**2 + 9 * rows * width**2 + 2 * 197 * rows * width
    plain = (12 * 197 * width**2 + 2 * 197**2 * width, 12 * rows * width**2 + 2 * rows**2 * width)
    expected = (sampling + 2 * plain[1] - 3 * plain[0]) / 1e9
    dense = gmacs(evovit.reduce_tokens(host, "dense", last_block="all"), (3, 224, 224))
    assert gmacs(half, (3, 224, 224)) - dense == pytest.approx(expected, rel=1e-6)


def test_late_starts_sample_nothing_first(tmp_path: Path) -> None:
    reduced, images = evovit.reduce_tokens(make_host("vit"), "ats", blocks=(1, 2)), pictures()
    reduced.method.set_reduction(0.0)
    with torch.no_grad():
        assert_close(reduced(images), reduced.model(images))
        save_reduced(reduced, tmp_path)
        assert torch.equal(load_reduced(tmp_path, make_host("vit")).eval()(images), reduced(images))
        reduced.method.set_reduction(1.0)
        assert reduced.run(images, record=True).trace[1].num_patches == 11
        assert not torch.allclose(reduced(images), reduced.model(images), atol=1e-4)


def test_absent_tokens_get_no_attention_and_send_no_gradient() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "ats", blocks=(0,), keep_ratio=1.0).train()
    outputs = reduced.run(pictures(), record=True)
    absent = outputs.trace[0].mask == 0
    assert absent.any()
    outputs.trace[0].x.retain_grad()
    outputs.logits.square().sum().backward()
    gradient = outputs.trace[0].x.grad[:, 1:]
    assert (gradient[absent] == 0).all() and (gradient[~absent].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_ratio": 0}, "keep_ratio is 0; allowed is a number above 0, at most 1"),
        ({"keep_ratio": [0.5, 0.4]}, "keep_ratio has 2 values for 1 reducing blocks"),
        ({"blocks": (4,)}, "blocks is 4; allowed is 0 to 3"),
        ({"shorten": "always"}, "shorten is 'always'; allowed is alone, never or batch"),
        ({"selection": "best"}, "selection is 'best'; allowed is class, column_mean, key_norm or probe"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "ats", **({"blocks": (1,)} | options))


def test_a_host_without_class_token_needs_a_chosen_score() -> None:
    with pytest.raises(evovit.EvoViTError, match="needs a class token.*choose 'column_mean'"):
        evovit.reduce_tokens(make_host("siglip"), "ats", blocks=(1,))
