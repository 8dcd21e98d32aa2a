"""What every block view promises a method: attention may be replaced, and scored before it is projected."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

import evovit
from evovit.backbones import Backbone, adapt
from evovit.methods import find_method
from evovit.ops.mask import masked_attention
from evovit.ops.select import take, take_qkv, with_prefix
from evovit.tokens import Tokens
from tests.conftest import HOSTS, disturb, make_host, pictures
from tests.parity import assert_close


def second_block(name: str) -> tuple[Backbone, Tokens]:
    """Return a tiny host's view and what enters its blocks; "levit" has position biases and wide values."""
    if name != "levit":
        backbone, images = adapt(make_host(name)), pictures()
    else:
        host = disturb(timm.create_model("levit_128s", img_size=64, num_classes=5), 0.1).eval()
        backbone, images = adapt(host), pictures(size=64)
    with torch.no_grad():
        return backbone, backbone.embed(images)


@pytest.mark.parametrize("host", [*HOSTS, "levit"])
def test_a_mask_of_ones_in_place_of_fused_attention_changes_nothing(host: str) -> None:
    """Also beside a method's bias; the host's own position bias is in what `mix` is given."""
    backbone, tokens = second_block(host)
    block = backbone.stages()[0].blocks[1]
    mix = partial(masked_attention, mask=torch.ones(tokens.x.shape[:2]))
    with torch.no_grad():
        qkv = block.qkv(tokens)
        for bias in (None, torch.randn(2, 1, 1, tokens.x.shape[1])):
            expected = block.attention(tokens, qkv, bias)
            assert_close(block.attention(tokens, qkv, bias, mix).x, expected.x)
        assert not torch.allclose(expected.x, block.attention(tokens, qkv).x)


@pytest.mark.parametrize("host", [*HOSTS, "levit"])
def test_scoring_qkv_and_qkv_of_rows_are_rows_of_the_whole_attention_input(host: str) -> None:
    """Keys of all, queries of the prefix; then everything of the chosen rows: on every kind of block."""
    backbone, tokens = second_block(host)
    with torch.no_grad():
        block = backbone.stages()[0].blocks[1]
        whole, seen = block.qkv(tokens), block.scoring_qkv(tokens)
        prefix = tokens.num_prefix
        assert_close(seen.k, whole.k)
        if prefix:
            assert_close(seen.q[:, :, :prefix], whole.q[:, :, :prefix])
        patches = torch.tensor([[0, 3, 7, 11], [1, 2, 14, 15]])
        rows = with_prefix(patches, prefix)
        active = tokens.change(x=take(tokens.x, rows), index=tokens.index.gather(1, patches))
        expected, ours = take_qkv(whole, rows), block.qkv_of_rows(active, seen, rows)
    for name in ("q", "k", "v"):
        assert_close(getattr(ours, name), getattr(expected, name))
    assert (ours.extra is None) == (expected.extra is None)
    if ours.extra is not None:
        assert_close(ours.extra, expected.extra)


def called(model: nn.Module, host: nn.Module, images: Tensor) -> set[str]:
    """Return the names of the host's modules that a forward of `model` calls."""
    seen, hooks = set[str](), []
    for name, module in host.named_modules():
        hooks.append(module.register_forward_hook(lambda *_, name=name: seen.add(name)))
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", [*HOSTS, "levit", "levit_cls"])
def test_an_adapter_names_every_module_that_is_never_called(name: str) -> None:
    if name in HOSTS:
        host, images = make_host(name), pictures()
    else:
        entry = {"levit": "levit_128s", "levit_cls": "levit_cls_128s"}[name]
        host, images = timm.create_model(entry, img_size=64, num_classes=5).eval(), pictures(size=64)
    for module in host.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # calls the dropout of the weights
    names = {id(module): name for name, module in host.named_modules()}
    bypassed = {names[id(module)] for module in adapt(host).bypassed()}
    ours = called(evovit.reduce_tokens(host, "dense"), host, images)
    assert called(host, host, images) - ours <= bypassed
    assert not bypassed & ours


def test_attention_dropout_has_no_place_in_a_method_that_mixes_itself() -> None:
    host = make_host("vit")
    host.blocks[0].attn.attn_drop.p = 0.1
    reduced = evovit.reduce_tokens(host, "dynamic_vit", blocks=(1,)).train()
    with pytest.raises(evovit.EvoViTError, match="attention dropout of 0.1; create the host without"):
        reduced(pictures())
    reduced.eval()(pictures())


@pytest.mark.parametrize("method", evovit.list_methods())
@pytest.mark.parametrize("host", ["vit", "vit_avg", "dinov2_reg", "lv_vit"])
def test_features_are_what_the_head_read(method: str, host: str) -> None:
    model = make_host(host)
    reduced = evovit.reduce_tokens(model, method, **find_method(method).example)
    with torch.no_grad():
        outputs = reduced.run(pictures())
        assert torch.equal(adapt(model).head(outputs.features), outputs.logits)
        assert outputs.token_logits is None and outputs.class_logits is None
        if host == "lv_vit":
            outputs = reduced.train().run(pictures())
            each, mask = outputs.token_logits, reduced.method.finish(outputs.tokens).mask
            best = (each if mask is None else each.masked_fill(mask[:, :, None] == 0, -torch.inf)).amax(1)
            assert_close(outputs.class_logits + 0.5 * best, outputs.logits)
