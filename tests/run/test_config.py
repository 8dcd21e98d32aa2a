"""Recipes: what is written is what is read, and a wrong one is refused in a sentence that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evovit.errors import EvoViTError
from evovit.methods import find_method, list_methods
from evovit.options import describe
from evovit.recipe.reading import LIBRARY, differences, parse_recipe, read_recipe
from evovit.recipe.tables import TABLES
from evovit.train.build import check_recipe

RECIPES = sorted(LIBRARY.rglob("*.toml"))
DIGITS = LIBRARY / "digits"
PLAIN = """
[model]
name = "vit_tiny_patch16_224"
options = {img_size = 24, patch_size = 6, depth = 4}
[method]
name = "evo_vit"
start_block = 1
[data]
source = "digits"
batch_size = 32
[learning_rate]
base = 1e-3
warm_up_epochs = 1
[run]
epochs = 3
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "plain.toml"
    path.write_text(PLAIN)
    return path


def test_a_written_recipe_reads_as_itself(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path, ["method.trade_off=[0.0, 0.5, 0.5, 0.5]", 'data.train_split="tr\\"äin"'])
    again = tmp_path / "again.toml"
    again.write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(again) == recipe
    assert differences(recipe, read_recipe(again)) == []


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("method.keep_ratio=0.7", ("method", "options", "keep_ratio"), 0.7),
        ("method.keep_ratio=[1.0, 0.5, 0.5, 0.5]", ("method", "options", "keep_ratio"), [1.0, 0.5, 0.5, 0.5]),
        ("method.selection=random", ("method", "options", "selection"), "random"),
        ("method.fast_update=false", ("method", "options", "fast_update"), False),
        ("model.options.depth=6", ("model", "options", "depth"), 6),
        ("run.ema_decay=1", ("run", "ema_decay"), 1.0),
    ],
)
def test_overrides_are_typed_as_in_toml(
    path: Path, override: str, place: tuple[str, ...], value: Any
) -> None:
    found: Any = read_recipe(path, [override])
    for part in place:
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("run.epoch=3", "Did you mean 'epochs'"),
        ("dat.batch_size=3", r"no table \[dat\]; .* Did you mean 'data'"),
        ("method.keep_rate=0.5", "Did you mean 'keep_ratio'"),
        ("method.name=evo_vitt", "Did you mean 'evo_vit'"),
        ("run.epochs=ten", "allowed is a whole number"),
        ("run.epochs=0", "allowed is a whole number, 1 or more"),
        ("run.precision=fp8", "allowed is fp32, bf16 or fp16"),
        ("run.compile=1", "allowed is true or false"),
        ("learning_rate.base=nan", "allowed is a number, 0 or more"),
        ("learning_rate.warm_up_epochs=3", "allowed is below run.epochs, 3"),
        ("data.erase=0.25", "no effect on digits"),
        ("data.source=/somewhere", None),
        ("run.batch_per_device=5", "a divisor of data.batch_size, 32"),
        ("objective.distillation=hard", "objective.teacher is empty"),
        ("objective.teacher=deit_tiny_patch16_224", "nothing is learnt from it"),
        ("run.reduce_from_epoch=4", "allowed is up to run.epochs, 3"),
        ("method.name=none", "Dense has no option 'start_block'; there are none"),
        ("nonsense", "not of the form name=value"),
    ],
)
def test_wrong_recipes_are_refused(path: Path, override: str, sentence: str | None) -> None:
    if sentence is None:
        read_recipe(path, [override])
        return
    with pytest.raises(EvoViTError, match=sentence):
        read_recipe(path, [override])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.name=vit_tiny_patch61_224", "Did you mean 'vit_tiny_patch16_224'"),
        ("model.options.dept=4", "timm cannot make"),
        ("method.start_block=4", "start_block is 4; allowed is 1 to 3"),
        ("method.keep_ratio=0", "keep_ratio is 0"),
        ("model.weights=missing.pth", "there is no file 'missing.pth'"),
    ],
)
def test_the_model_is_checked_without_memory(path: Path, override: str, sentence: str) -> None:
    with pytest.raises(EvoViTError, match=sentence):
        check_recipe(read_recipe(path, [override]))


def test_missing_and_broken_files_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(EvoViTError, match="cannot be read"):
        read_recipe(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(EvoViTError, match="not valid TOML"):
        read_recipe(broken)
    with pytest.raises(EvoViTError, match=r"model\.name is missing"):
        parse_recipe({})


def test_every_option_says_what_it_means() -> None:
    for kind in (*TABLES.values(), *(find_method(method).Config for method in list_methods())):
        for each in describe(kind):
            named = kind.title in ("model.", "method.") and each.name == "options"
            assert each.allowed and (named or len(each.meaning) > 5), (kind, each)


@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_this_repository_are_valid(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "dense" / "seed0"  # teaches some of those on digits
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text((DIGITS / "dense.toml").read_text())
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(file)
    check_recipe(recipe)
    head = file.read_text().split("[model]")[0]
    assert all(f"# {word}:" in head for word in ("command", "hardware", "cost", "published"))
