"""DynamicViT: equal to the official code on its reference numbers, and right on other hosts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import evovit
from evovit.backbones import adapt
from evovit.macs import gmacs
from evovit.methods import dynamic_vit
from evovit.methods.dynamic_vit import Decided, ScorePredictor
from evovit.ops.distance import kept_distance, logit_divergence
from evovit.ops.mask import gumbel_keep, gumbel_noise, masked_softmax
from evovit.recipe.tables import ObjectiveTable
from evovit.tokens import Outputs, Taught, Tokens
from evovit.train.objective import Objective
from tests.conftest import TINY, Golden, disturb, make_host, pictures
from tests.parity import assert_close, assert_same_gradients, assert_same_traces

DEIT, LV_VIT, UNITS = Golden("dynamicvit"), Golden("dynamicvit_lvvit"), Golden("units_dynamicvit")
CASES = [(official, case["name"]) for official in (DEIT, LV_VIT) for case in official.side["cases"]]
IDS = [f"{official.side['name']}-{name}" for official, name in CASES]
EVALUATION, TRAINING = (
    {"argvalues": [c for c in CASES if c[1].startswith(mode)], "ids": [i for i in IDS if f"-{mode}" in i]}
    for mode in ("eval", "train")
)
LOSSES = ["dynamic_False.mse_token_False", "dynamic_False.mse_token_True"]
LOSSES += ["dynamic_True.mse_token_False", "dynamic_True.mse_token_True"]


def load_case(official: Golden, case: dict[str, Any], **options: Any) -> evovit.ReducedViT:
    return evovit.load_official(
        "dynamic_vit",
        official.state_dict(),
        num_heads=official.side["model"]["num_heads"],
        keep_ratio=tuple(case["constructor"]["token_ratio"]),
        blocks=case["constructor"]["pruning_loc"],
        **({"skip_lam": 2.0} if official is LV_VIT else {}),
        **options,
    )


def draw(noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the decisions draw the given noise, one row per decision."""
    given: Iterator[Tensor] = iter(noise)
    monkeypatch.setattr(dynamic_vit, "gumbel_noise", lambda like: next(given))


def all_gradients(model: evovit.ReducedViT) -> dict[str, Tensor]:
    named = [*model.model.named_parameters(), *model.method.named_parameters()]
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize(("official", "name"), **EVALUATION)
def test_evaluation_equals_official(official: Golden, name: str) -> None:
    """Logits, scores, kept patches and traces."""
    case = official.case(name)
    model = load_case(official, case)
    with torch.no_grad():
        outputs = model.run(official.images(case), record=True)
    assert_same_traces(official, case, outputs)
    blocks = case["constructor"]["pruning_loc"]
    for number, keep in zip(blocks, case["keep"], strict=True):
        kept = official.out(case, f"keep_idx.{number}").long().sort(1).values
        assert torch.equal(outputs.trace[number].index, kept) and kept.shape[1] == keep
        with torch.no_grad():
            scores = model.method.scores(outputs.trace[number - 1], number)[..., 0]
        expected = official.out(case, f"score.{number}")
        if number > blocks[0]:  # the official rows, brought from score order to raster order
            before = official.out(case, f"keep_idx.{number - blocks[0]}").long()
            expected = expected.gather(1, before.argsort(1))
        assert_close(scores, expected)


@pytest.mark.parametrize(("official", "name"), **TRAINING)
def test_training_equals_official(official: Golden, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities, nested decisions, logits, traces, every loss term, the total and every gradient."""
    case = official.case(name)
    model = load_case(official, case).train()
    draw(official.out(case, "noise"), monkeypatch)
    outputs = model.run(official.images(case), record=True)
    assert_same_traces(official, case, outputs)
    keeps = outputs.tokens.carry.keeps
    for number, keep in zip(case["constructor"]["pruning_loc"], keeps, strict=True):
        assert torch.equal(keep.detach(), official.out(case, f"decision.{number}").float())
        before = outputs.trace[number - 1]
        assert_close(model.method.scores(before, number), official.out(case, f"pred_score.{number}"))
    assert [keep.sum(1).tolist() for keep in keeps] == case["kept_per_image"]
    terms = {"class": F.cross_entropy(outputs.logits, torch.tensor(case["labels"]))}
    if case["constructor"].get("distill"):
        terms |= check_losses(official, case, model, outputs)
    loss = torch.stack(list(terms.values())).sum()
    assert_close(loss, official.out(case, "loss")[0])
    loss.backward()
    assert_same_gradients(official, case, all_gradients(model))


def check_losses(
    official: Golden, case: dict[str, Any], model: evovit.ReducedViT, outputs: Outputs
) -> dict[str, Tensor]:
    on_lv_vit = outputs.token_logits is not None
    patches = outputs.token_logits if on_lv_vit else outputs.features[:, 1:]
    assert_close(patches.mean(1), official.out(case, "features_mean"))
    assert_close(patches[0], official.out(case, "features_image0"))
    teacher = load_case(official, case).model  # the student's batch statistics have moved on
    taught = Objective(model, ObjectiveTable(), teacher).teach(official.images(case))
    assert_close(taught.class_logits if on_lv_vit else taught.logits, official.out(case, "teacher_logits"))
    for options in LOSSES:
        batch, squared = ("dynamic_True" in options), options.endswith("token_True")
        other = load_case(
            official,
            case,
            ratio_of="batch" if batch else "image",
            token_loss="squared" if squared else "divergence",
        )
        terms = other.method.losses(outputs, taught)
        total, _, ratio, divergence, token = official.out(case, f"loss_parts.{options}")
        assert_close(terms["ratio"], 2.0 * ratio / 3)
        assert_close(terms["logits"], 0.5 * divergence)
        assert_close(terms["kept_tokens"], 0.5 * token)
        cross_entropy = F.cross_entropy(outputs.logits, torch.tensor(case["labels"]))
        assert_close(torch.stack([cross_entropy, *terms.values()]).sum(), total)
    terms = model.method.losses(outputs, taught)
    assert_close(terms["ratio"], 2.0 / 3 * official.out(case, "loss_ratio")[0])
    return terms


def unit(name: str) -> dict[str, Tensor]:
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in UNITS.tensors.items() if k.startswith(start)}


@pytest.mark.parametrize(
    "name", ["softmax_with_policy", "softmax_with_policy_all_ones", "softmax_with_policy_eps"]
)
def test_masked_softmax_equals_the_official_unit(name: str) -> None:
    tensors = unit(name)
    eps = 0.01 if name.endswith("_eps") else 1e-6
    ours = masked_softmax(tensors["in.attn"], tensors["in.policy"][..., 0], eps)
    assert_close(ours, tensors["out.out"])


def test_the_predictor_equals_the_official_unit() -> None:
    tensors = unit("predictor")
    predictor = ScorePredictor(16)
    weights = {k.removeprefix("in.w."): v for k, v in tensors.items() if k.startswith("in.w.")}
    predictor.load_state_dict(weights)
    with torch.no_grad():
        assert_close(predictor(tensors["in.x"], tensors["in.policy"][..., 0]), tensors["out.out"])


@pytest.mark.parametrize("name", [u["name"] for u in UNITS.side["units"] if u["name"].startswith("loss")])
def test_losses_equal_the_official_unit(name: str) -> None:
    tensors = unit(name)
    options = next(u["parameters"] for u in UNITS.side["units"] if u["name"] == name)
    host = make_host("vit")
    method = evovit.reduce_tokens(
        host,
        "dynamic_vit",
        blocks=(1, 2, 3),
        keep_ratio=tuple(options["keep_ratio"]),
        ratio_of="batch" if options["dynamic"] else "image",
        token_loss="squared" if options["mse_token"] else "divergence",
    ).method
    keeps = [tensors[f"in.decision{step}"].float() for step in range(3)]
    student, teacher = (F.pad(tensors[f"in.{who}tokens"], (0, 0, 1, 0)) for who in ("", "teacher_"))
    state = Tokens(student, torch.zeros(2, 17), 1, (1, 17), carry=Decided(tuple(keeps)))
    outputs = Outputs(tensors["in.logits"], state, {}, [], student, None)
    terms = method.losses(outputs, Taught(tensors["in.teacher_logits"], teacher))
    cross_entropy, ratio, divergence, token = tensors["out.parts"]
    mask = tensors["in.mask"][..., 0].float()
    distance = kept_distance(student[:, 1:], teacher[:, 1:], mask, method.config.token_loss)
    assert_close(F.cross_entropy(tensors["in.logits"], tensors["in.labels"].long()), cross_entropy)
    assert_close(terms["ratio"], 2.0 * ratio / 3)
    assert_close(terms["logits"], 0.5 * divergence)
    assert_close(logit_divergence(tensors["in.logits"], tensors["in.teacher_logits"]), divergence)
    if mask.any():
        assert_close(distance, token)
    else:
        assert distance == token == 0
    total = cross_entropy + terms["ratio"] + terms["logits"] + 0.5 * distance
    assert_close(total, tensors["out.total"][0])


def test_a_mask_of_ones_is_the_softmax_and_a_masked_key_is_alone_with_itself() -> None:
    logits = torch.randn(2, 3, 7, 7)
    assert_close(masked_softmax(logits, torch.ones(2, 7)), logits.softmax(-1))
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1, 1]).expand(2, 7)
    weights = masked_softmax(logits, mask, eps=0.0)
    assert (weights[:, :, [0, 2, 3, 5, 6]][..., [1, 4]] == 0).all()
    assert (weights[:, :, 1, 4] == 0).all() and (weights[:, :, 1, 1] > 0).all()
    rest = logits[..., [0, 2, 3, 5, 6]].softmax(-1)[:, :, [0, 2, 3, 5, 6]]
    assert_close(weights[:, :, [0, 2, 3, 5, 6]][..., [0, 2, 3, 5, 6]], rest)


def test_the_mask_has_a_gradient_where_it_is_zero() -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    masked_softmax(torch.randn(1, 1, 3, 3), mask)[0, 0, 0, 0].backward()
    assert mask.grad[0, 1].abs() > 1e-3 and mask.grad.isfinite().all()


def test_a_sampled_decision_has_the_value_of_the_choice_and_the_gradient_of_the_share() -> None:
    log_p = torch.randn(2, 50, 2).log_softmax(-1).requires_grad_()
    noise = gumbel_noise(log_p)
    keep = gumbel_keep(log_p, noise)
    assert torch.equal(keep.detach(), ((log_p + noise).argmax(-1) == 0).float())
    (keep,) = torch.autograd.grad(keep.sum(), log_p)
    (soft,) = torch.autograd.grad((log_p + noise).softmax(-1)[..., 0].sum(), log_p)
    assert_close(keep, soft)


def test_sampled_shares_are_the_probabilities() -> None:
    log_p = torch.tensor([0.2, 0.8]).log().expand(1, 40000, 2)
    share = gumbel_keep(log_p, gumbel_noise(log_p)).mean().item()
    assert share == pytest.approx(0.2, abs=0.01)  # five standard deviations


def given_noise(
    reduced: evovit.ReducedViT, images: Tensor, numbers: tuple[int, ...]
) -> tuple[Outputs, Tensor]:
    """Return evaluation's outputs and noise under which training decides the same."""
    with torch.no_grad():
        outputs = reduced.eval().run(images, record=True)
    noise = []
    for number in numbers:
        kept = torch.zeros(images.shape[0], 16).scatter(1, outputs.trace[number].index, 1.0)
        noise.append(100 * torch.stack((kept, 1 - kept), dim=-1))
    return outputs, torch.stack(noise)


def train_mode(reduced: evovit.ReducedViT) -> evovit.ReducedViT:
    """Set the mode of training; batch norms keep the statistics that evaluation has."""
    reduced.train()
    for module in reduced.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return reduced


POOLED: dict[str, dict[str, Any]] = {
    "max": {"global_pool": "max"},
    "avgmax_with_prefix": {"global_pool": "avgmax", "pool_include_prefix": True},
    "map_with_prefix": {"global_pool": "map", "pool_include_prefix": True},
    "prr": {"global_pool": "prr"},
}


@pytest.mark.parametrize(
    "host",
    [
        *("vit", "vit_avg", "deit3", "dinov2_reg", "deit_distilled", "clip", "siglip", "qk_norm"),
        *("post_norm", "parallel_things", "parallel_scaling", "eva02", "dinov3", "lv_vit"),
        *("max", "avgmax_with_prefix", "map_with_prefix"),
    ],
)
def test_masked_training_equals_gathered_evaluation_for_equal_decisions(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the eps of the released softmax: prefix, surviving tokens and logits, on every block and head."""
    images = pictures()
    model = disturb(VisionTransformer(**(TINY | POOLED[host]))) if host in POOLED else make_host(host)
    reduced = evovit.reduce_tokens(model, "dynamic_vit", blocks=(1, 3), keep_ratio=0.6)
    expected, noise = given_noise(reduced, images, (1, 3))
    draw(noise, monkeypatch)
    with torch.no_grad():
        outputs = train_mode(reduced).run(images)
    prefix, first, last = reduced.method.spec.num_prefix, *outputs.tokens.carry.keeps
    assert first.sum(1).tolist() == [9, 9] and last.sum(1).tolist() == [5, 5]
    rows = last.bool()
    patches = outputs.features[:, prefix:][rows].unflatten(0, (2, 5))
    ours = torch.cat((outputs.features[:, :prefix], patches), dim=1)
    assert_close(ours, expected.features)
    assert_close(outputs.logits, expected.logits)


@pytest.mark.parametrize("host", ["vit_avg", "siglip"])
def test_a_decision_before_the_last_block_learns_from_the_head_too(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the mask gains where the head pools by it, also for tokens that are out."""
    reduced = evovit.reduce_tokens(make_host(host), "dynamic_vit", blocks=(1,), keep_ratio=0.6)
    _, noise = given_noise(reduced, pictures(), (1,))
    draw(noise, monkeypatch)
    outputs = reduced.train().run(pictures())
    mask = outputs.tokens.mask.detach().requires_grad_()
    logits = adapt(reduced.model).masked_head(outputs.features.detach(), mask)
    assert_close(logits, outputs.logits)
    (gradient,) = torch.autograd.grad(logits.square().sum(), mask)
    assert gradient.isfinite().all() and (gradient.abs() > 1e-6).all()
    assert (mask == 0).any()


def test_a_head_that_no_mask_reaches_is_refused_in_training() -> None:
    host = disturb(VisionTransformer(**(TINY | POOLED["prr"])))
    reduced = evovit.reduce_tokens(host, "dynamic_vit", blocks=(1,))
    assert reduced.eval()(pictures()).isfinite().all()
    with pytest.raises(evovit.EvoViTError, match="cannot leave masked patch tokens out of the host's head"):
        reduced.train()(pictures())


def test_decisions_are_nested_and_masked_tokens_change_no_other() -> None:
    host = make_host("vit")
    reduced = evovit.reduce_tokens(host, "dynamic_vit", blocks=(1, 2, 3), keep_ratio=0.6).train()
    for seed in range(5):
        torch.manual_seed(seed)
        first, second, third = reduced.run(pictures()).tokens.carry.keeps
        assert (second <= first).all() and (third <= second).all()
    mask = torch.ones(2, 17)
    mask[:, [3, 8, 9]] = 0
    x = torch.randn(2, 2, 17, 8)
    other = x.clone()
    other[:, :, [3, 8, 9]] = torch.randn(2, 2, 3, 8)
    ours, changed = (masked_softmax(y @ y.transpose(-2, -1), mask, eps=0.0) @ y for y in (x, other))
    rest = mask[0].bool()
    assert_close(ours[:, :, rest], changed[:, :, rest])


def test_training_draws_anew_and_repeats_with_its_seed() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "dynamic_vit", blocks=(1, 3)).train()
    keeps = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        keeps.append(reduced.run(pictures()).tokens.carry.keeps[1])
    assert torch.equal(keeps[0], keeps[1]) and not torch.equal(keeps[0], keeps[2])


def test_a_ratio_of_one_keeps_all_in_training_too_and_leaves_predictors_in_the_graph() -> None:
    host, images = make_host("vit"), pictures()
    reduced = evovit.reduce_tokens(host, "dynamic_vit", blocks=(1, 3)).train()
    reduced.method.set_reduction(0.0)
    logits = reduced(images)
    assert_close(logits, host(images), 1e-4)
    logits.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in reduced.method.parameters())
    reduced.method.set_reduction(1.0)
    assert reduced.run(images).tokens.carry.keeps[0].mean() < 1


@pytest.mark.parametrize(
    ("official", "size"), [(DEIT, {"num_heads": 3}), (LV_VIT, {"num_heads": 2, "skip_lam": 2.0})]
)
def test_released_defaults_are_the_loaders_defaults(official: Golden, size: dict[str, Any]) -> None:
    case = official.case("eval_keep0.7")
    model = evovit.load_official("dynamic_vit", official.state_dict(), **size)
    with torch.no_grad():
        assert_close(model(official.images(case)), official.out(case, "logits"))
    on_lv_vit = official is LV_VIT
    assert model.method.config.token_loss == ("divergence" if on_lv_vit else "squared")
    assert not on_lv_vit or not model.model.aux_in_training


def test_another_layout_is_refused_in_a_sentence() -> None:
    with pytest.raises(evovit.EvoViTError, match="not an official dynamic_vit checkpoint"):
        evovit.load_official("dynamic_vit", Golden("idlevit").state_dict(), num_heads=3)
    with pytest.raises(evovit.EvoViTError, match="predictors do not fit the 2 blocks"):
        evovit.load_official("dynamic_vit", DEIT.state_dict(), num_heads=3, blocks=(3, 6))


WORK = {0.9: 4.04, 0.8: 3.46, 0.7: 2.98, 0.6: 2.57, 0.5: 2.23}  # GMACs of DeiT-S, predictors included
COUNTS = {0.9: [176, 158, 142], 0.7: [137, 96, 67], 0.5: [98, 49, 24]}


def dynamic_deit(size: str, ratio: float) -> evovit.ReducedViT:
    with torch.device("meta"):
        host = timm.create_model(f"deit_{size}_patch16_224")
        return evovit.reduce_tokens(host.eval(), "dynamic_vit", keep_ratio=ratio, last_block="all")


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [*(("small", ratio, work) for ratio, work in WORK.items()), ("base", 0.7, 11.48)],
)
def test_macs_equal_the_table(size: str, ratio: float, expected: float) -> None:
    model = dynamic_deit(size, ratio)
    assert gmacs(model, (3, 224, 224)) == pytest.approx(expected, rel=5e-3)
    if size == "small" and ratio in COUNTS:
        trace = model.run(torch.empty(1, 3, 224, 224, device="meta"), record=True).trace
        assert [trace[b].num_patches for b in (3, 6, 9)] == COUNTS[ratio]


@pytest.mark.parametrize(
    ("name", "ratio", "options", "expected", "digit"),
    [
        ("lv_vit_medium", 0.7, {"blocks": (5, 10, 15)}, 8.59, 0.01),
        ("lv_vit_small", 0.7, {"blocks": (4, 8, 12)}, 4.6, 0.1),
        ("deit_tiny_patch16_224", 0.7, {}, 1.3, 0.1),  # released as DeiT-256
    ],
)
def test_macs_on_other_hosts_equal_the_table(
    name: str, ratio: float, options: dict[str, Any], expected: float, digit: float
) -> None:
    size = {"embed_dim": 256, "num_heads": 4} if name.startswith("deit") else {}
    with torch.device("meta"):
        host = timm.create_model(name, **size).eval()
        model = evovit.reduce_tokens(host, "dynamic_vit", keep_ratio=ratio, last_block="all", **options)
    within = {"rel": 5e-3 if digit < 0.1 else 0, "abs": digit}  # as printed
    assert gmacs(model, (3, 224, 224)) == pytest.approx(expected, **within)


def test_parameters_equal_the_table() -> None:
    """The predictors add 0.724 M at width 384 and 2.885 M at width 768."""
    for size, added, total in (("small", 0.724, 22.77), ("base", 2.885, 89.45)):
        model = dynamic_deit(size, 0.7)
        own = sum(p.numel() for p in model.method.parameters()) / 1e6
        assert own == pytest.approx(added, abs=1e-3)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(total, abs=0.01)


def test_the_predictor_normalises_as_released() -> None:
    predictor = ScorePredictor(16)
    assert [m.eps for m in predictor.modules() if isinstance(m, nn.LayerNorm)] == [1e-5]
    none = torch.zeros(2, 6)
    assert predictor(torch.randn(2, 6, 16), none).isfinite().all()  # where every token was dropped


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_ratio": 0}, "keep_ratio is 0; allowed is a number above 0, at most 1"),
        ({"keep_ratio": [0.5, 0.4]}, "keep_ratio has 2 values for 1 reducing blocks"),
        ({"blocks": (4,)}, "blocks is 4; allowed is 0 to 3"),
        ({"ratio_weight": -1.0}, "ratio_weight is -1.0; allowed is a number, 0 or more"),
        ({"ratio_of": "token"}, "ratio_of is 'token'; allowed is image or batch"),
        ({"token_loss": "l1"}, "token_loss is 'l1'; allowed is squared or divergence"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "dynamic_vit", **({"blocks": (1,)} | options))
