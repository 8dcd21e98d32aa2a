"""Objective: equal to the released Evo-ViT losses, gradients and distillation units, and to eq. 8."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import evovit
from evovit.errors import EvoViTError
from evovit.methods import find_method
from evovit.recipe.tables import ObjectiveTable
from evovit.tokens import Taught
from evovit.train.objective import Objective, distillation
from tests.conftest import Golden, make_host, pictures
from tests.methods.test_evo_vit import OFFICIAL, TRAIN, load_case, official_gradient
from tests.parity import assert_close

UNITS = Golden("units_evo")
LABELS = torch.tensor([1, 3])


def reduced(**options: Any) -> evovit.ReducedViT:
    options = {"start_block": 1, "stage_length": 2, "assisted_head": True} | options
    return evovit.reduce_tokens(make_host("vit_avg"), "evo_vit", **options).train()


@pytest.mark.parametrize("name", TRAIN)
def test_training_equals_the_released_code(name: str) -> None:
    """Both losses, their mean and the norm of every gradient."""
    case = OFFICIAL.case(name)
    objective = Objective(load_case(case), ObjectiveTable(reduction="mean")).train()
    terms = objective(OFFICIAL.images(case), torch.tensor(case["labels"]))
    assert_close(2 * terms["class"], OFFICIAL.out(case, "loss_avg")[0])
    assert_close(2 * terms["class_token"], OFFICIAL.out(case, "loss_cls")[0])
    loss = torch.stack(list(terms.values())).sum()
    assert_close(loss, OFFICIAL.out(case, "loss")[0])
    if not case.get("backward", True):
        return
    loss.backward()
    norms = dict(zip(case["grad_norm_names"], OFFICIAL.out(case, "grad_norm"), strict=True))
    largest = max(norms.values())
    for official, expected in norms.items():
        actual = official_gradient(objective.model, official).norm()
        assert abs(actual - expected) <= 1e-5 * (expected + 1e-3 * largest), official


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_equals_the_released_units(kind: str) -> None:
    unit = next(u for u in UNITS.side["units"] if u["name"] == f"distillation_deit_{kind}")["parameters"]
    part = {
        k: UNITS.tensors[f"distillation_deit_{kind}.in.{k}"] for k in ("out", "out_kd", "teacher", "labels")
    }
    goal = ObjectiveTable(distillation=kind, alpha=unit["alpha"], temperature=unit["tau"], teacher="given")
    objective = Objective(nn.Identity(), goal)
    taught = Taught(part["teacher"], None)
    terms = objective.supervised(part["out"], {"class_token": part["out_kd"]}, part["labels"].long(), taught)
    assert_close(
        terms["class"] + terms["distillation"], UNITS.tensors[f"distillation_deit_{kind}.out.loss"][0]
    )


def test_without_distillation_the_loss_is_the_cross_entropy() -> None:
    part = {k: UNITS.tensors[f"distillation_deit_none.in.{k}"] for k in ("out", "labels")}
    terms = Objective(nn.Identity(), ObjectiveTable())(part["out"], part["labels"].long())
    assert_close(terms["class"], UNITS.tensors["distillation_deit_none.out.loss"][0])


def test_sum_is_twice_the_mean() -> None:
    model = reduced()
    terms = [Objective(model, ObjectiveTable(reduction=kind))(pictures(), LABELS) for kind in ("sum", "mean")]
    assert list(terms[0]) == ["class", "class_token"]
    for name in terms[0]:
        assert_close(terms[0][name], 2 * terms[1][name])


def test_labels_are_smoothed_and_mixed_targets_are_not() -> None:
    logits = torch.randn(2, 5)
    objective = Objective(nn.Identity(), ObjectiveTable(label_smoothing=0.1))
    smooth = F.one_hot(LABELS, 5) * 0.9 + 0.1 / 5
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    assert_close(objective(logits, LABELS)["class"], expected)
    assert_close(objective(logits, smooth)["class"], expected)


def test_the_teacher_is_frozen_asked_in_its_own_colours_and_stays_in_evaluation() -> None:
    teacher = make_host("vit_avg")
    before = copy.deepcopy(teacher.state_dict())
    scale, shift = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([0.1, 0.2, 0.3])
    goal = ObjectiveTable(distillation="soft", teacher="given")
    objective = Objective(reduced(assisted_head=False), goal, teacher, (scale, shift)).train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    images = pictures()
    terms = objective(images, LABELS)
    with torch.no_grad():
        taught = teacher(images * scale.view(3, 1, 1) + shift.view(3, 1, 1))
        student = objective.model(images)
    assert_close(terms["distillation"], 0.5 * distillation(student, taught, "soft", 1.0))
    torch.stack(list(terms.values())).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("preserve", [True, False])
def test_token_distillation_is_zero_for_the_teacher_itself_and_pairs_places(preserve: bool) -> None:
    goal = ObjectiveTable(token_distillation=1.0, teacher="given")
    same = reduced(keep_ratio=1.0)
    assert Objective(same, goal, copy.deepcopy(same.model))(pictures(), LABELS)["tokens"].item() < 1e-10
    model = reduced(preserve=preserve, fast_update=False)
    terms = Objective(model, goal, copy.deepcopy(model.model))(pictures(), LABELS)
    outputs = model.run(pictures())
    tokens = model.method.finish(outputs.tokens)
    full = evovit.reduce_tokens(copy.deepcopy(model.model), "evo_vit", keep_ratio=1.0, start_block=1)
    features = full.forward_features(pictures())[:, 1:]
    ours = tokens.patches  # vit_avg norms after pooling
    total, count = torch.zeros(()), 0
    for image in range(2):
        for row, place in enumerate(tokens.index[image].tolist()):
            total = total + (ours[image, row] - features[image, place]).square().mean()
            count += 1
    assert_close(terms["tokens"], total / count, 1e-4)


def test_a_methods_own_losses_join_and_may_read_the_teacher() -> None:
    class Taxed(type(reduced().method)):  # type: ignore[misc]
        learns_from_teacher = True

        def losses(self, outputs: Any, teacher: Any) -> dict[str, Tensor]:
            return {"tax": outputs.logits.square().mean() + (teacher.features - 1).square().mean()}

    model = reduced()
    model.method = Taxed(model.method.config, model.method.spec)
    goal = ObjectiveTable(distillation="hard", teacher="given")
    terms = Objective(model, goal, make_host("vit_avg"))(pictures(), LABELS)
    assert terms["tax"] > 0 and set(terms) == {"class", "distillation", "tax"}
    assert reduced().method.losses(None, None) == {}


@pytest.mark.parametrize("method", ["dynamic_vit", "idle_vit"])
def test_a_teacher_that_cannot_be_compared_with_is_refused_unless_nothing_is_compared(method: str) -> None:
    options = {"blocks": (1,)} if method == "dynamic_vit" else {"start_block": 1}
    model = evovit.reduce_tokens(make_host("vit"), method, **options)
    goal = ObjectiveTable(distillation="hard", teacher="given")
    with pytest.raises(EvoViTError, match="compares tokens with its teacher's.*choose an equal teacher"):
        Objective(model, goal, make_host("dinov2_reg"))
    with pytest.raises(EvoViTError, match="learns from all tokens of its teacher, which reduces them"):
        Objective(model, goal, evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,)))
    weights = ("logit_weight", "token_weight") if method == "dynamic_vit" else ("distill_weight",)
    alone = evovit.reduce_tokens(make_host("vit"), method, **options, **dict.fromkeys(weights, 0.0))
    terms = Objective(alone.train(), goal, make_host("dinov2_reg"))(pictures(), LABELS)
    assert set(terms) == {"class", "distillation", "ratio" if method == "dynamic_vit" else "token_cut"}


@pytest.mark.parametrize("method", ["dynamic_vit", "idle_vit"])
def test_method_and_recipe_distil_side_by_side(method: str) -> None:
    options = {"blocks": (1,)} if method == "dynamic_vit" else {"start_block": 1}
    model = evovit.reduce_tokens(make_host("vit"), method, **options).train()
    names = {"ratio", "kept_tokens"} if method == "dynamic_vit" else {"token_cut", "features"}
    for kind, others in (("none", {"class"}), ("soft", {"class", "distillation"})):
        goal = ObjectiveTable(distillation=kind, teacher="given")
        terms = Objective(model, goal, make_host("vit_avg"))(pictures(), LABELS)
        assert set(terms) == names | {"logits"} | others


def test_every_parameter_gets_a_gradient() -> None:
    """DistributedDataParallel needs this without find_unused_parameters."""
    for options in ({}, {"fast_update": False}, {"mode": "layer"}, {"selection": "class"}):
        model = reduced(**options)
        terms = Objective(model, ObjectiveTable())(pictures(), LABELS)
        torch.stack(list(terms.values())).sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


COMPARED = ObjectiveTable(token_distillation=1.0, teacher="given")


def test_token_distillation_asks_for_what_it_needs() -> None:
    with pytest.raises(EvoViTError, match="a reduced model and a teacher"):
        Objective(make_host("vit"), COMPARED, make_host("vit"))
    model = evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,))
    with pytest.raises(EvoViTError, match="token_distillation compares tokens with.*choose an equal teacher"):
        Objective(model, COMPARED, make_host("dinov3"))


@pytest.mark.parametrize("host", ["vit", "vit_avg", "siglip", "lv_vit", "dinov2_reg"])
@pytest.mark.parametrize("method", evovit.list_methods())
def test_token_distillation_trains_or_is_refused_when_it_is_built(method: str, host: str) -> None:
    cls, without = find_method(method), {"selection": "column_mean", "compared": "active"}
    chosen = {key: value for key, value in without.items() if host == "siglip" and hasattr(cls.Config, key)}
    model = evovit.reduce_tokens(make_host(host), method, **cls.example, **chosen).train()
    if not model.method.keeps_places:
        with pytest.raises(EvoViTError, match="leaves no patch token at its place on the grid"):
            Objective(model, COMPARED, make_host(host))
        return
    terms = Objective(model, COMPARED, make_host(host)).train()(pictures(), LABELS)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    assert terms["tokens"].isfinite() and loss.isfinite()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.01 * p.grad if p.grad is not None else 0)
    assert Objective(model, COMPARED, make_host(host))(pictures(), LABELS)["tokens"].isfinite()


def test_sub_sampling_that_pools_nothing_keeps_places() -> None:
    model = evovit.reduce_tokens(make_host("vit"), "subsample", block=2, stride=1)
    assert Objective(model, COMPARED, make_host("vit"))(pictures(), LABELS)["tokens"] < 1e-10


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("evit", {"blocks": (1,)}),
        ("subsample", {"block": 2}),
        ("evo_vit", {"start_block": 1, "preserve": False, "fast_update": False}),
        ("evo_vit", {"start_block": 1, "rejoin_last": False}),
    ],
)
@pytest.mark.parametrize("learner", ["evo_vit", "idle_vit"])
def test_a_teacher_that_reduces_its_tokens_is_refused(
    learner: str, method: str, options: dict[str, Any]
) -> None:
    """By token distillation, and by a method whose own losses compare tokens."""
    model = evovit.reduce_tokens(make_host("vit"), learner, start_block=1)
    teacher = evovit.reduce_tokens(make_host("vit"), method, **options)
    goal = COMPARED if learner == "evo_vit" else ObjectiveTable(teacher="given")
    with pytest.raises(EvoViTError, match="all tokens of its teacher, which reduces them; take a dense one"):
        Objective(model, goal, teacher)


@pytest.mark.parametrize("whole", [True, False])
def test_a_teacher_that_is_the_model_is_refused_and_stays_as_it_was(whole: bool) -> None:
    """It would be frozen, and the model with it."""
    model = reduced()
    teacher = model.model
    if not whole:  # one parameter in common is enough
        teacher = make_host("vit_avg")
        teacher.head.bias = model.model.head.bias
    with pytest.raises(EvoViTError, match=r"shares model\.\S+ with the model, which learns; give a copy"):
        Objective(model, ObjectiveTable(distillation="soft", teacher="given"), teacher)
    assert all(p.requires_grad for p in (*model.parameters(), *teacher.parameters()))
    assert model.training
