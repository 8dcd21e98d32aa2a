"""Parameter groups: rates by name, a host that waits, parameters that are not trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from evovit.errors import EvoViTError
from evovit.recipe.reading import read_recipe
from evovit.recipe.tables import Recipe
from evovit.runtime.world import World
from evovit.train.build import build_model, check_recipe, open_run
from evovit.train.optimizers import build_optimizers, rate_at, set_rates
from evovit.train.state import numbered
from evovit.train.trainer import Trainer
from tests.run.processes import SMALL, outcome, train_here

TEXT = SMALL[: SMALL.index("[method]")] + '[method]\nname = "dynamic_vit"\nblocks = [1, 3]\n'
TEXT += SMALL[SMALL.index("[data]") :]


def small(path: Path, *overrides: str) -> Recipe:
    (path / "small.toml").write_text(TEXT)
    return read_recipe(path / "small.toml", overrides)


def rates(recipe: Recipe, model: nn.Module, update: int) -> dict[str, float]:
    """Return the learning rate of every trained parameter at an update, ten of them per epoch."""
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = build_optimizers(recipe, model)
    set_rates(recipe, optimizers, update, 10)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_a_word_every_parameter_has_the_one_rate(tmp_path: Path, name: str) -> None:
    recipe = small(tmp_path, f"optimizer.name={name}")
    found = rates(recipe, build_model(recipe, 10), 12)
    expected = {rate_at(recipe, peak, 12, 10) for peak in ((2e-3, 0.02) if name == "muon" else (2e-3,))}
    assert set(found.values()) == expected
    assert all(p.requires_grad for p in build_model(recipe, 10).parameters())


def test_factors_scale_the_whole_rate_by_the_start_of_the_name(tmp_path: Path) -> None:
    factors = "model.=0.01 method.score_predictor.1=5"
    recipe = small(tmp_path, f"optimizer.rate_factors={factors}", "learning_rate.minimum=1e-4")
    model = build_model(recipe, 10)
    for update in (0, 12, 39):
        rate = rate_at(recipe, 2e-3, update, 10)
        for name, found in rates(recipe, model, update).items():
            factor = 0.01 if name.startswith("model.") else 5 if "predictor.1" in name else 1
            assert found == pytest.approx(factor * rate), name
    first = build_optimizers(recipe, model)[0].param_groups[0]
    assert first["factor"] == 1 and first["weight_decay"] > 0  # the rate that a run's records show


def test_the_host_waits_while_the_method_learns(tmp_path: Path) -> None:
    recipe = small(tmp_path, "optimizer.freeze_host_epochs=2", "optimizer.rate_factors=model.=0.5")
    model = build_model(recipe, 10)
    for update in (0, 19, 20, 39):
        for name, found in rates(recipe, model, update).items():
            rate = rate_at(recipe, 2e-3, update, 10)
            host = 0.0 if update < 20 else 0.5 * rate
            assert found == pytest.approx(host if name.startswith("model.") else rate), name


def test_an_update_moves_what_is_trained_and_nothing_else(tmp_path: Path) -> None:
    frozen = "optimizer.frozen=cls_token pos_embed"
    recipe = small(tmp_path, frozen, "optimizer.freeze_host_epochs=1", "data.scenes=32")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    images, model = open_run(recipe)
    alone = World(0, 1, torch.device("cpu"))
    trainer = Trainer(recipe, images, model, tmp_path / "run", alone, Console(quiet=True))
    start = {name: p.clone() for name, p in model.named_parameters()}
    changed = []
    for epoch in (0, 1):
        batches = trainer.images.train(epoch, 0, alone, 1)
        for _ in range(trainer.per_epoch):
            trainer.step(epoch, batches, False)
        changed.append({name for name, p in model.named_parameters() if not torch.equal(p, start[name])})
    host = {name for name in start if name.startswith("model.")}
    assert changed[0] == set(start) - host
    assert changed[1] == set(start) - {"model.cls_token", "model.pos_embed"}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("optimizer.frozen=pos_emb",), "which the network does not have. Did you mean 'pos_embed'"),
        (("optimizer.rate_factors=modell.=0.1",), "no trained parameter's name starts with 'modell.'"),
        (("optimizer.rate_factors=model.",), "rate_factors is 'model.'; give words such as model.=0.01"),
        (("optimizer.rate_factors=model.=x",), "give words such as model.=0.01"),
        *[
            ((f"optimizer.rate_factors=model.={odd}",), "give words such as model.=0.01")
            for odd in (-1, "nan", "inf")
        ],
        (
            ("optimizer.freeze_host_epochs=-1",),
            "freeze_host_epochs is -1; allowed is a whole number, 0 or more",
        ),
    ],
)
def test_wrong_words_are_refused_before_the_run(
    tmp_path: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(EvoViTError, match=sentence):
        check_recipe(small(tmp_path, *overrides))


def test_a_dense_model_has_nothing_to_train_while_its_host_waits(tmp_path: Path) -> None:
    path = tmp_path / "dense.toml"
    path.write_text(TEXT.replace('name = "dynamic_vit"\nblocks = [1, 3]', 'name = "none"'))
    with pytest.raises(EvoViTError, match="needs a method to train meanwhile"):
        check_recipe(read_recipe(path, ["optimizer.freeze_host_epochs=1"]))


def test_a_run_with_several_rates_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    words = ("optimizer.rate_factors=model.=0.1", "optimizer.freeze_host_epochs=1", "data.scenes=32")
    recipe = small(tmp_path, *words, "run.epochs=2", "optimizer.frozen=pos_embed")
    for name in ("whole", "stopped"):
        train_here(recipe, tmp_path / name)
    newest = numbered(tmp_path / "stopped" / "checkpoints")[0]
    for path in (tmp_path / "stopped").glob("model/*"):
        path.unlink()
    (tmp_path / "stopped" / "checkpoints" / f"{newest}.json").unlink()
    train_here(recipe, tmp_path / "stopped")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
