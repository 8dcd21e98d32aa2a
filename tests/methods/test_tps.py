"""TPS, token pruning and squeezing (`rest="squeeze"`): equal to the official code, on all that drop."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn import functional as F

import evovit
from evovit.backbones.timm_blocks import PreNormBlock
from evovit.checkpoints.reduced import load_reduced, save_reduced
from evovit.methods import dynamic_vit
from evovit.ops import squeeze as ops
from evovit.ops.select import split_top
from evovit.ops.squeeze import squeeze, squeeze_masked, squeeze_rows
from evovit.recipe.tables import ObjectiveTable
from evovit.tokens import Tokens
from evovit.train.objective import Objective
from tests.conftest import Golden, make_host, pictures
from tests.methods.test_dynamic_vit import all_gradients
from tests.parity import assert_close, assert_same_gradients, assert_same_traces, gradients_of

TPS, ETPS, UNITS = Golden("tps"), Golden("tps_etps"), Golden("units_tps")
EVALUATIONS = [case["name"] for case in TPS.side["cases"] if case["mode"] == "eval"]
TRAININGS = [case["name"] for case in TPS.side["cases"] if case["mode"] == "train"]
SQUEEZERS = [("evit", {"blocks": (1, 2)}), ("keep", {"blocks": (1, 2)}), ("dynamic_vit", {"blocks": (1, 2)})]


def load_case(case: dict[str, Any]) -> evovit.ReducedViT:
    """Return a network of the TPS repository (dTPS), whose weights have DynamicViT's names."""
    return evovit.load_official(
        "dynamic_vit",
        TPS.state_dict(),
        num_heads=TPS.side["model"]["num_heads"],
        blocks=case["prune_loc"],
        keep_ratio=case["keep_ratio"],
        rest="squeeze",
        temperature=case.get("temperature", 1.0),
        token_loss="squared" if case.get("mse_token_loss") else "divergence",
    )


def noting(monkeypatch: pytest.MonkeyPatch) -> list[Tokens]:
    """Return what fills with the tokens after each squeeze."""
    noted: list[Tokens] = []

    def note(*arguments: Any) -> Tokens:
        noted.append(squeeze_rows(*arguments))
        return noted[-1]

    monkeypatch.setattr(ops, "squeeze_rows", note)
    return noted


def check_squeezed(
    official: Golden, case: dict[str, Any], number: int, tokens: Tokens, gone: Tensor, before: Tensor
) -> Tensor:
    """Compare kept patches, hosts and squeezed tokens of one block; return the patches in official order.

    Args:
        gone: (B, R) positions of the removed among the patches present, in official order.
        before: (B, N) numbers of the patches present, in official order.
    """
    kept = official.out(case, f"keep_patch.{number}").long()
    assert torch.equal(tokens.index, kept.sort(1).values)
    hosts = kept.gather(1, official.out(case, f"host.{number}").long())
    ours = tokens.index.gather(1, tokens.carry.source.gather(1, before.gather(1, gone)))
    assert torch.equal(ours, hosts)
    order = kept.argsort(1)[..., None].expand_as(tokens.patches)  # from score order to raster order
    assert_close(tokens.patches, official.out(case, f"squeezed.{number}").gather(1, order))
    return kept


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_equals_official(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dTPS: logits, scores, kept patches, hosts, squeezed tokens, traces."""
    case, noted = TPS.case(name), noting(monkeypatch)
    model = load_case(case)
    with torch.no_grad():
        outputs = model.run(TPS.images(case), record=True)
    assert_same_traces(TPS, case, outputs)
    assert [t.x.shape[1] for t in outputs.trace] == case["tokens_after_block"]
    before = torch.arange(49).expand(2, 49)
    for number, tokens in zip(case["prune_loc"], noted, strict=True):
        with torch.no_grad():
            scores = model.method.scores(outputs.trace[number - 1], number)[..., 0]
        assert_close(scores, TPS.out(case, f"score.{number}").gather(1, before.argsort(1)))
        before = check_squeezed(TPS, case, number, tokens, TPS.out(case, f"drop.{number}").long(), before)


@pytest.mark.parametrize("name", TRAININGS)
def test_training_equals_official(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dTPS: log-probabilities, decisions, logits, traces, every loss term, the total and every gradient."""
    case = TPS.case(name)
    model = load_case(case).train()
    given: Iterator[Tensor] = iter(TPS.out(case, "noise"))
    monkeypatch.setattr(dynamic_vit, "gumbel_noise", lambda like: next(given))
    outputs = model.run(TPS.images(case), record=True)
    assert_same_traces(TPS, case, outputs)
    keeps = outputs.tokens.carry.keeps
    for number, keep in zip(case["prune_loc"], keeps, strict=True):
        assert torch.equal(keep.detach(), TPS.out(case, f"decision.{number}").float())
        scores = model.method.scores(outputs.trace[number - 1], number)
        assert_close(scores, TPS.out(case, f"pred_score.{number}"))
    assert_close(outputs.features[:, 1:].mean(1), TPS.out(case, "features_mean"))
    taught = Objective(model, ObjectiveTable(), load_case(case).model).teach(TPS.images(case))
    assert_close(taught.logits, TPS.out(case, "teacher_logits"))
    terms = model.method.losses(outputs, taught)
    assert_close(terms["ratio"], TPS.out(case, "loss_ratio")[0])
    distilled = TPS.out(case, "loss_distill")[0]
    assert_close(terms["logits"] + terms["kept_tokens"], distilled)
    terms["class"] = F.cross_entropy(outputs.logits, torch.tensor(case["labels"]))
    assert_close(terms["class"], TPS.out(case, "loss_cls")[0])
    loss = torch.stack(list(terms.values())).sum()
    assert_close(loss, TPS.out(case, "loss")[0])
    loss.backward()
    assert_same_gradients(TPS, case, all_gradients(model))


@pytest.mark.parametrize("name", [case["name"] for case in ETPS.side["cases"]])
def test_between_attention_and_ffn_equals_official(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """eTPS, EViT's selection: kept patches, hosts, squeezed tokens, traces, loss, every gradient."""
    case, noted = ETPS.case(name), noting(monkeypatch)
    model = evovit.load_official(
        "evit",
        ETPS.state_dict(),
        num_heads=3,
        blocks=case["drop_loc"],
        keep_ratio=tuple(case["keep_rates"]),
        rest="squeeze",
    ).train(case["mode"] == "train")
    outputs = model.run(ETPS.images(case), record=True)
    assert_same_traces(ETPS, case, outputs)
    assert [t.x.shape[1] for t in outputs.trace] == case["tokens_after_block"]
    before = torch.arange(49).expand(2, 49)
    for number, tokens in zip(case["drop_loc"], noted, strict=True):
        kept = ETPS.out(case, f"idx.{number}").long()
        gone = torch.ones_like(before).scatter(1, kept, 0).nonzero()[:, 1].view(2, -1)
        before = check_squeezed(ETPS, case, number, tokens, gone, before)
    if "labels" in case:
        loss = F.cross_entropy(outputs.logits, torch.tensor(case["labels"]))
        assert_close(loss, ETPS.out(case, "loss")[0])
        loss.backward()
        assert_same_gradients(ETPS, case, gradients_of(model))


def units(kind: str) -> list[dict[str, Any]]:
    return [unit for unit in UNITS.side["units"] if unit["kind"] == kind]


def unit_tensors(unit: dict[str, Any]) -> dict[str, Tensor]:
    start = f"{unit['name']}."
    return {k.removeprefix(start): v for k, v in UNITS.tensors.items() if k.startswith(start)}


@pytest.mark.parametrize("unit", units("eval"), ids=lambda unit: unit["name"])
def test_squeeze_equals_the_official_unit(unit: dict[str, Any]) -> None:
    tensors = unit_tensors(unit)
    squeezed, host = squeeze(tensors["in.kept"], tensors["in.removed"], **unit["parameters"])
    assert_close(squeezed, tensors["out.y"])
    assert torch.equal(host, tensors["out.host"].long())


@pytest.mark.parametrize("unit", units("train"), ids=lambda unit: unit["name"])
def test_masked_squeeze_equals_the_official_unit(unit: dict[str, Any]) -> None:
    tensors = unit_tensors(unit)
    x, keep = (tensors[f"in.{name}"].clone().requires_grad_() for name in ("x", "keep"))
    squeezed = squeeze_masked(x, keep[..., 0], tensors["in.prev"][..., 0], **unit["parameters"])
    assert_close(squeezed, tensors["out.y"])
    weight = torch.arange(squeezed.numel(), dtype=torch.float32).cos().view_as(squeezed)
    (squeezed * weight).sum().backward()
    assert_close(x.grad, tensors["out.grad_x"])
    assert_close(keep.grad, tensors["out.grad_keep"])


@pytest.mark.parametrize("unit", units("etps"), ids=lambda unit: unit["name"])
def test_one_block_equals_the_official_unit(unit: dict[str, Any]) -> None:
    tensors = unit_tensors(unit)
    block = TimmBlock(12, 3, mlp_ratio=2.0, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    block.load_state_dict({k.removeprefix("in.w."): v for k, v in tensors.items() if k.startswith("in.w.")})
    ratio = unit["parameters"]["keep_rate"]
    host = make_host("vit")
    method = evovit.reduce_tokens(host, "evit", blocks=(0,), keep_ratio=ratio, rest="squeeze").method
    tokens = Tokens(tensors["in.x"], torch.arange(13).expand(2, 13), 1, (1, 13))
    with torch.no_grad():
        tokens = method.run_block(PreNormBlock(block.eval(), 0), tokens)
    order = tensors["out.idx"].long().argsort(1)[..., None].expand(-1, -1, 12)
    expected = tensors["out.y"]
    assert torch.equal(tokens.index, tensors["out.idx"].long().sort(1).values)
    assert_close(tokens.x, torch.cat((expected[:, :1], expected[:, 1:].gather(1, order)), dim=1))


def naive(kept: Tensor, gone: Tensor, temperature: float) -> Tensor:
    """Return the squeezed tokens of one image by the paper's equations."""
    sums, weights = [math.e * row for row in kept], [math.e] * len(kept)
    for row in gone:
        cosines = [(F.cosine_similarity(row, other, dim=0)).item() for other in kept]
        host = cosines.index(max(cosines))
        weight = math.exp(cosines[host] / temperature)
        sums[host], weights[host] = sums[host] + weight * row, weights[host] + weight
    return torch.stack([total / weight for total, weight in zip(sums, weights, strict=True)])


@pytest.mark.parametrize(("kept", "gone"), [(1, 1), (1, 6), (7, 1), (4, 9), (5, 5)])
def test_squeeze_by_a_loop(kept: int, gone: int) -> None:
    stay, leave = torch.randn(2, kept, 5), torch.randn(2, gone, 5)
    for temperature in (0.02, 1.0, 3.0):
        found, _ = squeeze(stay, leave, temperature)
        for image in range(2):
            assert_close(found[image], naive(stay[image], leave[image], temperature))


def test_equal_cosines_fall_to_the_lower_row_and_zero_tokens_stay_finite() -> None:
    row = torch.randn(1, 1, 6)
    _, host = squeeze(torch.cat((-row, row, 2 * row, row), 1), row.repeat(1, 3, 1))
    assert (host >= 1).all() and torch.equal(squeeze(row.repeat(1, 4, 1), row)[1], torch.zeros(1, 1).long())
    kept = torch.zeros(1, 3, 6, requires_grad=True)
    squeezed, _ = squeeze(kept, torch.zeros(1, 2, 6))
    squeezed.sum().backward()
    assert squeezed.abs().max() == 0 and kept.grad.isfinite().all()


def test_masked_squeeze_is_the_gathered_one_and_leaves_the_others() -> None:
    """For equal decisions; who went before takes nobody in and changes no more."""
    patches, before = torch.randn(2, 12, 6), torch.ones(2, 12)
    before[:, [2, 7]] = 0
    split = split_top(torch.rand(2, 12).masked_fill(before == 0, -1.0), 4)
    keep = split.kept.float()
    found = squeeze_masked(patches, keep, before, 0.7)
    for image in range(2):
        gone = (before[image] > 0) & (keep[image] == 0)
        expected = patches[image].clone()
        expected[split.kept[image]] = naive(patches[image, split.kept[image]], patches[image, gone], 0.7)
        assert_close(found[image], expected)


def test_one_kept_token_in_training_stays_where_nothing_goes() -> None:
    """It has no other to join: all columns are barred, and the weight is 0."""
    patches, keep = torch.randn(1, 5, 4), torch.tensor([[0.0, 0, 1, 0, 0]])
    assert torch.equal(squeeze_masked(patches, keep, keep), patches)
    assert squeeze_masked(patches, keep * 0, keep * 0).isfinite().all()


@pytest.mark.parametrize(("method", "options"), SQUEEZERS)
@pytest.mark.parametrize("host", ["vit", "deit_distilled", "dinov2_reg", "siglip", "eva02"])
def test_counts_and_kept_tokens_are_those_of_dropping(
    method: str, options: dict[str, Any], host: str
) -> None:
    """The first selection reads what is not squeezed yet; prefix tokens neither go nor take in."""
    images = pictures()
    if host == "siglip" and method != "dynamic_vit":
        options = options | {"selection": "column_mean"}
    model = make_host(host)
    dropped, squeezed = (
        evovit.reduce_tokens(copy.deepcopy(model), method, rest=rest, **options)
        for rest in ("drop", "squeeze")
    )
    squeezed.method.load_state_dict(dropped.method.state_dict())
    with torch.no_grad():
        ours, theirs = (reduced.run(images, record=True).trace for reduced in (squeezed, dropped))
    assert torch.equal(ours[1].index, theirs[1].index)
    assert [t.num_patches for t in ours] == [t.num_patches for t in theirs]
    if method != "dynamic_vit" and host != "siglip":  # one squeezes before the block, one has no prefix
        assert_close(ours[1].prefix, theirs[1].prefix)
    assert not torch.allclose(ours[1].patches, theirs[1].patches, atol=1e-3)


@pytest.mark.parametrize(("method", "options"), SQUEEZERS)
def test_a_cell_has_the_token_it_was_squeezed_into(method: str, options: dict[str, Any]) -> None:
    reduced, images = (
        evovit.reduce_tokens(make_host("vit_avg"), method, rest="squeeze", **options),
        pictures(),
    )
    with torch.no_grad():
        trace = reduced.run(images, record=True).trace
        maps = reduced.forward_intermediates(images, intermediates_only=True)
        held = reduced.forward_intermediates(images, intermediates_only=True, restore="hold")
    for tokens, found, other in zip(trace, maps, held, strict=True):
        assert torch.equal(found, other)  # every cell has a token
        cells = found.flatten(2).transpose(1, 2)
        if tokens.carry is None:
            assert torch.equal(cells, tokens.patches)
            continue
        own = tokens.carry.source.gather(1, tokens.index)  # a kept token's own cell
        assert torch.equal(own, torch.arange(tokens.num_patches).expand_as(own))
        for image in range(2):
            assert torch.equal(cells[image], tokens.patches[image, tokens.carry.source[image]])


@pytest.mark.parametrize("value", [True, False])
def test_the_old_word_for_the_rest_is_still_read(value: bool, tmp_path: Path) -> None:
    """`fuse` in folders and recipes of version 0.1."""
    rest = "fuse" if value else "drop"
    reduced = evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,), rest=rest)
    save_reduced(reduced, tmp_path)
    manifest = tmp_path / "method.json"
    old = f'"fuse": {str(value).lower()}'
    manifest.write_text(manifest.read_text().replace(f'"rest": "{rest}"', old))
    assert old in manifest.read_text()
    loaded = load_reduced(tmp_path, make_host("vit")).eval()
    assert loaded.method.config.rest == rest
    with torch.no_grad():
        assert torch.equal(loaded(pictures()), reduced(pictures()))
    with pytest.raises(evovit.EvoViTError, match="EViT has no option 'fuse'"):
        evovit.reduce_tokens(make_host("vit"), "evit", fuse=value, rest=rest)


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("evit", {"rest": "merge"}, "rest is 'merge'; allowed is fuse, drop or squeeze"),
        ("keep", {"rest": "fuse"}, "rest is 'fuse'; allowed is drop or squeeze"),
        ("dynamic_vit", {"rest": "squeze"}, "Did you mean 'squeeze'"),
        ("evit", {"temperature": 0.0}, "temperature is 0.0; allowed is a number, 0.02 or more"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(
    method: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), method, **({"blocks": (1,)} | options))
