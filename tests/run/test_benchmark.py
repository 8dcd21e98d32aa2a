"""The benchmark says what its times show, and no more."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evovit import EvoViTError, cli
from evovit.bench import step as step_module
from evovit.bench.profile import PARTS, Profile, part_of
from evovit.bench.row import Measured, Row, append_rows, busy_notes, compare, rows_of
from evovit.bench.setting import Setting, Variant, build_host, build_models, parse_variants, usable
from evovit.bench.step import TimedStep
from evovit.bench.timing import Extras, largest_batch, measure
from evovit.macs import gmacs
from evovit.methods import DENSE, list_methods
from evovit.model import ReducedViT
from evovit.report.bench import write_report
from evovit.report.tables import speedup_text
from evovit.runtime.environment import environment

MODEL = "test_vit"  # 6 blocks of width 64
EVO = Variant("evo_vit", {"keep_ratio": 0.5})


def setting(**changes: Any) -> Setting:
    return Setting(**{"model": MODEL, "batch": 2, "rounds": 2, "threads": 1, **changes})


def rows_from(
    dense_ms: list[float], other_ms: list[float], compiled_ms: list[float] | None = None
) -> list[Row]:
    """Rows of made-up times: dense and evo_vit eager, and perhaps dense compiled."""
    dense, evo = Variant(DENSE), EVO
    step = lambda i: None  # noqa: E731
    measured = [
        Measured(dense, TimedStep("eager", step), 4.0, 1, dense_ms),
        Measured(evo, TimedStep("eager", step), 2.0, 1, other_ms),
    ]
    if compiled_ms:
        measured.insert(1, Measured(dense, TimedStep("compiled", step), 4.0, 1, compiled_ms))
    return rows_of(setting(rounds=len(dense_ms)), 160, measured)


def jitter(center: float, share: float, seed: int) -> list[float]:
    noise = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (center * (1 + share * noise)).tolist()


@pytest.fixture(scope="module")
def small_run() -> list[Row]:
    return measure(setting(engines=("eager", "graphs")), [EVO])


def test_a_clear_gain_is_a_ratio_with_conversion() -> None:
    row = rows_from(jitter(15, 0.01, 0), jitter(10, 0.01, 1))[1]
    assert row.speedup == pytest.approx(1.5, rel=0.02) and row.mac_ratio == 2.0
    assert row.conversion == pytest.approx(0.75, rel=0.02)
    assert row.verdict.startswith("1.5")


def test_a_gain_within_the_noise_is_no_gain() -> None:
    row = rows_from(jitter(10.1, 0.2, 0), jitter(10, 0.2, 1))[1]
    assert row.verdict.startswith("no difference beyond noise")
    assert speedup_text(row.speedup, row.noise).startswith("about 1 ±")


def test_a_loss_is_said_plainly() -> None:
    assert rows_from(jitter(10, 0.01, 0), jitter(12, 0.01, 1))[1].verdict.startswith(
        "dense is faster here: 0.8"
    )


def test_a_gain_over_a_slow_engine_names_the_faster_dense_engine() -> None:
    row = rows_from(jitter(20, 0.01, 0), jitter(15, 0.01, 1), jitter(10, 0.01, 2))[2]
    assert row.best_dense_engine == "compiled"
    assert row.verdict.endswith("; dense compiled is faster still")
    assert row.verdict_over_best_dense.startswith("dense is faster here")


def test_the_ratio_is_taken_round_by_round_so_a_common_drift_leaves_it() -> None:
    drift = [1 + 0.1 * i for i in range(20)]
    ratio = compare([3 * d for d in drift], [2 * d for d in drift])
    assert ratio.value == pytest.approx(1.5) and ratio.noise == 0.005


def test_noise_covers_the_range_where_rounds_are_few() -> None:
    assert compare([1.0, 1.2, 1.4], [1.0, 1.0, 1.0]).noise == pytest.approx(0.2 / 1.2)


def test_a_busy_machine_is_noticed_by_its_load_and_by_the_spread() -> None:
    steady = Measured(Variant(DENSE), TimedStep("eager", lambda i: None), 1.0, 1, [1.0] * 30)
    shaken = Measured(Variant(DENSE), TimedStep("eager", lambda i: None), 1.0, 1, jitter(1, 0.3, 0))
    assert busy_notes(setting(rounds=30, load=0.0), [steady]) == []
    assert "busy" in busy_notes(setting(rounds=30, load=999.0), [steady])[0]
    assert "unsteady" in busy_notes(setting(rounds=30, load=0.0), [shaken])[0]
    assert "30 or more" in busy_notes(setting(rounds=3, load=0.0), [steady])[0]


def test_dense_is_measured_beside_the_variant_and_a_missing_engine_says_why(small_run: list[Row]) -> None:
    assert [(row.method, row.engine) for row in small_run] == [
        *((DENSE, "eager"), (DENSE, "graphs")),
        *(("evo_vit", "eager"), ("evo_vit", "graphs")),
    ]
    dense, skipped, evo, _ = small_run
    assert "CUDA" in skipped.skipped and skipped.median_ms is None
    assert dense.gmacs > evo.gmacs and evo.mac_ratio == pytest.approx(dense.gmacs / evo.gmacs)
    assert evo.images_per_second == pytest.approx(2000 / (evo.median_ms or 0))
    assert (evo.kernels or 0) > (dense.kernels or 0) > 50 and set(evo.parts_ms or ()) == set(PARTS)
    assert evo.peak_memory_mb is None and evo.threads == 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_training_step_gives_every_parameter_a_gradient(dtype: str) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    batch = step_module.Batch(torch.randn(2, 3, 2, 2), torch.tensor([0, 2]))
    (one,) = step_module.prepare(model, ("eager",), dtype, [batch], True, "")
    one.run(0)
    assert model.training and all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())


def test_training_rows_say_what_the_type_means() -> None:
    rows = measure(setting(train=True, dtype="bf16"), [EVO], Extras(kernels=False))
    assert {row.types for row in rows} == {"bfloat16 autocast, float32 weights"}
    assert {row.task for row in rows} == {"training step"} and all(row.median_ms for row in rows)


def test_compiled_variants_count_their_own_breaks_and_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module.torch, "compile", partial(torch.compile, backend="eager"))
    variants = [Variant("evo_vit", {"keep_ratio": ratio, "start_block": 5}) for ratio in (0.5, 0.7)]
    rows = measure(setting(engines=("compiled",)), variants, Extras(kernels=False))
    assert [(row.graph_breaks, row.recompiles) for row in rows] == [(0, 0)] * 3


def test_a_compiler_that_fails_skips_the_engine_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(step_module.torch, "compile", partial(torch.compile, backend=broken))
    rows = measure(setting(engines=("eager", "compiled")), [], Extras(kernels=False))
    assert rows[0].median_ms and "no compiler here" in rows[1].skipped


def test_a_model_that_fails_loses_its_own_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step_module.forward_of

    def broken(*_: Any) -> Any:
        raise AssertionError("wrong strides")

    monkeypatch.setattr(step_module.torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(
        step_module, "forward_of", lambda m, train: broken if isinstance(m, ReducedViT) else whole(m, train)
    )
    engines = ("eager", "compiled")
    rows = measure(setting(engines=engines), [EVO], Extras(kernels=False))
    assert [bool(row.median_ms) for row in rows] == [True, True, False, False]
    assert all("wrong strides" in row.skipped for row in rows[2:])


def test_wrong_input_in_a_step_is_no_skipped_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise EvoViTError("no such thing")

    monkeypatch.setattr(step_module, "warm_up", refuse)
    batch = step_module.Batch(torch.randn(2, 3), torch.tensor([0, 2]))
    for engine in ("eager", "compiled"):
        with pytest.raises(EvoViTError, match="no such thing"):
            step_module.prepare(torch.nn.Linear(3, 3), (engine,), "fp32", [batch], False, "")


@pytest.mark.parametrize("error", [RuntimeError("no profiler"), torch.OutOfMemoryError("no profiler")])
def test_a_profile_that_fails_leaves_the_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from evovit.bench import timing as benchmark

    def broken(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(benchmark, "profile", broken)
    monkeypatch.setattr(benchmark, "write_trace", broken)
    said: list[str] = []
    rows = measure(setting(), [EVO], Extras(trace=Path("trace.json")), said.append)
    assert all(row.median_ms and row.kernels is None and row.parts_ms is None for row in rows)
    notes = [note for note in rows[0].notes if "no profiler" in note]
    assert len(notes) == 3 and "no profile of dense [eager]" in notes[0] and {*notes} <= {*said}
    write_report(tmp_path, append_rows(tmp_path, rows, environment("cpu")))


def test_a_graph_has_the_profile_of_its_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from evovit.bench import timing as benchmark

    seen: list[int] = []

    def numbered(*_: Any) -> Profile:
        seen.append(len(seen))
        return Profile(seen[-1], {}, {})

    monkeypatch.setattr(benchmark, "profile", numbered)
    pairs = [(v, engine) for v in (Variant(DENSE), EVO) for engine in ("eager", "compiled", "graphs")]
    pairs += [(Variant("evit"), "graphs")]
    measured = [Measured(v, TimedStep(engine, lambda i: None), 1.0) for v, engine in pairs]
    assert benchmark.profile_each(measured, "cpu", seen.append) == []
    assert [one.profile and one.profile.kernels for one in measured] == [0, 1, 1, 2, 3, 3, None]


def test_the_fullest_profile_counts_then_the_quickest(monkeypatch: pytest.MonkeyPatch) -> None:
    from evovit.bench import profile as profiles

    found = iter(
        [Profile(3, {"other": 1.0}, {}), Profile(4, {"other": 9.0}, {}), Profile(4, {"other": 5.0}, {})]
    )
    monkeypatch.setattr(profiles, "_profile_once", lambda step, device: next(found))
    assert profiles.profile(lambda i: None, "cpu") == Profile(4, {"other": 5.0}, {})


def test_a_batch_that_does_not_fit_is_halved_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from evovit.bench import timing as benchmark

    prepare = benchmark.prepare

    def tight(model: Any, engines: Any, dtype: str, batches: Any, *rest: Any) -> Any:
        if len(batches[0].images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(model, engines, dtype, batches, *rest)

    monkeypatch.setattr(benchmark, "prepare", tight)
    rows = measure(setting(batch=4), [], Extras(kernels=False))
    assert rows[0].batch == 2 and any("batch 4 ran out of memory" in note for note in rows[0].notes)


def test_rows_and_page_are_written_and_a_second_run_adds(tmp_path: Path, small_run: list[Row]) -> None:
    around = environment("cpu")
    append_rows(tmp_path, small_run, around)
    records = append_rows(tmp_path, small_run, around)
    assert len(records) == 8 and records[0]["torch"] == torch.__version__
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == records
    page = write_report(tmp_path, records).read_text()
    assert page.count("<h2>") == 1 and "data:image/png;base64," in page and "CUDA graphs need" in page
    assert "http://" not in page and "https://" not in page
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl", "report.html"}


FORMER = """
{"model": "test_vit", "method": "dense", "options": {}, "mode": "eager", "dtype": "fp32", "types": "float32",
"batch": 1, "image_size": 160, "task": "inference", "device": "cpu", "threads": 1, "rounds": 30,
"steps_per_round": 14, "gmacs": 0.0376, "gmacs_counted": 0.0376, "mac_ratio": 1.0, "median_ms": 1.4,
"p95_ms": 1.5, "images_per_second": 701.6, "peak_memory_mb": null, "memory_ratio": null, "speedup": 1.0,
"noise": null, "conversion": null, "speedup_over_best_dense": 1.0, "verdict_over_best_dense": "",
"best_dense_mode": "eager", "is_best_mode": true, "kernels": 91, "parts_ms": {"projections": 0.7},
"graph_breaks": null, "recompiles": null, "verdict": "", "skipped": "", "notes": [], "device_name": "a CPU",
"driver": null, "cuda": null, "torch": "2.15.0", "timm": "1.0.31", "evovit": "0.1.0", "python": "3.11.7",
"load_average": 1.7, "time": "2026-11-24T12:23:17+00:00"}
"""
FORMER_REDUCED = FORMER.replace('"dense", "options": {}', '"evo_vit", "options": {"mode": "layer"}')


def test_rows_of_the_former_version_are_still_read(tmp_path: Path, small_run: list[Row]) -> None:
    lines = [text.strip().replace("\n", " ") for text in (FORMER, FORMER_REDUCED)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
    dense, reduced, *new = append_rows(tmp_path, small_run, environment("cpu"))
    assert (dense["engine"], dense["best_dense_engine"], dense["is_best_engine"]) == ("eager", "eager", True)
    assert reduced["options"] == {"mode": "layer"} and len(new) == len(small_run)
    assert {"mode", "best_dense_mode", "is_best_mode"}.isdisjoint({*dense, *reduced})
    assert (tmp_path / "rows.jsonl").read_text().splitlines()[
        :2
    ] == lines  # a stranger's rows stay as they are
    page = write_report(tmp_path, [dense, reduced, *new]).read_text()
    assert "evo_vit mode=layer" in page and "a CPU" in page and page.count("<h2>") == 2


@pytest.mark.parametrize("line", ["{", "3", "[]x", "null", "[" * 9000], ids=range(5))
def test_a_line_that_is_no_row_is_named_and_nothing_written(
    tmp_path: Path, small_run: list[Row], line: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(EvoViTError, match="not a JSON row"):
        append_rows(tmp_path, small_run, {})
    assert (tmp_path / "rows.jsonl").read_text() == line
    (tmp_path / "rows.jsonl").write_bytes(b'{"model": "\xe9"}')
    with pytest.raises(EvoViTError, match="not a JSON row"):
        append_rows(tmp_path, small_run, {})


WRONG: list[dict[str, Any]] = [
    *({"torch": 2}, {"time": []}, {"device_name": 1}, {"batch": "1"}, {"notes": 3}, {"options": []}),
    *({"median_ms": float("nan")}, {"median_ms": float("inf")}, {"gmacs": None}, {"is_best_mode": "yes"}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_row_that_no_bench_wrote_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(json.loads(FORMER) | wrong))
    with pytest.raises(EvoViTError, match=r"rows.jsonl' has .*, not a row of evovit bench; move it away"):
        write_report(tmp_path, append_rows(tmp_path, [], {}))
    with pytest.raises(EvoViTError, match="not a row of evovit bench"):
        write_report(tmp_path, [{}])


def rows_of_command(out: Path, *words: str) -> list[dict[str, Any]]:
    cli.main(
        [
            "bench",
            MODEL,
            "--engine=eager",
            "--rounds=1",
            "--threads=1",
            "--device=cpu",
            f"--out={out}",
            *words,
        ]
    )
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_several_keep_ratios_make_a_row_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of_command(tmp_path, "--keep-ratio", "0.3", "0.5", "0.7")
    assert [(row["method"], row["options"]) for row in rows] == [
        (DENSE, {}),
        *(("evo_vit", {"keep_ratio": ratio}) for ratio in (0.3, 0.5, 0.7)),
    ]
    assert rows[1]["gmacs"] < rows[2]["gmacs"] < rows[3]["gmacs"] < rows[0]["gmacs"]
    assert "evo_vit keep_ratio=0.3" in capsys.readouterr().out


def test_a_method_takes_a_list_among_its_options(tmp_path: Path) -> None:
    rows = rows_of_command(tmp_path, "--method", "evit:blocks=[2,4],keep_ratio=0.5")
    assert rows[1]["options"] == {"blocks": [2, 4], "keep_ratio": 0.5}


def test_all_methods_say_who_is_left_out_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["method"] for row in rows_of_command(tmp_path, "--method", "all:keep_ratio=0.5")}
    out = capsys.readouterr().out
    assert found >= {DENSE, "evo_vit", "tome"} and "evit keep_ratio=0.5 is left out: blocks is 6" in out
    assert all(f"{name} " in out for name in {*list_methods()} - found)


def test_the_help_imports_no_torch_and_shows_examples() -> None:
    script = (
        "import sys\n"
        "from evovit.cli import main\n"
        "try:\n    main(['bench', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("\n$ evovit bench ") >= 2


def test_the_command_prints_rows_parts_and_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.json"
    words = f"bench {MODEL} --engine eager --rounds 2 --threads 1 --parts --keep-ratio 0.5 --trace {trace}"
    cli.main([*words.split(), "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "dense" in out and "evo_vit keep_ratio=0.5" in out and "projections" in out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"dense [eager]", "evo_vit keep_ratio=0.5 [eager]", "aten::addmm"} <= names


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("test_vti", "Did you mean 'test_vit'"),
        (f"{MODEL} --batch 0", "batch is 0"),
        (f"{MODEL} --batch many", "batch is 'many'"),
        (f"{MODEL} --batch max", "CUDA"),
        (f"{MODEL} --dtype fp12", "Did you mean 'fp"),
        (f"{MODEL} --dtype tf32", "tf32"),
        (f"{MODEL} --engine compile", "Did you mean 'compiled'"),
        (f"{MODEL} --method evo_vti", "Did you mean 'evo_vit'"),
        (f"{MODEL} --options keep_rato=0.5", "Did you mean 'keep_ratio'"),
        (f"{MODEL} --options keep_ratio", "name=value"),
        (f"{MODEL} --method all --options keep_rato=0.5", "Did you mean 'keep_ratio'"),
        (f"{MODEL} --method dense:keep_ratio=0.5", "no option 'keep_ratio'"),
        (f"{MODEL} --method evo_vit:last_block=patches", "last_block is 'patches'; allowed is"),
        (f"{MODEL} --method dense:last_block=prefixes", "Did you mean 'prefix'"),
        (f"{MODEL} --options keep_ratio=0.5 --keep-ratio 0.3", "given twice"),
        (f"{MODEL} --size 100", "multiple of the patch"),
        (f"{MODEL} --rounds 0", "rounds is 0"),
        (f"{MODEL} --batch 1 2 --trace x.json", "--trace"),
        ("", "No model"),
    ],
)
def test_a_wrong_input_is_one_sentence(
    words: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["evovit", "bench", *words.split(), "--device", "cpu", "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in message and message.count("\n") == 1


def test_a_model_without_an_adapter_is_measured_for_reference_and_never_reduced() -> None:
    setting = Setting(model="pit_ti_224", rounds=1)
    (row,) = measure(setting, [], Extras(kernels=False))
    assert row.median_ms and row.gmacs == pytest.approx(0.7, abs=0.05)
    with pytest.raises(EvoViTError, match="not a supported host"):
        measure(setting, [Variant("evo_vit")], Extras(kernels=False))


def test_methods_take_options_of_their_own() -> None:
    found = parse_variants(["evo_vit:mode=layer,fast_update=false", "dense"], ["keep_ratio=0.7"])
    assert found == [Variant("evo_vit", {"keep_ratio": 0.7, "mode": "layer", "fast_update": False})]
    every = parse_variants(["all"], [], [0.5])
    assert {v.method for v in every} >= {"evo_vit"} and EVO in every


def test_dense_without_what_nobody_reads_is_a_row_beside_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "dense",
        "dense:last_block=prefix",
        "evo_vit:start_block=2",
        "evo_vit:start_block=2,last_block=all",
    ]
    rows = rows_of_command(tmp_path, "--method", *words)
    assert [(row["method"], row["options"].get("last_block")) for row in rows] == [
        *((DENSE, None), (DENSE, "prefix")),
        *(("evo_vit", None), ("evo_vit", "all")),
    ]
    host, dense, evo, whole = (row["gmacs"] for row in rows)
    assert host > dense > evo and whole > evo
    assert rows[0]["verdict"] == "" and rows[0]["noise"] is None  # the one that all are compared with
    assert rows[1]["verdict"] and rows[1]["mac_ratio"] == pytest.approx(host / dense)
    assert "dense last_block=prefix [eager]" in capsys.readouterr().out
    assert "dense last_block=prefix" in (tmp_path / "report.html").read_text()


def test_every_method_has_dense_beside_it_where_the_head_leaves_something_out() -> None:
    free = Variant(DENSE, {"last_block": "prefix"})
    every = parse_variants(["all"], [])
    assert every[0] == free and every.count(free) == 1
    assert all(v.options == {"last_block": "all"} for v in parse_variants(["all"], ["last_block=all"]))
    assert usable(setting(model="vit_small_patch16_224"), [free]) == ([free], [])
    for model, train, why in (
        ("vit_base_patch16_siglip_224", False, "the head reads patch tokens"),
        ("vit_small_patch16_224", True, "training computes all rows"),
    ):
        chosen, left_out = usable(setting(model=model, train=train), [free])
        assert not chosen and left_out == [f"dense last_block=prefix is left out: {why}."]


def test_a_training_step_counts_every_row() -> None:
    host = build_host(setting(train=True))
    for train in (False, True):
        dense, free, evo = build_models(host, [Variant(DENSE, {"last_block": "prefix"}), EVO], train)
        assert (gmacs(free, (3, 160, 160)) == gmacs(dense, (3, 160, 160))) == train
        assert isinstance(evo, ReducedViT) and evo.last_block == ("all" if train else "prefix")


def test_the_largest_batch_is_asked_of_gpus_only() -> None:
    with pytest.raises(EvoViTError, match="CUDA"):
        largest_batch(setting())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_bias_TNT", "projections"),
        ("cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128", "projections"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void at::native::sbtopk::gatherTopK<long, unsigned int, 2, false>", "selection"),
        ("triton_per_fused_bitwise_and_cumsum_ge_12", "selection"),
        ("triton_per_fused__softmax_mean_3", "score"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "score"),
        ("triton_per_fused__to_copy_add_native_layer_norm_7", "norm and elementwise"),
        ("triton_poi_fused_gelu_4", "norm and elementwise"),
        ("triton_poi_fused_cat_index_select_5", "data movement"),
        ("Memcpy DtoD (Device -> Device)", "data movement"),
        ("void at::native::indexSelectLargeIndex<c10::BFloat16>", "data movement"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>",
            "norm and elementwise",
        ),
        ("triton_tem_fused_addmm_gelu_3", "projections"),
        ("triton_poi_fused_addmm_gelu_4", "norm and elementwise"),
        ("triton_poi_fused_addmm_view_5", "norm and elementwise"),
        ("triton_poi_fused_mm_2", "norm and elementwise"),
        ("triton_poi_fused_convolution_0", "norm and elementwise"),
        ("triton_per_fused_add_addmm_native_layer_norm_view_6", "norm and elementwise"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_transpose_1", "data movement"),
        ("triton_per_fused__log_softmax_nll_loss_forward_9", "norm and elementwise"),
        ("void at::native::cunn_SoftMaxForward<4, float, LogSoftMaxForwardEpilogue>", "norm and elementwise"),
        ("cudnn::fusion::convert_dq_to_16bits<64>", "attention"),
        ("cudnn::fusion::compute_dot_do_o_specialized<true>", "attention"),
        ("void pytorch_flash::flash_bwd_convert_dq_kernel", "attention"),
        ("graph_0_cpp_fused_gelu_native_layer_norm_0", "norm and elementwise"),
        ("graph_0_cpp_fused_convolution_0", "norm and elementwise"),
        ("graph_4_cpp_fused__log_softmax__to_copy_add_mean_nll_loss_forward_12", "norm and elementwise"),
        ("aten::_log_softmax", "norm and elementwise"),
        ("aten::_softmax", "score"),
        ("aten::addmm", "projections"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::topk", "selection"),
        ("aten::bmm", "score"),
        ("aten::index_copy", "data movement"),
        ("aten::native_layer_norm", "norm and elementwise"),
        ("something_else", "other"),
    ],
)
def test_a_kernel_belongs_to_its_part(name: str, part: str) -> None:
    assert part_of(name) == part


def load_gpu_table() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu_table.py"
    spec = importlib.util.spec_from_file_location("gpu_table", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script of the GPU table, with tiny groups; call it with its arguments for its exit status."""
    module = load_gpu_table()
    groups = [module.Group(name, {"model": MODEL, "batch": 2, "engines": ("eager",)}, ()) for name in "ab"]
    monkeypatch.setattr(module, "GROUPS", groups)

    def run(*words: str) -> int:
        monkeypatch.setattr(
            sys, "argv", ["gpu_table.py", str(tmp_path / "out"), "--device=cpu", "--rounds=1", *words]
        )
        with pytest.raises(SystemExit) as stop:
            module.main()
        return int(stop.value.code or 0)

    return SimpleNamespace(run=run, module=module)


class Child:
    """A process that says it takes longer than it may."""

    made: list[Child]

    def __init__(self, command: list[str]) -> None:
        self.command, self.ended = command, 0
        self.made.append(self)

    def wait(self, timeout: float | None = None) -> int:
        if timeout is not None:
            raise subprocess.TimeoutExpired(self.command, timeout)
        return 0

    def terminate(self) -> None:
        self.ended += 1


def test_the_gpu_table_compiles_ahead_in_one_process_per_group(
    table: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Child] = []
    monkeypatch.setattr(table.module.subprocess, "Popen", type("Own", (Child,), {"made": made}))
    assert table.run("--only=a") == table.run("--no-warm") == 0 and not made
    assert table.run("--batch=1") == 0
    out = capsys.readouterr().out
    assert [child.command[-2:] for child in made] == [[f"--only=^{name}$", "--warm"] for name in "ab"]
    assert all({"--device=cpu", "--batch=1"} <= {*child.command} and child.ended for child in made)
    assert "compiling a ahead: not done after 240 s" in out and "compiled 2 groups ahead" in out


def test_the_gpu_table_fails_where_a_row_is_missing(table: Any) -> None:
    assert table.run("--no-warm", "--only=a") == 0
    table.module.GROUPS[0].setting["engines"] = ("eager", "graphs")
    assert table.run("--no-warm", "--only=a") == 1


@pytest.mark.slow
def test_what_one_process_compiles_another_finds(tmp_path: Path) -> None:
    tiny = f"(gpu_table.Group('a', {{'model': {MODEL!r}, 'batch': 2, 'engines': ('compiled',)}}, ()),)"
    script = f"import gpu_table; gpu_table.GROUPS = {tiny}; gpu_table.main()"
    path = Path(__file__).parents[2] / "benchmarks"
    around = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(*words: str) -> str:
        command = [sys.executable, "-c", script, str(tmp_path / "out"), "--device=cpu", "--rounds=1", *words]
        done = subprocess.run(
            command, cwd=path, env=os.environ | around, check=True, capture_output=True, text=True
        )
        return done.stdout

    assert run("--warm") == "" and not (tmp_path / "out").exists()
    assert "1 graphs from the cache, 0 compiled" in run()


@pytest.mark.slow
def test_other_engines_are_timed_beside_their_own_dense_and_eager() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package)
    engines = ("eager", "frozen", "aoti", "onnxruntime", "openvino")
    setting = Setting(model="small_vit", engines=engines, rounds=3, threads=1)
    rows = measure(setting, [Variant("evo_vit")], Extras(kernels=False))
    assert [row.engine for row in rows] == 2 * list(engines)
    for row in rows:
        assert not row.skipped
        assert row.cpu_ms and row.speedup and row.speedup_over_eager
    int8 = measure(replace(setting, dtype="int8"), [Variant("evo_vit")], Extras(kernels=False))
    by_engine = {row.engine: row for row in int8 if row.method == "evo_vit"}
    assert {name for name, row in by_engine.items() if row.skipped} == {"eager", "frozen", "aoti"}
    assert all(row.speedup_over_eager for name, row in by_engine.items() if not row.skipped)


def test_engines_say_what_they_do_not_do() -> None:
    setting = Setting(model="small_vit", engines=("aoti", "openvino", "frozen"), rounds=1, train=True)
    told = {row.engine: row.skipped for row in measure(setting, [], Extras(kernels=False))}
    assert told == {
        "aoti": "aoti does not train",
        "openvino": "openvino does not train",
        "frozen": "frozen weights do not train",
    }
