"""ToMe: equal to the official code on its reference numbers, and right on hosts it was not written for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import evovit
from evovit.checkpoints.reduced import load_reduced, save_reduced
from evovit.macs import gmacs
from evovit.methods import tome
from evovit.methods.merging import unmerge
from evovit.ops.merge import Match, match_tokens, merge_sizes, merge_tokens
from evovit.schedule import removed_per_block
from evovit.train.run import settle
from tests.conftest import Golden, make_host, pictures
from tests.parity import assert_close, assert_same_gradients, assert_same_traces, gradients_of

OFFICIAL = {name: Golden(name) for name in ("tome", "tome_distilled")}
CASES = [(file, case["name"]) for file, golden in OFFICIAL.items() for case in golden.side["cases"]]
UNITS = Golden("units_tome")


def schedule(r: Any) -> dict[str, Any]:
    """Return our options for an official r: a number, a list, or a pair."""
    return {"r": r["tuple"][0], "inflection": float(r["tuple"][1])} if isinstance(r, dict) else {"r": r}


def merge_all(x: Tensor, size: Tensor, match: Match) -> Tensor:
    """Return merged tokens (B, N - R, C)."""
    return merge_tokens(x, merge_sizes(size, match)[1], match)


def load_case(golden: Golden, case: dict[str, Any]) -> evovit.ReducedViT:
    options = dict(golden.side["model"])
    cls = VisionTransformerDistilled if options.pop("distilled", False) else VisionTransformer
    host = cls(**options).eval()
    host.load_state_dict(golden.state_dict())
    proportional = case.get("prop_attn", True)
    return evovit.reduce_tokens(
        host, "tome", **schedule(case.get("r", 0)), proportional_attention=proportional, verify=False
    )


@pytest.mark.parametrize(("file", "name"), CASES)
def test_equals_official(file: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, pairs, sizes, sources and traces; in training also the loss and every gradient."""
    golden = OFFICIAL[file]
    case = golden.case(name)
    model, matches = load_case(golden, case), list[Match]()

    def noted(*args: Any, **options: Any) -> Match:
        matches.append(match_tokens(*args, **options))
        return matches[-1]

    monkeypatch.setattr(tome, "match_tokens", noted)
    outputs = model.run(golden.images(case), record=True)
    prefix = outputs.tokens.num_prefix
    heads = [outputs.logits]
    if "logits_dist" in case["outputs"]:  # in training the official code gives both heads apart
        features = model.model.norm(outputs.tokens.x)
        heads = [model.model.head(features[:, 0]), model.model.head_dist(features[:, 1])]
        assert_close(heads[1], golden.out(case, "logits_dist"))
    assert_same_traces(golden, case, outputs._replace(logits=heads[0]))
    assert [t.x.shape[1] for t in outputs.trace] == case["tokens_after_block"]
    for number, match in zip(case["merging_blocks"], matches, strict=True):
        order = match.sources.argsort(1)
        assert torch.equal(match.sources.gather(1, order) + prefix, golden.out(case, f"src.{number}").long())
        assert torch.equal(match.targets.gather(1, order) + prefix, golden.out(case, f"dst.{number}").long())
        size = golden.out(case, f"size.{number}").float()
        assert torch.equal(outputs.trace[number].size, size[:, prefix:])
    if "source" in case["outputs"]:
        source = golden.out(case, "source")[:, prefix:, prefix:].float().argmax(1)
        assert torch.equal(outputs.tokens.carry.source, source)
    if "labels" in case:
        loss = sum(F.cross_entropy(head, torch.tensor(case["labels"])) for head in heads)
        assert_close(loss, golden.out(case, "loss")[0])
        loss.backward()
        assert_same_gradients(golden, case, gradients_of(model))


@pytest.mark.parametrize("row", UNITS.side["parse_r"], ids=str)
def test_schedules_equal_the_official_ones(row: dict[str, Any]) -> None:
    options = {"inflection": 0.0} | schedule(row["r"])
    found = removed_per_block(depth=row["num_layers"], most=64, **options)
    assert list(found) == row["schedule"]


@pytest.mark.parametrize(
    "unit", [u for u in UNITS.side["units"] if u["name"] != "kth_bipartite"], ids=lambda unit: unit["name"]
)
def test_matching_equals_the_official_unit(unit: dict[str, Any]) -> None:
    """Official rows count the prefix; the weighted mean, sizes, sources and unmerged values must be equal."""
    name, options = unit["name"], unit["parameters"]
    tensors = {k.removeprefix(f"{name}."): v for k, v in UNITS.tensors.items() if k.startswith(name)}
    prefix = options["class_token"] + options["distill_token"]
    metric, x, size = (tensors[f"in.{k}"][:, prefix:] for k in ("metric", "x", "size"))
    size, removed = size[..., 0], min(options["r"], metric.shape[1] // 2)
    match = match_tokens(metric, removed, prefix % 2)
    ones = torch.ones_like(size)
    values = {
        "wavg_x": merge_all(x, size, match),
        "wavg_size": merge_sizes(size, match)[0][..., None],
        "merged_mean": merge_all(x, ones, match),
        "wavg_nosize_x": merge_all(x, ones, match),
        "wavg_nosize_size": merge_sizes(ones, match)[0][..., None],
        "source": F.one_hot(match.moved, match.rows.shape[1]).transpose(1, 2).float(),
    }
    # without a class token the official rows that stay are ordered by similarity: compare in our order
    sources = tensors["out.source"][:, prefix:, prefix:]
    order = torch.stack(
        [(ours @ theirs.T).argmax(1) for ours, theirs in zip(values["source"], sources, strict=True)]
    )
    for key, ours in values.items():
        theirs = sources if key == "source" else tensors[f"out.{key}"][:, prefix:]
        assert_close(ours, theirs.gather(1, order[..., None].expand_as(ours)))
    if options["distill_token"]:
        return  # the official unmerge forgets that its merge moved the distillation token to the front
    unmerged = values["merged_mean"].gather(1, match.moved[..., None].expand_as(x))
    assert_close(unmerged, tensors["out.unmerged_of_mean"][:, prefix:])


WORK = {  # methods' table, GMACs
    "deit_small_patch16_224": [((8, 0.0), 3.42), ((13, 0.0), 2.71), ((16, 0.0), 2.29)],
    "deit_base_patch16_224": [((8, 0.0), 13.11), ((13, 0.0), 10.37), ((16, 0.0), 8.77), ((16, -1.0), 5.87)],
    "deit_tiny_patch16_224": [((8, 0.0), 0.93), ((13, 0.0), 0.73), ((16, 0.0), 0.62)],
}


@pytest.mark.parametrize("name", WORK)
def test_macs_equal_the_table(name: str) -> None:
    with torch.device("meta"):
        host = timm.create_model(name)
    for (r, inflection), expected in WORK[name]:
        model = evovit.reduce_tokens(host, "tome", r=r, inflection=inflection, last_block="all")
        trace = model.run(torch.empty(1, 3, 224, 224, device="meta"), record=True).trace
        patches = [196, *(tokens.num_patches for tokens in trace)]
        merging = sum((n + 1) // 2 * (n - left) * host.embed_dim for n, left in pairwise(patches))
        work = (
            gmacs(model, (3, 224, 224)) - merging / 1e9
        )  # the table counts the similarities, not the merging
        assert work == pytest.approx(expected, rel=5e-3, abs=0.005)  # two decimals are printed


@pytest.mark.parametrize(("r", "left"), [(13, [184, 171, 158, 41]), (16, [181, 165, 149, 11])])
def test_counts_equal_the_table_and_sizes_always_sum_to_all_patches(r: int, left: list[int]) -> None:
    """The last block of r = 16 is capped at half of what is there."""
    host = VisionTransformer(img_size=56, patch_size=4, embed_dim=24, num_heads=2, num_classes=3).eval()
    reduced = evovit.reduce_tokens(host, "tome", r=r, verify=False)
    with torch.no_grad():
        trace = reduced.run(pictures(2, 56), record=True).trace
    counts = [t.x.shape[1] for t in trace]
    assert [*counts[:3], counts[-1]] == left
    for tokens in trace:
        assert torch.equal(tokens.size.sum(1), torch.full((2,), 196.0))
        source = tokens.carry.source
        assert torch.equal(F.one_hot(source, tokens.num_patches).sum(1), tokens.size.long())
        # a token stands at a place of its own, one of those merged into it
        assert torch.equal(source.gather(1, tokens.index), torch.arange(tokens.num_patches).expand(2, -1))


def naive_merge(x: Tensor, metric: Tensor, size: list[float], removed: int, protected: int) -> list[Tensor]:
    """One image, plain Python, rows counted with the prefix as the paper does; returns all rows left."""
    rows = range(x.shape[0])
    a, b = [i for i in rows if i % 2 == 0], [i for i in rows if i % 2 == 1]
    best = {}
    for i in a:
        if i >= protected:
            cosine = {j: F.cosine_similarity(metric[i], metric[j], 0).item() for j in b if j >= protected}
            best[i] = max(cosine, key=cosine.__getitem__), max(cosine.values())
    gone = sorted(best, key=lambda i: -best[i][1])[:removed]
    value, weight = {j: x[j] * size[j] for j in rows}, dict(zip(rows, size, strict=True))
    for i in gone:
        value[best[i][0]] = value[best[i][0]] + x[i] * size[i]
        weight[best[i][0]] += size[i]
    prefix = [value[i] / weight[i] for i in rows if i < protected]
    kept = [i for i in (*a, *b) if i >= protected and i not in gone]
    return prefix + [value[i] / weight[i] for i in kept]


@pytest.mark.parametrize("protected", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("patches", [6, 7])
def test_merge_equals_a_naive_loop_for_every_number_of_prefix_tokens(protected: int, patches: int) -> None:
    x, metric = torch.randn(2, protected + patches, 4), torch.randn(2, protected + patches, 3)
    size = torch.randint(1, 5, (2, patches)).float()
    for removed in range(1, patches // 2 + 1):
        match = match_tokens(metric[:, protected:], removed, protected % 2)
        ours = merge_all(x[:, protected:], size, match)
        for image in range(2):
            sizes = [1.0] * protected + size[image].tolist()
            expected = naive_merge(x[image], metric[image], sizes, removed, protected)
            assert_close(ours[image], torch.stack(expected[protected:]))


def test_a_token_that_takes_no_part_keeps_its_bits() -> None:
    x, size = torch.randn(2, 9, 4), torch.randint(1, 5, (2, 9)).float()
    match = match_tokens(torch.randn(2, 9, 3), 2, 1)
    merged = merge_all(x, size, match)
    for image in range(2):
        involved = {*match.sources[image].tolist(), *match.targets[image].tolist()}
        for new, old in enumerate(match.rows[image].tolist()):
            assert old in involved or torch.equal(merged[image, new], x[image, old])


def test_equal_patches_and_zero_keys_give_the_same_pairs_on_every_run() -> None:
    first, second = (match_tokens(torch.zeros(2, 8, 3), 3, 1) for _ in range(2))
    assert torch.equal(first.sources, second.sources)
    assert first.sources.tolist() == [[1, 3, 5]] * 2
    assert first.targets.tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("host", ["dinov2_reg", "deit3", "deit_distilled", "qk_norm", "eva02", "siglip"])
def test_prefix_tokens_neither_merge_nor_receive(host: str) -> None:
    """Two images whose patches differ; registers and class tokens must be what attention and FFN make them.

    The merge itself leaves prefix rows as they are, LayerScale and q/k norm of the host are in both roads.
    """
    model, images = make_host(host), pictures()
    reduced = evovit.reduce_tokens(model, "tome", r=(4,))
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        tokens = reduced.run(images, record=True).trace[0]
        model(images)
    prefix = reduced.method.spec.num_prefix
    assert tokens.num_prefix == prefix == model.num_prefix_tokens
    assert_close(tokens.prefix if prefix else torch.ones(1), seen[0][:, :prefix] if prefix else torch.ones(1))
    alone = tokens.size == 1  # a patch that merged with none is what the host's block makes of it
    own = seen[0][:, prefix:].gather(1, tokens.index[..., None].expand_as(tokens.patches))
    assert_close(tokens.patches[alone], own[alone])
    assert (tokens.size.sum(1) == 16).all() and tokens.num_patches == 12


@pytest.mark.parametrize("host", ["dinov2_reg", "qk_norm", "eva02", "deit3"])
def test_proportional_attention_counts_a_merged_token_once_per_patch(host: str) -> None:
    """Attention over merged tokens equals attention over one copy per patch (eq. 1)."""
    model = make_host(host)
    reduced = evovit.reduce_tokens(model, "tome", r=(4,))
    backbone = evovit.backbones.adapt(model)
    with torch.no_grad():
        tokens = backbone.embed(pictures())
        blocks = backbone.stages()[0].blocks
        merged = reduced.method.run_block(blocks[0], tokens)
        qkv = blocks[1].qkv(merged)
        bias = reduced.method.size_bias(merged)
        assert bias.shape == (2, 1, 1, merged.x.shape[1])
        ours = blocks[1].attention(merged, qkv, bias).prefix
        rows = F.pad(merged.carry.source + merged.num_prefix, (merged.num_prefix, 0))
        rows[:, : merged.num_prefix] = torch.arange(merged.num_prefix)
        copies = [y.gather(2, rows[:, None, :, None].expand(-1, y.shape[1], -1, y.shape[3])) for y in qkv[:3]]
        whole = unmerge(merged)
        expected = blocks[1].attention(whole, qkv._replace(q=copies[0], k=copies[1], v=copies[2])).prefix
    assert_close(ours, expected)


def test_average_pooling_weighs_by_size() -> None:
    """MAE's head: sum of x * size over the tokens, divided by the ORIGINAL patch count, before `fc_norm`."""
    model = make_host("vit_avg")
    reduced = evovit.reduce_tokens(model, "tome", r=3)
    with torch.no_grad():
        outputs = reduced.run(pictures())
        tokens = outputs.tokens
        pooled = (tokens.patches * tokens.size[..., None]).sum(1) / 16
        assert_close(outputs.logits, model.head(model.fc_norm(pooled)))


def test_unmerge_restores_length_and_raster_order() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "tome", r=3)
    with torch.no_grad():
        tokens = reduced.run(pictures()).tokens
        whole = unmerge(tokens)
    assert whole.x.shape[1] == 17 and whole.index.tolist() == [list(range(16))] * 2
    for image in range(2):
        for cell, row in enumerate(tokens.carry.source[image].tolist()):
            assert torch.equal(whole.patches[image, cell], tokens.patches[image, row])
    assert reduced.feature_map(pictures()).shape == (2, 32, 4, 4)


def test_two_forwards_and_a_different_order_of_calls_agree() -> None:
    """Nothing is kept between forwards, so that calls may interleave."""
    reduced, one, two = evovit.reduce_tokens(make_host("vit"), "tome", r=3), pictures(), pictures(seed=1)
    with torch.no_grad():
        first = reduced(one)
        reduced(two)
        assert torch.equal(reduced(one), first)


def test_matching_stays_in_float32_under_autocast() -> None:
    metric = torch.randn(4, 64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half = match_tokens(metric, 20, 1)
    full = match_tokens(metric, 20, 1)
    for name, value in vars(half).items():
        other = getattr(full, name)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def test_matching_has_no_gradient_and_merging_has() -> None:
    metric, x = (torch.randn(2, 8, 3, requires_grad=True) for _ in range(2))
    match = match_tokens(metric, 3, 1)
    merge_all(x, torch.ones(2, 8), match).square().sum().backward()
    assert metric.grad is None and x.grad.abs().min() > 0


def test_a_ramp_is_saved_as_it_is_and_ends_with_the_training(tmp_path: Path) -> None:
    """Also where the first block asks for more than there is."""
    reduced = evovit.reduce_tokens(make_host("vit"), "tome", r=16, inflection=-1.0)
    reduced.method.set_reduction(0.9)
    assert reduced.method.removed[0] > 16
    save_reduced(reduced, tmp_path)
    loaded = load_reduced(tmp_path, make_host("vit"))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pictures()), reduced.eval()(pictures()))
    settle(reduced)
    assert reduced.method.removed == (32, 21, 10, 0)
    assert reduced.method.current_config() == reduced.method.config


def test_reduction_can_start_late() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "tome", r=4)
    for share, expected in ((0.0, 0), (0.5, 2), (1.0, 4)):
        reduced.method.set_reduction(share)
        assert reduced.method.removed == (expected,) * 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": -1}, "r is -1; allowed is a whole number, 0 or more"),
        ({"r": 2.5}, "r is 2.5; allowed is a whole number, 0 or more"),
        ({"r": [1, 99]}, "r is 99; allowed is 0 to 16"),
        ({"r": [1] * 5}, "r lists 5 values for 4 blocks"),
        ({"r": [1, 2], "inflection": 1.0}, "r lists 2 values .* no inflection"),
        ({"inflection": 2.0}, "inflection is 2.0; allowed is a number from -1 to 1"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "tome", **options)


def test_fused_attention_stays_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes enter as a mask of one row per image; nothing of (T, T) is built."""
    masks: list[Any] = []
    fused = F.scaled_dot_product_attention

    def noted(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *args: Any, **options: Any) -> Tensor:
        masks.append(None if mask is None else tuple(mask.shape))
        return fused(q, k, v, mask, *args, **options)

    reduced = evovit.reduce_tokens(make_host("vit"), "tome", r=3)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    with torch.no_grad():
        reduced(pictures())
    assert masks == [None, (2, 1, 1, 14), (2, 1, 1, 11), (2, 1, 1, 8)]
