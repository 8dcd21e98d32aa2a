"""`forward_intermediates` on a reduced model: the host's own where nothing is reduced, and naive loops."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import evovit
from evovit.backbones import adapt
from evovit.methods import find_method
from evovit.ops.restore import NEIGHBOURS, TEMPERATURE, fill, interpolate, rows_by_place
from tests.conftest import HOSTS, disturb, make_host, pictures
from tests.test_contract import wrap

KEEP = {"keep_ratio": 0.5, "blocks": (1, 2)}


def levit(name: str) -> nn.Module:
    return disturb(timm.create_model(name, img_size=64, num_classes=5), 0.05).eval()


def reduced_vit(method: str, **options: Any) -> evovit.ReducedViT:
    return wrap(make_host("vit_avg"), method, options)


@torch.no_grad()
def maps(model: Any, images: Tensor, **options: Any) -> Any:
    return model.forward_intermediates(images, intermediates_only=True, **options)


def naive_maps(reduced: evovit.ReducedViT, images: Tensor) -> Tensor:
    """Return what each cell had last after each block, (blocks, B, C, rows, columns), by loops."""
    with torch.no_grad():
        first = list[Any]()
        outputs = reduced.run(images, record=True, prepare=lambda tokens: first.append(tokens) or tokens)
    rows, columns = first[0].grid
    held, found = first[0].patches.clone(), []
    for tokens in outputs.trace:
        for image in range(images.shape[0]):
            for row, place in enumerate(tokens.index[image].tolist()):
                if place >= 0:
                    held[image, place] = tokens.patches[image, row]
        found.append(held.clone().transpose(1, 2).unflatten(2, (rows, columns)))
    return torch.stack(found)


# Nothing reduced


WHOLE = {"dense": {}, "evo_vit": {"keep_ratio": 1.0, "start_block": 1}, "keep": KEEP | {"keep_ratio": 1.0}}


@pytest.mark.parametrize("name", HOSTS)
def test_maps_are_the_hosts_where_nothing_is_reduced(name: str) -> None:
    host, images = make_host(name), pictures()
    for method, options in WHOLE.items():
        reduced = wrap(host, method, options)
        for indices, norm, output_fmt in product((None, 2, [0, -1]), (False, True), ("NCHW", "NLC")):
            told = {"norm": norm, "output_fmt": output_fmt}
            expected = maps(host, images, indices=indices, **told)
            found = maps(reduced, images, indices=indices, **told)
            assert len(found) == len(expected)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.shape == theirs.shape and (ours.is_contiguous() or output_fmt == "NLC")
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", HOSTS)
def test_the_answer_has_the_hosts_form(name: str) -> None:
    """Final features, pairs with prefix tokens, timm's dictionary."""
    host, images = make_host(name), pictures()
    reduced = wrap(host, "dense", {})
    with torch.no_grad():
        expected, ours = host.forward_intermediates(images), reduced.forward_intermediates(images)
        assert (ours[0] - expected[0]).abs().max() <= 1e-5 * expected[0].abs().max()
        assert len(ours[1]) == len(expected[1]) == 4
        paired = reduced.forward_intermediates(images, return_prefix_tokens=True)[1]
        if not adapt(host).spec.num_prefix:  # then some of timm's hosts fail
            assert isinstance(paired[0], Tensor)
            return
        for pair, theirs in zip(
            paired, host.forward_intermediates(images, return_prefix_tokens=True)[1], strict=True
        ):
            for ours_part, part in zip(pair, theirs, strict=True):
                assert (ours_part - part).abs().max() <= 1e-5 * part.abs().max()
        if name in ("vit", "dinov2_reg", "deit_distilled"):
            told = {"output_dict": True, "return_prefix_tokens": True}
            dictionary, theirs = (m.forward_intermediates(images, **told) for m in (reduced, host))
            assert dictionary.keys() == theirs.keys()
            assert torch.allclose(dictionary["image_features"], theirs["image_features"], atol=1e-5)
            left = reduced.forward_intermediates(images, intermediates_only=True, output_dict=True)
            assert left.keys() == {"image_intermediates"}


@pytest.mark.parametrize("name", ["levit_128s", "levit_cls_128s"])
def test_indices_count_the_stages_of_a_host_of_several(name: str) -> None:
    host, images = levit(name), pictures(size=64)
    for method in ("dense", "idle_vit", "evo_levit"):
        reduced = wrap(host, method, {} if method == "dense" else {"start_block": 1})
        found = maps(reduced, images)
        assert [each.shape for each in found] == [(2, 128, 4, 4), (2, 256, 2, 2), (2, 384, 1, 1)]
        assert maps(reduced, images, indices=[-1])[0].shape == (2, 384, 1, 1)
        if method == "dense" and name == "levit_128s":
            for ours, theirs in zip(found, maps(host, images), strict=True):
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        net = evovit.features(reduced)
        assert net.feature_info.channels() == [128, 256, 384]
        assert net.feature_info.reduction() == [16, 32, 64]


# What is given to a cell without a token


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("keep", KEEP),
        ("evit", {"keep_ratio": 0.5, "blocks": (1, 3)}),
        ("evit", {"keep": (15,), "blocks": (1,)}),  # as many tokens as before, one of them fused
        ("dynamic_vit", {"keep_ratio": 0.5, "blocks": (0, 2)}),
        ("evo_vit", {"start_block": 1, "fast_update": False, "preserve": False}),
    ],
)
@pytest.mark.parametrize("host", ["vit_avg", "siglip", "dinov2_reg", "beit"])
def test_hold_is_what_each_cell_had_last(method: str, options: dict[str, Any], host: str) -> None:
    reduced, images = wrap(make_host(host), method, options), pictures()
    expected = naive_maps(reduced, images)
    for restore in ("auto", "hold"):
        assert torch.equal(torch.stack(maps(reduced, images, restore=restore)), expected)
    missing = maps(reduced, images, restore=None, output_fmt="NLC")[-1]
    assert missing.valid.sum(1).max() < 16


def test_a_method_that_parks_brings_its_tokens_up_to_date() -> None:
    """Evo-ViT in the midst of a stage: what waits moves with the representative token (eq. 7)."""
    reduced, images = reduced_vit("evo_vit", keep_ratio=0.5, start_block=1, stage_length=3), pictures()
    with torch.no_grad():
        trace = reduced.run(images, record=True).trace
    found, before = maps(reduced, images), trace[0].patches
    for number in (1, 2, 3):
        tokens, expected = trace[number], before.clone()
        for image in range(2):
            moved = tokens.x[image, -1] - tokens.carry.summary[image, 0]
            awake = dict(zip(tokens.index[image, :-1].tolist(), tokens.patches[image], strict=False))
            for cell in range(16):
                expected[image, cell] = awake[cell] if cell in awake else before[image, cell] + moved
        assert torch.allclose(found[number].flatten(2).transpose(1, 2), expected, atol=1e-6)


def test_hold_of_parked_tokens_is_the_masked_forward_of_all() -> None:
    """IdleViT: in a full-length forward idle tokens attend to nothing and are attended by none."""
    reduced, images = reduced_vit("idle_vit", keep_ratio=0.5, start_block=1, group_length=2), pictures()
    with torch.no_grad():
        trace, found = reduced.run(images, record=True).trace, maps(reduced, images)
        backbone = adapt(reduced.model)
        tokens = backbone.embed(images)
        for block in backbone.stages()[0].blocks:
            part = torch.zeros(2, 16, dtype=torch.bool).scatter(1, trace[block.number].index, True)
            whole = nn.functional.pad(part, (1, 0), value=True)
            bias = torch.zeros(2, 1, 1, 17).masked_fill(~whole[:, None, None], -torch.inf)
            tokens = tokens.with_x(torch.where(whole.unsqueeze(-1), block(tokens, bias).x, tokens.x))
            ours = found[block.number].flatten(2).transpose(1, 2)
            assert torch.allclose(ours, tokens.patches, atol=1e-5)


def test_unmerge_copies_the_token_a_cell_was_merged_into() -> None:
    reduced, images = reduced_vit("tome", r=3), pictures()
    with torch.no_grad():
        trace = reduced.run(images, record=True).trace
    expected = [reduced.method.finish(tokens).patches for tokens in trace]
    for restore in ("auto", "unmerge", "hold", "interpolate"):
        for tokens, map_, theirs in zip(trace, maps(reduced, images, restore=restore), expected, strict=True):
            cells = map_.flatten(2).transpose(1, 2)
            assert torch.equal(cells, theirs)
            for image in range(2):  # a cell per patch in the token, among them the token's own
                for row, place in enumerate(tokens.index[image].tolist()):
                    token = tokens.patches[image, row]
                    assert torch.equal(cells[image, place], token)
                    assert (cells[image] == token).all(1).sum() == tokens.size[image, row]


@pytest.mark.parametrize("stride", [2, 3])
def test_a_pooled_token_is_copied_to_its_window(stride: int) -> None:
    """Ragged edges, in no window, hold what they had."""
    reduced, images = reduced_vit("subsample", block=2, stride=stride), pictures()
    before, after = maps(reduced, images)[1], maps(reduced, images, indices=[2])[0]
    pooled = maps(reduced, images, indices=[2], restore=None, output_fmt="NLC")[0].x
    side = 4 // stride
    for y, x in product(range(4), repeat=2):
        inside = y // stride < side and x // stride < side
        value = pooled[:, y // stride * side + x // stride] if inside else before[:, :, y, x]
        assert torch.equal(after[:, :, y, x], value)


def test_fill_and_rows_by_place_by_loops() -> None:
    index = torch.tensor([[4, 0, -1, 2], [3, -1, -1, 5]])
    held, patches = torch.randn(2, 6, 3), torch.randn(2, 4, 3)
    rows = rows_by_place(index, 6)
    for image, cell in product(range(2), range(6)):
        there = (index[image] == cell).nonzero().flatten().tolist()
        assert rows[image, cell] == (there[0] if there else -1)
        expected = patches[image, there[0]] if there else held[image, cell]
        assert torch.equal(fill(held, patches, rows)[image, cell], expected)


def naive_estimate(values: Tensor, reference: Tensor, present: Tensor, cell: int) -> Tensor:
    """Return a mean of the nearest present cells, of one image: (N, C), (N, C), (N,)."""
    pairs = [
        (nn.functional.cosine_similarity(reference[cell], reference[other], dim=0), values[other])
        for other in range(values.shape[0])
        if present[other]
    ]
    nearest = sorted(pairs, key=lambda pair: -pair[0].item())[:NEIGHBOURS]
    weights = [(similarity / TEMPERATURE).exp() for similarity, _ in nearest]
    return sum(w * value for w, (_, value) in zip(weights, nearest, strict=True)) / sum(weights)


@pytest.mark.parametrize("count", [1, 3, 11])
def test_interpolate_by_a_loop(count: int) -> None:
    values, reference = torch.randn(2, 2, 14, 5)
    present = torch.stack([torch.randperm(14) < count for _ in range(2)])
    found = interpolate(values, reference, present)
    for image, cell in product(range(2), range(14)):
        expected = naive_estimate(values[image], reference[image], present[image], cell)
        assert torch.allclose(found[image, cell], expected, atol=1e-5)


def test_interpolated_maps_by_a_loop() -> None:
    """A cell dropped earlier is compared in the features of that time, and filled from who is left now."""
    reduced, images = reduced_vit("keep", **KEEP), pictures()
    with torch.no_grad():
        trace = reduced.run(images, record=True).trace
    held = naive_maps(reduced, images).flatten(3).transpose(2, 3)  # (blocks, B, cells, C)
    for number, found in enumerate(maps(reduced, images, restore="interpolate")):
        for image, cell in product(range(2), range(16)):
            alive = [cell in tokens.index[image].tolist() for tokens in trace[: number + 1]]
            expected = held[number, image, cell]
            if not alive[-1]:
                present = torch.tensor([c in trace[number].index[image].tolist() for c in range(16)])
                reference = held[alive.index(False) - 1, image]
                expected = naive_estimate(held[number, image], reference, present, cell)
            assert torch.allclose(found.flatten(2)[image, :, cell], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [(name, find_method(name).example) for name in evovit.list_methods() if name not in ("sit", "subsample")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_cell_comes_back_in_its_place(method: str, options: dict[str, Any]) -> None:
    """Blocks that change nothing, patches that are one-hot or far from it: a map shows the image's order."""
    host: Any = make_host("vit_avg")
    with torch.no_grad():
        for block in host.blocks:
            for p in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters()):
                p.zero_()
        host.pos_embed.zero_()
    host.patch_embed.proj.weight.data = torch.eye(32, 192).reshape(32, 3, 8, 8)
    host.patch_embed.proj.bias.data.zero_()
    reduced = wrap(host, method, options)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    patches = torch.eye(16, 192)[order].reshape(2, 4, 4, 3, 8, 8)
    images = patches.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)
    for map_ in maps(reduced, images):
        found = map_.flatten(2).argmax(1)
        if find_method(method).merges:  # one of the patches in the token
            ties = map_.flatten(2).gather(1, order[:, None])[:, 0]
            assert (ties > 0).all()
        else:
            assert torch.equal(found, order)


def test_without_restoring_tokens_are_as_the_block_left_them() -> None:
    for method, options in (("evo_vit", {"start_block": 1}), ("evit", {"blocks": (1,)}), ("tome", {"r": 3})):
        reduced, images = reduced_vit(method, **options), pictures()
        with torch.no_grad():
            trace = reduced.run(images, record=True).trace
            told = {"restore": None, "output_fmt": "NLC"}
            found = maps(reduced, images, **told)
            dictionary = maps(reduced, images, output_dict=True, **told)
        for number, (sparse, tokens) in enumerate(zip(found, trace, strict=True)):
            assert torch.equal(sparse.x, tokens.patches) and torch.equal(sparse.index, tokens.index)
            assert torch.equal(sparse.valid, tokens.index >= 0)
            for name in ("", "_index", "_valid"):
                each = getattr(sparse, name.removeprefix("_") or "x")
                assert torch.equal(dictionary[f"image_intermediates{name}"][number], each)


def test_masked_tokens_of_training_are_missing_too() -> None:
    reduced = reduced_vit("dynamic_vit", keep_ratio=0.5, blocks=(1, 2)).train()
    images = pictures()
    torch.manual_seed(0)
    trace = reduced.run(images, record=True).trace
    torch.manual_seed(0)
    found = reduced.forward_intermediates(images, intermediates_only=True)
    held = trace[0].patches
    for number, tokens in enumerate(trace):
        part = tokens.taking_part > 0.5
        held = torch.where(part.unsqueeze(-1), tokens.patches, held)
        assert torch.equal(found[number].flatten(2).transpose(1, 2), held)
    assert not part.all()
    found[-1].square().mean().backward()
    assert all(p.grad is not None for p in reduced.model.blocks.parameters())


@pytest.mark.parametrize("name", HOSTS)
def test_every_method_gives_whole_maps_on_every_host(name: str) -> None:
    host, images = make_host(name), pictures(3)
    for method in evovit.list_methods():
        reduced = wrap(host, method, find_method(method).example)
        if method == "sit":
            with pytest.raises(evovit.EvoViTError, match="no place on the grid"):
                maps(reduced, images)
            continue
        found, alone = maps(reduced, images, norm=True), maps(reduced, images[1:2], norm=True)
        for map_, one in zip(found, alone, strict=True):
            assert map_.shape == (3, adapt(host).spec.dims[0], 4, 4) and map_.isfinite().all()
            assert torch.allclose(map_[1:2], one, rtol=1e-4, atol=1e-4)


# timm's other promises


def test_final_features_are_what_the_head_reads() -> None:
    for method, options in (("evo_vit", {"start_block": 1}), ("keep", KEEP), ("tome", {"r": 3})):
        reduced, images = reduced_vit(method, **options), pictures()
        with torch.no_grad():
            final, _ = reduced.forward_intermediates(images, 1)
            assert torch.equal(reduced.forward_head(final), reduced(images))


@pytest.mark.parametrize(("method", "options"), [("evo_vit", {"start_block": 1}), ("keep", KEEP)])
def test_stopping_early_runs_no_later_block_and_changes_nothing(method: str, options: dict[str, Any]) -> None:
    reduced, images, ran = reduced_vit(method, **options), pictures(), list[int]()
    host: Any = reduced.model
    for number, block in enumerate(host.blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    whole = maps(reduced, images, indices=[1, 2])
    assert ran == [0, 1, 2, 3]
    with torch.no_grad():
        final, early = reduced.forward_intermediates(images, [1, 2], stop_early=True)
    assert ran[4:] == [0, 1, 2]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(early, whole, strict=True))
    if method == "evo_vit":
        normed = maps(reduced, images, indices=[2], norm=True)[0]
        assert torch.equal(final[:, 1:].transpose(1, 2).reshape(normed.shape), normed)


PRUNED: dict[str, Callable[[], evovit.ReducedViT]] = {
    "evo_vit": lambda: reduced_vit("evo_vit", start_block=1, stage_length=1),
    "keep": lambda: reduced_vit("keep", keep_ratio=0.5, blocks=(1, 3)),
    "dynamic_vit": lambda: reduced_vit("dynamic_vit", keep_ratio=0.5, blocks=(1, 3)),
    "tome": lambda: wrap(make_host("beit"), "tome", {"r": 3}),
    "idle_vit": lambda: wrap(make_host("eva02"), "idle_vit", {"start_block": 1}),
    "evo_levit": lambda: wrap(levit("levit_128s"), "evo_levit", {"start_block": 1}),
}


@pytest.mark.parametrize("name", PRUNED)
def test_pruning_takes_later_blocks_out_and_leaves_the_maps(name: str) -> None:
    reduced = PRUNED[name]()
    images = torch.randn(2, *adapt(reduced.model).image_shape)
    before, count = maps(reduced, images, indices=[0, 1]), len(list(reduced.parameters()))
    assert reduced.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert sum(adapt(reduced.model).spec.depths) < reduced.method.spec.depth
    assert len(list(reduced.parameters())) < count
    after = maps(reduced, images)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True))


def test_a_host_that_cannot_be_pruned_says_so() -> None:
    reduced = wrap(levit("levit_cls_128s"), "evo_levit", {"start_block": 1})
    with pytest.raises(evovit.EvoViTError, match="no prune_intermediate_layers.* stop_early=True"):
        reduced.prune_intermediate_layers(1)


@pytest.mark.parametrize(
    ("method", "options", "asked", "words"),
    [
        ("keep", KEEP, {"restore": "unmerge"}, "drops tokens without merging them; set restore"),
        ("keep", KEEP, {"restore": "holds"}, "Did you mean 'hold'"),
        ("keep", KEEP, {"restore": None}, "output_fmt='NLC'"),
        ("keep", KEEP, {"output_fmt": "NHWC"}, "output_fmt is 'NHWC'; allowed is NCHW or NLC"),
        ("keep", KEEP, {"indices": 5}, "indices is 5; allowed is 1 to 4"),
        ("keep", KEEP, {"indices": [0, 4]}, "indices is 4; allowed is -4 to 3"),
        ("keep", KEEP, {"indices": []}, "indices is empty"),
        ("keep", KEEP, {"indices": "all"}, "indices is 'all'"),
        ("keep", KEEP, {"attn_mask": torch.ones(17, 17)}, "attn_mask is given, but the tokens"),
        ("keep", KEEP, {"is_causal": True}, "is_causal is True, but the tokens"),
        ("sit", {"blocks": (1,)}, {}, "leaves tokens that have no place on the grid; set restore=None"),
    ],
)
def test_what_cannot_be_honoured_is_one_sentence(
    method: str, options: dict[str, Any], asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(evovit.EvoViTError, match=words) as refusal:
        maps(reduced_vit(method, **options), pictures(), **asked)
    assert str(refusal.value).count(". ") <= ("Did you" in str(refusal.value))


def test_slots_without_a_place_are_given_as_they_are() -> None:
    reduced = reduced_vit("sit", blocks=(1,))
    found = maps(reduced, pictures(), restore=None, output_fmt="NLC")
    assert [each.x.shape[1] for each in found] == [16, 8, 8, 8]
    assert found[0].valid.all() and not found[1].valid.any()


def test_images_of_another_size_have_a_map_of_their_grid() -> None:
    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2,
        dynamic_img_size=True, dynamic_img_pad=True,
    )  # fmt: skip
    host = disturb(host).eval()
    images = torch.randn(2, 3, 41, 64)
    for method, options in (("evo_vit", {"start_block": 1}), ("keep", KEEP), ("tome", {"r": 5})):
        assert maps(wrap(host, method, options), images)[-1].shape == (2, 32, 6, 8)
    for ours, theirs in zip(maps(wrap(host, "dense", {}), images), maps(host, images), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


TRACED = [
    ("evo_vit", {"start_block": 1, "stage_length": 3}, "hold"),
    pytest.param("keep", KEEP, "interpolate", marks=pytest.mark.slow),
    pytest.param("tome", {"r": 3}, "unmerge", marks=pytest.mark.slow),
    pytest.param("idle_vit", {"start_block": 1}, "hold", marks=pytest.mark.slow),
    pytest.param("keep", KEEP, "hold", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "options", "restore"), TRACED)
def test_a_restored_map_compiles_and_exports_with_a_dynamic_batch(
    method: str, options: dict[str, Any], restore: str
) -> None:
    torch._dynamo.reset()
    net = evovit.features(reduced_vit(method, **options), [1, 3], restore=restore)
    images, batch = pictures(2), torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        for ours, theirs in zip(compiled(images), net(images), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own exporter
            program = torch.export.export(net, (images,), dynamic_shapes=({0: batch},)).module()
        for count in (1, 3):
            for ours, theirs in zip(program(pictures(count)), net(pictures(count)), strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_maps_keep_the_hosts_type(kind: torch.dtype) -> None:
    for method, options, restore in (
        ("evo_vit", {"start_block": 1}, "hold"),
        ("keep", KEEP, "interpolate"),
        ("tome", {"r": 3}, "unmerge"),
    ):
        reduced = reduced_vit(method, **options).to(kind)
        for map_ in maps(reduced, pictures().to(kind), restore=restore, norm=True):
            assert map_.dtype == kind and map_.isfinite().all()
