"""Folding batch norms: the same numbers from fewer parts, or a refusal; the given model stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evovit
from evovit.models.levit_cls import LevitCls
from evovit.models.small_vit import small_vit
from tests.backbones import test_levit_cls, test_timm_levit
from tests.backbones.test_timm_levit import alive
from tests.conftest import TINY, make_host, pictures
from tests.parity import assert_close

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


@pytest.mark.parametrize("build", [test_timm_levit.small, test_levit_cls.small], ids=["timm", "class token"])
def test_a_levit_without_batch_norms_computes_the_same(build: Any) -> None:
    host = build()
    before = {key: value.clone() for key, value in host.state_dict().items()}
    fused, images = evovit.fuse_batch_norm(host), pictures(size=64)
    with torch.no_grad():
        assert_close(fused(images), host(images))
        assert_close(fused.forward_features(images), host.forward_features(images))
    assert all(name.startswith("head_cls") for name in norms(fused))  # take no part in inference
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())
    assert sum(p.numel() for p in fused.parameters()) < sum(p.numel() for p in host.parameters())
    evovit.check_adapter(fused)


@torch.no_grad()
def test_a_reduced_model_selects_the_same() -> None:
    model = evovit.reduce_tokens(test_levit_cls.small(), "evo_levit", start_block=1)
    fused, images = evovit.fuse_batch_norm(model.train()), pictures(size=64)
    assert model.training and not fused.training
    ours, theirs = (m.run(images, record=True) for m in (fused, model.eval()))
    assert_close(ours.logits, theirs.logits)
    pairs = zip(ours.trace, theirs.trace, strict=True)
    assert all(torch.equal(a.index, b.index) for a, b in pairs)


def test_a_convolutional_stem_is_folded_and_half_precision_stays() -> None:
    host = alive(small_vit(0))
    fused = evovit.fuse_batch_norm(host)
    assert norms(host) and not norms(fused)
    with torch.no_grad():
        assert_close(fused(pictures(size=48)), host(pictures(size=48)))
    assert next(evovit.fuse_batch_norm(host.bfloat16()).parameters()).dtype == torch.bfloat16


def test_a_bias_and_a_norm_without_weights_are_folded_too() -> None:
    host = test_levit_cls.small()
    mlp = host.stages[0].blocks[0].mlp
    mlp.ln1.linear.bias = nn.Parameter(torch.randn(32))
    mlp.ln1.bn = nn.BatchNorm1d(32, affine=False).eval()
    fused = evovit.fuse_batch_norm(host)
    with torch.no_grad():
        assert_close(fused(pictures(size=64)), host(pictures(size=64)))


class Backwards(nn.Module):
    """A patch embedding that holds a layer before the norm and runs it after."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        self.grid_size, self.num_patches, self.img_size = (4, 4), 16, (img_size, img_size)
        self.mix, self.norm = nn.Conv2d(in_chans, in_chans, 1), nn.BatchNorm2d(in_chans)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        x = self.mix(self.norm(images).relu())
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def test_a_wrong_fold_is_found_by_its_result_and_refused() -> None:
    from timm.models.vision_transformer import VisionTransformer

    host = alive(VisionTransformer(**TINY, embed_layer=Backwards))
    before = host(pictures())
    with pytest.raises(evovit.EvoViTError, match="With its batch norms folded VisionTransformer differs by"):
        evovit.fuse_batch_norm(host)
    assert torch.equal(host(pictures()), before)


def test_nothing_to_fold_is_said() -> None:
    with pytest.raises(evovit.EvoViTError, match="holds no batch norm with running statistics"):
        evovit.fuse_batch_norm(make_host("vit"))
    forgetful = LevitCls(**test_levit_cls.SMALL)
    for module in forgetful.modules():
        if isinstance(module, NORMS):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    with pytest.raises(evovit.EvoViTError, match="nothing to fuse"):
        evovit.fuse_batch_norm(forgetful)
