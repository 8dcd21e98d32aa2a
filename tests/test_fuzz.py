"""Any input works or is one `EvoViTError`: options, recipes, commands, images, checkpoints, saved folders.

Examples are drawn by hypothesis: the same few in every run, many new ones with `-m fuzz`.
"""

from __future__ import annotations

import json
import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import evovit
from evovit import cli
from evovit.backbones.base import BackboneSpec
from evovit.checkpoints.reduced import load_reduced, save_reduced
from evovit.data.folder import FolderReader
from evovit.data.pictures import Pictures, Unreadable
from evovit.errors import EvoViTError
from evovit.methods import build_config, find_method
from evovit.options import read_named, read_value
from evovit.recipe.reading import parse_recipe, read_recipe
from evovit.recipe.tables import TABLES
from evovit.runtime.files import read_state_dict
from evovit.train.records import read_lines
from evovit.train.state import Checkpoint, read_newest, write_checkpoint
from tests.conftest import make_host

FEW = settings(
    max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
MANY = settings(FEW, max_examples=3000, derandomize=False)
LANES = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.fuzz)]

METHODS = evovit.list_methods()
SPEC = BackboneSpec(
    depths=(4,), dims=(8,), num_heads=(2,), grid=(4, 4), num_prefix=1, has_class_token=True, num_classes=5
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.sampled_from([10**400, -(10**5000), 2**63, 1e400]),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.sampled_from(["none", "layer", "stage", "random", "\x00", "a\nb", "$\\frac$", "\ud800"]),
    st.builds(numpy.float32, st.floats(width=32)),
    st.builds(numpy.int64, st.integers(-5, 300)),
    st.builds(lambda x: torch.tensor(x), st.floats(0, 1)),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=5),
    st.dictionaries(st.text(max_size=3), SCALARS, max_size=2),
    st.binary(max_size=4),
    st.just(torch.zeros(2, 2)),
    st.just(numpy.zeros(3)),
)


def options_of(method: str) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from([*find_method(method).Config.__dataclass_fields__, "keep_ration"])
    return st.dictionaries(names, VALUES, max_size=3)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("method", METHODS)
def test_options(method: str, lane: settings) -> None:
    @lane
    @given(options_of(method))
    def check(options: dict[str, Any]) -> None:
        cls = find_method(method)
        try:
            made = cls(build_config(cls, cls.example | options), SPEC)
        except EvoViTError as error:
            assert_sentence(error)
            return
        assert repr(made)
        for value in vars(made.config).values():  # plain, finite, and small enough for what they count
            for item in value if isinstance(value, tuple) else (value,):
                assert item is None or type(item) in (bool, int, float, str)
                assert not isinstance(item, float) or math.isfinite(item)

    check()


def assert_sentence(error: BaseException) -> None:
    text = str(error)
    assert 0 < len(text) < 2000 and "\n" not in text and "\x00" not in text, text


TOML = st.recursive(
    st.one_of(st.booleans(), st.integers(-9, 999), st.floats(0, 1), st.floats(), st.text(max_size=6)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": {"name": "vit_tiny_patch16_224"},
        "data": {"source": "digits", "batch_size": 8},
        "learning_rate": {"base": 1e-3, "warm_up_epochs": 0},
        "run": {"epochs": 2},
    }
    for _ in range(draw(st.integers(1, 3))):
        table = draw(st.sampled_from([*TABLES, "rum"]))
        known = list(TABLES[table].__dataclass_fields__) if table in TABLES else ["x"]
        key = draw(st.sampled_from([*known, "keep_ratio", "odd key"]) | st.text(max_size=4))
        if draw(st.integers(0, 9)) == 0:
            found[table] = draw(TOML)
        elif isinstance(found.setdefault(table, {}), dict):
            found[table][key] = draw(TOML)
    return found


@pytest.mark.parametrize("lane", LANES)
def test_recipes_are_refused_or_read_back_as_they_were_written(
    lane: settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"

    @lane
    @given(tables())
    def check(content: dict[str, Any]) -> None:
        try:
            recipe = parse_recipe(content)
        except EvoViTError as error:
            assert_sentence(error)
            return
        path.write_text(recipe.to_toml(), encoding="utf-8")
        assert read_recipe(path) == recipe

    check()


@pytest.mark.parametrize("lane", LANES)
def test_recipe_files(lane: settings, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    plain = b'[model]\nname = "small_vit"\n[data]\nsource = "digits"\nbatch_size = 8\n[run]\nepochs = 1\n'

    @lane
    @given(mutations(plain), st.lists(st.text(max_size=20), max_size=2))
    def check(content: bytes, overrides: list[str]) -> None:
        path.write_bytes(content)
        try:
            read_recipe(path, overrides)
        except EvoViTError as error:
            assert_sentence(error)

    check()


def test_nested_without_end_is_one_sentence(tmp_path: Path) -> None:
    for text in ("a = " + "[" * 100_000, "a = " + "9" * 5000, "x = 1e999999999\n[" + "a." * 5000 + "a]"):
        (tmp_path / "deep.toml").write_text(text)
        with pytest.raises(EvoViTError) as caught:
            read_recipe(tmp_path / "deep.toml")
        assert_sentence(caught.value)


@pytest.mark.parametrize("lane", LANES)
def test_words_of_the_command_line_have_a_value(lane: settings) -> None:
    @lane
    @given(st.text(max_size=30))
    def check(text: str) -> None:
        read_value(text)
        try:
            read_named(text)
        except EvoViTError as error:
            assert_sentence(error)

    check()


WORDS = st.one_of(
    st.sampled_from(
        ["--set", "--out", "--method", "evo_vit:keep_ratio=0.5", "tome:r=[", "--seeds", "0", "-1"]
    ),
    st.sampled_from(
        ["run.epochs=0", "x", "--help", "copy", "digits/dense", "--to", "/dev/null/x", "--images"]
    ),
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=8),
)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("command", ["", "methods", "options", "recipes", "report", "eval", "bench", "trian"])
def test_command_lines(
    command: str, lane: settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    limited = settings(lane, max_examples=max(15, lane.max_examples // 10))

    @limited
    @given(st.lists(WORDS, max_size=4))
    def check(words: list[str]) -> None:
        assume(command != "bench" or not any("vit" in word and "_" in word for word in words[:1]))
        try:
            cli.main([command, *words] if command else words)
        except SystemExit as exit_:
            assert exit_.code in (0, 2), (words, exit_.code)
        assert "Traceback" not in capsys.readouterr().err

    check()


@st.composite
def mutations(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw what becomes of a file: cut, changed, lengthened, or anything."""
    kind = draw(st.sampled_from(["cut", "change", "insert", "other"]))
    place = draw(st.integers(0, len(whole)))
    some = draw(st.binary(min_size=1, max_size=12))
    if kind == "cut":
        return whole[:place]
    if kind == "change":
        return whole[:place] + some + whole[place + len(some) :]
    return whole[:place] + some + whole[place:] if kind == "insert" else some * draw(st.integers(1, 40))


def picture(kind: str) -> bytes:
    buffer = BytesIO()
    Image.effect_noise((16, 12), 60).convert("RGB").save(buffer, format=kind)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it finds
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_image_files(kind: str, lane: settings, tmp_path: Path) -> None:
    path = tmp_path / "class" / "a.png"
    path.parent.mkdir()
    path.write_bytes(b"")
    pictures = Pictures(FolderReader(tmp_path), lambda image: torch.from_numpy(numpy.asarray(image).copy()))

    @lane
    @given(mutations(picture(kind)))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = pictures[(("place",), 0)]
        if isinstance(found, Unreadable):
            assert found.why.isprintable() or found.why
        else:
            assert isinstance(found[0], Tensor) and found[0].shape[2] == 3 and found[1] == 0

    check()


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_weight_files(kind: str, lane: settings, tmp_path: Path) -> None:
    from safetensors.torch import save

    state, buffer = {"a.weight": torch.randn(3, 2), "b": torch.zeros(2)}, BytesIO()
    torch.save({"model": state}, buffer)
    whole, path = save(state) if kind == "safetensors" else buffer.getvalue(), tmp_path / f"a.{kind}"

    @lane
    @given(mutations(whole))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            assert isinstance(read_state_dict(path), dict)
        except EvoViTError as error:
            assert_sentence(error)

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("lane", LANES)
def test_checkpoints_of_a_training(lane: settings, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A damaged newest checkpoint is told, and the one before it is used."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for update in (1, 2):
        write_checkpoint(
            folder, f"{update:09d}", Checkpoint({"model.a": torch.ones(2) * update}, {"update": update})
        )
    names = ("000000002.json", "000000002.safetensors")
    whole = {name: (folder / name).read_bytes() for name in names}

    @lane
    @given(st.sampled_from(names), st.data())
    def check(name: str, data: st.DataObject) -> None:
        content = data.draw(mutations(whole[name]) | JSON.map(lambda value: json.dumps(value).encode()))
        (folder / name).write_bytes(content)
        try:
            checkpoint, complaints = read_newest(folder)
            assert checkpoint is not None and checkpoint.plain["update"] == (1 if complaints else 2)
        finally:
            (folder / name).write_bytes(whole[name])

    check()


@pytest.mark.parametrize("lane", LANES)
def test_records_of_a_training(lane: settings, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"

    @lane
    @given(
        mutations(b'{"update": 1, "loss": 2.0}\n{"update": 2, "loss": 1.5}\n')
        | JSON.map(repr).map(str.encode)
    )
    def check(content: bytes) -> None:
        path.write_bytes(content)
        for record in read_lines(path):
            assert isinstance(record, dict) and isinstance(record["update"], int)

    check()


@pytest.mark.parametrize("lane", LANES)
def test_saved_folders(lane: settings, tmp_path: Path) -> None:
    """A refused folder leaves the model as it was."""
    save_reduced(evovit.reduce_tokens(make_host("vit"), start_block=2), tmp_path)
    names = [path.name for path in tmp_path.iterdir()]
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    model = make_host("vit")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    content = json.loads(whole["method.json"])

    @settings(lane, max_examples=max(20, lane.max_examples // 10))
    @given(st.sampled_from(names), st.data())
    def check(name: str, data: st.DataObject) -> None:
        changed = st.builds(lambda key, value: content | {key: value}, st.sampled_from([*content]), JSON)
        texts = changed.map(lambda value: json.dumps(value).encode())
        drawn = data.draw(mutations(whole[name]) | texts if name.endswith("json") else mutations(whole[name]))
        (tmp_path / name).write_bytes(drawn)
        try:
            load_reduced(tmp_path, model)
        except EvoViTError as error:
            assert_sentence(error)
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        finally:
            (tmp_path / name).write_bytes(whole[name])
            model.load_state_dict(before)

    check()
