"""Recipes: what is written is what is read, and a wrong one is refused in a sentence that helps."""

from __future__ import annotations

import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from evovit.errors import EvoViTError
from evovit.methods import find_method, list_methods
from evovit.options import describe
from evovit.recipe.reading import LIBRARY, differences, parse_recipe, read_recipe
from evovit.recipe.tables import TABLES, MethodTable
from evovit.train.build import check_recipe

RECIPES = sorted(LIBRARY.rglob("*.toml"))
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
NESTED = """
[model.options.pretrained_cfg_overlay]
mean = [0.5, 0.25, 0.5]
note = "Zürich \\"東\\"\\n"
[[model.options.stages]]
depth = 2
[[model.options.stages]]
depth = 4
names = ["é", "b"]
inner = {deep = {on = true}, none = []}
"""
OLD = r"""
[model]
name = "vit_tiny_patch16_224"
num_classes = 0
drop_path = 0.1
pretrained = false
weights = ""
options.img_size = 24
options.patch_size = 6
options.depth = 4
options.global_pool = "avg"

[method]
name = "none"

[data]
source = "digits"
train_split = "trä\"in"
test_split = "val"
batch_size = 32
workers = 4
max_corrupt = 10
repeats = 1
crop_scale = 0.08
flip = 0.5
rand_augment = ""
colour_jitter = 0.0
erase = 0.0
mixup = 0.0
cutmix = 0.0
token_labels = ""
token_label_grid = 14
crop_pct = 0.875
scenes = 2048
test_scenes = 2000
fragments = 4

[objective]
reduction = "sum"
label_smoothing = 0.0
distillation = "none"
teacher = ""
teacher_weights = ""
alpha = 0.5
temperature = 1.0
token_distillation = 0.0
token_label_weight = 0.0
mix_token = false

[optimizer]
name = "adamw"
weight_decay = 0.05
beta1 = 0.9
beta2 = 0.999
eps = 1e-08
clip_norm = 0.0
adaptive_clip = 0.0
rate_factors = ""
freeze_host_epochs = 0
frozen = ""

[learning_rate]
base = 0.001
reference_batch = 512
muon = 0.02
warm_up_epochs = 1.0
warm_up_start = 1e-06
minimum = 1e-05
last_epochs = 0

[run]
epochs = 3
seed = 0
device = "auto"
batch_per_device = 0
precision = "fp32"
compile = false
activation_checkpointing = false
ema_decay = 0.0
reduce_from_epoch = 0
reduce_ramp_epochs = 0
test_every = 1
checkpoint_every = 0
max_skipped = 10
log_to = "none"
"""  # as version 0.1 wrote it into the folder of a run


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


def test_nested_options_are_written_as_they_were_read(path: Path, tmp_path: Path) -> None:
    inline = "options = {img_size = 24, patch_size = 6, depth = 4}"  # no table may follow inside it
    path.write_text(PLAIN.replace(inline, "options.depth = 4") + NESTED, encoding="utf-8")
    recipe = read_recipe(path)
    options = recipe.model.options
    assert options["depth"] == 4
    assert options["pretrained_cfg_overlay"] == {"mean": [0.5, 0.25, 0.5], "note": 'Zürich "東"\n'}
    last = {"depth": 4, "names": ["é", "b"], "inner": {"deep": {"on": True}, "none": []}}
    assert options["stages"] == [{"depth": 2}, last]
    again = tmp_path / "again.toml"
    again.write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(again) == recipe and differences(recipe, read_recipe(again)) == []
    assert read_recipe(again).to_toml() == recipe.to_toml()
    inside = "model.options.pretrained_cfg_overlay.mean=[0.5, 0.5, 0.5]"
    (said,) = differences(recipe, read_recipe(again, [inside]))
    assert said.startswith("model.options.pretrained_cfg_overlay: ")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ('{a = {b = [1, {c = "ü"}]}}', {"a": {"b": [1, {"c": "ü"}]}}),
        ("[{a = 1}, {b = [[1, 2], [3]]}]", [{"a": 1}, {"b": [[1, 2], [3]]}]),
        ("{'a': (1, None), 2: 'x'}", {"a": [1, "none"], "2": "x"}),
        ("[{day = 2020-01-01}]", [{"day": date(2020, 1, 1)}]),
        ("{1, 2}", None),
        ("[b'x']", None),
    ],
)
def test_nested_overrides_are_read_back_or_refused(path: Path, tmp_path: Path, value: str, read: Any) -> None:
    override = f"model.options.given={value}"
    if read is None:
        with pytest.raises(
            EvoViTError, match="allowed are text, numbers, true, false, dates, lists and tables"
        ):
            read_recipe(path, [override])
        return
    recipe, again = read_recipe(path, [override]), tmp_path / "again.toml"
    assert recipe.model.options["given"] == read
    again.write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(again) == recipe


def test_a_recipe_of_python_values_is_read_back(path: Path, tmp_path: Path) -> None:
    tables = tomllib.loads(PLAIN)
    tables["method"] |= {"keep_ratio": (1.0, 0.5, 0.5, 0.5), "switch_at": None}
    tables["model"]["options"] |= {"given": ({"a": (1, 2)},), "depth": numpy.int64(6)}
    tables["run"]["epochs"] = torch.tensor(7)
    recipe = parse_recipe(tables)
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert differences(recipe, read_recipe(path)) == []
    assert recipe.model.options["depth"] == 6 and recipe.run.epochs == 7


def test_a_recipe_of_version_0_1_reads_as_an_equal_one(path: Path, tmp_path: Path) -> None:
    """Its options have dotted keys, its dense method is called none."""
    old = tmp_path / "old.toml"
    old.write_text(OLD, encoding="utf-8")
    text = PLAIN.replace('name = "evo_vit"\nstart_block = 1', 'name = "dense"')
    path.write_text(text.replace("depth = 4}", 'depth = 4, global_pool = "avg"}'), encoding="utf-8")
    new = read_recipe(path, ["model.drop_path=0.1", 'data.train_split="trä\\"in"'])
    assert read_recipe(old) == new and differences(read_recipe(old), new) == []
    assert read_recipe(old).to_toml() == new.to_toml()
    reduced = tmp_path / "reduced.toml"
    method = 'name = "evo_vit"\nkeep_ratio = [1.0, 0.5, 0.5, 0.5]\nfast_update = false'
    reduced.write_text(OLD.replace('[method]\nname = "none"', f"[method]\n{method}"), encoding="utf-8")
    options = {"keep_ratio": [1.0, 0.5, 0.5, 0.5], "fast_update": False}
    assert read_recipe(reduced).method == MethodTable(name="evo_vit", options=options)


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("method.keep_ratio=0.7", ("method", "options", "keep_ratio"), 0.7),
        ("method.keep_ratio=[1.0, 0.5, 0.5, 0.5]", ("method", "options", "keep_ratio"), [1.0, 0.5, 0.5, 0.5]),
        ("method.selection=random", ("method", "options", "selection"), "random"),
        ("method.fast_update=false", ("method", "options", "fast_update"), False),
        ("model.options.depth=6", ("model", "options", "depth"), 6),
        ("learning_rate.base=1", ("learning_rate", "base"), 1.0),
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
        ("learning_rate.base=nan", "allowed is a number from 0 to 100"),
        ("learning_rate.base=1e30", "allowed is a number from 0 to 100"),
        ("optimizer.weight_decay=1e300", "allowed is a number from 0 to 100"),
        ("optimizer.eps=1e300", "allowed is a number from 1e-30 to 1"),
        ("objective.temperature=1e300", "allowed is a number from 0.01 to 1000"),
        ("data.mixup=1e308", "allowed is a number from 0 to 100"),
        ("data.workers=100000", "allowed is a whole number from 0 to 256"),
        ("data.repeats=2147483647", "allowed is a whole number from 1 to 1000"),
        ("data.token_label_grid=100000", "allowed is a whole number from 1 to 1000"),
        ("model.num_classes=1000000000", "allowed is a whole number from 0 to 1000000"),
        ("run.ema_decay=1", "allowed is a number, 0 or more, below 1"),
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
    "policy",
    [
        *(
            "weird",
            "1",
            "-",
            "../..",
            "random",
            "RAND-m9",
            "rand_m9",
            "rand-m9 ",
            "rand-m9;n2",
            "rand-",
            "rand-m",
        ),
        *(
            "rand-mx",
            "rand-m-1",
            "rand-m1e3",
            "rand-m99999",
            "rand-n0",
            "rand-n1.5",
            "rand-n999999",
            "rand-inc",
        ),
        *(
            "rand-p9",
            "rand-p-1",
            "rand-mstdnan",
            "rand-mstd-1",
            "rand-w0",
            "rand-tx",
            "rand-m9-x9",
            "original-m9",
        ),
        *("augmix-m99999", "augmix-w0", "augmix-w99", "3b", "v1", "\\n", "$\\frac$"),
    ],
)
def test_words_that_are_no_policy_of_timm_are_refused(path: Path, policy: str) -> None:
    with pytest.raises(EvoViTError, match=r"data\.rand_augment is .* give a policy of timm"):
        read_recipe(path, ["data.source=/somewhere", f"data.rand_augment='{policy}'"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.options.num_classes=2", "set elsewhere: use model.num_classes"),
        ("model.options.in_chans=1", "images of 1 channels; only colours"),
        ("model.options.depth=1000000000", "depth is 1000000000; allowed is a whole number from 1 to 1000"),
        ("model.options.img_size=1000000", "img_size is 1000000; allowed is a whole number from 1 to 16384"),
        (
            "model.options.embed_dim=1000000",
            "embed_dim is 1000000; allowed is a whole number from 1 to 65536",
        ),
        ("model.options.features_only=true", "features_only, which says nothing about a host"),
        *(
            (f"model.options.pretrained_cfg_overlay={{{value}}}", "give 3 numbers each, std above 0")
            for value in ("mean='x'", "mean=3", "mean=[0.5]", "mean=[0.5,0.5,'x']", "std=[0.0,1.0,1.0]")
        ),
        ("model.options.scriptable=x", "scriptable, which says nothing about a host"),
        (f"model.weights={'a' * 5000}", "is not a path"),
        (f"objective.teacher={'a' * 5000}", "is not a path"),
        ("model.name=vit_tiny_patch61_224", "Did you mean 'vit_tiny_patch16_224'"),
        ("model.options.dept=4", "timm cannot make"),
        ("method.start_block=4", "start_block is 4; allowed is 1 to 3"),
        ("method.keep_ratio=0", "keep_ratio is 0"),
        ("model.weights=missing.pth", "there is no file 'missing.pth'"),
    ],
)
def test_the_model_is_checked_without_memory(path: Path, override: str, sentence: str) -> None:
    more = ["data.source=/somewhere"] if "cfg_overlay" in override else []
    more += ["objective.distillation=hard"] if override.startswith("objective.teacher") else []
    with pytest.raises(EvoViTError, match=sentence):
        check_recipe(read_recipe(path, [override, *more]))


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
    recipe = read_recipe(file)
    if recipe.objective.teacher.startswith("runs/"):  # of those in a folder compare/: the dense run beside it
        run = tmp_path / recipe.objective.teacher
        run.mkdir(parents=True)
        (run / "recipe.toml").write_text((file.parent.parent / "dense.toml").read_text())
    monkeypatch.chdir(tmp_path)
    check_recipe(recipe)
    head = file.read_text().split("[model]")[0]
    assert all(f"# {word}:" in head for word in ("command", "hardware", "cost", "published"))
