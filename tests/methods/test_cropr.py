"""Cropr: equal to the official code on its reference numbers, and right on hosts it was not written for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import evovit
from evovit.checkpoints.reduced import load_reduced, save_reduced
from evovit.macs import gmacs
from evovit.methods.cropr import Cropr, Router, removed_per_router
from evovit.recipe.tables import ObjectiveTable
from evovit.tokens import Tokens
from evovit.train.objective import Objective
from tests.conftest import Golden, make_host, pictures
from tests.methods.test_dynamic_vit import all_gradients
from tests.parity import assert_close, assert_same_gradients

OFFICIAL, UNITS = Golden("cropr"), Golden("units_cropr")
CASES = [case["name"] for case in OFFICIAL.side["cases"]]


def load_case(case: dict[str, Any]) -> evovit.ReducedViT:
    config = case["cropr_cfg"]
    return evovit.load_official(
        "cropr",
        OFFICIAL.state_dict(),
        num_heads=OFFICIAL.side["model"]["num_heads"],
        r=config["pruning_rate"],
        llf=config["llf"],
        router_heads=config["num_heads"],
        auxiliary=config["training"],
        global_pool=case.get("global_pool", "token"),
    )


def noting(monkeypatch: pytest.MonkeyPatch) -> list[Tokens]:
    """Return what fills with the tokens after each block, before its router drops any."""
    noted: list[Tokens] = []
    route = Cropr.route

    def note(self: Cropr, tokens: Tokens, number: int) -> Tokens:
        noted.append(tokens)
        return route(self, tokens, number)

    monkeypatch.setattr(Cropr, "route", note)
    return noted


@pytest.mark.parametrize("name", CASES)
def test_equals_official(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, kept and dropped tokens, logits, traces; in training auxiliary logits, losses, gradients."""
    case, noted = OFFICIAL.case(name), noting(monkeypatch)
    model = load_case(case).train(case["mode"] == "train")
    outputs = model.run(OFFICIAL.images(case), record=True)
    batch, blocks = len(outputs.logits), [*noted, *outputs.trace[len(noted) :]]
    assert_close(outputs.logits, OFFICIAL.out(case, "logits"))
    assert_close(torch.stack([t.x[:, 0] for t in blocks]), OFFICIAL.out(case, "cls_trace"))
    assert_close(torch.stack([t.patches.mean(1) for t in blocks]), OFFICIAL.out(case, "mean_trace"))
    assert [t.x.shape[1] for t in blocks] == case["tokens_into_block"]
    before = torch.arange(50).expand(batch, 50)
    for number, count in enumerate(case["pruned_per_module"]):
        scores = model.method.cropr[number].cross_attn.scores(noted[number].patches)
        order = before[:, 1:].argsort(1)  # official rows, brought to raster order
        assert_close(scores, OFFICIAL.out(case, f"score.{number}").gather(1, order))
        kept = OFFICIAL.out(case, f"kept_token.{number}").long()
        assert torch.equal(outputs.trace[number].index + 1, kept[:, 1:].sort(1).values)
        dropped = before.gather(1, OFFICIAL.out(case, f"drop.{number}").long())
        assert dropped.shape[1] == count == model.method.removed[number]
        if model.method.config.llf:
            places = outputs.trace[number].carry.dropped[number][1]
            assert torch.equal(places + 1, dropped.sort(1).values)
        before = kept
    for number in case.get("token_layers", []):
        tokens, theirs = blocks[number], OFFICIAL.out(case, f"tokens.{number}")
        last = number == len(blocks) - 1 and model.method.config.llf
        order = OFFICIAL.out(case, "llf_token" if last else f"kept_token.{number - 1}").long()
        assert_close(tokens.x, theirs.gather(1, order.argsort(1)[..., None].expand_as(theirs)))
    if case["mode"] == "train":
        check_training(case, model, outputs, noted)


def check_training(
    case: dict[str, Any], model: evovit.ReducedViT, outputs: evovit.Outputs, noted: list[Tokens]
) -> None:
    assert list(outputs.extra_logits) == [f"cropr_{i}" for i in range(len(noted))]
    for number, logits in enumerate(outputs.extra_logits.values()):
        assert_close(logits, OFFICIAL.out(case, f"aux_logits.{number}"))
        gathered = model.method.cropr[number].cross_attn(noted[number].x)
        assert_close(gathered[:, 0], OFFICIAL.out(case, f"aggregate.{number}"))
    labels = torch.tensor(case["labels"])
    objective = Objective(model, ObjectiveTable(reduction="sum"))
    terms = objective.supervised(outputs.logits, outputs.extra_logits, labels, None)
    losses = torch.stack(list(terms.values()))
    assert_close(losses, OFFICIAL.out(case, "losses"))
    assert_close(losses.sum(), OFFICIAL.out(case, "loss")[0])
    losses.sum().backward()
    assert_same_gradients(OFFICIAL, case, all_gradients(model))


@pytest.mark.parametrize("unit", UNITS.side["units"], ids=lambda unit: unit["name"])
def test_a_router_equals_the_official_unit(unit: dict[str, Any]) -> None:
    options, start = dict(unit["parameters"]), f"{unit['name']}."
    tensors = {k.removeprefix(start): v for k, v in UNITS.tensors.items() if k.startswith(start)}
    removed, dim, classes, heads = (
        options.pop(key) for key in ("pruning_rate", "embed_dim", "num_classes", "num_heads")
    )
    for auxiliary in (True, False) if options["num_queries"] == 1 else (False,):
        router = Router(Cropr.Config(**options, auxiliary=auxiliary), dim, heads, classes)
        weights = {k.removeprefix("in.w."): v for k, v in tensors.items() if k.startswith("in.w.")}
        wanted = router.state_dict()
        assert set(wanted) <= set(weights) and (not auxiliary or set(wanted) == set(weights))
        router.load_state_dict({key: weights[key] for key in wanted})
        x = tensors["in.x"]
        with torch.no_grad():
            scores = router.cross_attn.scores(x[:, 1:])
            assert_close(scores, tensors["out.scores"])
            order = scores.argsort(1, descending=True)[..., None].expand_as(x[:, 1:])
            ranked = x[:, 1:].gather(1, order)
            count = x.shape[1] - 1 - removed
            assert torch.equal(torch.cat((x[:, :1], ranked[:, :count]), 1), tensors["out.x_keep"])
            assert torch.equal(ranked[:, count:], tensors["out.x_pruned"])
            if auxiliary:
                assert_close(scores, tensors["out.scores_train"])
                assert_close(router.cross_attn(x)[:, 0], tensors["out.aggregate"])
                assert_close(router(x), tensors["out.aux_logits"])


def naive(router: Router, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return scores (N,) and what the query gathers (C,), of one image (N, C), head by head."""
    attention, dim = router.cross_attn, x.shape[1] // heads
    y = attention.attn_norm(x)
    q, k, v = attention.q(attention.queries[0]), attention.k(y), attention.v(y)
    scores, parts = torch.zeros(len(x)), []
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        logits = q[:, part] @ k[:, part].T
        scores = scores + logits.sum(0)
        parts.append((logits / dim**0.5).softmax(-1) @ v[:, part])
    gathered = attention.proj(torch.cat(parts, -1))
    return scores, (gathered + attention.mlp(attention.mlp_norm(gathered)))[0]


@pytest.mark.parametrize(
    "options", [{}, {"pre_attn_norm": True, "q_proj": True, "k_proj": True, "v_proj": True}]
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_router_by_a_loop_over_heads(options: dict[str, Any], bias: bool) -> None:
    router = Router(Cropr.Config(**options, qkv_bias=bias), 16, 4, 5)
    for p in router.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        scores, gathered = router.cross_attn.scores(x), router.cross_attn(x)[:, 0]
        for image in range(2):
            expected = naive(router, x[image], 4)
            assert_close(scores[image], expected[0])
            assert_close(gathered[image], expected[1])


@pytest.mark.parametrize("host", ["vit", "deit_distilled", "dinov2_reg", "siglip", "eva02", "beit", "lv_vit"])
@pytest.mark.parametrize("llf", [True, False])
def test_survivors_run_alone_and_the_others_come_back_in_place(host: str, llf: bool) -> None:
    """Block by block with the host's own views; prefix tokens are never ranked."""
    model, images = make_host(host), pictures()
    reduced = evovit.reduce_tokens(model, "cropr", r=(3, 4), llf=llf)
    with torch.no_grad():
        outputs = reduced.run(images, record=True)
        backbone = evovit.backbones.adapt(model)
        tokens = backbone.embed(images)
        held = tokens.patches.clone()
        for block in backbone.stages()[0].blocks:
            number = block.number
            if number == 3 and llf:
                index = torch.arange(16).expand(2, 16)
                tokens = tokens.change(x=torch.cat((tokens.prefix, held), 1), index=index)
            tokens = block(tokens)
            held = held.scatter(1, tokens.index[..., None].expand_as(tokens.patches), tokens.patches)
            if number < 2:
                scores = reduced.method.cropr[number].cross_attn.scores(tokens.patches)
                rows = scores.topk(tokens.num_patches - (3, 4)[number]).indices.sort(1).values
                patches = tokens.patches.gather(1, rows[..., None].expand(-1, -1, tokens.x.shape[2]))
                tokens = tokens.change(
                    x=torch.cat((tokens.prefix, patches), 1), index=tokens.index.gather(1, rows)
                )
            assert torch.equal(outputs.trace[number].index, tokens.index)
            assert_close(outputs.trace[number].x, tokens.x)
    assert [t.num_patches for t in outputs.trace] == [13, 9, 9, 16 if llf else 9]
    if llf:
        with torch.no_grad():
            found = reduced.forward_intermediates(images, [1], intermediates_only=True)[0]
        whole = reduced.method.finish(outputs.trace[1])
        assert torch.equal(found.flatten(2).transpose(1, 2), whole.patches)


def test_the_host_learns_from_its_own_loss_and_routers_from_theirs() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "cropr", r=3).train()
    outputs = reduced.run(pictures())
    outputs.logits.sum().backward(retain_graph=True)
    assert all(p.grad is None for p in reduced.method.parameters())
    reduced.zero_grad()
    torch.stack([x.sum() for x in outputs.extra_logits.values()]).sum().backward()
    assert all(p.grad is None for p in reduced.model.parameters())
    assert all(p.grad is not None for p in reduced.method.parameters())


def test_routers_alone_run_a_trained_model_with_the_queries_weights() -> None:
    trained = evovit.reduce_tokens(make_host("vit"), "cropr", r=3)
    alone = evovit.reduce_tokens(make_host("vit"), "cropr", r=3, auxiliary=False)
    assert [name for name, _ in alone.method.named_parameters()] == [
        "cropr.0.cross_attn.queries",
        "cropr.1.cross_attn.queries",
    ]
    assert not any(p.requires_grad for p in alone.method.parameters())
    state = trained.method.state_dict()
    alone.method.load_state_dict({name: state[name] for name in alone.method.state_dict()})
    with torch.no_grad():
        assert torch.equal(alone(pictures()), trained(pictures()))
        assert alone.train().run(pictures()).extra_logits == {}
        several = evovit.reduce_tokens(make_host("vit"), "cropr", num_queries=5, auxiliary=False)
        assert several(pictures()).isfinite().all()


@pytest.mark.parametrize(
    ("r", "count", "expected"),
    [
        (8, 4, (9, 8, 8, 8)),
        (8, 1, (9,)),
        (8, 0, ()),
        (0, 3, (0, 0, 0)),
        ((2, 0), 3, (2, 0, 0)),
        ((), 2, (0, 0)),
    ],
)
def test_the_first_router_drops_one_more(r: Any, count: int, expected: tuple[int, ...]) -> None:
    assert removed_per_router(r, count, 196) == expected


def test_one_token_is_left_however_many_should_go() -> None:
    for llf, counts in ((True, [1, 1, 1, 16]), (False, [1, 1, 1, 1])):
        reduced = evovit.reduce_tokens(make_host("vit"), "cropr", r=15, llf=llf)
        with torch.no_grad():
            trace = reduced.run(pictures(), record=True).trace
        assert [t.num_patches for t in trace] == counts
        assert trace[-1].x.isfinite().all()


def test_hosts_of_one_and_two_blocks_have_no_router_to_run() -> None:
    for depth, llf, routers in ((1, False, 0), (2, True, 0), (2, False, 1), (3, True, 1)):
        host = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=depth, num_classes=5)
        reduced = evovit.reduce_tokens(host.eval(), "cropr", r=1, llf=llf)
        assert len(reduced.method.cropr) == routers
        with torch.no_grad():
            assert reduced(pictures()).shape == (2, 5)


def test_work_is_that_of_the_tokens_left() -> None:
    """196 tokens lose 9 after the first block, 8 after every other; the last block has all again."""
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224").eval()
        dense = gmacs(host, (3, 224, 224))
        model = evovit.reduce_tokens(host, "cropr", r=8, last_block="all")
    rows = [197, *(188 - 8 * step for step in range(10)), 197]
    blocks = sum(12 * n * 384**2 + 2 * n**2 * 384 for n in rows)
    whole = 12 * (12 * 197 * 384**2 + 2 * 197**2 * 384)
    assert gmacs(model, (3, 224, 224)) - dense == pytest.approx((blocks - whole) / 1e9, rel=1e-6)


def test_a_ramp_drops_a_share_and_is_saved_as_it_is(tmp_path: Path) -> None:
    reduced, images = evovit.reduce_tokens(make_host("vit"), "cropr", r=4), pictures()
    reduced.method.set_reduction(0.5)
    assert reduced.method.removed == (2, 2)
    save_reduced(reduced, tmp_path)
    loaded = load_reduced(tmp_path, make_host("vit")).eval()
    assert loaded.method.config.r == (2, 2)
    with torch.no_grad():
        assert torch.equal(loaded(images), reduced(images))
    reduced.method.set_reduction(0.0)
    with torch.no_grad():
        assert_close(reduced(images), reduced.model(images))
    outputs = reduced.train().run(images)
    assert len(outputs.extra_logits) == 2  # they learn from the first epoch on


def test_another_number_of_classes_reaches_the_auxiliary_heads() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "cropr", r=3)
    reduced.reset_classifier(7)
    outputs = reduced.train().run(pictures())
    assert [x.shape for x in outputs.extra_logits.values()] == [(2, 7)] * 2
    F.cross_entropy(outputs.extra_logits["cropr_0"], torch.tensor([6, 0])).backward()


def test_another_layout_is_refused_in_a_sentence() -> None:
    with pytest.raises(evovit.EvoViTError, match="not an official cropr checkpoint"):
        evovit.load_official("cropr", Golden("evit").state_dict(), num_heads=3)
    state = OFFICIAL.state_dict()
    del state["cropr.1.cross_attn.queries"]
    with pytest.raises(evovit.EvoViTError, match="The routers do not fit the options"):
        evovit.load_official("cropr", state, num_heads=3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": -1}, "r is -1; allowed is a whole number, 0 or more"),
        ({"r": 17}, "r is 17; allowed is 0 to 16"),
        ({"r": (1, 1, 1)}, "r lists 3 values for 2 routers"),
        ({"router_heads": 3}, "router_heads is 3; allowed are divisors of the host's width, 32"),
        ({"num_queries": 4}, "num_queries is 4, but an auxiliary head learns from one; set auxiliary"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0; allowed is a number above 0"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "cropr", **options)
