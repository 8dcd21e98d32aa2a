"""LV-ViT: equal to the official code on its reference numbers, to a naive loop, and of the published size."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch.nn import functional as F

import evovit
from evovit.backbones import adapt
from evovit.fuse import fuse_batch_norm
from evovit.macs import gmacs
from evovit.models.lv_vit import LVViT
from tests.conftest import TINY, Golden, disturb, make_host, pictures
from tests.parity import assert_close


def dense_state(golden: Golden) -> dict[str, torch.Tensor]:
    return {k: v for k, v in golden.state_dict().items() if not k.startswith("score_predictor")}


def tiny(**options: Any) -> LVViT:
    return disturb(LVViT(**(TINY | options))).eval()


@pytest.mark.parametrize(
    ("name", "case", "both"),
    [
        ("dynamicvit_lvvit", "train_keep0.7_distill", False),
        ("idlevit_lvvit", "train_keep0.7_distill_both", True),
    ],
)
def test_equals_official(name: str, case: str, both: bool) -> None:
    """The recorded teachers are plain LV-ViTs: one gave class logits, the other those of both heads."""
    official = Golden(name)
    found = official.case(case)
    host = evovit.load_official("lv_vit", dense_state(official), num_heads=2, skip_lam=2.0)
    images, expected = official.images(found), official.out(found, "teacher_logits")
    with torch.no_grad():
        features = host.forward_features(images)
        assert_close(host(images) if both else host.class_logits(features), expected)
        assert_close(host.forward_head(features), host(images))


def test_equals_a_naive_loop() -> None:
    host, images = tiny(skip_lam=3.0, stem_width=8), pictures()
    with torch.no_grad():
        x = images
        for number in (1, 2, 3):
            conv, norm = (getattr(host.patch_embed, f"{part}{number}") for part in ("conv", "bn"))
            x = F.conv2d(x, conv.weight, stride=2 if number == 1 else 1, padding=3 if number == 1 else 1)
            x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
            x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
        x = F.conv2d(x, host.patch_embed.proj.weight, host.patch_embed.proj.bias, stride=4)
        x = torch.cat((host.cls_token.expand(2, -1, -1), x.flatten(2).transpose(1, 2)), 1) + host.pos_embed
        for block in host.blocks:
            norm1, norm2 = block.norm1, block.norm2
            y = F.layer_norm(x, (32,), norm1.weight, norm1.bias, 1e-5)
            q, k, v = (y @ block.attn.qkv.weight.T).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            y = ((q * 16**-0.5) @ k.transpose(2, 3)).softmax(3) @ v
            x = x + block.attn.proj(y.transpose(1, 2).flatten(2)) / 3
            y = F.layer_norm(x, (32,), norm2.weight, norm2.bias, 1e-5)
            x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(y))) / 3
        x = F.layer_norm(x, (32,), host.norm.weight, host.norm.bias, 1e-5)
        logits = host.head(x[:, 0]) + 0.5 * host.aux_head(x[:, 1:]).max(1).values
        assert_close(host(images), logits)
        assert_close(host.token_logits(x), host.aux_head(x[:, 1:]))


TABLE = [  # parameters in millions, GMACs with both heads, pixels
    ("lv_vit_tiny", 8.53, None, 224),
    ("lv_vit_small", 26.15, 6.55, 224),
    ("lv_vit_medium", 55.83, 12.68, 224),
    ("lv_vit_large", 150.5, None, 448),
]


@pytest.mark.parametrize(("name", "parameters", "work", "size"), TABLE)
def test_size_and_macs_equal_the_published(
    name: str, parameters: float, work: float | None, size: int
) -> None:
    with torch.device("meta"):
        host = timm.create_model(name).eval()
    assert host.patch_embed.img_size == (size, size)
    assert sum(p.numel() for p in host.parameters()) / 1e6 == pytest.approx(parameters, rel=6e-4)
    if work is not None:
        assert gmacs(host, (3, size, size)) == pytest.approx(work, rel=5e-3)


def test_named_models_come_from_both_doors() -> None:
    for create in (evovit.create_model, timm.create_model):
        host = create("lv_vit_tiny", num_classes=7, drop_path_rate=0.1, depth=2)
        assert isinstance(host, LVViT) and host.num_classes == 7
    assert timm.data.resolve_data_config(model=host)["crop_pct"] == 0.9
    with pytest.raises(evovit.EvoViTError, match="No weights of LV-ViT or SiT are hosted"):
        timm.create_model("lv_vit_small", pretrained=True)


def test_training_may_leave_the_second_head_to_the_loss() -> None:
    """Logits of both heads, or the class token's alone; the patch tokens' are at hand either way."""
    images = pictures()
    for both in (True, False):
        host = tiny(aux_in_training=both)
        model = evovit.reduce_tokens(host, "evit", blocks=(1,), keep_ratio=0.5).train()
        outputs = model.run(images)
        assert outputs.token_logits.shape == (2, 9, 5)  # 8 kept and the fused one
        alone = adapt(host).class_logits(outputs.features)
        added = 0.5 * outputs.token_logits.amax(1)
        assert_close(outputs.logits, alone + added if both else alone)
        with torch.no_grad():
            outputs = model.eval().run(images)
            largest = host.token_logits(outputs.features).amax(1)
            assert_close(outputs.logits, host.class_logits(outputs.features) + 0.5 * largest)


def test_the_second_head_reads_every_token_that_is_there() -> None:
    """All grid cells where a method keeps them (idle ones too), else those that are left."""
    images, host = pictures(), tiny()
    for method, options, count in (
        ("idle_vit", {"start_block": 1}, 16),
        ("evo_vit", {"start_block": 1, "stage_length": 2}, 16),
        ("tome", {"r": 3}, 16),
        ("keep", {"blocks": (1,), "keep_ratio": 0.5}, 8),
        ("sit", {"blocks": (1,)}, 8),
    ):
        model = evovit.reduce_tokens(host, method, **options)
        with torch.no_grad():
            outputs = model.run(images)
        assert outputs.features.shape[1] == 1 + count
        assert_close(outputs.logits, host.forward_head(outputs.features))


def test_reset_gives_both_heads_another_number_of_classes() -> None:
    model = evovit.reduce_tokens(tiny(), "evit", blocks=(1,))
    model.reset_classifier(3)
    assert model(pictures()).shape == (2, 3)
    assert model.host.aux_head.out_features == 3 and model.get_classifier() is model.host.head
    with pytest.raises(evovit.EvoViTError, match="LV-ViT's heads take only 'token'"):
        model.reset_classifier(3, "avg")
    frozen = tiny(aux_weight=0.0)
    frozen.reset_classifier(3)
    assert not frozen.aux_head.weight.requires_grad
    without = tiny(num_classes=0)
    assert without(pictures()).shape == (2, 32)


def test_timms_conveniences() -> None:
    host, images = tiny(), pictures()
    assert host.no_weight_decay() & dict(host.named_parameters()).keys() == {"cls_token", "pos_embed"}
    groups = param_groups_layer_decay(host, layer_decay=0.5)
    assert sum(len(g["params"]) for g in groups) == len(list(host.parameters()))
    with torch.no_grad():
        expected = host(images)
        assert torch.equal(copy.deepcopy(host)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(host))(images), expected)
        maps = host.forward_intermediates(images, indices=1, intermediates_only=True)
    assert maps[0].shape == (2, 32, 4, 4)
    gradients = []
    for recompute in (False, True):
        host.train().set_grad_checkpointing(recompute)
        host.zero_grad()
        host(images).square().mean().backward()
        gradients.append([p.grad.clone() for p in host.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_another_input_size_moves_the_positions_as_timm_does() -> None:
    host = tiny()
    before = host.pos_embed.detach().clone()
    host.set_input_size((48, 40))
    assert host.patch_embed.grid_size == (6, 5) and host.pos_embed.shape == (1, 31, 32)
    assert torch.equal(host.pos_embed[:, :1], before[:, :1])
    model = evovit.reduce_tokens(host, "evo_vit", start_block=1)
    with torch.no_grad():
        images = torch.randn(2, 3, 48, 40)
        assert model.run(images, record=True).trace[0].num_patches == 30
    with pytest.raises(evovit.EvoViTError, match="img_size is 44 x 40; allowed are multiples"):
        host.set_input_size((44, 40))


def test_initial_values_are_deits() -> None:
    torch.manual_seed(0)
    host = LVViT(depth=1, num_classes=1000)
    for weight in (host.head.weight, host.aux_head.weight, host.cls_token, host.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert host.aux_head.bias.abs().max() == host.head.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"img_size": 30}, "img_size is 30 x 30; allowed are multiples of the patch's 8 pixels"),
        ({"stem": "4c"}, "patch_size is 8; the stem '4c' makes patches of 16 pixels"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad is for timm's own patch embedding"),
        ({"stem": "2c"}, "stem is '2c'; allowed is 4_2, 4c or 6c"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        tiny(**options)


def test_another_image_size_is_refused_in_one_sentence() -> None:
    with pytest.raises(evovit.EvoViTError, match="The images have 24 x 24 pixels, the model is for 32 x 32"):
        tiny()(pictures(size=24))


def test_wrong_checkpoints_are_refused_in_one_sentence() -> None:
    state = dense_state(Golden("idlevit_lvvit"))
    with pytest.raises(evovit.EvoViTError, match="no released size, so give both"):
        evovit.load_official("lv_vit", state)
    with pytest.raises(evovit.EvoViTError, match="210 patches, but the checkpoint has 196 positions"):
        evovit.load_official("lv_vit", state, num_heads=2, skip_lam=2.0, img_size=(224, 240))
    with pytest.raises(evovit.EvoViTError, match="'patch_embed.conv1.weight' is missing"):
        evovit.load_official("lv_vit", Golden("evit").state_dict())
    del state["patch_embed.bn2.weight"]
    with pytest.raises(evovit.EvoViTError, match="incomplete or inconsistent"):
        evovit.load_official("lv_vit", state, num_heads=2, skip_lam=2.0)


def test_a_released_size_needs_no_further_word() -> None:
    with torch.device("meta"):
        state = timm.create_model("lv_vit_tiny").state_dict()
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}
    host = evovit.load_official("lv_vit", state)
    assert host.blocks[0].attn.num_heads == 4 and host.blocks[0].ls1.divisor == 1
    assert list(host.state_dict()) == list(state)


def test_a_part_the_view_does_not_know_is_refused() -> None:
    host: Any = make_host("lv_vit")
    host.blocks[2].ls2 = torch.nn.Identity()
    with pytest.raises(evovit.EvoViTError, match="The scale of block 2 is a Identity"):
        evovit.check_adapter(host)


@pytest.mark.parametrize(("options", "size"), [({}, 32), ({"stem": "4c", "patch_size": 16}, 64)])
def test_batch_norm_of_the_stem_is_fused_away(options: dict[str, Any], size: int) -> None:
    """Same logits with convolutions alone, of LV-ViT's stem and of SiT's."""
    host = tiny(**({"img_size": size, "stem_width": 8} | options))
    generator, images = torch.Generator().manual_seed(2), pictures(size=size)
    for module in host.patch_embed.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    with torch.no_grad():
        expected = host(images)
        fused = fuse_batch_norm(host)
        assert_close(fused(images), expected)
    assert not [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    evovit.reduce_tokens(fused, "evit", blocks=(1,))
