"""Every timm model of a supported class is exact when nothing is reduced, or refused with one sentence.

The walk covers `timm.list_models()`: each variant is built small (few blocks, narrow, a 4 x 6 grid) with all
of its structural options, and all its values are disturbed so that parts that start at zero or one count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from timm.models.vitamin import VitCfg, VitConvCfg
from torch import Tensor, nn

from evovit import reduce_tokens
from evovit.backbones import adapt
from evovit.errors import EvoViTError
from evovit.ops.select import take, with_prefix

HOSTS = (VisionTransformer, Eva, Beit, VisionTransformerRelPos)
RELEASE = tuple(int(number) for number in timm.__version__.split(".")[:3])
FEWEST_EXACT = 260  # timm 1.0.31 has 289
REFUSED = {  # differential attention: two softmaxes, subtracted
    "vit_dlittle_patch16_reg1_gap_256": "DiffAttention",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention",
    "vit_dpwee_patch16_reg1_gap_256": "DiffParallelScalingBlock",
}
TINY: dict[str, Any] = {"embed_dim": 48, "num_heads": 6, "depth": 3, "num_classes": 7}
SMALL: dict[str, Any] = {"img_size": (16, 24), "patch_size": 4}
KEEP: dict[str, Any] = {"keep_ratio": 0.5, "start_block": 1, "stage_length": 1}


def timm_names() -> list[str]:
    """Return the models of every timm module that knows a supported class."""

    def knows_host(module: str) -> bool:
        values = vars(sys.modules[f"timm.models.{module}"]).values()
        return any(isinstance(value, type) and issubclass(value, HOSTS) for value in values)

    modules = [module for module in timm.list_modules() if f"timm.models.{module}" in sys.modules]  # not ours
    return [name for module in modules if knows_host(module) for name in timm.list_models(module=module)]


def tiny_model(name: str) -> nn.Module:
    """Build a variant small, with its structural options, and disturb all its values."""
    options = dict(TINY)
    module = timm.model_entrypoint(name).__module__.rsplit(".", 1)[1]
    if module in ("vision_transformer_hybrid", "vitamin"):  # these stems shrink the image 16 or 32 times
        options |= {"img_size": (64, 96)}
    else:
        options |= SMALL
    if module == "vitamin":
        convolutions = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
        options["embed_cfg"] = VitCfg(
            (8, 16, 48), (1, 1, 1), stem_width=8, conv_cfg=convolutions, head_type="1d"
        )
    if name == "vit_base_mci_224":  # its stem ends at 768 channels
        options |= {"embed_dim": 768, "num_heads": 12}
    if "sapiens2" in name:  # full attention in the outer blocks, shared keys and values between
        options["num_kv_heads"] = (6, 2, 6)
    return disturbed(timm.create_model(name, **options)).eval()


def disturbed(model: nn.Module) -> nn.Module:
    """Add noise to all parameters and floating-point buffers (running variances stay positive)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                noise = 0.1 * torch.randn(value.shape, generator=generator)
                value.add_(noise if isinstance(value, nn.Parameter) else noise.abs())
    return model


def image_pair(size: tuple[int, int]) -> Tensor:
    return torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(1))


def relative_error(ours: Tensor, host: Tensor) -> float:
    assert ours.shape == host.shape
    return ((ours - host).abs().max() / host.abs().max()).item()


def selection(host: nn.Module) -> str:
    return "global" if host.cls_token is not None else "column_mean"


def assert_exact(host: nn.Module, images: Tensor) -> None:
    """Compare the host with itself run by a method that keeps everything; the same dice in training."""
    whole = reduce_tokens(host, "evo_vit", selection=selection(host), **KEEP | {"keep_ratio": 1.0})
    with torch.no_grad():
        for ours, theirs in ((whole.forward_features, host.forward_features), (whole, host)):
            outputs = []
            for forward in (ours, theirs):
                torch.manual_seed(0)
                outputs.append(forward(images))
            assert relative_error(*outputs) < 1e-5


def pools_otherwise(host: Any) -> bool:
    """Tell whether the head pools in a way that no mask reaches: refined patches, or not at all."""
    attn_pool = getattr(host, "attn_pool", None)
    return type(attn_pool).__name__ == "AttentionPoolPrr" or not host.global_pool


def assert_masked_head(host: nn.Module, images: Tensor) -> None:
    """Compare the masked head with the host's own on the rows that take part, other ones for each image."""
    backbone, prefix = adapt(host), host.num_prefix_tokens
    with torch.no_grad():
        features = host.forward_features(images)
        count = features.shape[1] - prefix
        rows = torch.stack([torch.randperm(count)[: count // 2].sort().values for _ in images])
        mask = torch.zeros(len(images), count).scatter(1, rows, 1.0)
        if pools_otherwise(host):
            with pytest.raises(EvoViTError, match="cannot leave masked patch tokens out") as refusal:
                backbone.masked_head(features, mask)
            assert str(refusal.value).count(". ") == 0
            return
        kept = take(features, with_prefix(rows, prefix))
        assert relative_error(backbone.masked_head(features, mask), host.forward_head(kept)) < 1e-5
        whole = backbone.masked_head(features, torch.ones_like(mask))
        assert relative_error(whole, host.forward_head(features)) < 1e-5


def assert_maps(host: nn.Module, images: Tensor) -> None:
    """Compare the first and the last feature map, normed, and the final features with the host's own."""
    dense, told = reduce_tokens(host, "dense", verify=False), {"indices": [0, -1], "norm": True}
    with torch.no_grad():
        ours, theirs = (model.forward_intermediates(images, **told) for model in (dense, host))
    assert relative_error(ours[0], theirs[0]) < 1e-5
    for our_map, their_map in zip(ours[1], theirs[1], strict=True):
        assert relative_error(our_map, their_map) < 1e-5


def test_walk_is_complete() -> None:
    names = timm_names()
    assert set(REFUSED) <= set(names)
    assert len(names) - len(REFUSED) >= FEWEST_EXACT


@pytest.mark.parametrize("name", timm_names())
def test_exact_or_refused(name: str) -> None:
    host = tiny_model(name)
    assert isinstance(host, HOSTS)
    options = KEEP | {"selection": selection(host)}
    if name in REFUSED:
        with pytest.raises(EvoViTError, match=REFUSED[name]) as refusal:
            reduce_tokens(host, "evo_vit", **options)
        assert str(refusal.value).count(". ") == 0
        return
    images = image_pair(host.patch_embed.img_size)
    assert_exact(host, images)
    assert_masked_head(host, images)
    assert_maps(host, images)
    with torch.no_grad():
        outputs = reduce_tokens(host, "evo_vit", verify=False, **options).run(images, record=True)
    assert outputs.logits.isfinite().all()
    num_patches = host.patch_embed.num_patches
    kept = num_patches // 2
    assert [tokens.num_patches for tokens in outputs.trace] == [num_patches, kept + 1, kept + 1]
    for tokens in outputs.trace:
        assert tokens.num_prefix == host.num_prefix_tokens
        assert tokens.x.shape == (2, host.num_prefix_tokens + tokens.num_patches, host.embed_dim)
    for tokens in outputs.trace[1:]:
        assert (tokens.index[:, -1] == -1).all()
        assert all(row.unique().numel() == kept and row.min() >= 0 for row in tokens.index[:, :-1])


def vit(**options: Any) -> nn.Module:
    return VisionTransformer(**TINY | SMALL | options)


def eva(**options: Any) -> nn.Module:
    return Eva(**TINY | SMALL | {"use_rot_pos_emb": True} | options)


def with_attention(host: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """Give the blocks attentions whose options no timm model hands through."""
    for block in host.blocks:
        block.attn = make()
    return host


def eva_gated(**options: Any) -> nn.Module:
    host = eva()
    for number in range(len(host.blocks)):
        host.blocks[number] = EvaBlock(48, 6, gated_attn=True, init_values=0.1, **options)
    return host


def beit(**options: Any) -> nn.Module:
    return Beit(**TINY | SMALL | {"use_rel_pos_bias": True} | options)


def relpos(**options: Any) -> nn.Module:
    return VisionTransformerRelPos(**TINY | SMALL | options)


OPTIONS: dict[str, Callable[[], nn.Module]] = {
    "gated": lambda: with_attention(vit(), lambda: Attention(48, 6, qkv_bias=True, gated=True)),
    "qk_norm": lambda: vit(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "post_norm": lambda: vit(block_fn=ResPostBlock, init_values=0.1),
    "parallel_things": lambda: vit(block_fn=ParallelThingsBlock, init_values=0.1, qk_norm=True),
    "parallel_scaling": lambda: vit(block_fn=ParallelScalingBlock, init_values=0.1, qk_norm=True),
    "parallel_scaling_no_bias": lambda: vit(block_fn=ParallelScalingBlock, qkv_bias=False),
    "registers": lambda: vit(reg_tokens=3, no_embed_class=True, embed_norm_layer="layernorm"),
    "no_positions": lambda: vit(pos_embed="none", class_token=False, global_pool="avg"),
    "no_pool": lambda: vit(global_pool=""),
    "no_classes": lambda: vit(num_classes=0),
    "pool_with_prefix": lambda: vit(global_pool="avgmax", pool_include_prefix=True),
    "max_pool": lambda: vit(global_pool="max"),
    "map_pool": lambda: vit(global_pool="map"),
    "map_pool_with_prefix": lambda: vit(global_pool="map", pool_include_prefix=True),
    "prr_pool": lambda: vit(global_pool="prr"),
    "eva_gated": lambda: eva_gated(num_prefix_tokens=1),
    "eva_rope_gated": lambda: eva_gated(attn_type="rope", num_kv_heads=2, qkv_fused=False, qk_norm=True),
    "eva_separate_bias": lambda: with_attention(
        eva(), lambda: EvaAttention(48, 6, qkv_bias_separate=True, norm_layer=nn.LayerNorm)
    ),
    "eva_no_bias": lambda: eva(qkv_bias=False, scale_attn_inner=True, qk_norm=True),
    "eva_unfused": lambda: eva(qkv_fused=False, rope_rotate_half=True, swiglu_mlp=True, scale_mlp=True),
    "eva_post_norm": lambda: eva(use_post_norm=True, init_values=0.1),
    "eva_mixed": lambda: eva(rope_type="mixed", num_reg_tokens=2, no_embed_class=True),
    "eva_mixed_rope_attention": lambda: eva(rope_type="mixed", attn_type="rope", use_abs_pos_emb=False),
    "eva_mrope": lambda: eva(rope_type="mrope", attn_type="rope"),
    "eva_half_scale": lambda: eva(init_values=0.1, attn_only_layer_scale=True),
    "eva_map_pool": lambda: eva(global_pool="map"),
    "eva_max_pool": lambda: eva(global_pool="avgmax"),
    "eva_no_class_token": lambda: eva(class_token=False, global_pool="map"),
    "eva_no_pool": lambda: eva(global_pool="", num_classes=0),
    "beit_shared_and_own": lambda: beit(use_shared_rel_pos_bias=True, init_values=0.1),
    "beit_shared": lambda: beit(use_shared_rel_pos_bias=True, use_rel_pos_bias=False, use_abs_pos_emb=False),
    "beit_no_bias": lambda: beit(qkv_bias=False, use_rel_pos_bias=False, global_pool="token"),
    "beit_gated_mlp": lambda: beit(swiglu_mlp=True, scale_mlp=True),
    "beit_separate_bias": lambda: with_attention(
        beit(), lambda: BeitAttention(48, 6, qkv_bias=True, qkv_bias_separate=True, window_size=(4, 6))
    ),
    "relpos_table": lambda: relpos(rel_pos_type="bias", class_token=True, global_pool="token", qk_norm=True),
    "relpos_table_shared": lambda: relpos(rel_pos_type="bias", shared_rel_pos=True, class_token=True),
    "relpos_swin": lambda: relpos(rel_pos_type="mlp_swin", block_fn=ResPostRelPosBlock, init_values=0.1),
    "relpos_no_pool": lambda: relpos(global_pool="", init_values=None),
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """Build and disturb a host, or skip where timm is older than the option."""
    try:
        return disturbed(make())
    except (TypeError, ValueError):
        if RELEASE >= (1, 0, 31):
            raise
        pytest.skip(f"timm {timm.__version__} has no such option")


@pytest.mark.parametrize("name", OPTIONS)
def test_options_without_a_named_model_are_exact(name: str) -> None:
    host = built(OPTIONS[name]).eval()
    assert_exact(host, image_pair((16, 24)))
    assert_masked_head(host, image_pair((16, 24)))


DROPS = {
    "drop_rate": 0.1,
    "pos_drop_rate": 0.1,
    "proj_drop_rate": 0.1,
    "attn_drop_rate": 0.1,
    "drop_path_rate": 0.2,
}


def without_positions(drops: dict[str, float]) -> dict[str, float]:
    return {name: chance for name, chance in drops.items() if name != "pos_drop_rate"}


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: vit(**DROPS),
    "post_norm": lambda: vit(block_fn=ResPostBlock, **DROPS),
    "parallel_things": lambda: vit(block_fn=ParallelThingsBlock, **DROPS),
    "parallel_scaling": lambda: vit(block_fn=ParallelScalingBlock, **DROPS),
    "eva": lambda: eva(**DROPS),
    "eva_post_norm": lambda: eva(use_post_norm=True, **DROPS),
    "beit": lambda: beit(use_shared_rel_pos_bias=True, **DROPS),
    "relpos": lambda: relpos(**without_positions(DROPS)),
    "relpos_shared": lambda: relpos(shared_rel_pos=True, **without_positions(DROPS)),
    "dinov3_moving_positions": lambda: eva(
        rope_type="dinov3", rope_shift_coords=0.3, rope_jitter_coords=1.5, rope_rescale_coords=2.0
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_throws_the_same_dice(name: str) -> None:
    host = built(TRAINED[name]).train()
    assert_exact(host, image_pair((16, 24)))
    torch.manual_seed(0)
    once = host(image_pair((16, 24)))
    assert relative_error(host(image_pair((16, 24))), once) > 1e-3  # the dice matter


SIZED: dict[str, Callable[..., nn.Module]] = {
    "vit": vit,
    "no_positions": lambda **options: vit(pos_embed="none", **options),
    "eva": eva,
    "dinov3": lambda **options: eva(rope_type="dinov3", use_abs_pos_emb=False, **options),
    "eva_mixed": lambda **options: eva(rope_type="mixed", **options),
}


@pytest.mark.parametrize("name", SIZED)
def test_images_of_other_sizes_are_exact(name: str) -> None:
    host = disturbed(SIZED[name](dynamic_img_size=True, dynamic_img_pad=True)).eval()
    for size in ((16, 24), (28, 12), (27, 14)):
        assert_exact(host, image_pair(size))
    reduced = reduce_tokens(host, "evo_vit", **KEEP)
    assert reduced.feature_map(image_pair((27, 14))).shape == (2, 48, 7, 4)


def no_grid() -> nn.Module:
    host = vit(dynamic_img_size=True)
    host.patch_embed.grid_size = None
    return host


def two_predictions() -> nn.Module:
    host = timm.create_model("deit_tiny_distilled_patch16_224", **TINY | SMALL)
    host.set_distilled_training()
    return host


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: vit(patch_drop_rate=0.25), "drops 25% of its patches .* patch_drop_rate=0"),
        (lambda: eva(patch_drop_rate=0.25), "drops 25% of its patches .* patch_drop_rate=0"),
        (no_grid, "PatchEmbed.* img_size"),
        (lambda: with_attention(eva(), lambda: Attention(48, 6)), "attention of block 0 is a Attention"),
    ],
)
def test_refused_with_one_sentence(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(EvoViTError, match=words) as refusal:
        reduce_tokens(make(), "evo_vit", **KEEP)
    assert str(refusal.value).count(". ") == 0


def test_two_predictions_in_training_are_refused() -> None:
    reduced = reduce_tokens(two_predictions(), "evo_vit", **KEEP).train()
    with pytest.raises(EvoViTError, match="set_distilled_training"):
        reduced(image_pair((16, 24)))
    assert reduced.eval()(image_pair((16, 24))).shape == (2, 7)
