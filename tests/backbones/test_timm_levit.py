"""LeViT through timm: equal to the official code, exact or refused, a host for methods that keep the grid."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.models.levit import Levit, LevitDistilled
from torch import Tensor, nn
from torch.nn import functional as F

import evovit
from evovit.backbones import adapt
from evovit.backbones.timm_levit_blocks import relative_bias
from evovit.checkpoints.official_levit import read_layout, rename
from evovit.macs import gmacs
from evovit.methods import find_method
from tests.conftest import Golden, disturb, pictures
from tests.parity import assert_close, assert_near

OFFICIAL = Golden("levit")
SMALL: dict[str, Any] = {
    **{"img_size": 64, "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (2, 1, 2)},
    **{"num_classes": 5},
}
METHODS = {
    "idle_vit": {"selection": "column_mean", "start_block": 1, "group_length": 2},
    "evo_levit": {"selection": "column_mean", "start_block": 1},
    "evo_levit, layer": {"selection": "column_mean", "start_block": 1, "mode": "layer"},
    "evo_levit, shift": {"selection": "shift", "start_block": 1},
}


def alive(model: nn.Module) -> nn.Module:
    """Disturb every parameter and the statistics of every batch norm."""
    generator = torch.Generator().manual_seed(2)
    for module in disturb(model).modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def small(cls: type[Levit] = LevitDistilled, **options: Any) -> Any:
    torch.manual_seed(0)
    return alive(cls(**(SMALL | options)))


def reduced(name: str, **options: Any) -> evovit.ReducedViT:
    return evovit.reduce_tokens(small(), name.split(",")[0], **(METHODS[name] | options))


def official_host(case: dict[str, Any]) -> Any:
    state = OFFICIAL.state_dict()
    if "nodist" in case["name"]:
        state = {key: value for key, value in state.items() if not key.startswith("head_dist")}
    return evovit.load_official("levit", state, key_dim=OFFICIAL.side["model"]["D"])


@pytest.mark.parametrize("name", ["eval", "eval_fused", "eval_nodist"])
def test_evaluation_equals_official(name: str) -> None:
    """Logits of the host and of its views, and the tokens after every attention and every MLP."""
    case = OFFICIAL.case(name)
    host, images = official_host(case), OFFICIAL.images(case)
    if case.get("fused"):
        host = evovit.fuse_batch_norm(host)
        for key in (key for key in case["outputs"] if key.startswith("fused.")):
            assert_close(fused_parameter(host, key.removeprefix("fused.")), OFFICIAL.out(case, key))
    backbone, number, kinds = adapt(host), 0, case["block_types"]
    with torch.no_grad():
        assert_near(host(images), OFFICIAL, case, "logits")
        tokens = backbone.embed(images)
        for stage in backbone.stages():
            if stage.enter:
                assert kinds[number] == "AttentionSubsample"
                tokens, number = stage.enter(tokens), number + 2
                assert_after(tokens.x, case, number - 1)
            for block in stage.blocks:
                tokens, _ = block.attend(tokens)
                assert_after(tokens.x, case, number)
                tokens = block.ffn(tokens)
                assert_after(tokens.x, case, number + 1)
                number += 2
        assert number == len(kinds)
        assert_near(backbone.head(tokens.x), OFFICIAL, case, "logits")


def assert_after(x: Tensor, case: dict[str, Any], number: int) -> None:
    assert_close(x.mean(1), OFFICIAL.out(case, f"mean_after.{number}"))
    if number in case.get("token_layers", ()):
        assert_close(x, OFFICIAL.out(case, f"tokens.{number}"))


def fused_parameter(host: nn.Module, official: str) -> Tensor:
    """Return the parameter whose name in the fused official model is given; its layers have no norm."""
    module, part = official.rsplit(".", 1)
    inner = "l" if module.startswith("head") else "c"
    (ours,) = rename({f"{module}.{inner}.{part}": torch.ones(())}, read_layout(OFFICIAL.state_dict()))[0]
    return host.get_parameter(ours)


def test_training_equals_official() -> None:
    """Logits of both heads, loss, every gradient and the statistics of the batch norms."""
    case = OFFICIAL.case("train")
    host = official_host(case)
    host.set_distilled_training(True)
    model = evovit.reduce_tokens(host, "evo_levit", selection="column_mean", keep_ratio=1.0).train()
    outputs = model.run(OFFICIAL.images(case))
    labels, distilled = torch.tensor(case["labels"]), outputs.extra_logits["distilled"]
    assert_near(outputs.logits, OFFICIAL, case, "logits", 1e-4)
    assert_near(distilled, OFFICIAL, case, "logits_dist", 1e-4)
    loss = F.cross_entropy(outputs.logits, labels) + F.cross_entropy(distilled, labels)
    assert_near(loss[None], OFFICIAL, case, "loss", 1e-4)
    loss.backward()
    norms = dict(zip(case["grad_norm_names"], OFFICIAL.out(case, "grad_norm"), strict=True))
    layout, largest = read_layout(OFFICIAL.state_dict()), max(norms.values())
    allowed = 10 * case["checks"]["float64_max_abs_diff"]["grad_norm_relative"]
    for official, expected in norms.items():
        (ours,) = rename({official: expected}, layout)[0]
        actual = host.get_parameter(ours).grad.norm()
        assert abs(actual - expected) <= allowed * (expected + 1e-3 * largest), official
    for key in case["outputs"]:
        kind, _, official = key.partition(".")
        if kind in ("grad", "bn_after"):
            (ours,) = rename({official: labels}, layout)[0]
            actual = host.get_parameter(ours).grad if kind == "grad" else host.get_buffer(ours)
            assert_close(actual, OFFICIAL.out(case, key), allowed if kind == "grad" else 1e-5)


def test_a_dense_distilled_host_trains_one_head_on_labels_and_one_on_the_teacher() -> None:
    from evovit.recipe.tables import ObjectiveTable
    from evovit.train.objective import Objective

    host, teacher, labels = small().train(), small(Levit), torch.tensor([1, 3])
    goal = ObjectiveTable(distillation="hard", teacher="given")
    terms = Objective(copy.deepcopy(host), goal, teacher).train()(pictures(size=64), labels)
    host.set_distilled_training(True)
    first, second = host(pictures(size=64))
    with torch.no_grad():
        answer = teacher(pictures(size=64)).argmax(1)
    assert_close(terms["class"], F.cross_entropy(first, labels) / 2)
    assert_close(terms["distillation"], F.cross_entropy(second, answer) / 2)


LINEAR = [name for name in timm.list_models(module="levit") if "conv" not in name]


@pytest.mark.parametrize("name", LINEAR)
def test_every_linear_levit_of_timm_is_reproduced(name: str) -> None:
    torch.manual_seed(0)
    stride = 8 if name.endswith("s8") else 16
    host = alive(timm.create_model(name, **(SMALL | {"img_size": (4 * stride, 6 * stride)})))
    evovit.check_adapter(host)
    assert adapt(host).image_shape == (3, 4 * stride, 6 * stride)


@pytest.mark.parametrize(
    "options",
    [
        {"drop_path_rate": 0.1},
        {"drop_rate": 0.1},
        {"num_classes": 0},
        {"in_chans": 4},
        {"attn_ratio": (2, 3, 4), "mlp_ratio": 3},
        {"act_layer": "silu", "attn_act_layer": "gelu"},
        {"img_size": (96, 80), "depth": (1, 2, 1)},
        {"embed_dim": (16,), "depth": (3,), "num_heads": (2,)},
    ],
    ids=str,
)
def test_every_option_is_reproduced(options: dict[str, Any]) -> None:
    evovit.check_adapter(small(Levit, **options))


def test_what_would_be_wrong_is_refused_in_a_sentence() -> None:
    with pytest.raises(evovit.EvoViTError, match="convolutional LeViT keeps its tokens as an image"):
        evovit.reduce_tokens(small(use_conv=True), "idle_vit", selection="column_mean")
    odd = small()
    odd.stages[1].downsample.attn_downsample.q.down.pool = nn.AvgPool2d(3, 2, 1)
    with pytest.raises(evovit.EvoViTError, match="A down-sampling .* holds pool"):
        evovit.check_adapter(odd)
    gated = small()
    gated.stages[0].blocks[1].attn.gate = nn.Linear(16, 16)
    with pytest.raises(evovit.EvoViTError, match="attention of block 1 .* holds gate"):
        evovit.check_adapter(gated)
    with pytest.raises(
        evovit.EvoViTError, match="a 5 x 5 grid, but this LeViT's position biases are for 4 x 4"
    ):
        reduced("idle_vit")(pictures(size=80))
    with pytest.raises(evovit.EvoViTError, match=r"needs a class token .* choose 'column_mean'"):
        evovit.reduce_tokens(small(), "idle_vit")


@pytest.mark.parametrize("method", [m for m in evovit.list_methods() if not find_method(m).crosses_stages])
def test_methods_that_cannot_follow_the_stages_are_refused(method: str) -> None:
    cls = find_method(method)
    options = {"selection": "column_mean"} if hasattr(cls.Config, "selection") else {}
    with pytest.raises(evovit.EvoViTError, match="does not follow the 3 stages|needs a class token"):
        evovit.reduce_tokens(small(), method, **options)


def test_checking_leaves_no_stale_biases_in_the_host() -> None:
    """timm's LeViT caches its gathered biases in evaluation."""
    host, other = small(), small()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
        evovit.check_adapter(host)
        host.load_state_dict(other.state_dict())
        assert torch.equal(host(pictures(size=64)), other(pictures(size=64)))


def test_position_bias_follows_the_tokens() -> None:
    """Naive loop; a token without a place gets none."""
    table, grid = torch.randn(3, 12), (3, 4)
    index = torch.tensor([[5, 0, 11, -1], [2, 3, 7, 8]])
    bias = relative_bias(table, index, grid[1])
    assert bias.shape == (2, 3, 4, 4)
    for image in range(2):
        for a, first in enumerate(index[image].tolist()):
            for b, second in enumerate(index[image].tolist()):
                dy, dx = abs(first // 4 - second // 4), abs(first % 4 - second % 4)
                expected = table[:, dy * 4 + dx] if min(first, second) >= 0 else torch.zeros(3)
                assert torch.equal(bias[image, :, a, b], expected)


@torch.no_grad()
def test_idle_tokens_wait_and_the_active_keep_their_own_bias() -> None:
    """Each block of IdleViT against the host's own modules on the active rows; entries see whole grids."""
    model = reduced("idle_vit", keep_ratio=(1.0, 0.5, 0.4, 1.0, 0.5))
    host, images = model.model, pictures(size=64)
    trace = model.run(images, record=True).trace
    x = host.stem(images).flatten(2).transpose(1, 2)
    number = 0
    for stage in host.stages:
        x = stage.downsample(x)
        for block in stage.blocks:
            attn, index = block.attn, trace[number].index
            bias = attn.attention_biases[:, attn.attention_bias_idxs]  # (H, N, N)
            for image in range(2):
                rows = index[image]
                part = x[image : image + 1, rows]
                q, k, v = attn.qkv(part).unflatten(-1, (attn.num_heads, -1)).split((8, 8, 16), -1)
                logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * attn.scale + bias[:, rows][:, :, rows]
                mixed = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2)
                part = part + attn.proj(mixed)
                x = x.index_put((torch.tensor([image]), rows), (part + block.mlp(part))[0])
            assert_close(model.method.finish(trace[number]).x, x)
            number += 1
    assert [tokens.num_patches for tokens in trace] == [16, 8, 1, 1, 1] == [16, 8, int(4 * 0.4), 1, 1]


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_is_the_host_exactly(name: str) -> None:
    model = reduced(name, keep_ratio=1.0)
    with torch.no_grad():
        assert_close(model(pictures(size=64)), model.model(pictures(size=64)))
        assert_close(
            model.forward_features(pictures(size=64)), model.model.forward_features(pictures(size=64))
        )


@pytest.mark.parametrize("name", METHODS)
def test_the_contract_holds_on_stages(name: str) -> None:
    """Whole grids between stages, no dependence on the batch, gradients, half precision."""
    model, images = reduced(name), pictures(3, size=64)
    with torch.no_grad():
        expected = model(images)
        assert torch.allclose(model(images[1:2]), expected[1:2], rtol=1e-4, atol=1e-5)
        assert torch.equal(copy.deepcopy(model)(images), expected)
        whole = [model.method.finish(tokens) for tokens in model.run(images, record=True).trace]
        assert [tokens.num_patches for tokens in whole] == [16, 16, 4, 1, 1]
        assert all(torch.equal(t.index[0], torch.arange(t.num_patches)) for t in whole)
        half = copy.deepcopy(model).bfloat16()
        assert torch.isfinite(half(images.bfloat16())).all()
    model.train()(images).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", [pytest.param("idle_vit", marks=pytest.mark.slow), "evo_levit"])
def test_compiles_in_one_graph_and_exports(name: str) -> None:
    host, images = small(depth=(2, 1), embed_dim=(16, 24), num_heads=(2, 3)), pictures(3, size=64)
    model = evovit.reduce_tokens(host, name, **METHODS[name])
    torch._dynamo.reset()
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own exporter
        program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},)).module()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for run in (program, compiled):
            assert torch.allclose(run(images), model(images), rtol=1e-4, atol=1e-5)


def test_macs_equal_the_table() -> None:
    for name, expected in (("128s", 0.305), ("128", 0.405), ("192", 0.657), ("256", 1.127), ("384", 2.352)):
        with torch.device("meta"):
            host = timm.create_model(f"levit_{name}").eval()
        assert gmacs(host, (3, 224, 224)) == pytest.approx(expected, rel=5e-3)
