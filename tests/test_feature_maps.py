"""`features` answers as timm's `features_only=True`; the pyramid of ViTDet; how old each cell is."""

from __future__ import annotations

import copy
import math
from itertools import product
from typing import Any

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import nn

import evovit
from evovit.feature_maps import last_updates
from tests.conftest import TINY, disturb, make_host, pictures
from tests.test_contract import wrap

NAMES = [
    "vit_tiny_patch16_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
]
EVO: dict[str, Any] = {"start_block": 1, "stage_length": 2}


def reduced_vit(method: str, **options: Any) -> evovit.ReducedViT:
    return wrap(make_host("vit_avg"), method, options)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_timms_where_nothing_is_reduced(name: str) -> None:
    """Maps, channels, strides; of timm's own wrapper around a reduced model too."""
    images = pictures()
    for out_indices, norm in product((3, (0, 2), [-1]), (False, True)):
        host = disturb(timm.create_model(name, **TINY)).eval()
        options: dict[str, Any] = {"out_indices": out_indices, "norm": norm}
        theirs = FeatureGetterNet(copy.deepcopy(host), **options)
        reduced = wrap(host, "dense", {})
        ours = evovit.features(reduced, **options)
        for told in ("channels", "reduction"):
            assert getattr(ours.feature_info, told)() == getattr(theirs.feature_info, told)()
        names = theirs.feature_info.module_name()
        assert ours.feature_info.module_name() == [f"model.{each}" for each in names]
        with torch.no_grad():
            expected, found = theirs(images), ours(images)
            wrapped = FeatureGetterNet(reduced, **options)(images)
        assert len(found) == len(wrapped) == len(expected)
        for a, b, c in zip(found, wrapped, expected, strict=True):
            assert torch.equal(a, b) and (a - c).abs().max() <= 1e-5 * c.abs().max()


def test_features_of_a_timm_name_made_with_features_only() -> None:
    told = {"features_only": True, "out_indices": (1, 3), **TINY}
    theirs = timm.create_model("vit_tiny_patch16_224", **told)
    ours = evovit.features(reduced_vit("evo_vit", **EVO), (1, 3))
    assert ours.feature_info.channels() == theirs.feature_info.channels() == [32, 32]
    assert ours.feature_info.reduction() == theirs.feature_info.reduction() == [8, 8]
    assert [x.shape for x in ours(pictures())] == [x.shape for x in theirs(pictures())]


def test_pruned_features_are_the_same_with_fewer_weights() -> None:
    images, whole = pictures(), evovit.features(reduced_vit("evo_vit", **EVO), [0, -2])
    pruned = evovit.features(reduced_vit("evo_vit", **EVO), [0, -2], prune=True)
    assert pruned.out_indices == [0, 2]
    with torch.no_grad():
        for ours, theirs in zip(pruned(images), whole(images), strict=True):
            assert torch.equal(ours, theirs)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in whole.parameters())
    pruned.train()(images)[-1].square().mean().backward()
    assert all(p.grad is not None for p in pruned.parameters())


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"out_indices": 9}, "indices is 9; allowed is 1 to 4"),
        ({"restore": "unmerge"}, "Keep as configured drops tokens"),
        ({"restore": None}, "output_fmt='NLC'"),
    ],
)
def test_wrong_features_are_refused_when_they_are_made(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=words):
        evovit.features(reduced_vit("keep", blocks=(1,)), **asked)
    with pytest.raises(evovit.EvoViTError, match="what reduce_tokens returns"):
        evovit.features(make_host("vit"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["evo_deit_tiny_patch16_224", "evo_levit_128s", "sit_tiny", "small_vit"])
def test_a_named_model_made_with_features_only_says_how(name: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=r"evovit.features\(model, out_indices"):
        timm.create_model(name, features_only=True)


def test_features_of_a_transformers_host() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    host = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes)).eval()
    images = pictures()
    with torch.no_grad():
        expected = host(images, output_hidden_states=True).hidden_states[1:]
        net = evovit.features(evovit.reduce_tokens(host, "dense"), None)
        for map_, hidden in zip(net(images), expected, strict=True):
            assert (map_.flatten(2).transpose(1, 2) - hidden[:, 1:]).abs().max() <= 1e-5 * hidden.abs().max()
    assert net.feature_info.channels() == [32] * 4 and net.feature_info.reduction() == [8] * 4
    held = evovit.features(evovit.reduce_tokens(host, "keep", blocks=(1,)), 1)
    assert held(images)[0].shape == (2, 32, 4, 4)


def test_the_pyramid_has_levels_of_its_strides() -> None:
    pyramid = evovit.SimplePyramid(evovit.features(reduced_vit("evo_vit", **EVO), 1), channels=16)
    assert pyramid.strides == (2, 4, 8, 16) and pyramid.out_channels == 16
    levels = pyramid(pictures())
    assert list(levels) == ["0", "1", "2", "3"]
    assert [tuple(x.shape) for x in levels.values()] == [(2, 16, side, side) for side in (16, 8, 4, 2)]
    two = evovit.SimplePyramid(pyramid.backbone, channels=16, scales=(1, 2.0))
    assert two.strides == (4, 8) and len(two(pictures())) == 2
    sum(x.square().mean() for x in levels.values()).backward()
    assert all(p.grad is not None for p in pyramid.levels.parameters())


def test_a_level_norms_over_channels_at_each_place() -> None:
    """The coarsest level by hand: pooled map, 1 x 1 and 3 x 3 convolution, each normed over its channels."""
    pyramid = evovit.SimplePyramid(evovit.features(reduced_vit("dense"), 1), channels=16, scales=(0.5,))
    pool, one, norm1, three, norm2 = pyramid.levels[0]
    with torch.no_grad():
        for norm in (norm1, norm2):
            norm.weight.normal_()
            norm.bias.normal_()
        x = pyramid.backbone(pictures())[-1]
        x = x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).amax((3, 5))
        for conv, norm in ((one, norm1), (three, norm2)):
            x = nn.functional.conv2d(x, conv.weight, padding=conv.kernel_size[0] // 2)
            mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
            x = (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[
                :, None, None
            ]
        assert torch.allclose(pyramid(pictures())["0"], x, atol=1e-5)
    assert isinstance(pool, nn.MaxPool2d)


def test_wrong_pyramids_are_refused() -> None:
    net = evovit.features(reduced_vit("dense"), 1)
    wrong: list[Any] = [(), (3,), (1, 1.0), 4, "4", None, [[1]], [True], {1: 2}, [math.nan]]
    for scales in wrong:
        with pytest.raises(evovit.EvoViTError, match=r"scales is .*; list some of 4.0, 2.0, 1.0 or 0.5"):
            evovit.SimplePyramid(net, scales=scales)
    with pytest.raises(evovit.EvoViTError, match=r"what evovit.features returns"):
        evovit.SimplePyramid(net.model)  # type: ignore[arg-type]
    with pytest.raises(evovit.EvoViTError, match="output_fmt='NCHW'"):
        evovit.SimplePyramid(evovit.features(net.model, output_fmt="NLC"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("evo_vit", {"start_block": 1, "stage_length": 1, "keep_ratio": 0.4}),
        ("idle_vit", {"start_block": 1, "keep_ratio": 0.5}),
        ("keep", {"blocks": (1, 3), "keep_ratio": 0.5}),
        ("evit", {"blocks": (0, 2), "keep_ratio": 0.5}),
    ],
)
def test_stale_share_by_a_loop(method: str, options: dict[str, Any]) -> None:
    reduced, images = reduced_vit(method, **options), pictures(3)
    with torch.no_grad():
        trace = reduced.run(images, record=True).trace
    there = [[set(row[row >= 0].tolist()) for row in tokens.index] for tokens in trace]
    newest = last_updates(reduced, images)
    for block, image, cell in product(range(4), range(3), range(16)):
        seen = [n for n in range(block + 1) if cell in there[n][image]]
        assert newest[image, block].flatten()[cell] == (seen[-1] if seen else -1)
    for older_than in (1, 2, 4):
        expected = []
        for block in (1, 3):
            recent = range(max(0, block - older_than + 1), block + 1)
            cells = product(range(3), range(16))
            old = [not any(cell in there[n][image] for n in recent) for image, cell in cells]
            # before the first block nothing is older than what there is
            expected.append(sum(old) / len(old))
        found = evovit.stale_share(reduced, images, [1, 3], older_than=older_than)
        assert found == pytest.approx(expected)


def test_nothing_is_stale_where_every_cell_is_computed() -> None:
    for method, options in (("dense", {}), ("tome", {"r": 3}), ("subsample", {"block": 2})):
        assert evovit.stale_share(reduced_vit(method, **options), pictures()) == [0.0] * 4
    slim = evovit.stale_share(reduced_vit("sit", blocks=(1,)), pictures())
    assert slim == [0.0, 1.0, 1.0, 1.0]  # slots have no place
    levit = disturb(timm.create_model("levit_128s", img_size=64, num_classes=5), 0.05).eval()
    share = evovit.stale_share(wrap(levit, "idle_vit", {"start_block": 1}), pictures(size=64))
    assert len(share) == 3 and all(0 <= each < 1 for each in share)
    with pytest.raises(evovit.EvoViTError, match="older_than is 0; allowed is 1 to 4"):
        evovit.stale_share(reduced_vit("dense"), pictures(), older_than=0)
