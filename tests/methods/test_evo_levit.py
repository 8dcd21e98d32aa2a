"""Evo-LeViT: equal to the official code on its reference numbers, and to a naive loop from the paper."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import evovit
from evovit.backbones.timm_levit_blocks import LevitEntry
from evovit.checkpoints.official_levit import read_layout, rename
from evovit.methods.evo_levit import EvoLeViT
from evovit.models.levit_cls import LevitCls
from evovit.recipe.tables import ObjectiveTable
from evovit.tokens import Taught, Tokens
from evovit.train.objective import Objective
from tests.backbones.test_timm_levit import alive
from tests.conftest import Golden, disturb, pictures
from tests.parity import assert_close, assert_near

FILES = {name: Golden(name) for name in ("evo_levit", "evo_levit_384", "evo_levit_nodist")}
CASES = [(name, case["name"]) for name, file in FILES.items() for case in file.side["cases"]]
EVAL = [pair for pair in CASES if "eval" in pair[1]]
TRAIN = [pair for pair in CASES if "train" in pair[1]]


def load_case(official: Golden, case: dict[str, Any]) -> evovit.ReducedViT:
    layers, _ = case.get("constructor", official.side["model"])["prune_ratio"]
    model = evovit.load_official(
        "evo_levit",
        official.state_dict(),
        key_dim=official.side["model"]["D"],
        class_heads=official.side["model"]["distillation"],
        keep_ratio=layers,
        mode="stage" if case["stage_wise_prune"] else "layer",
        learn_trade_off=case.get("learn_tradeoff", True),
    )
    return evovit.fuse_batch_norm(model) if case.get("fused") else model


def stage_ends(model: evovit.ReducedViT) -> list[int]:
    return list(accumulate(model.method.spec.depths))


def first_grid_numbers(tokens: Tokens, stage: int, columns: int) -> Tensor:
    """Return the raster positions (B, N) of a stage's tokens as numbers of the first stage's grid."""
    y, x = tokens.index // tokens.grid[1], tokens.index % tokens.grid[1]
    return y * 2**stage * columns + x * 2**stage


@pytest.mark.parametrize(("file", "name"), EVAL)
def test_evaluation_equals_official(file: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, scores and sets of every selection, and class token and mean patch token after every module."""
    official = FILES[file]
    case = official.case(name)
    entered: list[Tokens] = []
    enter = EvoLeViT.enter_stage

    def noted(method: EvoLeViT, stage: Any, tokens: Tokens) -> Tokens:
        entered.append(enter(method, stage, tokens))
        return entered[-1]

    monkeypatch.setattr(EvoLeViT, "enter_stage", noted)
    monkeypatch.setattr(EvoLeViT, "is_read", lambda *_: True)  # also the scores that nobody reads
    model = load_case(official, case)
    with torch.no_grad():
        outputs = model.run(official.images(case), record=True)
    whole = [model.method.finish(tokens) for tokens in outputs.trace]
    assert_near(outputs.logits, official, case, "logits")
    assert_near(whole[-1].patches.mean(1), official, case, "pooled")
    selections = compare_selections(official, case, model, outputs.trace)
    columns, last = model.method.spec.grid[1], len(model.method.spec.depths) - 1
    numbers = official.out(case, "final_ori_indices").long()
    raster = numbers.argsort(1)
    assert torch.equal(first_grid_numbers(whole[-1], last, columns), numbers.gather(1, raster))
    score = official.out(case, "final_global_attn").gather(1, raster)
    assert_close(whole[-1].carry.score, score)
    for number, block, tokens in modules(case, model, whole, entered):
        assert_close(tokens.x[:, 0], official.out(case, f"cls_after.{number}"))
        assert_close(tokens.patches.mean(1), official.out(case, f"mean_after.{number}"))
        if number in case.get("token_layers", ()):
            expected = official.out(case, f"tokens.{number}")
            past = [j for j, selected in enumerate(selections) if selected <= block]
            here = [j for j in past if official.out(case, f"order.{j}").shape[1] == tokens.num_patches]
            if here:  # the official rows, brought from the order of the last selection to raster order
                back = official.out(case, f"order.{here[-1]}").long().argsort(1)[:, :, None]
                patches = expected[:, 1:].gather(1, back.expand(-1, -1, expected.shape[2]))
                expected = torch.cat((expected[:, :1], patches), 1)
            assert_close(tokens.x, expected)


def compare_selections(
    official: Golden, case: dict[str, Any], model: evovit.ReducedViT, trace: list[Tokens]
) -> list[int]:
    """Compare sets and scores of every selection; return the block before which each is made."""
    ends, method = stage_ends(model), model.method
    selections = [
        number
        for number in range(method.spec.depth)
        if method.selects(number) and method.schedule.count(number, trace[number].num_cells)
    ]
    assert len(selections) == len(case["selections"])
    for j, number in enumerate(selections):
        tokens, recorded = trace[number], case["selections"][j]
        state, keep = tokens.carry, recorded["keep"]
        stage = next(i for i, end in enumerate(ends) if number < end)
        assert tokens.grid[0] == recorded["grid"] and state.awake.shape[1] == keep
        kept = first_grid_numbers(tokens, stage, method.spec.grid[1])[:, :keep]
        assert torch.equal(kept, official.out(case, f"keep_idx.{j}").long().sort(1).values)
        patches = first_grid_numbers(state.before, stage, method.spec.grid[1])
        assert torch.equal(patches, official.out(case, f"patch.{j}").long())
        assert_close(state.score, official.out(case, f"score.{j}"))
        order = patches.gather(1, state.score.argsort(dim=1, descending=True, stable=True))
        assert torch.equal(order, official.out(case, f"order.{j}").long())
    return selections


def modules(
    case: dict[str, Any], model: evovit.ReducedViT, whole: list[Tokens], entered: list[Tokens]
) -> list[tuple[int, int, Tokens]]:
    """Return (number of the official module, last block run, all tokens) where both sides have them."""
    found, block, waiting, half = [], -1, False, False
    stages = iter(entered[1:])
    for number, kind in enumerate(case["module_sequence"]):
        if kind == "AttentionSubsample":
            waiting = True
        elif kind == "Residual" and waiting:
            found.append((number, block, next(stages)))
            waiting = False
        elif kind == "Residual" and not half:
            half = True
        else:
            half = False
            block = (
                block + 1
                if kind != "StageModule"
                else next(e for e in stage_ends(model) if e > block + 1) - 1
            )
            found.append((number, block, whole[block]))
    assert block == len(whole) - 1
    return found


@pytest.mark.parametrize(("file", "name"), TRAIN)
def test_training_equals_official(file: str, name: str) -> None:
    """Logits of all heads, the released loss, every gradient and the statistics of the batch norms."""
    official = FILES[file]
    case = official.case(name)
    model, labels = load_case(official, case).train(), torch.tensor(case["labels"])
    outputs = model.run(official.images(case))
    assert_near(outputs.logits, official, case, "logits_avg", 1e-4)
    heads = {"distilled": "avg_dist", "class_token": "cls", "class_token_distilled": "cls_dist"}
    assert set(outputs.extra_logits) == (set(heads) if official.side["model"]["distillation"] else set())
    for head, logits in outputs.extra_logits.items():
        assert_near(logits, official, case, f"logits_{heads[head]}", 1e-4)
    goal, taught = ObjectiveTable(), None
    if outputs.extra_logits:
        goal = ObjectiveTable(distillation="hard", teacher="given", alpha=case["distillation_alpha"])
        taught = Taught(official.out(case, "teacher_logits"), None)
    terms = Objective(nn.Identity(), goal).supervised(outputs.logits, outputs.extra_logits, labels, taught)
    loss = torch.stack(list(terms.values())).sum()
    assert_near(loss[None], official, case, "loss", 1e-4)
    loss.backward()
    compare_gradients(official, case, model)


def compare_gradients(official: Golden, case: dict[str, Any], model: evovit.ReducedViT) -> None:
    layout = read_layout(official.state_dict())

    def ours(name: str) -> tuple[nn.Module, str]:
        host, method = rename({name: torch.ones(())}, layout)
        return (model.model, *host) if host else (model.method, *method)

    def gradient(name: str) -> Tensor:
        module, key = ours(name)
        return module.get_parameter(key).grad

    norms = dict(zip(case["grad_norm_names"], official.out(case, "grad_norm"), strict=True))
    largest = max(norms.values())
    allowed = 10 * case["checks"]["float64_max_abs_diff"]["grad_norm_relative"]
    for name, expected in norms.items():
        assert abs(gradient(name).norm() - expected) <= allowed * (expected + 1e-3 * largest), name
    for name in case["parameters_without_gradient"]:
        if not name.startswith("head_cls"):
            assert gradient(name).abs().sum() == 0, name
    if case.get("grad_learn_tradeoff_names"):
        actual = torch.cat([gradient(name) for name in case["grad_learn_tradeoff_names"]])
        assert_close(actual, official.out(case, "grad_learn_tradeoff"), allowed)
    for key in case["outputs"]:
        kind, _, name = key.partition(".")
        if kind == "grad":
            assert_close(gradient(name), official.out(case, key), allowed)
        elif kind == "bn_after" and not name.startswith(
            ("stage_blocks", "head_cls" * (not model.model.class_heads) or "-")
        ):
            module, buffer = ours(name)
            assert_close(module.get_buffer(buffer), official.out(case, key), 1e-4)


def test_the_four_head_loss_equals_the_released_unit() -> None:
    unit = {k.split(".")[-1]: v for k, v in Golden("units_evo").tensors.items() if "levit_cls" in k}
    heads = {"distilled": unit["o1"], "class_token": unit["o2"], "class_token_distilled": unit["o3"]}
    goal = ObjectiveTable(distillation="hard", teacher="given", alpha=0.5)
    terms = Objective(nn.Identity(), goal).supervised(
        unit["o0"], heads, unit["labels"].long(), Taught(unit["teacher"], None)
    )
    assert_close(terms["class"] + terms["distillation"], unit["loss"][0])


# A naive loop: one image at a time, from equations 1 to 7 of the paper and the released rescaling.


def small(**options: Any) -> LevitCls:
    torch.manual_seed(0)
    size = {
        "img_size": 64,
        "embed_dim": (16, 24, 32),
        "key_dim": 8,
        "num_heads": (2, 3, 4),
        "depth": (2, 2, 2),
    }
    return alive(LevitCls(**(size | {"num_classes": 5} | options)))


def evolved(host: nn.Module, **options: Any) -> evovit.ReducedViT:
    model = evovit.reduce_tokens(host, "evo_levit", **({"start_block": 1} | options))
    with torch.no_grad():
        for number, p in enumerate(model.method.parameters()):
            p.fill_(0.3 * number - 0.5)
    return model


def naive_attention(attn: Any, x: Tensor, asking: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the residual of the rows `asking`, and the class attention (T,) of q (Q, H * D) over rows x."""
    layer = attn.qkv if hasattr(attn, "qkv") else attn.kv
    out, attention = [], torch.zeros(x.shape[0])
    for h, part in enumerate(layer(x[None])[0].chunk(attn.num_heads, dim=1)):
        d = attn.key_dim
        k, v = (part[:, d : 2 * d], part[:, 2 * d :]) if hasattr(attn, "qkv") else (part[:, :d], part[:, d:])
        query = part[:, :d] if hasattr(attn, "qkv") else q[:, h * d : (h + 1) * d]
        weights = torch.softmax(query @ k.T / d**0.5, dim=1)
        out.append(weights @ v)
        attention = attention + weights[0] / attn.num_heads  # eq. 3
    return attn.proj(torch.cat(out, 1)[None])[0], attention


def naive(model: evovit.ReducedViT, image: Tensor, keep: dict[int, int], layer: bool) -> Tensor:
    """Return the tokens (1 + N, C) after the last block, in raster order."""
    host, method = model.model, model.method
    learnt = [torch.sigmoid(p).item() for p in method.learn_tradeoff]
    between = [torch.sigmoid(p).item() for p in method.enter_tradeoff]
    x, score, number, grid = host.embed(image[None])[0], None, 0, host.grid
    for i, stage in enumerate(host.stages):
        if i:
            attn = stage.downsample.attn_downsample
            total, x = sum(score), x + attn.pos_embed[0]
            cells = [r * grid[1] + c for r in range(0, grid[0], 2) for c in range(0, grid[1], 2)]
            rows = [0, *(1 + cell for cell in cells)]
            residual, attention = naive_attention(attn, x, x[rows], attn.q(x[rows][None])[0])
            x = residual + stage.downsample.mlp(residual[None])[0]
            score = [(1 - between[i - 1]) * score[c] + between[i - 1] * attention[1 + c] for c in cells]
            score = [s * total / sum(score) for s in score]
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))
        placeholders: list[int] = []
        for block in stage.blocks:
            if keep.get(number, len(x) - 1) < len(x) - 1 and (layer or not placeholders):
                order = sorted(range(len(score)), key=lambda n: -float(score[n]))
                awake = sorted(order[: keep[number]])
                placeholders = order[keep[number] :]
                weight = sum(score[n] for n in placeholders)
                summary = sum(score[n] / weight * x[1 + n] for n in placeholders)  # eq. 5
            elif not placeholders:
                awake, summary = list(range(len(x) - 1)), None
            rows = [0, *(1 + n for n in awake)]
            part = x[rows] if summary is None else torch.cat((x[rows], summary[None]))
            first, attention = naive_attention(block.attn, part, part, part)
            second = block.mlp((part + first)[None])[0]
            after = part + first + second  # eq. 6
            x = x.clone()
            x[rows] = after[: len(rows)]
            if summary is not None:
                for n in placeholders:
                    x[1 + n] = x[1 + n] + first[-1] + second[-1]  # eq. 7
                summary = after[-1]
            a = learnt[number]
            if score is None:
                score = list(attention[1:])
            else:
                for row, n in enumerate(awake):
                    score[n] = (1 - a) * score[n] + a * attention[1 + row]  # eq. 4
            number += 1
    return x


@pytest.mark.parametrize("mode", ["stage", "layer"])
@pytest.mark.parametrize(
    ("ratios", "counts"),
    [
        ((1.0, 0.5, 0.5, 0.5, 0.5, 0.5), {1: 8, 2: 2, 3: 2}),
        ((1.0, 0.94, 0.75, 0.75, 1.0, 1.0), {1: 15, 2: 3, 3: 3}),  # exactly one placeholder
        ((1.0, 1.0, 0.5, 0.75, 1.0, 1.0), {2: 2, 3: 3}),
    ],
)
@torch.no_grad()
def test_equals_the_papers_equations(mode: str, ratios: tuple[float, ...], counts: dict[int, int]) -> None:
    model = evolved(small(), keep_ratio=ratios, mode=mode)
    images = pictures(size=64)
    outputs = model.run(images)
    whole = model.method.finish(outputs.tokens).x
    for image in range(2):
        assert_close(whole[image], naive(model, images[image], counts, mode == "layer"))


@torch.no_grad()
def test_one_placeholder_keeps_its_own_score() -> None:
    """The released code gives it the representative token's attention: a test of shapes misfires there."""
    model = evolved(small(depth=(3, 1, 1)), keep_ratio=(1.0, 0.94, 0.94, 1.0, 1.0), mode="layer")
    first, second, _, *_ = model.run(pictures(size=64), record=True).trace
    state, after = second.carry, model.method.finish(second).carry
    waiting = ~state.split.kept
    assert waiting.sum(1).tolist() == [1, 1]
    assert torch.equal(after.score[waiting], first.carry.score[waiting])


@torch.no_grad()
def test_placeholders_of_a_part_change_by_one_vector_and_the_total_score_survives_each_entry() -> None:
    model = evolved(small(img_size=128, depth=(3, 2, 1)))
    trace = model.run(pictures(size=128), record=True).trace
    before, after = trace[1].carry.before.x[:, 1:], model.method.finish(trace[2]).patches
    for image in range(2):
        change = (after - before)[image, ~trace[1].carry.split.kept[image]]
        assert change.shape[0] == 32
        assert_close(change, change[:1].expand_as(change), 1e-4)
    for end, start in ((2, 3), (4, 5)):
        old = model.method.finish(trace[end]).carry.score.sum(1)
        assert_close(trace[start].carry.score.sum(1), old)


@torch.no_grad()
def test_each_stages_map_is_in_raster_order() -> None:
    """Each 16 x 16 cell is painted with its own grey; positions make every query find its own cell."""
    host = small(embed_dim=(32, 32, 32), key_dim=32, num_heads=(1, 1, 1))
    host.stem = nn.Sequential(nn.AvgPool2d(16), nn.Conv2d(3, 32, 1, bias=False))
    host.stem[1].weight.zero_()
    host.stem[1].weight[31] = 1 / 3
    for p in (host.cls_token, host.pos_embed):
        p.zero_()
    for module in host.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
            module.weight.fill_(1.0)
            module.bias.zero_()
    for stage in host.stages:
        for block in stage.blocks:
            block.attn.proj.ln.bn.weight.zero_()
            block.mlp.ln2.bn.weight.zero_()
        if isinstance(stage.downsample, nn.Identity):
            continue
        stage.downsample.mlp.ln2.bn.weight.zero_()
        attn = stage.downsample.attn_downsample
        codes = attn.pos_embed.shape[1]
        attn.pos_embed.zero_()[0, :, :codes] = torch.eye(codes)
        for p in (attn.kv.linear.weight, attn.q.ln.linear.weight, attn.proj.ln.linear.weight):
            p.zero_()
        attn.q.ln.linear.weight[:codes, :codes] = 1000 * torch.eye(codes)
        attn.kv.linear.weight[:codes, :codes] = torch.eye(codes)
        attn.kv.linear.weight[32, 31] = 1.0  # the first value is the grey
        attn.proj.ln.linear.weight[31, 0] = 1.0
    grey = torch.arange(3.0, 19.0).view(1, 1, 4, 4)  # above 3, where Hardswish is the identity
    images = F.interpolate(grey.expand(1, 3, 4, 4), scale_factor=16)
    for mode in ("stage", "layer"):
        model = evolved(host, mode=mode)
        assert [t.num_patches for t in model.run(images, record=True).trace] == [16, 9, 3, 3, 1, 1]
        for stage, expected in enumerate((grey, grey[:, :, ::2, ::2], grey[:, :, ::4, ::4])):
            assert_close(model.feature_map(images, stage)[:, 31:], expected, 1e-4)
    with pytest.raises(evovit.EvoViTError, match="stage is 3; allowed is -3 to 2"):
        model.feature_map(images, 3)


def test_down_sampling_is_known_by_its_view() -> None:
    model = evolved(small())
    entries = [s.enter for s in evovit.backbones.adapt(model.model).stages()]
    assert entries[0] is None and all(isinstance(entry, LevitEntry) for entry in entries[1:])


def test_representation_shift_runs_on_stages_without_class_token() -> None:
    """The first selection is by the FFN of the block before; all stages run, all parameters learn."""
    torch.manual_seed(0)
    host = disturb(timm.create_model("levit_128s", img_size=64, num_classes=5), 0.05).eval()
    reduced = evovit.reduce_tokens(host, "evo_levit", start_block=1, keep_ratio=0.5, selection="shift")
    with torch.no_grad():
        trace = reduced.run(pictures(size=64), record=True).trace
        x = host.stem(pictures(size=64)).flatten(2).transpose(1, 2)
        block = host.stages[0].blocks[0]
        y = x + block.attn(x)
        shift = (block.mlp(y) - y).norm(dim=-1)
    assert torch.equal(trace[1].index[:, :8], shift.topk(8).indices.sort(1).values)
    assert [tokens.num_patches for tokens in trace][:2] == [16, 9]
    reduced.train()(pictures(size=64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reduced.parameters())
