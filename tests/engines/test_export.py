"""Files for other engines compute what eager does, keep the tokens it keeps, and run without evovit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import evovit
from evovit import cli
from evovit.engines import exporting
from evovit.engines.base import Plan, Run, WithIndices, trace, upstream_products
from evovit.engines.exporting import TARGETS, export
from evovit.engines.proof import prove
from evovit.errors import EvoViTError
from evovit.methods import find_method, list_methods
from evovit.models.levit_cls import LevitCls
from evovit.ops.fusion import Fusion
from evovit.ops.merge import drop_where, match_both_ways, match_tokens
from evovit.ops.select import descending, split_top
from tests.conftest import HOSTS, SIZE, disturb, make_host, pictures

PREPARE: dict[str, Any] = {
    "input_size": [3, SIZE, SIZE],
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "class_names": [f"class {number}" for number in range(5)],
}
EVERY = [*(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "openvino")), "pt2"]
MATRIX = ("deit3", "dinov2_reg", "siglip", "eva02", "dinov3", "lv_vit", "levit")


def ready(name: str) -> None:
    """Skip where an engine's packages are not installed."""
    for package in TARGETS[name].needs:
        pytest.importorskip(package)


def host_of(name: str) -> nn.Module:
    if name != "levit":
        return make_host(name)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": (16, 24, 32), "num_heads": (2, 3, 4), "depth": (2, 2, 2)}
    return disturb(LevitCls(img_size=64, key_dim=8, num_classes=5, **sizes)).eval()


def reduced(host: str, method: str, **options: Any) -> evovit.ReducedViT:
    """Return a reduced tiny host; skip where the method refuses it."""
    try:
        return evovit.reduce_tokens(host_of(host), method, **(options or find_method(method).example))
    except EvoViTError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("to", EVERY)
def test_an_export_is_proven_and_leaves_what_runs_it(to: str, tmp_path: Path) -> None:
    ready(to)
    model = reduced("vit", "evo_vit").train()  # it is written as it evaluates
    entry = export(model, tmp_path / "out", to, preprocessing=PREPARE)
    assert model.training
    assert entry["proof"]["largest_error"] <= 1e-5
    assert entry["proof"]["same_kept"] == 1.0
    assert entry["proof"]["batch_sizes"] == [1, 3, 5]
    assert json.loads((tmp_path / "out/export.json").read_text())[to] == entry
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held == {"export.json", "preprocessing.json", "run.py", entry["file"].split("/")[0]}


@pytest.mark.parametrize("to", EVERY)
@pytest.mark.parametrize("crop_mode", ["center", pytest.param("squash", marks=pytest.mark.slow)])
def test_the_program_answers_as_pytorch_does_without_evovit(to: str, crop_mode: str, tmp_path: Path) -> None:
    ready(to)
    model, prepare = reduced("vit", "evit"), PREPARE | {"crop_mode": crop_mode}
    batch: int | str = "dynamic" if crop_mode == "center" else 2
    export(model, tmp_path, to, batch=batch, preprocessing=prepare)
    photo = Image.fromarray(load_sample_image("china.jpg"))
    photo.save(tmp_path / "photo.png")
    alone = "import runpy, sys; sys.modules['evovit'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0])"
    words = [sys.executable, "-c", alone, str(tmp_path / "run.py"), str(tmp_path / "photo.png"), to]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    plain = {key: value for key, value in prepare.items() if key != "class_names"}
    image = timm.data.create_transform(**plain)(photo)
    scores = model.eval()(image[None])[0].softmax(-1)
    order = scores.argsort(descending=True)
    expected = [f"{scores[i]:6.1%}  class {i}" for i in order]
    assert done.stdout.splitlines() == expected


@pytest.fixture
def one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all exports of a test that take the same graph of its model share one trace."""
    programs: dict[tuple[type, bool], Any] = {}

    def traced_once(model: nn.Module, shape: Any, plan: Plan, *, half: bool = False) -> Any:
        graph = (type(model), half)
        if graph not in programs:
            programs[graph] = trace(model, shape, plan, half=half)
        return programs[graph]

    monkeypatch.setattr(exporting, "trace", traced_once)


def export_to_all(model: nn.Module, folder: Path) -> dict[str, dict[str, Any]]:
    """Export in float32 to each engine whose file is run with ordinary means; return what was told."""
    entries = {}
    for to in ("onnx", "openvino", "pt2"):
        ready(to)
        entries[to] = export(model, folder, to)
        assert entries[to]["proof"].get("same_kept", 1.0) == 1.0, to
    return entries


# The share of kept tokens that int8 must leave. Where tokens are split by rank, two neighbours in rank that
# trade places change sides and partners: fewer tokens are equal.
LOWER = {
    "dense": 0.9,
    "evo_vit": 0.9,
    "tome": 0.9,
    "dynamic_vit": 0.9,
    "pitome": 0.75,
    "ppt": 0.9,
    "mctf": 0.75,
}
FULL = ("ppt", "mctf")  # in the full lane: their scores and their merging are those of others
SQUEEZING = [name for name in list_methods() if hasattr(find_method(name).Config, "rest")]


@pytest.mark.slow
@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("method", [name for name in list_methods() if name not in LOWER or name in FULL])
def test_every_method_is_exported_to_every_engine(method: str, tmp_path: Path) -> None:
    export_to_all(reduced("vit", method), tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("method", SQUEEZING)
def test_squeezing_is_exported_to_every_engine(method: str, tmp_path: Path) -> None:
    export_to_all(reduced("vit", method, **find_method(method).example, rest="squeeze"), tmp_path)


@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.full if m in FULL else pytest.mark.slow) for m in LOWER]
)
def test_lower_precisions_stay_near_the_export_in_float32(method: str, tmp_path: Path) -> None:
    model = reduced("vit", method)
    whole = export_to_all(model, tmp_path)
    for to, precision in [
        *(("onnx", "fp16"), ("openvino", "fp16"), ("pt2", "fp16")),
        *(("onnx", "int8"), ("openvino", "int8")),
    ]:
        entry = export(model, tmp_path, to, precision, calibration=pictures(32, seed=9))
        proof, case = entry["proof"], (to, precision)
        assert entry["bytes"] < whole[to]["bytes"], case
        assert proof["relative_error"] <= (0.35 if precision == "int8" else 0.05), case
        assert proof["top1_agreement"] >= 0.8, case
        assert proof.get("kept_overlap", 1.0) >= (LOWER[method] if precision == "int8" else 0.9), case


def lane_of(method: str, host: str, to: str) -> pytest.MarkDecorator:
    """Return the lane of an export: `vit` is above, and `test_contract` traces every method on `eva02`.

    The slow one has every method on the other adapters, and the conversion of two from every host.
    """
    kept = host in ("lv_vit", "levit") if to == "pt2" else method in ("evo_vit", "tome") or host == "levit"
    return pytest.mark.slow if kept else pytest.mark.full


@pytest.mark.parametrize(
    ("method", "host", "to"),
    [
        pytest.param(method, host, to, marks=lane_of(method, host, to))
        for method in list_methods()
        for host in MATRIX
        for to in ("onnx", "pt2")
    ],
)
def test_every_method_on_every_host_is_exported(method: str, host: str, to: str, tmp_path: Path) -> None:
    ready(to)
    export(reduced(host, method), tmp_path, to)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "evo_vit"])
def test_aotinductor_is_proven_too(method: str, tmp_path: Path) -> None:
    entry = export(reduced("vit", method), tmp_path, "aoti")
    assert (tmp_path / "model.aoti.pt2").stat().st_size == entry["bytes"]


class Selecting(nn.Module):
    """What selects and matches, alone."""

    def forward(self, score: Tensor) -> tuple[Tensor, ...]:
        batch, num = score.shape[0], score.shape[2]
        split = split_top(score[:, 0], num // 2)
        match = match_tokens(score.reshape(batch, num, -1), num // 4, first=1)
        order = descending(score[:, 0])
        both = Fusion(match_both_ways(score[:, :, :8], 5, first=1), None)
        some = drop_where(match, score[:, 0, :1] > 0, order)
        return split.rows, split.kept, match.rows, match.moved, order, both.moved, some.moved


def tied_scores(seed: int) -> Tensor:
    """Return (5, 8, 49): each row of few values, zeros of both signs and denormals among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-1.0, -0.0, 0.0, 1e-40, 0.5, 0.5, 1.0, 2.0])
    return values[torch.randint(len(values), (5, 8, 49), generator=generator)]


@pytest.mark.parametrize("to", EVERY)
def test_engines_break_ties_as_eager_does(to: str, tmp_path: Path) -> None:
    ready(to)
    engine = TARGETS[to]
    path = tmp_path / engine.file
    path.parent.mkdir(exist_ok=True)
    engine.write(trace(Selecting(), (8, 49), Plan()), path, Plan())
    run = engine.load(path)
    for seed in range(20):
        scores = tied_scores(seed)
        for found, truth in zip(run(scores), Selecting()(scores), strict=True):
            assert torch.equal(found.to(truth.dtype), truth)


def test_the_order_of_merging_for_engines_is_that_of_eager_but_for_the_sources() -> None:
    scores = tied_scores(3).reshape(5, 49, 8)
    eager = match_tokens(scores, 12, first=1)
    program = torch.export.export(Selecting(), (tied_scores(3),))
    assert not any("sort" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(tied_scores(3))[3], eager.moved)


class Wrong:
    """Runs of a file that is off."""

    def __init__(self, model: nn.Module, change: Any) -> None:
        self.model, self.change = model, change

    def __call__(self, images: Tensor) -> list[Tensor]:
        out = self.model(images)
        return self.change([out] if isinstance(out, Tensor) else list(out))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda out: [out[0] * 1.001, *out[1:]], "largest error over the largest logit"),
        (lambda out: [out[0] * float("nan"), *out[1:]], "not finite"),
        (lambda out: [out[0][:, :-1], *out[1:]], "other shapes"),
    ],
)
def test_a_file_that_is_off_is_told_by_how_much(change: Any, told: str) -> None:
    model = reduced("vit", "evo_vit").eval()
    run: Run = Wrong(model, change)
    with pytest.raises(EvoViTError, match=told):
        prove(model, run, Wrong(WithIndices(model), list), pictures(9), "fp32", None, "The file")


def test_a_file_that_keeps_other_tokens_is_refused() -> None:
    model = reduced("vit", "evit").eval()
    telling = Wrong(WithIndices(model), lambda out: [out[0], *(index.flip(1) for index in out[1:])])
    with pytest.raises(EvoViTError, match="keeps different tokens than the model on 100%"):
        prove(model, Wrong(model, list), telling, pictures(9), "fp32", None, "The file")


def test_a_file_that_fails_its_proof_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(reduced("vit", "dense"), tmp_path, "pt2", preprocessing=PREPARE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def off(self: Any, path: Path, threads: int | None = None) -> Run:
        return lambda images: [torch.ones(len(images), 5)]

    monkeypatch.setattr(exporting.Pt2, "load", off)
    with pytest.raises(EvoViTError, match="differs from the model"):
        export(reduced("deit3", "dense"), tmp_path, "pt2", preprocessing=PREPARE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_selecting_products_are_found_behind_what_only_moves_numbers() -> None:
    sources = {"top": ["add"], "add": ["score", "sum"], "sum": ["wide"], "score": ["wide"], "wide": []}
    kinds = {"top": "TopK", "add": "Add", "sum": "ReduceSum", "score": "MatMul", "wide": "MatMul"}
    assert upstream_products(sources, kinds, ["MatMul"]) == {"score"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"to": "onxx"}, "Did you mean 'onnx'"),
        ({"to": "pt2", "precision": "int8"}, "int8 is for onnx and openvino"),
        ({"to": "pt2", "precision": "fp8"}, "precision is 'fp8'"),
        ({"to": "pt2", "batch": 0}, "batch is 0"),
        ({"to": "pt2", "batch": "some"}, "batch is 'some'"),
        ({"to": "pt2", "images": torch.zeros(3, SIZE, SIZE)}, "give prepared images"),
        ({"to": "pt2", "images": torch.zeros(0, 3, SIZE, SIZE)}, "has 0 images"),
        ({"to": "pt2", "calibration": "photos"}, "give prepared images"),
        ({"to": "pt2", "images": torch.full((1, 3, SIZE, SIZE), torch.nan)}, "that are not finite"),
        ({"to": "pt2", "images": torch.zeros(1, 3, SIZE, SIZE, device="meta")}, "has no values, or"),
        ({"to": "pt2", "preprocessing": 3}, "preprocessing is 3; give a table"),
        ({"to": "pt2", "preprocessing": [1]}, r"preprocessing is \[1\]; give a table"),
        ({"to": "pt2", "preprocessing": {}}, r"preprocessing.input_size is missing; give it: \(channels"),
        ({"to": "pt2", "preprocessing": PREPARE | {"mean": "x"}}, "preprocessing.mean is 'x'"),
        ({"to": "pt2", "preprocessing": PREPARE | {"std": (0, 0, 0)}}, "preprocessing.std is"),
        ({"to": "pt2", "preprocessing": PREPARE | {"crop_mode": object()}}, "preprocessing.crop_mode is"),
        ({"to": "pt2", "preprocessing": PREPARE | {"mean": (0.5,)}}, "1 mean, 3 std; the model takes"),
        ({"to": "pt2", "preprocessing": PREPARE | {"means": 1}}, "no option 'means'.*Did you mean 'mean'"),
    ],
)
def test_wrong_wishes_are_one_sentence(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(EvoViTError, match=told):
        export(reduced("vit", "evo_vit"), tmp_path, **{"preprocessing": PREPARE} | given)
    with pytest.raises(EvoViTError, match="model is 'deit'"):
        export("deit", tmp_path, "pt2")  # type: ignore[arg-type]


def test_another_model_does_not_mix_into_a_folder(tmp_path: Path) -> None:
    export(reduced("vit", "dense"), tmp_path, "pt2", preprocessing=PREPARE)
    with pytest.raises(EvoViTError, match="another preprocessing of images"):
        export(reduced("vit", "evo_vit"), tmp_path, "pt2", preprocessing=PREPARE | {"crop_pct": 1.0})


@pytest.mark.slow
def test_int8_of_openvino_asks_for_images(tmp_path: Path) -> None:
    ready("openvino")
    with pytest.raises(EvoViTError, match="int8 needs images to find the range of activations"):
        export(reduced("vit", "evo_vit"), tmp_path, "openvino", "int8", preprocessing=PREPARE)


def test_missing_packages_are_told_with_what_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting.Onnx, "needs", ("onnx", "no_such_package"))
    with pytest.raises(EvoViTError, match=r"pip install 'evovit\[onnx\]'"):
        export(reduced("vit", "evo_vit"), tmp_path, "onnx", preprocessing=PREPARE)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["deit_tiny_patch16_224", "--to", "onxx"], "Did you mean 'onnx'"),
        (["deit_tiny_patch16_224", "--to", "pt2", "--batch", "-1"], "batch is '-1'"),
        (["deit_tiny_patch16", "--to", "pt2"], "Did you mean 'deit_tiny_patch16_224'"),
        (["deit_tiny_patch16_224", "--to", "pt2", "--method", "evo"], "method"),
        (["deit_tiny_patch16_224", "--to", "pt2", "--calibration", "nowhere"], "There is no folder"),
        (["deit_tiny_patch16_224", "--to", "pt2", "--weights", "a.pth"], "There is no checkpoint file"),
        ([".", "--to", "pt2"], "is neither the folder of a run nor one that save_reduced wrote"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["export", *words])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.count("\n") == 1
    assert told in said


def test_the_command_writes_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(load_sample_image("flower.jpg")).save(tmp_path / "flower.jpg")
    cli.main(
        ["export", "small_vit", "--keep-ratio", "0.5", "--to", "pt2", "--batch", "1", "--calibration", "."]
    )
    said = capsys.readouterr().out
    assert "random weights" in said and "same tokens kept on 100%" in said
    entry = json.loads((tmp_path / "exports/small_vit/export.json").read_text())["pt2"]
    assert entry["options"]["keep_ratio"] == 0.5 and entry["batch"] == 1


def test_hosts_of_the_matrix_are_those_of_the_other_tests() -> None:
    assert set(MATRIX) - {"levit"} <= set(HOSTS)


def test_a_saved_folder_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5)
    options = {"img_size": 32, "depth": 3, "num_classes": 5}
    named: dict[str, Any] = {"host": "vit_tiny_patch16_224", "host_options": options}
    evovit.save_reduced(evovit.reduce_tokens(host, "evit", blocks=(1,)), tmp_path / "saved", **named)
    cli.main(["export", str(tmp_path / "saved"), "--to", "pt2", "--out", str(tmp_path / "out")])
    assert "same tokens kept on 100%" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/export.json").read_text())["pt2"]["method"] == "evit"


@pytest.mark.slow
def test_a_host_of_transformers_is_exported(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=SIZE, patch_size=8, num_labels=5)
    host = transformers.ViTForImageClassification(config).eval()
    reduced = evovit.reduce_tokens(host, "evo_vit", start_block=1, stage_length=2)
    entry = export(reduced, tmp_path, "pt2", preprocessing=PREPARE)
    assert entry["proof"]["same_kept"] == 1.0
    entry = export(reduced, tmp_path / "own", "pt2")  # prepared as ViT's own processor does
    assert entry["host"].endswith("ViTForImageClassification")
