"""SiT: equal to the official code on its reference numbers, also in training, and right on other hosts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

import evovit
from evovit.macs import gmacs
from evovit.methods.sit import Recovered, ReverseSlimming, SiT, TokenSlimming
from evovit.recipe.reading import parse_recipe
from evovit.recipe.tables import ObjectiveTable
from evovit.tokens import Outputs, Taught
from evovit.train.build import build_objective, check_recipe
from evovit.train.objective import Objective
from tests.conftest import GOLDEN, TINY, Golden, make_host, pictures
from tests.parity import assert_close

EVALUATION, TRAINING = Golden("sit"), Golden("sit_frd")
CASES = [(golden, case["name"]) for golden in (EVALUATION, TRAINING) for case in golden.side["cases"]]
UNITS = load_file(GOLDEN / "units_sit.safetensors")
GIVEN = ObjectiveTable(teacher="given")


def load_case(official: Golden, case: dict[str, Any]) -> evovit.ReducedViT:
    """Load the official state; where it has reverse modules they tell the blocks."""
    options = {} if official is TRAINING else {"blocks": tuple(i - 1 for i in case["slim_index"])}
    weights = {
        name: case[official_name]
        for name, official_name in (
            ("token_weight", "lambda_token"),
            ("logit_weight", "lambda_logits"),
            ("temperature", "tau"),
        )
        if official_name in case
    }
    return evovit.load_official("sit", official.state_dict(), num_heads=2, skip_lam=2.0, **options, **weights)


def official_gradients(model: evovit.ReducedViT) -> dict[str, Tensor]:
    parameters = [*model.model.named_parameters(), *model.method.named_parameters()]
    return {name: p.grad for name, p in parameters if p.grad is not None}


@pytest.mark.parametrize(
    ("official", "name"), CASES, ids=lambda value: getattr(value, "side", {}).get("name")
)
def test_equals_official(official: Golden, name: str) -> None:
    """Logits, slots, traces; in training recovered tokens, every loss term and every gradient too."""
    case = official.case(name)
    model = load_case(official, case).train(case["mode"] == "train")
    images = official.images(case)
    teacher = copy.deepcopy(model.model)
    outputs = model.run(images, record=True)
    assert_close(outputs.logits, official.out(case, "logits"))
    assert_close(torch.stack([t.x[:, 0] for t in outputs.trace]), official.out(case, "cls_trace"))
    assert model.method.config.blocks == tuple(i - 1 for i in case["slim_index"])
    for place, block in enumerate(model.method.config.blocks):
        assert_close(outputs.trace[block].patches, official.out(case, f"tsm_out.{place}"))
        assert (outputs.trace[block].index == -1).all()
    if case["mode"] == "eval":
        means = torch.stack([t.patches.mean(1) for t in outputs.trace])
        assert_close(means, official.out(case, "layer_tokens_mean"))
        assert [t.num_patches for t in outputs.trace] == case["layer_tokens_count"]
        for number in case["layer_tokens"]:
            assert_close(outputs.trace[number].patches, official.out(case, f"layer_tokens.{number}"))
        return
    recovered = outputs.tokens.carry.patches
    assert_close(torch.stack([x.mean(1) for x in recovered]), official.out(case, "recovered_mean"))
    for number in case["layer_tokens"]:
        assert_close(recovered[number], official.out(case, f"recovered.{number}"))
    model = load_case(official, case)  # as it was before the stem's batch norm moved
    terms = Objective(model, GIVEN, teacher).train()(images, torch.tensor(case["labels"]))
    for ours, theirs in (("class", "cls"), ("frd_tokens", "token"), ("frd_logits", "logits")):
        assert_close(terms[ours], official.out(case, f"loss_{theirs}")[0])
    loss = torch.stack(list(terms.values())).sum()
    assert_close(loss, official.out(case, "loss")[0])
    loss.backward()
    gradients = official_gradients(model)
    norms = dict(zip(case["grad_norm_names"], official.out(case, "grad_norm"), strict=True))
    assert set(norms) == set(gradients)
    largest = max(norms.values())
    for name, expected in norms.items():
        assert abs(gradients[name].norm() - expected) <= 1e-5 * (expected + 1e-3 * largest), name
    last_bias = (
        "grad.tsm.2.weight.3.bias"  # alike for all tokens of a softmax over tokens: 0 but for rounding
    )
    for output in case["outputs"]:
        if output.startswith("grad.") and output != last_bias:
            assert_close(gradients[output.removeprefix("grad.")], official.out(case, output))
    for gradient in (gradients[last_bias.removeprefix("grad.")], official.out(case, last_bias)):
        assert gradient.abs().max() < 1e-7 * largest


def test_units_equal_the_official_ones() -> None:
    """Slimming, reverse slimming, and the whole loss of three recorded layers."""
    slim, reverse = TokenSlimming(12, 7), ReverseSlimming(12, 7, 16)
    for module, unit in ((slim, "token_slimming"), (reverse, "reverse_slimming")):
        start = f"{unit}.in.w."
        module.load_state_dict({k.removeprefix(start): v for k, v in UNITS.items() if k.startswith(start)})
        with torch.no_grad():
            assert_close(module(UNITS[f"{unit}.in.x"]), UNITS[f"{unit}.out.out"])
    part = {k.removeprefix("frd_loss.in."): v for k, v in UNITS.items() if k.startswith("frd_loss.in.")}
    model = evovit.reduce_tokens(make_host("vit"), "sit", blocks=(1,))
    tokens = model.run(pictures()).tokens
    tokens = tokens.change(carry=Recovered(tuple(part[f"tokens{i}"] for i in range(3))))
    outputs = Outputs(part["logits"], tokens, {}, [], tokens.x, None)
    taught = Taught(part["teacher_logits"], None, trace=tuple(part[f"teacher_tokens{i}"] for i in range(3)))
    terms = model.method.losses(outputs, taught)
    total, classes, token, logits, _ = UNITS["frd_loss.out.parts"]
    assert_close(terms["frd_tokens"], token)
    assert_close(terms["frd_logits"], logits)
    assert_close(F.cross_entropy(part["logits"], part["labels"].long()) + sum(terms.values()), total)
    assert_close(F.cross_entropy(part["logits"], part["labels"].long()), classes)


def test_slots_are_means_and_equal_a_naive_loop() -> None:
    """A slot's shares sum to 1 over the tokens (2 images of 6 tokens, to 3 slots)."""
    slim, x = TokenSlimming(4, 3), torch.randn(2, 6, 4)
    with torch.no_grad():
        slim.scale.fill_(1.7)
        assert_close(slim.shares(x).sum(1), torch.ones(2, 3))
        norm, down, _, up = slim.weight
        for image in range(2):
            scores = torch.stack(
                [
                    1.7 * up(F.gelu(down(F.layer_norm(x[image, n], (4,), norm.weight, norm.bias, 1e-5))))
                    for n in range(6)
                ]
            )
            for slot in range(3):
                weights = scores[:, slot].exp() / scores[:, slot].exp().sum()
                expected = sum(weights[n] * x[image, n] for n in range(6))
                assert_close(slim(x)[image, slot], expected)


TABLE = [  # M parameters without and with reverse modules, GMACs, the teacher's M and GMACs, pixels
    ("sit_tiny", "sit_backbone_tiny", 15.87, 29.9, 0.99, 15.7, 3.5, 224),
    ("sit_extra_small", "sit_backbone_small", 25.63, 47.4, 1.48, 25.4, 5.5, 224),
    ("sit_small", "sit_backbone_small", 25.6, 36.7, 4.02, 25.4, 5.5, 224),
    ("sit_medium", "sit_backbone_medium", 55.6, 81.0, 8.02, 55.2, 11.9, 224),
    ("sit_large", "sit_backbone_large", 148.2, 226.9, 34.3, 147.0, 56.1, 288),
]


@pytest.mark.parametrize(("name", "host", "small", "whole", "work", "teacher", "its_work", "size"), TABLE)
def test_size_and_macs_equal_the_table(
    name: str, host: str, small: float, whole: float, work: float, teacher: float, its_work: float, size: int
) -> None:
    with torch.device("meta"):
        model, dense = (timm.create_model(each).eval() for each in (name, host))
        plain = evovit.create_model(name, token_weight=0)
    millions = [sum(p.numel() for p in each.parameters()) / 1e6 for each in (plain, model, dense)]
    assert millions == [pytest.approx(expected, rel=2e-3) for expected in (small, whole, teacher)]
    model.last_block = "all"  # as published
    assert gmacs(model, (3, size, size)) == pytest.approx(work, rel=5e-3)
    assert gmacs(dense, (3, size, size)) == pytest.approx(its_work, rel=1.3e-2)  # one decimal printed
    assert sum(p.requires_grad for p in dense.aux_head.parameters()) == 0


def test_slots_of_a_deit_are_counted_as_in_the_second_source() -> None:
    """Half of 196 after blocks 2, 5 and 8: 98, 49, 24; the class token is row 0 throughout."""
    with torch.device("meta"):
        model = evovit.reduce_tokens(timm.create_model("deit_tiny_patch16_224"), "sit")
    trace = model.run(torch.empty(1, 3, 224, 224, device="meta"), record=True).trace
    assert [t.num_patches for t in trace] == [196] * 2 + [98] * 3 + [49] * 3 + [24] * 4


@pytest.mark.parametrize("host", ["vit", "dinov2_reg", "eva02", "lv_vit", "siglip"])
def test_the_losses_are_sums_over_blocks_of_what_the_teacher_has_there(host: str) -> None:
    """Also before the first slimming, where nothing is reversed; prefix tokens pass the slimming by."""
    teacher, images = make_host(host), pictures()
    model = evovit.reduce_tokens(make_host(host), "sit", blocks=(0, 2), temperature=2.0, logit_weight=0.5)
    model.train()
    model.host.eval()  # so that a stem with batch norm does as the teacher's
    outputs, taught = model.run(images, record=True), Objective(model, GIVEN, teacher).teach(images)
    dense = evovit.reduce_tokens(teacher, "sit", blocks=()).eval().run(images, record=True)
    assert torch.equal(outputs.trace[0].prefix, dense.trace[0].prefix)
    terms, total = model.method.losses(outputs, taught), torch.zeros(())
    for number in range(4):
        assert torch.equal(taught.trace[number], dense.trace[number].patches)
        recovered = model.method.rtsm[number](outputs.trace[number].patches)
        total = total + (recovered - dense.trace[number].patches).square().mean()
    assert_close(terms["frd_tokens"], 2 * total / 4)
    p, q = (each.double().div(2).softmax(1) for each in (dense.logits, outputs.logits))
    assert abs(terms["frd_logits"] - 0.5 * 4 * (p * (p / q).log()).sum(1).mean()) < 1e-6


def test_training_compiles_in_one_graph_with_its_teacher() -> None:
    student, teacher = (VisionTransformer(**(TINY | {"depth": 2})) for _ in range(2))
    model = evovit.reduce_tokens(student, "sit", blocks=(0,))
    objective, labels = Objective(model, GIVEN, teacher).train(), torch.tensor([1, 3])
    torch.compiler.reset()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    found = []
    for forward in (objective, compiled):
        model.zero_grad()
        terms = forward(pictures(), labels)
        torch.stack(list(terms.values())).sum().backward()
        found.append([*terms.values(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))


def test_reverse_modules_are_left_out_where_nothing_needs_them() -> None:
    """Same logits without them; they are no part of evaluation."""
    official, case = TRAINING, TRAINING.case("eval")
    model = load_case(official, case)
    bare = evovit.load_official("sit", official.state_dict(), num_heads=2, skip_lam=2.0, token_weight=0)
    assert not any(name.startswith("rtsm") for name in bare.method.state_dict())
    with torch.no_grad():
        assert torch.equal(bare(official.images(case)), model(official.images(case)))
        assert model.run(official.images(case)).tokens.carry == Recovered()
    assert set(model.method.state_dict()) | set(model.model.state_dict()) == set(official.state_dict())


def test_a_teacher_must_be_there_dense_and_equal() -> None:
    model = evovit.reduce_tokens(make_host("vit"), "sit", blocks=(1,))
    recipe = parse_recipe(
        {
            "model": {"name": "small_vit"},
            "method": {"name": "sit", "blocks": [1]},
            "data": {"source": "digits", "batch_size": 8},
            "learning_rate": {"base": 1e-3, "warm_up_epochs": 0},
            "run": {"epochs": 1},
        }
    )
    check_recipe(recipe)  # the command that runs it may add the teacher
    with pytest.raises(evovit.EvoViTError, match="sit as configured learns from a teacher and there is none"):
        build_objective(recipe, model, 10)
    with pytest.raises(evovit.EvoViTError, match="reduces them; take a dense one"):
        Objective(model, GIVEN, evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,)))
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=5)
    with pytest.raises(evovit.EvoViTError, match="has 3 blocks of width 192.*choose an equal"):
        Objective(model, GIVEN, other)
    plain = evovit.reduce_tokens(make_host("vit"), "sit", blocks=(1,), token_weight=0)
    for teacher, names in ((None, {"class"}), (other, {"class", "frd_logits"})):  # logits alone: any teacher
        terms = Objective(plain.train(), GIVEN, teacher)(pictures(), torch.tensor([1, 3]))
        assert set(terms) == names


def test_another_image_size_is_refused_in_one_sentence() -> None:
    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5, dynamic_img_size=True
    )
    model = evovit.reduce_tokens(host, "sit", blocks=(0,))
    with pytest.raises(evovit.EvoViTError, match="a grid of 4 x 4 patches, but these images have 6 x 6"):
        model(pictures(1, 96))


def test_token_distillation_finds_no_place_to_compare_at() -> None:
    model = evovit.reduce_tokens(make_host("vit"), "sit", blocks=(1,))
    goal = ObjectiveTable(teacher="given", token_distillation=1.0)
    with pytest.raises(evovit.EvoViTError, match="SiT leaves no patch token at its place"):
        Objective(model, goal, make_host("vit"))


def test_the_loader_refuses_what_it_cannot_know() -> None:
    state = EVALUATION.state_dict()
    with pytest.raises(evovit.EvoViTError, match="after which blocks it slims; give blocks"):
        evovit.load_official("sit", state, num_heads=2, skip_lam=2.0)
    with pytest.raises(evovit.EvoViTError, match="do not fit blocks and keep_ratio"):
        evovit.load_official("sit", state, num_heads=2, skip_lam=2.0, blocks=(0, 1))
    with pytest.raises(evovit.EvoViTError, match="no 'tsm.' tensors.*load_official\\('lv_vit'"):
        evovit.load_official("sit", Golden("idlevit_lvvit").state_dict(), num_heads=2)
    rest = {key: value for key, value in state.items() if not key.startswith("tsm.")}
    teacher = evovit.load_official("lv_vit", rest, num_heads=2, skip_lam=2.0)
    assert teacher.aux_weight == 0 and teacher.patch_embed.proj is None


def test_named_models_come_from_both_doors() -> None:
    for create in (evovit.create_model, timm.create_model):
        model = create("sit_extra_small", num_classes=7, depth=4, img_size=64, token_weight=0)
        assert isinstance(model, evovit.ReducedViT) and isinstance(model.method, SiT)
        assert model.method.config.blocks == (0, 1, 2) and model.num_classes == 7
        assert model(pictures(1, 64)).shape == (1, 7)
    with pytest.raises(evovit.EvoViTError, match="No weights of LV-ViT or SiT are hosted"):
        timm.create_model("sit_small", pretrained=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_ratio": 0}, "keep_ratio is 0; allowed is a number above 0, at most 1"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5; allowed is a number above 0, at most 1"),
        ({"blocks": (3,)}, "blocks is 3; allowed is 0 to 2 .nothing reads what the last block would slim"),
        ({"blocks": (2, 1)}, r"blocks is \(2, 1\); list each reducing block once"),
        ({"token_weight": -1}, "token_weight is -1; allowed is a number, 0 or more"),
        ({"temperature": 0}, "temperature is 0; allowed is a number above 0"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "sit", **({"blocks": (1,)} | options))


def test_full_size_modules_cannot_start_late() -> None:
    with pytest.raises(evovit.EvoViTError, match="SiT has no keep ratio that could start late or ramp"):
        evovit.reduce_tokens(make_host("vit"), "sit", blocks=(1,)).method.set_reduction(0.5)
