"""IdleViT: equal to the official code on its reference numbers, and right on hosts it was not written for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import evovit
from evovit.backbones import adapt
from evovit.macs import gmacs
from evovit.methods.idle_vit import Idle
from evovit.ops.distance import feature_distance, logit_divergence, token_cut
from evovit.ops.score import class_logit_mean
from evovit.ops.select import take_qkv
from evovit.recipe.tables import ObjectiveTable
from evovit.tokens import QKV, Outputs, Taught, Tokens
from evovit.train.objective import Objective
from tests.conftest import Golden, make_host, pictures
from tests.parity import assert_close, assert_same_gradients, gradients_of

OFFICIAL, LV_VIT, UNITS = Golden("idlevit"), Golden("idlevit_lvvit"), Golden("units_idlevit")
CASES = [(official, case["name"]) for official in (OFFICIAL, LV_VIT) for case in official.side["cases"]]
IDS = [f"{official.side['name']}-{name}" for official, name in CASES]


def load_case(official: Golden, case: dict[str, Any]) -> evovit.ReducedViT:
    options = case["constructor"]
    start = options["idle_layers"][0]
    depth = official.side["model"]["depth"]
    ratios = [1.0] * start + options["keep_ratios"][: depth - start]
    loss = case.get("loss", {"cutloss_type": "both", "cut_weight": 0.0})
    return evovit.load_official(
        "idle_vit",
        official.state_dict(),
        num_heads=official.side["model"]["num_heads"],
        keep_ratio=ratios,
        start_block=start,
        cut=loss["cutloss_type"],
        cut_weight=loss["cut_weight"],
        cut_blocks="released",
        distill_weight=loss.get("distill_weight", 0.0),
        **({"skip_lam": 2.0} if official is LV_VIT else {}),
    )


@pytest.mark.parametrize(("official", "name"), CASES, ids=IDS)
def test_equals_official(official: Golden, name: str) -> None:
    """Logits, picked patches and traces; in training all loss terms, also with a teacher, and gradients."""
    case = official.case(name)
    model, images = load_case(official, case), official.images(case)
    if case["mode"] == "train":
        model.train()
    outputs = model.run(images, record=True)
    assert_close(outputs.logits, official.out(case, "logits"))
    joined = [model.method.finish(tokens) for tokens in outputs.trace]
    assert_close(torch.stack([t.x[:, 0] for t in joined]), official.out(case, "cls_trace"))
    assert_close(torch.stack([t.patches.mean(1) for t in joined]), official.out(case, "mean_trace"))
    for number, keep in zip(case["idle_layers"], case["keep"], strict=True):
        picked = outputs.trace[number].index
        assert picked.shape[1] == keep
        assert torch.equal(picked, official.out(case, f"keep_idx.{number}").long().sort(1).values)
    if "labels" in case:
        check_losses(official, case, model, images, outputs)


def check_losses(
    official: Golden, case: dict[str, Any], model: evovit.ReducedViT, images: Tensor, outputs: Outputs
) -> None:
    kind, idle, weights = case["loss"]["cutloss_type"], len(case["idle_layers"]), case["loss"]
    cuts = torch.stack(outputs.tokens.carry.cuts)
    assert_close(cuts, official.out(case, f"cut_per_layer.{kind}"))
    taught = None
    if case["constructor"].get("distill"):
        teacher = load_case(official, case).model  # the student's batch statistics may have moved on
        taught = Objective(model, ObjectiveTable(), teacher).teach(images)
        shown = slice(None) if official is LV_VIT else 0
        assert_close(outputs.features[:, shown], official.out(case, "feature"))
        if official is OFFICIAL:
            assert_close(taught.features[:, 0], official.out(case, "teacher_feature"))
        else:
            assert_close(taught.logits, official.out(case, "teacher_logits"))
    terms = model.method.losses(outputs, taught)
    assert_close(terms["token_cut"], weights["cut_weight"] / idle * official.out(case, "loss_cut")[0])
    if taught is not None:
        each = weights["distill_weight"]
        assert_near(terms["logits"] / each, official, case, "loss_logits_distill")
        assert_near(terms["features"] / each / 100, official, case, "loss_feature_distill")
    terms["class"] = F.cross_entropy(outputs.logits, torch.tensor(case["labels"]))
    assert_close(terms["class"], official.out(case, "loss_cls")[0])
    loss = torch.stack(list(terms.values())).sum()
    assert_close(loss, official.out(case, "loss")[0])
    loss.backward()
    assert_same_gradients(official, case, gradients_of(model))


def assert_near(actual: Tensor, official: Golden, case: dict[str, Any], name: str) -> None:
    """Compare to 1e-5, or ten times what float32 itself loses there."""
    expected, lost = official.out(case, name)[0], 10 * case["checks"]["float64_max_abs_diff"][name]
    assert abs(actual - expected) <= max(1e-5 * abs(expected), lost)


def test_released_defaults_are_the_loaders_defaults() -> None:
    case = OFFICIAL.case("eval_keep0.7")
    model = evovit.load_official("idle_vit", OFFICIAL.state_dict(), num_heads=3)
    with torch.no_grad():
        assert_close(model(OFFICIAL.images(case)), OFFICIAL.out(case, "logits"))
    case, state = LV_VIT.case("eval_keep0.7"), LV_VIT.state_dict()
    model = evovit.load_official("idle_vit", state, num_heads=2, skip_lam=2.0)
    with torch.no_grad():
        assert_close(model(LV_VIT.images(case)), LV_VIT.out(case, "logits"))
    assert model.method.config.compared == "active" and model.model.aux_in_training
    later = evovit.load_official("idle_vit", OFFICIAL.state_dict(), num_heads=3, start_block=4)
    case = OFFICIAL.case("eval_keep0.7_from_layer4")
    with torch.no_grad():
        assert_close(later(OFFICIAL.images(case)), OFFICIAL.out(case, "logits"))


@pytest.mark.parametrize("kind", ["both", "intra", "inter"])
def test_token_cut_equals_the_official_unit(kind: str) -> None:
    """Per layer; summed over every second layer it is what the released code adds up."""
    tensors = {k.removeprefix(f"token_cut_{kind}."): v for k, v in UNITS.tensors.items()}
    cuts = []
    for layer in range(5):
        attention = tensors[f"in.attn{layer}"].mean(1).softmax(-1)
        cut = token_cut(attention, tensors[f"in.mask{layer}"][..., 0], 1)
        cuts.append(cut.inter + cut.intra if kind == "both" else getattr(cut, kind))
    assert_close(torch.stack(cuts), tensors["out.cut_per_layer"])
    assert_close(torch.stack(cuts[::2]).sum(), tensors["out.cut"][0])
    total = F.cross_entropy(tensors["in.logits"], tensors["in.labels"].long())
    assert_close(total + 10 / 5 * torch.stack(cuts[::2]).sum(), tensors["out.total"][0])


@pytest.mark.parametrize("kind", ["class", "token"])
def test_distillation_terms_equal_the_official_unit(kind: str) -> None:
    start = f"total_distill_{kind}_feature."
    tensors = {k.removeprefix(start): v for k, v in UNITS.tensors.items() if k.startswith(start)}
    logits, taught = tensors["in.logits"], tensors["in.teacher_logits"]
    assert_close(logit_divergence(logits, taught), tensors["out.logits_distill"][0])
    student, teacher = tensors["in.feature"], tensors["in.teacher_feature"]
    if kind == "token":  # the released code masks with the last layer's mask and normalises over tokens
        student, teacher = (x * tensors["in.mask4"] for x in (student, teacher))
    ours = feature_distance(student, teacher, dim=-1 if kind == "class" else 1)
    assert_close(ours, tensors["out.feature_distill"][0])
    if kind == "token":  # the method compares the active rows alone
        mask = tensors["in.mask4"][..., 0].bool()
        student, teacher = tensors["in.feature"], tensors["in.teacher_feature"]
        state = Idle(rows=mask[:1].nonzero()[:, 1][None].expand(1, -1))
        tokens = Tokens(student[:1], torch.zeros(1, 1), 1, (1, 1), carry=state)
        method = evovit.reduce_tokens(make_host("vit"), "idle_vit", start_block=1, compared="active").method
        outputs = Outputs(logits[:1], tokens, {}, [], student[:1], None)
        part = method.distance(outputs, Taught(taught[:1], teacher[:1]))
        masked = [x[:1] * tensors["in.mask4"][:1] for x in (student, teacher)]
        assert_close(part, feature_distance(*masked, dim=1))


def test_the_masked_softmax_of_the_official_code_picks_the_same_rows() -> None:
    logits = UNITS.tensors["softmax_with_top_attn.in.attn"]
    top = UNITS.tensors["softmax_with_top_attn.out.top"].long()
    best = logits.mean(1)[:, 0, 1:].topk(8).indices + 1
    assert torch.equal(top[:, 1:].sort(1).values, best.sort(1).values)
    rows = top[:, None, None, :].expand(-1, 2, 17, -1)
    gathered = logits.gather(3, rows).softmax(-1)  # over the active keys alone
    assert_close(gathered, UNITS.tensors["softmax_with_top_attn.out.attn"].gather(3, rows))


def masked_forward(host: nn.Module, images: Tensor, keep: dict[int, int]) -> Tensor:
    """IdleViT's training form: all rows run, idle keys are masked out, idle rows add nothing."""
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    prefix = host.num_prefix_tokens
    for number, block in enumerate(host.blocks):
        mask = x.new_ones(x.shape[:2])
        attn, y = block.attn, block.norm1(x)
        q, k, v = attn.qkv(y).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        logits = q @ k.transpose(-2, -1) * attn.scale
        if number in keep:
            score = (q @ k.transpose(-2, -1)).mean(1)[:, 0, prefix:]
            best = score.topk(keep[number]).indices
            mask = torch.zeros_like(score).scatter(1, best, 1.0)
            mask = F.pad(mask, (prefix, 0), value=1.0)
        logits = logits.masked_fill(mask[:, None, None] == 0, -1e5)
        out = attn.proj(attn.norm((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        x = x + block.ls1(out) * mask[..., None]
        x = x + block.ls2(block.mlp(block.norm2(x))) * mask[..., None]
    return x


@pytest.mark.parametrize(
    "host", ["vit", "vit_avg", "dinov2_reg", "deit3", "deit_distilled", "qk_norm", "clip"]
)
def test_gathered_training_equals_the_masked_form_in_values_and_gradients(host: str) -> None:
    """Registers and the distillation token always take part; LayerScale and q/k norm are the host's."""
    model, images = make_host(host), pictures()
    options = {"start_block": 1, "group_length": 2, "keep_ratio": 0.6, "cut_weight": 0.0}
    reduced = evovit.reduce_tokens(model, "idle_vit", **options).train()
    gradients = []
    for masked in (False, True):
        model.zero_grad()
        tokens = reduced.method.finish(reduced.run(images).tokens)
        x = masked_forward(model, images, {1: 9, 2: 9, 3: 5}) if masked else tokens.x
        gradients.append(
            (x, torch.autograd.grad(x.square().sum(), [model.pos_embed, model.blocks[1].mlp.fc1.weight]))
        )
    (ours, own), (expected, other) = gradients
    assert_close(ours, expected)
    for a, b in zip(own, other, strict=True):
        assert_close(a, b, 2e-5)


def test_idle_tokens_keep_their_bits_and_may_return() -> None:
    reduced = evovit.reduce_tokens(
        make_host("vit"), "idle_vit", start_block=1, keep_ratio=0.5, group_length=3
    )
    with torch.no_grad():
        trace = reduced.run(pictures(), record=True).trace
    joined = [reduced.method.finish(tokens) for tokens in trace]
    returned = 0
    for number in (1, 2, 3):
        took_part = torch.zeros(2, 16, dtype=torch.bool).scatter(1, trace[number].index, True)
        before, after = joined[number - 1].patches, joined[number].patches
        assert torch.equal(before[~took_part], after[~took_part])
        assert not torch.isclose(before[took_part], after[took_part]).all(-1).any()
        if number > 1:
            idle_before = torch.ones(2, 16, dtype=torch.bool).scatter(1, trace[number - 1].index, False)
            returned += int((idle_before & took_part).sum())
        assert torch.equal(joined[number].index, torch.arange(16).expand(2, 16))
    assert returned > 0


def test_rows_of_qkv_keep_their_own_bias_and_extra() -> None:
    """Hosts with a position bias: row and column of each pair move together."""
    q, k, v = torch.randn(3, 2, 3, 7, 4)
    qkv = QKV(q, k, v, 0.5, bias=torch.randn(1, 3, 7, 7), extra=torch.randn(2, 7, 6))
    rows = torch.tensor([[0, 2, 5], [0, 1, 6]])
    some = take_qkv(qkv, rows)
    for image in range(2):
        for i, a in enumerate(rows[image].tolist()):
            assert torch.equal(some.q[image, :, i], q[image, :, a])
            assert torch.equal(some.v[image, :, i], v[image, :, a])
            assert torch.equal(some.extra[image, i], qkv.extra[image, a])
            for j, b in enumerate(rows[image].tolist()):
                assert torch.equal(some.bias[image, :, i, j], qkv.bias[0, :, a, b])


def test_scores_are_the_raw_class_logits_of_the_host() -> None:
    """On a rotary host with a class token the patches picked are those of its own queries and keys."""
    model = make_host("eva02")
    reduced = evovit.reduce_tokens(model, "idle_vit", start_block=0, group_length=4, keep_ratio=0.5)
    backbone = adapt(model)
    with torch.no_grad():
        tokens = backbone.embed(pictures())
        qkv = backbone.stages()[0].blocks[0].qkv(tokens)
        logits = torch.einsum("bhd,bhkd->bhk", qkv.q[:, :, 0], qkv.k).mean(1)[:, 1:]
        assert_close(class_logit_mean(qkv, 1), logits * qkv.scale)
        picked = reduced.run(pictures(), record=True).trace[0].index
    assert torch.equal(picked, logits.topk(8).indices.sort(1).values)


COUNTS = {  # methods' table: patch tokens per group, N = 196
    0.9: [176, 158, 142],
    0.8: [156, 125, 100],
    0.7: [137, 96, 67],
    0.6: [117, 70, 42],
    0.5: [98, 49, 24],
}
WORK = {  # GMACs of DeiT-S from block 3, from block 4, of DeiT-B from block 3, from block 4
    0.9: (3.97, 4.07, 15.21, 15.59),
    0.8: (3.44, 3.62, 13.24, 13.91),
    0.7: (3.01, 3.24, 11.58, 12.47),
    0.6: (2.63, 2.91, 10.14, 11.20),
    0.5: (2.33, 2.64, 8.98, 10.15),
}


@pytest.mark.parametrize("ratio", WORK)
def test_counts_and_macs_equal_the_table(ratio: float) -> None:
    """Keys of all rows are projected, queries and values of the active rows alone."""
    small, small_later, base, base_later = WORK[ratio]
    rows = (("small", 3, small), ("small", 4, small_later), ("base", 3, base), ("base", 4, base_later))
    for size, start, expected in rows:
        with torch.device("meta"):
            host = timm.create_model(f"deit_{size}_patch16_224")
        options = {"keep_ratio": ratio, "start_block": start}
        model = evovit.reduce_tokens(host.eval(), "idle_vit", last_block="all", **options)
        trace = model.run(torch.empty(1, 3, 224, 224, device="meta"), record=True).trace
        counts = [tokens.num_patches for tokens in trace]
        assert counts == [196] * start + [COUNTS[ratio][n // 3] for n in range(12 - start)]
        assert gmacs(model, (3, 224, 224)) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [("small", 0.7, 4.77), ("small", 0.5, 4.02), ("medium", 0.7, 8.86), ("medium", 0.5, 7.23)],
)
def test_macs_on_lv_vit_equal_the_table(size: str, ratio: float, expected: float) -> None:
    with torch.device("meta"):
        host = timm.create_model(f"lv_vit_{size}").eval()
        quarter = len(host.blocks) // 4
        options = {"start_block": quarter, "group_length": quarter, "keep_ratio": ratio}
        model = evovit.reduce_tokens(host, "idle_vit", **options)
    assert gmacs(model, (3, 224, 224)) == pytest.approx(expected, rel=5e-3)


def test_cut_loss_is_computed_in_training_alone_and_released_takes_every_second() -> None:
    options = {"start_block": 1, "group_length": 2}
    values = {}
    for blocks in ("all", "released"):
        reduced = evovit.reduce_tokens(make_host("vit"), "idle_vit", cut_blocks=blocks, **options).train()
        outputs = reduced.run(pictures())
        values[blocks] = reduced.method.losses(outputs, None)["token_cut"]
        cuts = outputs.tokens.carry.cuts
        used = cuts if blocks == "all" else (cuts[0], cuts[2])
        assert_close(values[blocks], 20.0 / 3 * torch.stack(used).sum())
        values[blocks].backward()
        grad = reduced.model.blocks[2 if blocks == "all" else 1].attn.qkv.weight.grad
        assert grad[:64].abs().max() > 0  # it moves queries and keys
        reduced.eval()
        assert reduced.run(pictures()).tokens.carry.cuts == ()
        assert reduced.method.losses(reduced.run(pictures()), None) == {}
    assert values["all"] > values["released"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_ratio": 0}, "keep_ratio is 0; allowed is a number above 0, at most 1"),
        ({"keep_ratio": [0.5, 0.5]}, "keep_ratio has 2 values for 4 blocks"),
        ({"start_block": 4}, "start_block is 4; allowed is 0 to 3"),
        ({"group_length": 0}, "group_length is 0; allowed is a whole number, 1 or more"),
        ({"cut": "none"}, "cut is 'none'; allowed is both, inter or intra"),
        ({"cut_weight": -1.0}, "cut_weight is -1.0; allowed is a number, 0 or more"),
        ({"distill_weight": -1.0}, "distill_weight is -1.0; allowed is a number, 0 or more"),
        ({"compared": "all"}, "compared is 'all'; allowed is class or active"),
        ({"cut_blocks": "half"}, "cut_blocks is 'half'; allowed is all or released"),
        ({"selection": "best"}, "selection is 'best'; allowed is class, column_mean, key_norm or probe"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "idle_vit", **({"start_block": 1} | options))


def test_a_list_of_ratios_starts_where_start_block_says() -> None:
    ratios = (0.9, 0.5, 0.5, 0.5)
    with pytest.raises(
        evovit.EvoViTError, match="keep_ratio is below 1 before start_block 1; set it to the first"
    ):
        evovit.reduce_tokens(make_host("vit"), "idle_vit", start_block=1, keep_ratio=ratios)
    reduced = evovit.reduce_tokens(make_host("vit"), "idle_vit", start_block=0, keep_ratio=ratios)
    assert reduced.method.schedule.ratios == ratios


def test_an_adapted_projection_is_used_whole() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    host = make_host("vit")
    for block in host.blocks:
        block.attn.qkv.__class__ = Adapted
    reduced = evovit.reduce_tokens(host, "idle_vit", start_block=1, keep_ratio=0.6).eval()
    with torch.no_grad():
        evaluated = reduced(pictures())
        assert_close(evaluated, reduced.train()(pictures()))  # the cut loss takes the whole matrix


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _prune(layer: nn.Linear) -> None:
    torch.nn.utils.prune.l1_unstructured(layer, "weight", amount=0.3)


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "hook": lambda layer: layer.register_forward_hook(lambda module, given, out: 2 * out),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, given: (2 * given[0],)),
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "pruned": _prune,
    "forward": lambda layer: setattr(layer, "forward", lambda x: 2 * F.linear(x, layer.weight, layer.bias)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_projection_is_used_whole(change: str) -> None:
    """In evaluation as in training, which reads the whole matrix; and it trains on, twice."""
    host = make_host("vit")
    for block in host.blocks:
        CHANGES[change](block.attn.qkv)
    reduced = evovit.reduce_tokens(host, "idle_vit", start_block=1, keep_ratio=0.6, group_length=1).eval()
    plain = evovit.reduce_tokens(make_host("vit"), "idle_vit", start_block=1, keep_ratio=0.6, group_length=1)
    with torch.no_grad():
        evaluated = reduced(pictures())
        assert not torch.allclose(evaluated, plain(pictures()))
        assert_close(evaluated, reduced.train()(pictures()))
    for weight in (20.0, 0.0):  # with the cut loss, and without it, where training scores as evaluation does
        reduced = evovit.reduce_tokens(
            host, "idle_vit", start_block=1, keep_ratio=0.6, group_length=1, cut_weight=weight
        ).train()
        for _ in range(2):
            reduced.zero_grad()
            reduced(pictures()).square().mean().backward()
            assert all(p.grad is not None and p.grad.any() for p in reduced.parameters())


def test_features_of_the_class_token_need_one() -> None:
    host = make_host("siglip")
    reduced = evovit.reduce_tokens(host, "idle_vit", start_block=1, selection="column_mean").train()
    outputs = reduced.run(pictures())
    taught = Taught(outputs.logits.detach(), outputs.features.detach())
    with pytest.raises(evovit.EvoViTError, match="compared='class' needs a class token.*choose 'active'"):
        reduced.method.losses(outputs, taught)
    reduced = evovit.reduce_tokens(
        host, "idle_vit", start_block=1, selection="column_mean", compared="active"
    ).train()
    terms = reduced.method.losses(reduced.run(pictures()), taught)
    assert terms["features"] < 1e-6 and set(terms) == {"token_cut", "logits", "features"}
    assert set(reduced.method.losses(reduced.run(pictures()), None)) == {"token_cut"}


def test_a_host_without_class_token_needs_a_chosen_score() -> None:
    with pytest.raises(evovit.EvoViTError, match="needs a class token.*choose 'column_mean'"):
        evovit.reduce_tokens(make_host("siglip"), "idle_vit", start_block=1)
