"""ReducedViT as a timm user meets it: names, conveniences, registry, errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import evovit
from evovit.backbones import Block, adapt
from evovit.methods import find_method, register
from evovit.methods.base import Method
from evovit.methods.evo_vit import EvoViT
from evovit.methods.subsample import Subsample
from evovit.tokens import Tokens
from tests.conftest import HOSTS, make_host, pictures


def make_headed(name: str, num_classes: int) -> nn.Module:
    """Return a tiny host with a head for so many classes."""
    host = make_host(name)
    host.reset_classifier(num_classes)
    return host


def named(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Return a model of timm's registry for 64 pixels."""
    return timm.create_model(name, img_size=64, num_classes=num_classes, **options).eval()


SMALL = {"start_block": 1, "stage_length": 2}


def test_named_models_come_from_both_doors() -> None:
    for create in (evovit.create_model, timm.create_model):
        model = create("evo_deit_tiny_patch16_224", num_classes=7, keep_ratio=0.7, drop_path_rate=0.1)
        assert isinstance(model, evovit.ReducedViT)
        assert model.num_classes == 7
        assert model.method.config.keep_ratio == 0.7
        assert model.method.config.fast_update is False
    assert set(evovit.list_models()) <= set(timm.list_models())
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 224, 224)


def test_named_models_refuse_what_they_cannot_give() -> None:
    with pytest.raises(evovit.EvoViTError, match="No Evo-DeiT weights are hosted"):
        evovit.create_model("evo_deit_tiny_patch16_224", pretrained=True)
    with pytest.raises(evovit.EvoViTError, match="Did you mean 'evo_deit_tiny_patch16_224'"):
        evovit.create_model("evo_deit_tiny_patch16_22")


def test_timms_conveniences() -> None:
    host, images = make_host("vit_avg"), pictures()
    reduced = evovit.reduce_tokens(host, "evo_vit", assisted_head=True, **SMALL)
    with torch.no_grad():
        features = reduced.forward_features(images)
        assert features.shape == (2, 17, 32)
        assert torch.equal(reduced.forward_head(features), reduced(images))
        assert reduced.forward_head(features, pre_logits=True).shape == (2, 32)
        assert reduced.feature_map(images).shape == (2, 32, 4, 4)
    assert reduced.get_classifier() is host.head
    assert reduced.no_weight_decay() == {f"model.{name}" for name in host.no_weight_decay()}
    assert reduced.no_weight_decay() & dict(reduced.named_parameters()).keys() == {
        "model.cls_token",
        "model.pos_embed",
    }
    assert reduced.num_classes == 5 and reduced.num_features == 32
    assert reduced.pretrained_cfg == {}
    reduced.reset_classifier(3)
    outputs = reduced.run(images)
    assert outputs.logits.shape == outputs.extra_logits["class_token"].shape == (2, 3)


HEADLESS: dict[str, Callable[[int], nn.Module]] = {
    **{name: partial(make_headed, name) for name in HOSTS},
    "levit": partial(named, "levit_128s"),
    "levit_distilled": partial(named, "levit_256d"),
    "levit_cls": partial(named, "levit_cls_128s"),
    "levit_cls_plain": partial(named, "levit_cls_128s", distilled=False, class_heads=False),
    "sit_backbone": partial(named, "sit_backbone_tiny"),
}


@pytest.mark.parametrize("name", HEADLESS)
@pytest.mark.parametrize("method", ["dense", "evo_levit", "idle_vit"])
def test_without_classes_logits_are_the_pooled_features(name: str, method: str) -> None:
    """timm's convention, of a host made so and of one whose classifier is reset; and a new one may follow."""
    options = {"selection": "column_mean", "compared": "active"}
    options = {k: v for k, v in options.items() if hasattr(find_method(method).Config, k)}
    made = evovit.reduce_tokens(HEADLESS[name](0), method, **options)
    reset = evovit.reduce_tokens(HEADLESS[name](5), method, **options)
    reset.reset_classifier(0)
    images = torch.randn(2, *adapt(made.model).image_shape)
    for reduced in (made, reset):
        for training in (False, True):
            reduced.train(training)
            with torch.no_grad():
                outputs = reduced.run(images)
            assert outputs.logits.shape == (2, reduced.num_features)
            assert outputs.token_logits is None
        with torch.no_grad():
            features = reduced.eval().forward_features(images)
            pooled = reduced.forward_head(features, pre_logits=True)
            assert (reduced(images) - pooled).abs().max() <= 1e-5 * pooled.abs().max()
            reduced.last_block = "all"
            assert torch.equal(reduced(images), pooled)
            reduced.reset_classifier(3)
            assert reduced(images).shape == (2, 3)


@pytest.mark.parametrize("name", ["evo_deit_tiny_patch16_224", "evo_levit_128s", "sit_tiny"])
def test_named_models_without_classes_give_features(name: str) -> None:
    model = evovit.create_model(name, num_classes=0).train()
    with torch.no_grad():
        outputs = model.run(pictures(2, 224))
    assert outputs.logits.shape == (2, model.num_features)
    assert all(extra.shape == (2, model.num_features) for extra in outputs.extra_logits.values())


def test_layer_decay_groups_match_the_wrapped_names() -> None:
    from timm.optim import param_groups_layer_decay

    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", **SMALL)
    ours = param_groups_layer_decay(reduced, layer_decay=0.5)
    hosts = param_groups_layer_decay(reduced.model, layer_decay=0.5)
    assert [(g["lr_scale"], len(g["params"])) for g in ours] == [
        (g["lr_scale"], len(g["params"])) for g in hosts
    ]


def test_a_feature_map_is_refused_where_tokens_are_gone() -> None:
    options = {"preserve": False, "fast_update": False}
    with pytest.raises(evovit.EvoViTError, match="leaves 8 of 16"):
        evovit.reduce_tokens(make_host("vit"), "evo_vit", **SMALL, **options).feature_map(pictures())


@pytest.mark.parametrize(
    ("method", "options"),
    [("evit", {"blocks": (1,), "keep": (15,)}), ("sit", {"blocks": (1,), "keep_ratio": 1.0})],
)
def test_a_feature_map_is_refused_where_cells_have_no_token_though_the_count_fits(
    method: str, options: dict[str, Any]
) -> None:
    """15 kept and one fused are 16 tokens, as are 16 slots; a fused token or a slot has no place."""
    reduced = evovit.reduce_tokens(make_host("vit_avg"), method, **options)
    assert reduced.run(pictures()).tokens.num_patches == 16
    with pytest.raises(evovit.EvoViTError, match="leaves cells of the 4 x 4 grid without a token"):
        reduced.feature_map(pictures())


def test_a_feature_map_places_tokens_by_their_index() -> None:
    """On a grid of the first block, and on the coarser one of pooling, whose index is of the finer."""

    class Shuffled(Subsample):
        keeps_grid = False

        def run_block(self, block: Block, tokens: Tokens) -> Tokens:
            tokens = super().run_block(block, tokens)
            if block.number < self.config.block:
                return tokens
            order = torch.randperm(tokens.num_patches)
            x = torch.cat((tokens.prefix, tokens.patches[:, order]), dim=1)
            return tokens.change(x=x, index=tokens.index[:, order])

    host, images = make_host("vit"), pictures()
    for stride in (1, 2):
        config = Subsample.Config(block=1, stride=stride)
        straight, shuffled = (
            evovit.ReducedViT(host, cls(config, adapt(host).spec)) for cls in (Subsample, Shuffled)
        )
        with torch.no_grad():
            maps = [model.feature_map(images) for model in (straight, shuffled)]
        assert maps[0].shape == (2, 32, 4 // stride, 4 // stride)
        assert torch.allclose(*maps, rtol=1e-4, atol=1e-5)


def test_any_depth_and_any_resolution() -> None:
    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=7, num_classes=3, dynamic_img_size=True
    )
    reduced = evovit.reduce_tokens(host, "evo_vit", start_block=2, stage_length=3, keep_ratio=0.5).eval()
    with torch.no_grad():
        for size in (64, 96, 128):
            trace = reduced.run(pictures(1, size), record=True).trace
            assert trace[-1].num_patches == (size // 16) ** 2 // 2 + 1  # and the representative token


def test_a_config_is_taken_as_it_is() -> None:
    config = EvoViT.Config(keep_ratio=0.25, **SMALL)
    assert evovit.reduce_tokens(make_host("vit"), config).method.config is config
    with pytest.raises(evovit.EvoViTError, match="Options keep_ratio are given beside a Config"):
        evovit.reduce_tokens(make_host("vit"), config, keep_ratio=0.5)


def test_unknown_methods_and_hosts_are_refused_in_one_sentence() -> None:
    with pytest.raises(evovit.EvoViTError, match="There is no method 'evovit'.*Did you mean 'evo_vit'"):
        evovit.reduce_tokens(make_host("vit"), "evovit")
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=12, num_heads=(1, 1, 1, 1)
    )
    with pytest.raises(
        evovit.EvoViTError, match="SwinTransformer is not a supported host; .*VisionTransformer"
    ):
        evovit.reduce_tokens(swin, "evo_vit")


def test_a_method_name_is_used_once() -> None:
    with pytest.raises(ValueError, match="is taken by EvoViT"):
        register("evo_vit")(type("Other", (Method,), {}))


def test_a_printed_model_shows_the_options_in_force() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", keep_ratio=0.25, **SMALL)
    reduced.method.mode = "layer"
    text = repr(reduced)
    assert "keep_ratio=0.25" in text and "stage_length=2" in text and "mode='layer'" in text


def test_wrapping_leaves_every_modules_own_mode() -> None:
    host = make_host("vit_avg").train()
    frozen = (host.patch_embed, *host.blocks[:2])
    for part in frozen:
        part.eval()
    flags = {name: module.training for name, module in host.named_modules()}
    reduced = evovit.reduce_tokens(host, "evo_vit", assisted_head=True, **SMALL)
    assert {name: module.training for name, module in host.named_modules()} == flags
    assert reduced.training and all(module.training for module in reduced.method.modules())
    reduced = evovit.reduce_tokens(host.eval(), "evo_vit", assisted_head=True, **SMALL)
    assert not any(module.training for module in reduced.modules())


def test_counting_leaves_modes_and_no_cache_of_evaluation() -> None:
    host = timm.create_model("levit_128s", img_size=64, num_classes=5).eval()
    host.stages[1].train()
    flags = [module.training for module in host.modules()]
    evovit.gmacs(host, (3, 64, 64))
    assert [module.training for module in host.modules()] == flags
    assert not any(stage.blocks[0].attn.attention_bias_cache for stage in host.stages)


def test_checkpointing_asked_of_the_host_takes_effect() -> None:
    for reduced in (
        evovit.reduce_tokens(make_host("vit"), "evo_vit", **SMALL),
        evovit.reduce_tokens(timm.create_model("levit_cls_128s", img_size=64), "evo_levit"),
    ):
        assert not reduced.grad_checkpointing
    host, calls = make_host("vit").train(), []
    host.set_grad_checkpointing()
    reduced = evovit.reduce_tokens(host, "evo_vit", **SMALL)
    host.blocks[2].norm1.register_forward_hook(lambda *_: calls.append(1))
    reduced(pictures()).sum().backward()
    assert len(calls) == 2  # once more in the backward pass


HOOKS = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("place", ["", "blocks", "blocks.1", "blocks.1.attn", "blocks.1.attn.attn_drop"])
def test_a_hook_that_would_never_run_is_refused(place: str, hook: str) -> None:
    host = make_host("vit")
    handle = getattr(host.get_submodule(place), hook)(lambda *_: None)
    named = place.replace(".", "[.]") or "The host itself"
    with pytest.raises(evovit.EvoViTError, match=f"{named} has a hook .*run.images, record=True") as refusal:
        evovit.reduce_tokens(host, "evo_vit", verify=False, **SMALL)
    assert str(refusal.value).count(". ") == 0
    handle.remove()
    evovit.reduce_tokens(host, "evo_vit", **SMALL)


def test_a_forward_of_a_modules_own_that_would_never_run_is_refused() -> None:
    host = timm.create_model("levit_128s", img_size=64)
    block = host.stages[0].blocks[1]
    block.forward = block.forward
    with pytest.raises(
        evovit.EvoViTError, match="stages[.]0[.]blocks[.]1 has a hook or a forward of its own"
    ):
        evovit.reduce_tokens(host, "idle_vit", selection="column_mean")


@pytest.mark.parametrize("place", ["patch_embed", "blocks.1.norm1", "blocks.1.attn.qkv", "blocks.1.mlp"])
def test_hooks_on_inner_layers_run(place: str) -> None:
    host, calls = make_host("vit"), []
    host.get_submodule(place).register_forward_hook(lambda *_: calls.append(1))
    for method, options in (("evo_vit", SMALL), ("idle_vit", {"start_block": 1})):
        reduced = evovit.reduce_tokens(host, method, **options)
        calls.clear()
        reduced(pictures())
        assert calls


def test_two_models_in_one_process_do_not_share_state() -> None:
    one, two = (
        evovit.reduce_tokens(make_host("vit"), "evo_vit", keep_ratio=r, **SMALL) for r in (0.25, 0.75)
    )
    images = pictures()
    with torch.no_grad():
        alone = one(images)
        two(images)
        assert torch.equal(one(images), alone)


@pytest.mark.parametrize("arguments", [["methods"], ["--help"]])
def test_the_command_line_runs_as_a_module(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evovit", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "evo_vit" in done.stdout or "quickstart" in done.stdout


def test_a_wrong_command_line_exits_with_2_and_no_traceback() -> None:
    for arguments in (["quickstart", "--keep-ratio", "0"], ["no-such-command"]):
        done = subprocess.run(
            [sys.executable, "-m", "evovit", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_py_typed_is_shipped() -> None:
    assert (Path(evovit.__file__).parent / "py.typed").exists()


def test_a_feature_map_of_a_method_that_keeps_the_grid_is_one_graph() -> None:
    reduced, images = evovit.reduce_tokens(make_host("vit_avg"), start_block=1), pictures()
    with torch.no_grad():
        compiled = torch.compile(reduced.feature_map, fullgraph=True, backend="aot_eager")(images)
        assert torch.allclose(compiled, reduced.feature_map(images), rtol=1e-4, atol=1e-5)
