"""Options: one declaration, one check, one syntax, wherever a value comes from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import evovit
from evovit import cli
from evovit.bench.setting import parse_variants
from evovit.errors import EvoViTError
from evovit.methods import build_config, find_method
from evovit.options import allowed, describe, read_named, read_value, written
from evovit.recipe.reading import parse_recipe, read_recipe
from tests.conftest import make_host

TABLES: dict[str, Any] = {
    "model": {"name": "vit_tiny_patch16_224"},
    "data": {"source": "digits", "batch_size": 8},
    "learning_rate": {"base": 1e-3, "warm_up_epochs": 0},
    "run": {"epochs": 2},
}


@pytest.mark.parametrize(
    "value", [0.25, numpy.float64(0.25), numpy.float32(0.25), torch.tensor(0.25), numpy.array(0.25)]
)
def test_scalars_of_numpy_and_pytorch_are_numbers(value: Any) -> None:
    config = build_config(find_method("evo_vit"), {"keep_ratio": value, "start_block": numpy.int64(2)})
    assert (config.keep_ratio, type(config.keep_ratio)) == (0.25, float)
    assert (config.start_block, type(config.start_block)) == (2, int)


@pytest.mark.parametrize("value", [[2, 4], (2, 4), numpy.array([2, 4]), torch.tensor([2, 4])])
def test_lists_of_any_kind_are_tuples(value: Any) -> None:
    assert build_config(find_method("evit"), {"blocks": value}).blocks == (2, 4)


@pytest.mark.parametrize("text", ["False", "false"])
def test_false_drops_and_other_words_are_refused_wherever_they_are_said(text: str, tmp_path: Path) -> None:
    """`method.preserve=False` once preserved."""
    path, name = tmp_path / "recipe.toml", "preserve"
    path.write_text(parse_recipe(TABLES | {"method": {"name": "evo_vit"}}).to_toml())
    assert read_recipe(path, [f"method.{name}={text}"]).method.options[name] is False
    (variant,) = parse_variants([f"evo_vit:{name}={text}"], ())
    assert variant.options == {name: False}
    for refused in (
        lambda: read_recipe(path, [f"method.{name}=no"]),
        lambda: parse_variants([f"evo_vit:{name}=no"], ()),
        lambda: evovit.reduce_tokens(make_host("vit"), "evo_vit", preserve="no"),
        lambda: parse_recipe(TABLES | {"method": {"name": "evo_vit", name: "no"}}),
    ):
        with pytest.raises(EvoViTError, match="preserve is 'no'; allowed is true or false"):
            refused()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        (".5", 0.5),
        ("3", 3),
        ("[2, 4]", [2, 4]),
        ("(2,4)", (2, 4)),
        ("true", True),
        ("None", None),
        ("layer", "layer"),
        ('"a b"', "a b"),
        ("2024-01-01", "2024-01-01"),
        ("{a = 1}", {"a": 1}),
    ],
)
def test_one_syntax_of_values(text: str, value: Any) -> None:
    assert read_value(text) == value and type(read_value(text)) is type(value)


def test_a_named_method_takes_lists_and_quoted_commas() -> None:
    assert read_named("evit:blocks=[2,4],keep_ratio=0.5") == ("evit", {"blocks": [2, 4], "keep_ratio": 0.5})
    assert read_named("keep") == ("keep", {})
    assert read_named("x:a='b,c',d=(1,2)") == ("x", {"a": "b,c", "d": (1, 2)})


@pytest.mark.parametrize("method", evovit.list_methods())
def test_every_default_is_written_as_it_is_read(method: str) -> None:
    for each in describe(find_method(method).Config):
        value = read_value(each.default)
        config = build_config(find_method(method), {each.name: value})
        assert written(getattr(config, each.name)) == each.default


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (
            "evo_vit",
            {"keep_ration": 0.5},
            r"EvoViT has no option 'keep_ration'; .* Did you mean 'keep_ratio'\?",
        ),
        (
            "evo_vit",
            {"mode": "stages"},
            r"mode is 'stages'; allowed is stage or layer\. Did you mean 'stage'\?",
        ),
        (
            "evo_vit",
            {"keep_ratio": True},
            "keep_ratio is True; allowed is a number above 0, at most 1, or a list",
        ),
        ("evit", {"shrink": [0.2]}, "allowed is a list of 2, each a number from 0 to 1, or none"),
        ("tome", {"r": 10**5000}, "allowed is a whole number, 0 or more"),
        ("tome", {"inflection": float("nan")}, "inflection is nan; allowed is a number from -1 to 1"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_range_and_nearest_name(
    method: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), method, **options)


def test_types_are_said_in_words() -> None:
    assert allowed(int) == "a whole number"
    assert allowed(float | None) == "a number, or none"


def test_an_option_that_is_set_later_raises_and_the_mode_takes_effect() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), start_block=1)
    with pytest.raises(EvoViTError, match=r"keep_ratio is an option .* fixed once a model is wrapped"):
        reduced.method.keep_ratio = 0.3
    with pytest.raises(EvoViTError, match="mode is 'both'; allowed is stage or layer"):
        reduced.method.mode = "both"
    reduced.method.mode = "layer"
    assert reduced.method.current_config().mode == "layer"
    assert "keep_ratio=0.5" in repr(reduced) and "evo_vit" in repr(reduced).lower().replace(
        "evovit", "evo_vit"
    )


def test_the_command_line_says_it_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evovit", "bench", "test_vit", "--method", "evit:blocks=[2,x]"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    told = capsys.readouterr().err
    assert exit_.value.code == 2 and told.count("\n") == 1 and "blocks is '[2,x]'; allowed is a list" in told
