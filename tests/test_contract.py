"""What every method promises on every host, from the registries: a new method is tested without an edit here.

Run time is dominated by tracing (`fullgraph`, export); both use a tiny host of four blocks.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evovit
from evovit.checkpoints.reduced import load_reduced, save_reduced
from evovit.methods import DENSE, find_method
from evovit.recipe.tables import ObjectiveTable
from evovit.train.objective import Objective
from tests.conftest import HOSTS, covering, make_host, pairs, pictures, traced

METHODS = evovit.list_methods()


def variants(name: str) -> list[dict[str, Any]]:
    """Return the options to test a method with: its example, and one for each other mode, or for the rest."""
    cls = find_method(name)
    others = {"mode": "layer", "rest": "squeeze"}
    found = [{option: value} for option, value in others.items() if hasattr(cls.Config, option)]
    return [cls.example, *({**cls.example, **other} for other in found)]


def wrap(host: nn.Module, name: str, options: dict[str, Any]) -> evovit.ReducedViT:
    """Wrap a host; one without class token gets the score and the loss that are made for it."""
    if getattr(host, "cls_token", None) is None:
        without = {"selection": "column_mean", "compared": "active", "assisted_head": False}
        options = options | {k: v for k, v in without.items() if hasattr(find_method(name).Config, k)}
    return evovit.reduce_tokens(host, name, **options)


def seeded(model: nn.Module, images: Tensor, seed: int = 0) -> Tensor:
    """Run a model whose training may sample, with the given seed."""
    torch.manual_seed(seed)
    return model(images)  # type: ignore[no-any-return]


PAIRS = pairs(METHODS)
ON_VIT = [(m, o) for m in METHODS for o in variants(m)]
IDS = [f"{m}-{o.get('mode') or o.get('rest', 'default')}" for m, o in ON_VIT]


@pytest.mark.parametrize(("method", "host"), PAIRS)
def test_keeping_everything_is_the_host_exactly(method: str, host: str) -> None:
    model, images = make_host(host), pictures()
    cls = find_method(method)
    reduced = wrap(model, method, cls.example | cls.keep_all)
    with torch.no_grad():
        expected = model(images)
        assert (reduced(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
        features = model.forward_features(images)
        assert (reduced.forward_features(images) - features).abs().max() <= 1e-5 * features.abs().max()


@pytest.mark.parametrize(("method", "host"), PAIRS)
def test_reduces_protects_the_prefix_and_ignores_the_batch(method: str, host: str) -> None:
    for options in variants(method):
        reduced, images = wrap(make_host(host), method, options), pictures(3)
        with torch.no_grad():
            outputs = reduced.run(images, record=True)
            alone = reduced(images[1:2])
        prefix = outputs.tokens.num_prefix
        assert prefix == reduced.method.spec.num_prefix
        assert method == DENSE or min(tokens.num_patches for tokens in outputs.trace) < 16
        for tokens in outputs.trace:
            assert tokens.num_prefix == prefix
            assert tokens.x.shape[1] == prefix + tokens.index.shape[1]
            real = [row[row >= 0].tolist() for row in tokens.index]  # -1: a token that stands for several
            assert all(len(set(row)) == len(row) and max(row, default=0) < 16 for row in real)
        assert torch.isfinite(outputs.logits).all()
        assert torch.allclose(outputs.logits[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "host"), PAIRS)
def test_every_parameter_gets_a_gradient(method: str, host: str) -> None:
    cls = find_method(method)
    extra = {"assisted_head": True} if hasattr(cls.Config, "assisted_head") else {}
    for options in variants(method):
        reduced = wrap(make_host(host), method, options | extra).train()
        outputs = reduced.run(pictures())
        loss = outputs.logits.square().mean() + sum(x.square().mean() for x in outputs.extra_logits.values())
        if reduced.method.learns_from_teacher:  # some parameters may have no other use
            taught = Objective(reduced, ObjectiveTable(teacher="given"), make_host(host)).teach(pictures())
            loss = loss + sum(reduced.method.losses(outputs, taught).values())
        loss.backward()
        without = [
            name for name, p in reduced.named_parameters() if p.grad is None or not p.grad.isfinite().all()
        ]
        assert not without


@pytest.mark.parametrize(("method", "options"), ON_VIT, ids=IDS)
def test_training_and_evaluation_agree_without_dropout(method: str, options: dict[str, Any]) -> None:
    """A method that samples in training says so, follows the seed there, and evaluates alike every time.

    One that relaxes its decisions in training says so too, and computes something else there.
    """
    reduced, images = wrap(make_host("vit"), method, options), pictures()
    with torch.no_grad():
        trained, again = (seeded(reduced.train(), images) for _ in range(2))
        other, evaluated = seeded(reduced, images, seed=1), seeded(reduced.eval(), images, seed=1)
        assert torch.equal(trained, again) and torch.equal(evaluated, seeded(reduced, images, seed=2))
    if find_method(method).samples_in_training:
        assert not torch.allclose(trained, other)
    elif find_method(method).relaxes_in_training:
        assert torch.equal(trained, other)
    else:
        assert torch.equal(trained, other)
        assert (trained - evaluated).abs().max() <= 1e-6 * evaluated.abs().max()  # other products, same sums


def check_one_graph(method: str, options: dict[str, Any], host: str, training: bool, backend: str) -> None:
    torch._dynamo.reset()
    reduced, images = wrap(make_host(host), method, options).train(training), pictures()
    compiled = torch.compile(reduced, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(training):
        expected, actual = seeded(reduced, images), seeded(compiled, images)
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)
    if training:
        actual.square().mean().backward()


@pytest.mark.parametrize(("method", "options"), traced(ON_VIT, ("evo_vit", "tome")), ids=IDS)
def test_compiles_in_one_graph(method: str, options: dict[str, Any]) -> None:
    """In evaluation and in training, with the graph of the gradients."""
    for training in (False, True):
        check_one_graph(method, options, "vit_avg", training, "aot_eager")


@pytest.mark.parametrize(
    ("method", "host"),
    [pytest.param(m, h, marks=covering(m, h)) for h in HOSTS if h != "vit_avg" for m in METHODS],
)
def test_trains_in_one_graph_on_every_host(method: str, host: str) -> None:
    """Each operator of the graph runs by itself, so that autograd finds the gradients as in eager mode."""
    check_one_graph(method, find_method(method).example, host, True, "eager")


@pytest.mark.full
@pytest.mark.parametrize(("method", "options"), ON_VIT, ids=IDS)
@pytest.mark.parametrize("host", sorted(set(HOSTS) - {"vit_avg"}))
def test_compiles_in_one_graph_on_every_host(method: str, options: dict[str, Any], host: str) -> None:
    for training in (False, True):
        check_one_graph(method, options, host, training, "aot_eager")


@pytest.mark.parametrize(
    ("method", "options", "host"),
    [
        *traced([(method, options, "vit_avg") for method, options in ON_VIT]),
        *(pytest.param(m, find_method(m).example, "eva02", marks=pytest.mark.slow) for m in METHODS),
    ],
)
def test_exports_with_a_dynamic_batch(method: str, options: dict[str, Any], host: str) -> None:
    reduced = wrap(make_host(host), method, options)
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporter
        program = torch.export.export(reduced, (pictures(2),), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for count in (1, 5):
            images = pictures(count, seed=count)
            assert torch.allclose(program(images), reduced(images), rtol=1e-4, atol=1e-5)


def owning_modules(name: str) -> dict[str, Any]:
    """Return a method's example with the options under which it owns modules, where there are such."""
    own = {"assisted_head": True, "kind": "conv"}
    cls = find_method(name)
    return cls.example | {option: value for option, value in own.items() if hasattr(cls.Config, option)}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("method", "host"), PAIRS)
def test_half_precision_stays_finite(method: str, host: str, kind: torch.dtype) -> None:
    reduced = wrap(make_host(host).to(kind), method, owning_modules(method))
    with torch.no_grad():
        outputs = reduced.run(pictures().to(kind))
    for logits in (outputs.logits, *outputs.extra_logits.values()):
        assert logits.dtype == kind
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_wrapped_model_may_be_cast(method: str) -> None:
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        reduced = wrap(make_host("vit"), method, owning_modules(method)).to(kind)
        expected = wrap(make_host("vit").to(kind), method, owning_modules(method))
        expected.method.load_state_dict(reduced.method.state_dict())
        with torch.no_grad():
            assert torch.equal(reduced(pictures().to(kind)), expected(pictures().to(kind)))


@pytest.mark.parametrize(("method", "host"), PAIRS)
def test_double_precision_is_the_hosts(method: str, host: str) -> None:
    """With everything kept to its last digits; a step of training changes method and host in it."""
    model, images, cls = make_host(host).double(), pictures().double(), find_method(method)
    with torch.no_grad():
        expected = model(images)
        error = (wrap(model, method, cls.example | cls.keep_all)(images) - expected).abs().max()
        assert error <= 1e-13 * expected.abs().max()
    reduced = wrap(model, method, cls.example).train()
    optimizer = torch.optim.SGD(reduced.parameters(), 1e-3)
    first = reduced.run(images)
    assert first.logits.dtype == torch.float64
    loss = first.logits.square().mean()
    if reduced.method.learns_from_teacher:
        taught = Objective(reduced, ObjectiveTable(teacher="given"), make_host(host).double()).teach(images)
        loss = loss + sum(reduced.method.losses(first, taught).values())
    loss.backward()
    optimizer.step()
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in reduced.parameters())


@pytest.mark.parametrize(("method", "options"), ON_VIT, ids=IDS)
def test_copies_pickles_and_recomputes(method: str, options: dict[str, Any]) -> None:
    reduced, images = wrap(make_host("vit"), method, options), pictures()
    with torch.no_grad():
        expected = reduced(images)
        assert torch.equal(copy.deepcopy(reduced)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(reduced))(images), expected)
    gradients = []
    for recompute in (False, True):
        reduced.train().set_grad_checkpointing(recompute)
        reduced.zero_grad()
        seeded(reduced, images).square().mean().backward()
        found = {name: p.grad.clone() for name, p in reduced.named_parameters() if p.grad is not None}
        gradients.append(found)  # none where only the losses of a teacher lead
    assert list(gradients[0]) == list(gradients[1]) and "model.head.weight" in gradients[0]
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


@pytest.mark.parametrize(("method", "options"), ON_VIT, ids=IDS)
def test_saves_and_loads_exactly(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    reduced, images = wrap(make_host("vit"), method, options), pictures()
    save_reduced(reduced, tmp_path / "own", include_model=False)
    save_reduced(reduced, tmp_path / "all", include_model=True)
    fresh = make_host("vit")
    with torch.no_grad():
        expected = reduced(images)
        assert torch.equal(load_reduced(tmp_path / "own", fresh).eval()(images), expected)
        for p in fresh.parameters():
            p.zero_()
        assert torch.equal(load_reduced(tmp_path / "all", fresh).eval()(images), expected)


def check_saved_as_it_is(reduced: evovit.ReducedViT, folder: Path) -> None:
    """Save and load; evaluation and a training forward are the same to the last bit."""
    save_reduced(reduced, folder)
    loaded, images = load_reduced(folder, make_host("vit")), pictures()
    with torch.no_grad():
        for training in (False, True):
            ours, theirs = (seeded(model.train(training), images) for model in (reduced, loaded))
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("method", "options"), ON_VIT, ids=IDS)
def test_saves_and_loads_exactly_in_the_middle_of_a_ramp(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    for share in (0.0, 0.3, 0.7, 1.0):
        reduced = wrap(make_host("vit"), method, options)
        try:
            reduced.method.set_reduction(share)
        except evovit.EvoViTError as error:
            assert "no keep ratio" in str(error)
            return
        check_saved_as_it_is(reduced, tmp_path / str(share))
        if share == 1:
            assert reduced.method.current_config() == reduced.method.config


@pytest.mark.parametrize(("method", "options"), ON_VIT, ids=IDS)
def test_saves_and_loads_exactly_in_the_middle_of_a_training(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    follows = {"switch_at": 0.5, "shrink": (0.1, 0.9)}
    config = find_method(method).Config
    options = options | {option: value for option, value in follows.items() if hasattr(config, option)}
    for fraction in (0.0, 0.3, 0.6, 1.0):
        reduced = wrap(make_host("vit"), method, options)
        reduced.method.set_progress(fraction)
        check_saved_as_it_is(reduced, tmp_path / str(fraction))


@pytest.mark.parametrize("method", METHODS)
def test_the_host_stays_untouched(method: str) -> None:
    host = make_host("vit")
    before, keys = {k: v.clone() for k, v in host.state_dict().items()}, list(host.state_dict())
    images = pictures()
    with torch.no_grad():
        expected = host(images)
        reduced = wrap(host, method, find_method(method).example)
        reduced(images)
        assert reduced.model is host
        assert list(host.state_dict()) == keys
        assert all(torch.equal(v, before[k]) for k, v in host.state_dict().items())
        assert torch.equal(host(images), expected)
    reduced.model.load_state_dict(before)


@pytest.mark.parametrize("method", METHODS)
def test_a_grid_keeping_method_gives_a_map_in_raster_order(method: str) -> None:
    """Each patch is painted with its own grey; the map must show the same order."""
    host = make_host("vit_avg")
    with torch.no_grad():
        for block in host.blocks:
            for p in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters()):
                p.zero_()
        host.pos_embed.zero_()
    cls = find_method(method)
    if not cls.keeps_grid:
        pytest.skip("the method does not keep the grid")
    reduced = wrap(host, method, cls.example)
    ramp = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    images = torch.nn.functional.interpolate(ramp, scale_factor=8)
    with torch.no_grad():
        order = reduced.feature_map(images)
        direct = host.patch_embed(images).transpose(1, 2).unflatten(2, (4, 4))
    if order.shape == direct.shape:
        assert torch.allclose(order, direct, atol=1e-5)
    else:  # a smaller grid: windows of the same order
        assert torch.allclose(order, torch.nn.functional.avg_pool2d(direct, 4 // order.shape[-1]), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param(m, o, marks=pytest.mark.slow if o == find_method(m).example else pytest.mark.full)
        for m, o in ON_VIT
    ],
    ids=IDS,
)
def test_the_default_compiler_agrees(method: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    reduced, images = wrap(make_host("vit_avg"), method, options), pictures()
    with torch.no_grad():
        assert torch.allclose(
            torch.compile(reduced, fullgraph=True)(images), reduced(images), rtol=1e-4, atol=1e-5
        )
