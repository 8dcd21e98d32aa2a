"""Where the head reads prefix tokens alone, the last block computes these rows only: same logits, less work.

Every host and method is compared with `last_block="all"` and, nothing reduced, with the host's own forward.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import evovit
from evovit.backbones import adapt, check_adapter
from evovit.backbones.prefix import PrefixBlock
from evovit.backbones.timm_blocks import PreNormBlock
from evovit.checkpoints.reduced import MANIFEST, load_reduced, save_reduced
from evovit.macs import gmacs
from evovit.methods import find_method
from evovit.ops.mask import masked_attention
from evovit.recipe.tables import ObjectiveTable
from evovit.tokens import QKV, Tokens
from evovit.train.objective import Objective
from tests.backbones.test_timm_hosts import OPTIONS, built, image_pair
from tests.conftest import HOSTS, TINY, disturb, make_host, pairs, pictures, traced
from tests.parity import assert_close
from tests.test_contract import METHODS, ON_VIT, variants, wrap

IMAGE = (3, 32, 32)
READS_PATCHES = ("vit_avg", "siglip", "eva02", "dinov3", "lv_vit", "beit", "relpos")
PREFIX_ALONE = [name for name in HOSTS if name not in READS_PATCHES]
LAST = {  # options under which a method does in the last block what it does in others
    "dynamic_vit": {"blocks": (1, 3)},
    "evit": {"blocks": (1, 3)},
    "evit-column_mean": {"blocks": (1, 3), "selection": "column_mean"},
    "evit-keep": {"blocks": (1, 3), "keep": (8, 4)},
    "evo_levit-column_mean": {"start_block": 1, "mode": "layer", "selection": "column_mean"},
    "evo_vit": {"start_block": 3, "stage_length": 1},
    "evo_vit-column_mean": {"start_block": 1, "mode": "layer", "selection": "column_mean"},
    "evo_vit-last_class": {"start_block": 1, "mode": "layer", "selection": "last_class"},
    "evo_vit-pruned": {"start_block": 1, "fast_update": False, "preserve": False, "rejoin_last": False},
    "idle_vit": {"start_block": 3},
    "idle_vit-column_mean": {"start_block": 1, "group_length": 1, "selection": "column_mean"},
    "evit-shift": {"blocks": (1, 3), "selection": "shift"},
    "evo_vit-shift": {"start_block": 1, "mode": "layer", "selection": "shift"},
    "keep-shift": {"blocks": (1, 3), "selection": "shift"},
    "keep": {"blocks": (1, 3)},
    "keep-column_mean": {"blocks": (1, 3), "selection": "column_mean"},
    "mctf": {"r": 3, "blocks": (1, 3)},
    "mctf-recompute": {"r": 3, "blocks": (1, 3), "ahead": "recompute"},
    "mctf-off": {"r": 3, "blocks": (1, 3), "ahead": "off"},
    "pitome": {"r": (3, 3, 3, 3), "bipartite": "second_half"},
    "ppt": {"r": 4, "blocks": (1, 3), "threshold": 1e-3},
    "ppt-column_mean": {
        "r": 4,
        "blocks": (1, 3),
        "selection": "column_mean",
        "proportional_attention": False,
    },
    "subsample": {"block": 3},
    "tome": {"r": (3, 3, 3, 3), "proportional_attention": False},
}


def token_host(name: str) -> nn.Module:
    """Return a small host of an option without a named model, whose head reads the class token alone."""
    host = built(OPTIONS[name]).eval()
    host.reset_classifier(7, global_pool="token")
    return disturb(host)


NO_CLASS_TOKEN = ("no_positions", "eva_no_class_token", "relpos_swin")
WITH_TOKEN = [name for name in OPTIONS if "pool" not in name and name not in NO_CLASS_TOKEN]


def both(
    host: nn.Module, method: str, options: dict[str, Any]
) -> tuple[evovit.ReducedViT, evovit.ReducedViT]:
    """Return a reduced model that computes the prefix alone in its last block, and one that computes all."""
    reduced, whole = (wrap(host, method, options) for _ in range(2))
    whole.method.load_state_dict(reduced.method.state_dict())
    whole.last_block = "all"
    return reduced, whole


@pytest.mark.parametrize(("method", "host"), pairs(METHODS))
def test_logits_are_those_of_all_rows_for_less_work(method: str, host: str) -> None:
    for options in variants(method):
        reduced, whole = both(make_host(host), method, options)
        with torch.no_grad():
            ours, expected = reduced(pictures()), whole(pictures())
        if host in READS_PATCHES:
            assert torch.equal(ours, expected)
            assert gmacs(reduced, IMAGE) == gmacs(whole, IMAGE)
        else:
            assert_close(ours, expected)
            assert gmacs(reduced, IMAGE) < 0.98 * gmacs(whole, IMAGE)


@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize("host", ["vit", "deit_distilled", "dinov2_reg"])
def test_a_method_may_reduce_in_the_last_block(host: str, name: str) -> None:
    reduced, whole = both(make_host(host), name.split("-")[0], LAST[name])
    with torch.no_grad():
        assert_close(reduced(pictures()), whole(pictures()))
    assert gmacs(reduced, IMAGE) < gmacs(whole, IMAGE)


@pytest.mark.parametrize("name", [*PREFIX_ALONE, "sit_backbone"])
def test_dense_logits_are_the_hosts(name: str) -> None:
    if name == "sit_backbone":
        host, images = disturb(timm.create_model("sit_backbone_tiny", img_size=64)).eval(), pictures(size=64)
    else:
        host, images = make_host(name), pictures()
    reduced, shape = evovit.reduce_tokens(host, "dense"), images.shape[1:]
    with torch.no_grad():
        assert_close(reduced(images), host(images))
    assert gmacs(reduced, shape) < gmacs(host, shape)


@pytest.mark.parametrize("name", WITH_TOKEN)
def test_every_kind_of_attention_projects_the_prefix_alone(name: str) -> None:
    """Biases beside and inside the projection, grouped queries, gates, norms of q and k, all rotations."""
    host, images = token_host(name), image_pair((16, 24))
    with torch.no_grad():
        for method in ("dense", "tome", "idle_vit"):
            reduced, whole = both(host, method, find_method(method).example)
            assert_close(reduced(images), whole(images))
        assert_close(evovit.reduce_tokens(host, "dense")(images), host(images))


def test_an_unfused_and_a_fused_projection_save_the_same() -> None:
    """Patch tokens have no queries, mixed values, output gate, projection and FFN."""
    rows, width = 24, 48
    for name in ("registers", "eva_gated", "eva_unfused", "eva_separate_bias", "eva_no_bias", "eva_mixed"):
        host = token_host(name)
        prefix = host.num_prefix_tokens
        gate = rows * width**2 if name == "eva_gated" else 0
        hidden = host.blocks[-1].mlp
        mlp = sum(layer.weight.numel() for layer in hidden.modules() if isinstance(layer, nn.Linear))
        saved = rows * (2 * width**2 + mlp) + 2 * rows * (rows + prefix) * width + gate
        work = gmacs(host, (3, 16, 24)) - gmacs(evovit.reduce_tokens(host, "dense"), (3, 16, 24))
        assert round(work * 1e9) == saved, name


def test_deit_small_does_without_a_fourteenth() -> None:
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224").eval()
        dense = evovit.reduce_tokens(host, "dense")
    saved = 196 * 10 * 384**2 + 2 * 196 * 197 * 384
    whole = gmacs(host, (3, 224, 224))
    assert whole - gmacs(dense, (3, 224, 224)) == pytest.approx(saved / 1e9, rel=1e-9)
    assert saved / 1e9 / whole == pytest.approx(0.069, abs=5e-4)
    dense.last_block = "all"
    assert gmacs(dense, (3, 224, 224)) == whole


@pytest.mark.parametrize(("method", "options"), ON_VIT)
def test_all_else_computes_every_row(method: str, options: dict[str, Any]) -> None:
    """Features, tokens, maps and recorded runs have all patch tokens, to the same bits."""
    reduced, whole = both(make_host("vit"), method, options)
    images = pictures()
    with torch.no_grad():
        assert torch.equal(reduced.forward_features(images), whole.forward_features(images))
        for record in (False, True):
            ours, theirs = (model.run(images, record=record) for model in (reduced, whole))
            assert torch.equal(ours.features, theirs.features) and torch.equal(ours.logits, theirs.logits)
            assert torch.equal(ours.tokens.x, theirs.tokens.x) and ours.tokens.num_patches > 0
        if reduced.method.keeps_grid:
            assert torch.equal(reduced.feature_map(images), whole.feature_map(images))


@pytest.mark.parametrize(("method", "options"), ON_VIT)
def test_training_is_the_same_to_the_last_bit(method: str, options: dict[str, Any]) -> None:
    host, found = make_host("vit"), []
    for model in both(host, method, options):
        model.train().zero_grad()
        objective = Objective(model, ObjectiveTable(), make_host("vit"))
        torch.manual_seed(0)
        sum(objective(pictures(), torch.tensor([0, 1])).values()).backward()
        torch.manual_seed(0)
        model(pictures()).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("host", PREFIX_ALONE)
def test_gradients_in_evaluation_are_those_of_all_rows(host: str) -> None:
    """Saliency maps: gradients of logits for images and weights."""
    model, found = make_host(host), []
    for reduced in both(model, "evo_vit", {"start_block": 1, "stage_length": 2}):
        images = pictures().requires_grad_()
        model.zero_grad()
        reduced(images).square().mean().backward()
        found.append([images.grad, *(p.grad for p in model.parameters())])
    ours, expected = ([g for g in each if g is not None] for each in found)
    largest = max(g.abs().max() for g in expected[1:])  # a bias of keys has none but rounding
    for one, other in zip(ours, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(other.abs().max(), 1e-3 * largest)


def test_a_method_in_training_sees_all_rows_whatever_the_host_does() -> None:
    """SiT's reverse modules read the patch tokens of the last block."""
    reduced, whole = both(make_host("vit"), "sit", {"blocks": (1,)})
    for model in (reduced, whole):
        model.eval().method.train()
    assert torch.equal(reduced(pictures()), whole(pictures()))


@pytest.mark.parametrize(("method", "options"), traced(ON_VIT, ("evo_vit", "tome")))
def test_it_compiles_in_one_graph_and_exports_with_a_dynamic_batch(
    method: str, options: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    reduced, whole = both(make_host("vit"), method, options)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporter
        compiled = torch.compile(reduced, fullgraph=True, backend="eager")
        assert_close(compiled(pictures()), whole(pictures()))
        program = torch.export.export(reduced, (pictures(),), dynamic_shapes=({0: batch},)).module()
        for count in (1, 5):
            assert_close(program(pictures(count)), whole(pictures(count)))


def test_setting_it_takes_effect_in_a_compiled_model() -> None:
    torch._dynamo.reset()
    reduced = evovit.reduce_tokens(make_host("vit"), "dense")
    with torch.no_grad():
        compiled, expected = torch.compile(reduced, backend="eager", fullgraph=True), reduced(pictures())
        assert torch.equal(compiled(pictures()), expected)
        reduced.last_block = "all"
        assert torch.equal(compiled(pictures()), reduced.run(pictures()).logits)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_and_autocast(method: str, kind: torch.dtype) -> None:
    reduced, _ = both(make_host("vit").to(kind), method, find_method(method).example)
    with torch.no_grad():
        assert reduced(pictures().to(kind)).isfinite().all()
        mixed = wrap(make_host("vit"), method, find_method(method).example)
        with torch.autocast("cpu", kind):
            assert mixed(pictures()).isfinite().all()


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "norm1", "norm2", "mlp"])
def test_hooks_inside_the_last_block_run(part: str) -> None:
    host, calls = make_host("vit"), []
    reduced, whole = both(host, "dense", {})
    with torch.no_grad():
        expected = whole(pictures())
        host.blocks[-1].get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
        assert_close(reduced(pictures()), expected)
    assert calls == [1]


def test_a_projection_of_another_class_is_called_as_it_is() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    host = make_host("vit")
    host.blocks[-1].attn.qkv.__class__ = Doubled
    with torch.no_grad():
        assert_close(evovit.reduce_tokens(host, "dense")(pictures()), host(pictures()))


@pytest.mark.parametrize("shape", [(17, 17), (2, 1, 1, 17), (2, 2, 17, 17)])
@pytest.mark.parametrize("mixes", [False, True])
def test_a_bias_and_an_attention_of_the_methods_own_reach_the_prefix(
    shape: tuple[int, ...], mixes: bool
) -> None:
    backbone = adapt(make_host("vit"))
    tokens, bias = backbone.embed(pictures()), torch.randn(shape)
    block = backbone.stages()[0].blocks[3]
    mix = partial(masked_attention, mask=torch.rand(2, 17).round()) if mixes else None
    with torch.no_grad():
        qkv = block.qkv(tokens)
        expected = block.ffn(block.attention(tokens, qkv, bias, mix))
        last = PrefixBlock(block)
        ours = last.ffn(last.attention(tokens, last.qkv(tokens), bias, mix))
    assert (ours.num_patches, ours.index.shape, ours.num_prefix) == (0, (2, 0), 1)
    assert_close(ours.x, expected.prefix)


def test_a_head_said_to_read_the_prefix_alone_is_proven_to() -> None:
    class ReadsMore(VisionTransformer):
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return super().forward_head(x + x.mean(1, keepdim=True), pre_logits)

    host = disturb(ReadsMore(**TINY)).eval()
    with pytest.raises(evovit.EvoViTError, match="ReadsMore is not reproduced exactly"):
        evovit.reduce_tokens(host, "dense")


def test_wrong_queries_of_the_prefix_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(self: PreNormBlock, tokens: Tokens, count: int) -> QKV:
        qkv = self.qkv(tokens)
        return qkv._replace(q=qkv.q[:, :, 1:2])

    monkeypatch.setattr(PreNormBlock, "leading_qkv", swapped)
    with pytest.raises(evovit.EvoViTError, match="not reproduced exactly"):
        check_adapter(make_host("vit"))


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    for choice in ("prefix", "all"):
        reduced = evovit.reduce_tokens(make_host("vit"), "tome", r=2, last_block=choice)
        save_reduced(reduced, tmp_path / choice)
        loaded = load_reduced(tmp_path / choice, make_host("vit"))
        assert loaded.last_block == choice
        with torch.no_grad():
            assert torch.equal(loaded.eval()(pictures()), reduced(pictures()))
    path = tmp_path / "all" / MANIFEST
    text = path.read_text()
    assert text.count('"last_block": "all"') == 1
    path.write_text(text.replace('"last_block": "all",', ""))  # as an older version wrote it
    assert load_reduced(tmp_path / "all", make_host("vit")).last_block == "prefix"
    path.write_text(text.replace('"last_block": "all"', '"last_block": 3'))
    with pytest.raises(evovit.EvoViTError, match="last_block is 3; allowed is"):
        load_reduced(tmp_path / "all", make_host("vit"))


def test_any_other_word_is_refused_in_a_sentence() -> None:
    words = "last_block is 'prefixes'; allowed is .*Did you mean 'prefix'"
    with pytest.raises(evovit.EvoViTError, match=words):
        evovit.reduce_tokens(make_host("vit"), "dense", last_block="prefixes")  # type: ignore[arg-type]
    reduced = evovit.reduce_tokens(make_host("vit"), "dense")
    with pytest.raises(evovit.EvoViTError, match=words):
        reduced.last_block = "prefixes"
    assert reduced.last_block == "prefix"


def test_a_pool_that_changes_is_followed() -> None:
    host = make_host("vit")
    reduced = evovit.reduce_tokens(host, "dense")
    reduced.reset_classifier(5, global_pool="avg")
    with torch.no_grad():
        assert torch.equal(reduced(pictures()), reduced.run(pictures()).logits)
        assert_close(reduced(pictures()), host(pictures()))


def test_the_first_of_two_inferences_runs_its_last_block_no_further_than_its_keys() -> None:
    """Table 4, "via twice inference": its score is read from the last block's queries and keys."""
    with torch.device("meta"):
        host = timm.create_model("deit_tiny_patch16_224").eval()
        twice = evovit.reduce_tokens(host, "evo_vit", selection="last_class", last_block="all")
        once = evovit.reduce_tokens(host, "evo_vit", selection="class", last_block="all")
    shape, width = (3, 224, 224), 192
    blocks = 11 * (12 * 197 * width**2 + 2 * 197**2 * width) + 3 * 197 * width**2
    assert gmacs(twice, shape) - gmacs(once, shape) == pytest.approx(blocks / 1e9, rel=1e-6)
