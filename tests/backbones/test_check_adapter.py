"""`check_adapter` sees what the views would ignore, leaves the host as it was, and protects prefix tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import evovit
from evovit.backbones import adapt, check_adapter, run_dense
from evovit.errors import EvoViTError
from tests.conftest import HOSTS, SIZE, TINY, disturb, make_host, pictures

KEEP = {"keep_ratio": 0.25, "start_block": 1, "stage_length": 3}


def zero_linear() -> nn.Linear:
    layer = nn.Linear(32, 32)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


PLACES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "host": lambda host: host,
    "block": lambda host: host.blocks[2],
    "attention": lambda host: host.blocks[2].attn,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["vit", "eva02"])
def test_a_part_that_starts_at_zero_is_refused(name: str, place: str) -> None:
    host = make_host(name)
    PLACES[place](host).add_module("newcomer", zero_linear())
    with pytest.raises(EvoViTError, match="holds newcomer"):
        evovit.reduce_tokens(host, "evo_vit")


@pytest.mark.parametrize("name", ["vit", "eva02"])
def test_a_zero_parameter_or_buffer_is_refused(name: str) -> None:
    host = make_host(name)
    host.blocks[0].scale = nn.Parameter(torch.zeros(32))
    with pytest.raises(EvoViTError, match=r"Block 0 .* holds scale"):
        check_adapter(host)
    host = make_host(name)
    host.blocks[0].attn.register_buffer("sink", torch.zeros(32))
    with pytest.raises(EvoViTError, match=r"attention of block 0 .* holds sink"):
        check_adapter(host)


@pytest.mark.parametrize(("name", "base"), [("vit", Block), ("eva02", EvaBlock)])
def test_a_changed_block_forward_is_refused(name: str, base: type[nn.Module]) -> None:
    class Scaled(base):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor, *args: object, **options: object) -> Tensor:
            return 1.01 * super().forward(x, *args, **options)

    host = make_host(name)
    host.blocks[1].__class__ = Scaled
    with pytest.raises(EvoViTError, match="Block 1 is a Scaled"):
        evovit.reduce_tokens(host, "evo_vit")
    Scaled.__name__, Scaled.__qualname__ = base.__name__, base.__qualname__
    with pytest.raises(EvoViTError, match=f"Block 1 is a {base.__name__} of tests"):
        evovit.reduce_tokens(host, "evo_vit")
    Scaled.__module__ = base.__module__  # what a new version of timm would look like
    with pytest.raises(EvoViTError, match="is not reproduced exactly"):
        evovit.reduce_tokens(host, "evo_vit")


def test_a_changed_head_is_refused() -> None:
    class Doubled(type(make_host("vit"))):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((super().forward(x), super().forward(x)), dim=1)

    host = make_host("vit")
    host.__class__ = Doubled
    with pytest.raises(EvoViTError, match="is not reproduced exactly"):
        check_adapter(host)


def test_values_that_are_no_numbers_are_refused() -> None:
    host = make_host("vit")
    with torch.no_grad():
        host.head.bias.fill_(torch.nan)
    with pytest.raises(EvoViTError, match="is not reproduced exactly"):
        check_adapter(host)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18", "cait_xxs24_224"])
def test_other_families_are_refused_with_one_sentence(name: str) -> None:
    with torch.device("meta"):
        host = timm.create_model(name)
    with pytest.raises(EvoViTError, match=r"not a supported host.*VisionTransformer") as refusal:
        evovit.reduce_tokens(host, "evo_vit")
    assert "timm.models.eva.Eva" in str(refusal.value)
    assert str(refusal.value).count(". ") == 0


@pytest.mark.parametrize("name", HOSTS)
def test_the_check_leaves_the_host_as_it_was(name: str) -> None:
    host = make_host(name).train()
    host.blocks[1].eval()
    host.head.weight.requires_grad_(False)

    def state() -> dict[str, Tensor]:
        return {key: value.clone() for key, value in (*host.named_parameters(), *host.named_buffers())}

    flags = {key: module.training for key, module in host.named_modules()}
    before, dice = state(), torch.get_rng_state()
    check_adapter(host)
    assert flags == {key: module.training for key, module in host.named_modules()}
    assert torch.equal(dice, torch.get_rng_state())
    after = state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.grad is None for parameter in host.parameters())
    assert not host.head.weight.requires_grad


def test_a_failing_check_leaves_the_training_flags() -> None:
    host = make_host("vit").train()
    host.forward_head = None
    with pytest.raises(EvoViTError, match="does not run on random images .*TypeError"):
        check_adapter(host)
    assert all(module.training for module in host.modules())


@pytest.mark.parametrize("name", HOSTS)
def test_a_bfloat16_host_passes(name: str) -> None:
    host = make_host(name).bfloat16()
    reduced = evovit.reduce_tokens(host, "evo_vit", selection="column_mean", **KEEP)
    with torch.no_grad():
        out = reduced(pictures().bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize("name", HOSTS)
def test_a_meta_host_passes_the_guard_on_parts_only(name: str) -> None:
    host = make_host(name).to("meta")
    check_adapter(host)
    host.blocks[0].newcomer = nn.Identity()
    with pytest.raises(EvoViTError, match="holds newcomer"):
        check_adapter(host)


ROTARY = {  # name: options beside TINY; interleaved, half, mixed per block, and grouped keys
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_dinov3": {"embed_dim": 64},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_base_patch16_rope_reg1_gap_256": {},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_base_patch16_sapiens2": {"embed_dim": 64, "num_kv_heads": (2, 1, 1, 2)},
}


@pytest.mark.parametrize("name", ROTARY)
def test_a_rotated_token_keeps_its_place_wherever_it_sits(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    host = disturb(timm.create_model(name, **(TINY | ROTARY[name]))).eval()
    backbone = adapt(host)
    with torch.no_grad():
        tokens = backbone.embed(pictures())
        order = torch.stack([torch.randperm(tokens.num_patches) for _ in range(2)])
        shuffled = tokens.change(
            x=torch.cat((tokens.prefix, tokens.patches.take_along_dim(order[:, :, None], 1)), dim=1),
            index=order,
        )
        for block in backbone.stages()[0].blocks:
            straight, mixed = block(tokens), block(shuffled)
            torch.testing.assert_close(mixed.prefix, straight.prefix)
            torch.testing.assert_close(mixed.patches, straight.patches.take_along_dim(order[:, :, None], 1))
            unplaced = block(tokens.change(index=order))
            assert (unplaced.patches - straight.patches).abs().max() > 1e-3  # places matter


def test_a_token_without_a_place_is_not_rotated() -> None:
    host = make_host("dinov3")
    backbone = adapt(host)
    tokens = backbone.embed(pictures())
    block = backbone.stages()[0].blocks[0]
    placed, placeless = block.qkv(tokens), block.qkv(tokens.change(index=torch.full_like(tokens.index, -1)))
    host.rope = None
    plain = adapt(host).stages()[0].blocks[0].qkv(tokens)
    torch.testing.assert_close(placeless.q, plain.q, rtol=0, atol=0)
    torch.testing.assert_close(placeless.k, plain.k, rtol=0, atol=0)
    assert not torch.allclose(placed.q, plain.q)


@pytest.mark.parametrize(("name", "num_prefix"), [("dinov2_reg", 5), ("deit_distilled", 2), ("dinov3", 5)])
def test_prefix_tokens_are_never_reduced(name: str, num_prefix: int) -> None:
    """The host's own blocks, given prefix and kept tokens by hand, make the very same tokens."""
    host = make_host(name)
    reduced = evovit.reduce_tokens(host, "evo_vit", fast_update=False, **KEEP)
    with torch.no_grad():
        trace = reduced.run(pictures(), record=True).trace
        rope = host._pos_embed(host.patch_embed(pictures()))[1] if name == "dinov3" else None
        index = trace[-1].index
        assert index.shape == (2, (SIZE // 8) ** 2 // 4)
        x = torch.cat((trace[0].prefix, trace[0].patches.take_along_dim(index[:, :, None], 1)), dim=1)
        for number, tokens in enumerate(trace[1:], start=1):
            x = host.blocks[number](x) if rope is None else host.blocks[number](x, rope=rope[index][:, None])
            assert tokens.num_prefix == num_prefix == host.num_prefix_tokens
            torch.testing.assert_close(tokens.x, x)


@pytest.mark.parametrize("name", HOSTS)
def test_views_reproduce_the_host(name: str) -> None:
    host = make_host(name)
    with torch.no_grad():
        torch.testing.assert_close(run_dense(adapt(host), pictures()), host.forward_features(pictures()))


class SoftCapped(Attention):
    """Logits capped at 50: invisible while weights are small."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        batch, rows, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, rows, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = 50 * torch.tanh((q @ k.transpose(-2, -1)) * self.scale / 50)
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, rows, width))


class Clamped(Block):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return super().forward(x).clamp(-30, 30)


class Trained(Block):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return super().forward(x) * (1.001 if self.training else 1.0)


def disguised(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass that claims to be its base class: name, module and all."""
    base = kind.__mro__[1]
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (kind,), names)


ODD = {
    "soft-capped attention": (SoftCapped, "attn", "once weights are large"),
    "clamping block": (Clamped, "", "once weights are large"),
    "other in training": (Trained, "", "in training mode"),
}


@pytest.mark.parametrize("odd", ODD)
def test_variants_are_refused_with_fresh_weights(odd: str) -> None:
    """By the path of their class, and where that is forged, by what they compute."""
    kind, attribute, where = ODD[odd]
    for forged in (False, True):
        torch.manual_seed(0)
        host: Any = timm.create_model("deit_tiny_patch16_224", depth=4)
        with torch.no_grad():
            expected = host.eval()(pictures(size=224))
        for block in host.blocks:
            part = getattr(block, attribute) if attribute else block
            part.__class__ = disguised(kind) if forged else kind
        with torch.no_grad():  # what a comparison with small weights would see
            assert (host(pictures(size=224)) - expected).abs().max() <= 1e-4 * expected.abs().max()
        before = {key: value.clone() for key, value in host.state_dict().items()}
        with pytest.raises(EvoViTError, match=where if forged else "does not support"):
            evovit.reduce_tokens(host, "evo_vit", start_block=2)
        assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())
        assert not host.training


def test_the_proof_leaves_dropout_and_running_statistics_alone() -> None:
    host: Any = timm.create_model("vit_tiny_patch16_224", depth=2, drop_rate=0.1, drop_path_rate=0.2)
    levit: Any = timm.create_model("levit_128s", distilled=False)
    for model in (host, levit):
        model.train()
        chances = [getattr(m, n, None) for m in model.modules() for n in ("p", "drop_prob")]
        before = {key: value.clone() for key, value in model.state_dict().items()}
        check_adapter(model)
        assert all(module.training for module in model.modules())
        assert [getattr(m, n, None) for m in model.modules() for n in ("p", "drop_prob")] == chances
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
