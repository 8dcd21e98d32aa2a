"""The host of Evo-LeViT and its named models: exact, loadable, of the published size; the contract."""

from __future__ import annotations

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import evovit
from evovit.backbones import adapt
from evovit.checkpoints.reduced import load_reduced, save_reduced
from evovit.macs import gmacs
from evovit.models.levit_cls import LevitCls
from tests.backbones.test_timm_levit import alive
from tests.conftest import Golden, pictures
from tests.parity import assert_close, assert_near

SMALL: dict[str, Any] = {
    **{"img_size": 64, "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (2, 1, 1)},
    **{"num_classes": 5},
}
MODES = [{"mode": mode, "learn_trade_off": learn} for mode in ("stage", "layer") for learn in (True, False)]


def small(**options: Any) -> LevitCls:
    torch.manual_seed(0)
    return alive(LevitCls(**(SMALL | options)))  # type: ignore[return-value]


def reduced(host: nn.Module | None = None, **options: Any) -> evovit.ReducedViT:
    return evovit.reduce_tokens(host or small(), "evo_levit", **({"start_block": 1} | options))


IMAGES = pictures(3, size=64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distilled": False},
        {"class_heads": False, "in_chans": 1},
        {"img_size": (48, 112)},
        {"img_size": 70, "stem_type": "s8"},
        {"embed_dim": (16,), "num_heads": (2,), "depth": (2,)},
        {"drop_path_rate": 0.2, "mlp_ratio": 3.0},
    ],
    ids=str,
)
def test_the_views_reproduce_the_host(options: dict[str, Any]) -> None:
    host = small(**options)
    evovit.check_adapter(host)
    backbone = adapt(host)
    images = torch.randn(2, *backbone.image_shape)
    with torch.no_grad():
        kept = reduced(host, keep_ratio=1.0)
        assert_close(kept(images), host(images))
        assert_close(kept.forward_features(images), host.forward_features(images))
        assert torch.isfinite(reduced(host)(images)).all()


def test_a_foreign_part_or_image_size_is_refused_in_a_sentence() -> None:
    host = small()
    host.stages[1].downsample.attn_downsample.gate = nn.Linear(1, 1)
    with pytest.raises(evovit.EvoViTError, match="A down-sampling .* holds gate"):
        reduced(host)
    with pytest.raises(evovit.EvoViTError, match="a 6 x 6 grid, but the positions are for 4 x 4"):
        small()(pictures(size=96))
    with pytest.raises(evovit.EvoViTError, match="stem_type is 's4'; allowed is s16 or s8"):
        small(stem_type="s4")
    with pytest.raises(evovit.EvoViTError, match="No weights of LeViT with a class token"):
        timm.create_model("evo_levit_128s", pretrained=True)


def test_timms_conveniences() -> None:
    host = small()
    model = reduced(host)
    spared = {"pos_embed", *(f"stages.{i}.downsample.attn_downsample.pos_embed" for i in (1, 2))}
    assert host.no_weight_decay() == spared
    assert model.no_weight_decay() == {f"model.{name}" for name in spared}
    assert model.get_classifier() == (host.head, host.head_dist)
    model.reset_classifier(7)
    assert model(IMAGES).shape == (3, 7) and set(model.train().run(IMAGES).extra_logits) == {
        *("distilled", "class_token", "class_token_distilled"),
    }
    with pytest.raises(evovit.EvoViTError, match="global_pool is 'max'"):
        host.reset_classifier(7, "max")
    host.eval().set_grad_checkpointing()
    assert_close(host(IMAGES), small_again(host)(IMAGES))
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 64, 64)


def small_again(host: LevitCls) -> LevitCls:
    plain = copy.deepcopy(host)
    plain.set_grad_checkpointing(False)
    return plain


def test_names_of_parameters_are_timms() -> None:
    theirs = timm.create_model("levit_128s", **SMALL).state_dict()
    own = ("cls_token", "pos_embed", "head_cls")
    ours = {key for key in small().state_dict() if not any(part in key for part in own)}
    assert ours == {key for key in theirs if not key.endswith("attention_biases")}


# Evo-LeViT on it


@pytest.mark.parametrize("options", MODES, ids=str)
def test_every_parameter_gets_a_gradient(options: dict[str, Any]) -> None:
    """No find_unused_parameters: a trade-off that no selection depends on gets zeros."""
    model = reduced(**options).train()
    outputs = model.run(IMAGES)
    loss = outputs.logits.square().mean() + sum(x.square().mean() for x in outputs.extra_logits.values())
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    moved = [n for n, p in model.method.named_parameters() if p.grad.abs().sum() > 0]
    assert bool(moved) == options["learn_trade_off"]


@pytest.mark.parametrize("mode", ["stage", pytest.param("layer", marks=pytest.mark.slow)])
def test_one_graph_and_an_export_with_any_batch(mode: str) -> None:
    host = small(embed_dim=(16, 24), num_heads=(2, 3), depth=(2, 1))
    model = reduced(host, mode=mode)
    torch._dynamo.reset()
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own exporter
        program = torch.export.export(model, (IMAGES[:2],), dynamic_shapes=({0: batch},)).module()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for run in (program, compiled):
            assert torch.allclose(run(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", MODES[::2], ids=str)
def test_copies_pickles_halves_recomputes_and_ignores_the_batch(options: dict[str, Any]) -> None:
    model = reduced(**options)
    with torch.no_grad():
        expected = model(IMAGES)
        assert torch.equal(copy.deepcopy(model)(IMAGES), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), expected)
        assert torch.allclose(model(IMAGES[1:2]), expected[1:2], rtol=1e-4, atol=1e-5)
        assert torch.isfinite(copy.deepcopy(model).bfloat16()(IMAGES.bfloat16())).all()
        torch.testing.assert_close(copy.deepcopy(model).double()(IMAGES.double()).float(), expected)
    gradients = []
    for recompute in (False, True):
        copied = copy.deepcopy(model).train()
        copied.set_grad_checkpointing(recompute)
        copied(IMAGES).square().mean().backward()
        gradients.append([p.grad for p in copied.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_two_models_in_threads_do_not_meet() -> None:
    """The released code keeps scores, positions and the learnt switch in module-level variables."""
    models = [reduced(**options) for options in MODES] + [reduced(small(img_size=96))]
    inputs = [*(IMAGES for _ in MODES), pictures(2, size=96)]
    expected = [model(images) for model, images in zip(models, inputs, strict=True)]

    def run(turn: int) -> Tensor:
        with torch.no_grad():
            return models[turn % 5](inputs[turn % 5])

    with ThreadPoolExecutor(5) as pool:
        for turn, logits in enumerate(pool.map(run, range(40))):
            assert torch.equal(logits, expected[turn % 5])


def test_training_goes_from_layers_to_stages_and_then_learns_the_trade_off(tmp_path: Path) -> None:
    model = reduced(switch_at=2 / 3)
    states = []
    for epoch in (0, 199, 200, 299):
        model.method.set_progress(epoch / 300)
        states.append((model.method.mode, model.method.learns))
    assert states == [("layer", False), ("layer", False), ("stage", True), ("stage", True)]
    model.method.set_progress(0.1)
    save_reduced(model, tmp_path)
    loaded = load_reduced(tmp_path, small())
    assert (loaded.method.mode, loaded.method.learns) == ("layer", False)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IMAGES), model(IMAGES))


def test_a_late_start_keeps_everything_until_then() -> None:
    model = reduced()
    model.method.set_reduction(0.0)
    with torch.no_grad():
        assert_close(model(IMAGES), model.model(IMAGES))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "block"}, "mode is 'block'; allowed is stage or layer"),
        ({"trade_off": [0.5, 0.5]}, "allowed is a number from 0 to 1"),
        ({"selection": "best"}, "selection is 'best'; allowed is global"),
        ({"trade_off": 1.5}, "trade_off is 1.5; allowed is a number from 0 to 1"),
        ({"start_block": 0}, "start_block is 0; allowed is 1 to 3"),
        ({"keep_ratio": 0}, "keep_ratio is 0"),
        ({"keep_ratio": [0.5, 0.5]}, "keep_ratio has 2 values for 4 blocks"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        reduced(**options)


@torch.no_grad()
def test_other_selections_are_the_rungs_of_table_3() -> None:
    """Class attention alone keeps no history; without fast update the placeholders wait unchanged."""
    model = reduced(small(depth=(3, 1, 1)), selection="class", fast_update=False, mode="layer")
    first, second, *_ = model.run(IMAGES, record=True).trace
    state = second.carry
    assert torch.equal(
        model.method.finish(second).x[:, 1:][~state.split.kept], first.x[:, 1:][~state.split.kept]
    )
    block = model.model.stages[0].blocks[0].attn
    q, k, _ = (
        block.qkv(model.model.embed(IMAGES)).unflatten(-1, (2, 32)).transpose(1, 2).split((8, 8, 16), -1)
    )
    assert_close(state.score, (q[:, :, :1] @ k.mT / 8**0.5).softmax(-1)[:, :, 0, 1:].mean(1))


@torch.no_grad()
def test_other_methods_run_on_it_or_are_refused() -> None:
    """IdleViT brings its tokens back before each down-sampling; EViT could not."""
    for ratio in (1.0, 0.5):
        model = evovit.reduce_tokens(small(), "idle_vit", start_block=1, keep_ratio=(1.0, ratio, ratio, 1.0))
        trace = model.run(IMAGES, record=True).trace
        assert [t.num_patches for t in trace] == [16, int(16 * ratio), int(4 * ratio), 1]
        assert torch.allclose(model(IMAGES), model.model(IMAGES), rtol=1e-4, atol=1e-5) == (ratio == 1.0)
    with pytest.raises(evovit.EvoViTError, match="EViT does not follow the 3 stages"):
        evovit.reduce_tokens(small(), "evit", blocks=(1,))


# Named models


TABLE = {  # GMACs, million parameters without the training heads on the class token
    "evo_levit_128s": (0.256, 7.84),
    "evo_levit_128": (0.305, 9.27),
    "evo_levit_192": (0.510, 11.03),
    "evo_levit_256": (0.880, 19.01),
    "evo_levit_384": (1.849, 39.30),
    "evo_levit_256_384": (2.763, 19.24),
    "evo_levit_384_384": (5.622, 39.64),
}


@pytest.mark.parametrize("name", TABLE)
def test_named_models_have_the_published_work_and_size(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    shape, (work, size) = model.pretrained_cfg["input_size"], TABLE[name]
    assert gmacs(model, shape) == pytest.approx(work, rel=5e-3)
    if name == "evo_levit_128s":
        model.method.mode = "layer"
        assert gmacs(model, shape) == pytest.approx(work, rel=5e-3)
    count = sum(p.numel() for n, p in model.named_parameters() if "head_cls" not in n)
    assert count / 1e6 == pytest.approx(size, rel=1e-3)


def test_names_are_in_both_registries() -> None:
    names = [
        f"evo_levit_{size}{end}" for size in ("128s", "128", "192", "256", "384") for end in ("", "_384")
    ]
    assert set(names) == {name for name in evovit.list_models() if name.startswith("evo_levit")}
    assert set(names) == set(timm.list_models("evo_levit*"))
    model = evovit.create_model("evo_levit_128s", num_classes=7, keep_ratio=0.7, img_size=64, mode="layer")
    assert model.num_classes == 7 and model.method.config.keep_ratio == 0.7 and model.method.mode == "layer"
    assert model(IMAGES).shape == (3, 7)


# Official checkpoints


def test_a_checkpoint_of_plain_levit_starts_an_evo_levit() -> None:
    official, evo = Golden("levit"), Golden("evo_levit").state_dict()
    with pytest.raises(evovit.EvoViTError, match="plain LeViT, .* pass fresh_parts=True"):
        evovit.load_official("evo_levit", official.state_dict(), key_dim=16)
    model = evovit.load_official("evo_levit", official.state_dict(), key_dim=16, fresh_parts=True)
    plain = evovit.load_official("levit", official.state_dict(), key_dim=16)
    own, theirs = model.model.state_dict(), plain.state_dict()
    shared = [key for key in theirs if not key.endswith("attention_biases")]
    assert all(torch.equal(own[key], theirs[key]) for key in shared)
    assert not model.model.cls_token.any() and model.model.class_heads
    with pytest.raises(evovit.EvoViTError, match="Evo-LeViT; load it as 'evo_levit'"):
        evovit.load_official("levit", evo, key_dim=16)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "key_dim is None; give the width of a head's keys .* a divisor of 32 and 48 and 64"),
        ({"key_dim": 24}, "key_dim is 24"),
        (
            {"key_dim": 16, "img_size": 384},
            "img_size is 384 x 384 pixels, but the checkpoint has 196 positions",
        ),
        ({"key_dim": 16, "keep_ratio": 2}, "keep_ratio is 2"),
    ],
)
def test_contradicting_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.load_official("evo_levit", Golden("evo_levit").state_dict(), **options)


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    state = Golden("evo_levit").state_dict()
    with pytest.raises(
        evovit.EvoViTError, match="no official LeViT or Evo-LeViT .* 'patch_embed.0.c.weight'"
    ):
        evovit.load_official("evo_levit", small().state_dict(), key_dim=16)
    for key in ("blocks.4.m1.m.learn_tradeoff", "blocks.2.kv.bn.weight", "blocks.0.m2.m.0.c.weight"):
        with pytest.raises(evovit.EvoViTError, match="incomplete or inconsistent"):
            evovit.load_official("evo_levit", {k: v for k, v in state.items() if k != key}, key_dim=16)
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 299}, tmp_path / "last.pth")
    official = Golden("evo_levit")
    case = official.case("eval_stage")
    model = evovit.load_official("evo_levit", tmp_path / "last.pth", key_dim=16)
    assert model.method.mode == "stage" and model.method.learns and not model.training
    with torch.no_grad():
        assert_near(model(official.images(case)), official, case, "logits")


def test_published_widths_need_no_key_dim() -> None:
    with torch.device("meta"):
        host = timm.create_model("levit_cls_192", img_size=32)
    state = {key: torch.zeros(value.shape) for key, value in official_names(host).items()}
    model = evovit.load_official("evo_levit", state)
    assert model.method.spec.num_heads == (3, 5, 6) and model.model.img_size == (32, 32)


def official_names(host: LevitCls) -> dict[str, Tensor]:
    """Return the host's tensors under the official names, with trade-offs."""
    renamed, k = {}, -1
    tensors = host.state_dict()
    places = {"head": "head", "head_dist": "head_dist", "head_cls": "head_cls"}
    places |= {"head_cls_dist": "head_cls_dist"} | {
        f"stem.conv{i + 1}": f"patch_embed.{2 * i}" for i in range(4)
    }
    for s, stage in enumerate(host.stages):
        if s:
            k += 1
            places[f"stages.{s}.downsample.attn_downsample"] = f"blocks.{k}"
            renamed[f"blocks.{k}.learn_tradeoff"] = torch.zeros(1)
            k += 1
            places[f"stages.{s}.downsample.mlp"] = f"blocks.{k}.m"
        for b in range(len(stage.blocks)):
            k += 1
            places |= {
                f"stages.{s}.blocks.{b}.attn": f"blocks.{k}.m1.m",
                f"stages.{s}.blocks.{b}.mlp": f"blocks.{k}.m2.m",
            }
            renamed[f"blocks.{k}.m1.m.learn_tradeoff"] = torch.zeros(1)
    for key, value in tensors.items():
        prefix = max((p for p in places if key.startswith(f"{p}.")), key=len, default="")
        name = places[prefix] + key[len(prefix) :] if prefix else key
        for ours, theirs in (
            (".proj.ln.", ".proj.1."),
            (".q.ln.", ".q.1."),
            (".ln1.", ".0."),
            (".ln2.", ".2."),
        ):
            name = name.replace(ours, theirs)
        name = name.replace(".linear.", ".l." if name.startswith("head") else ".c.")
        renamed[name.replace("pos_embed", "poss")] = value
    return renamed
