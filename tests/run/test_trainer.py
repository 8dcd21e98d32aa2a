"""The loop: rates, groups, averages, clipping, skipping, the method's schedule, precision, teachers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from evovit import cli
from evovit.commands.eval import eval as eval_command
from evovit.commands.report import report
from evovit.errors import EvoViTError
from evovit.methods import find_method, list_methods
from evovit.options import describe
from evovit.recipe.tables import TABLES, Recipe
from evovit.runtime.seeds import seed_for
from evovit.runtime.world import World
from evovit.train import trainer as trainer_module
from evovit.train.build import build_model, open_run
from evovit.train.evaluate import evaluate, paired, paired_over_runs
from evovit.train.optimizers import build_optimizers, rate_at
from evovit.train.state import numbered, read_weights
from evovit.train.trainer import Trainer, accumulation
from tests.run.processes import losses, small, train_here

ALONE = World(0, 1, torch.device("cpu"))
SHORT = ("run.epochs=2", "data.scenes=32", "run.checkpoint_every=0", "learning_rate.warm_up_epochs=1")


def make(recipe: Recipe, folder: Path) -> Trainer:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    images, model = open_run(recipe)
    return Trainer(recipe, images, model, folder, ALONE, Console(quiet=True))


def test_seeds_stay_the_same_so_that_trainings_do() -> None:
    assert seed_for(0, "weights") == 3436511528
    assert seed_for(3, "order", 7) == 3576768988
    assert seed_for(0, 12, 0, 1) == 4124321039


def test_the_rate_warms_up_per_update_and_falls_as_a_cosine(tmp_path: Path) -> None:
    recipe = small(tmp_path, "run.epochs=10", "learning_rate.warm_up_epochs=2", "learning_rate.minimum=1e-4")
    rates = [rate_at(recipe, 1e-2, update, 5) for update in range(50)]
    assert rates[0] == pytest.approx(1e-6) and rates[5] == pytest.approx((1e-6 + 1e-2) / 2)
    assert rates[10] == pytest.approx(1e-2) == max(rates)
    assert rates[30] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rate_at(recipe, 1e-2, 50, 5) == pytest.approx(1e-4)


def test_the_last_epochs_stay_at_the_minimum(tmp_path: Path) -> None:
    options = ("learning_rate.warm_up_epochs=0", "learning_rate.minimum=1e-4")
    longer = small(tmp_path, "run.epochs=10", "learning_rate.last_epochs=4", *options)
    plain = small(tmp_path, "run.epochs=6", *options)
    assert [rate_at(longer, 1e-2, u, 5) for u in range(30)] == [rate_at(plain, 1e-2, u, 5) for u in range(30)]
    assert {rate_at(longer, 1e-2, update, 5) for update in range(30, 50)} == {1e-4}
    with pytest.raises(EvoViTError, match="below run.epochs - learning_rate.last_epochs, 1"):
        small(tmp_path, "run.epochs=3", "learning_rate.last_epochs=2", "learning_rate.warm_up_epochs=1")


def test_the_peak_follows_the_effective_batch_whatever_the_accumulation(tmp_path: Path) -> None:
    peaks = []
    for overrides in ((), ("run.batch_per_device=4",), ("data.batch_size=32",)):
        recipe = small(tmp_path, *overrides)
        model = build_model(recipe, 10)
        peaks.append(build_optimizers(recipe, model)[-1].param_groups[0]["peak"])
    assert peaks == pytest.approx([2e-3, 2e-3, 4e-3])
    assert accumulation(small(tmp_path, "run.batch_per_device=4"), ALONE) == 4
    assert accumulation(small(tmp_path, "run.batch_per_device=4"), World(0, 2, ALONE.device)) == 2
    with pytest.raises(EvoViTError, match="a multiple of 24"):
        accumulation(small(tmp_path, "run.batch_per_device=8"), World(0, 3, ALONE.device))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_spares_vectors_and_what_the_model_names(tmp_path: Path, name: str) -> None:
    recipe = small(tmp_path, f"optimizer.name={name}")
    model = build_model(recipe, 10)
    optimizers = build_optimizers(recipe, model)
    names = {id(p): key for key, p in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    bare = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    rest = {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert bare | rest == set(names.values()) and not bare & rest
    assert {"model.pos_embed", "model.cls_token", "model.norm.weight"} & bare >= {
        "model.pos_embed",
        "model.cls_token",
    }
    assert all(model.get_parameter(key).ndim > 1 and not key.endswith("bias") for key in rest)
    if name == "muon":
        assert all("blocks." in names[id(p)] and p.ndim == 2 for p in optimizers[0].param_groups[0]["params"])


def test_the_average_follows_the_weights_by_images_seen(tmp_path: Path) -> None:
    recipe = small(tmp_path, "run.ema_decay=0.9", "learning_rate.reference_batch=32", *SHORT)
    trainer = make(recipe, tmp_path / "run")
    key = "model.blocks.0.attn.qkv.weight"
    expected = trainer.model.state_dict()[key].clone()
    batches = trainer.images.train(0, 0, ALONE, 1)
    for _ in range(2):
        trainer.step(0, batches, False)
        expected += (1 - 0.9**0.5) * (trainer.model.state_dict()[key] - expected)
    assert torch.allclose(trainer.average[key], expected, atol=1e-7)


def gradients(trainer: Trainer, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in trainer.parameters:
        p.grad = scale * torch.randn(p.shape, generator=generator)


def test_gradients_are_clipped_by_norm_and_by_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: seen.append(
            float(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm())
        ),
    )
    for index, knob in enumerate(("clip_norm=0", "clip_norm=0.5", "adaptive_clip=0.01")):
        trainer = make(
            small(tmp_path, "optimizer.clip_norm=0", f"optimizer.{knob}", *SHORT), tmp_path / str(index)
        )
        gradients(trainer, 10.0)
        norm = trainer.descend()
    assert seen[0] == pytest.approx(norm) and norm > 100
    assert seen[1] == pytest.approx(0.5, rel=1e-4)
    assert seen[2] < 0.05 * norm


def test_a_loss_that_is_not_finite_is_skipped_counted_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(small(tmp_path, *SHORT), tmp_path / "run")
    (tmp_path / "run" / "steps.jsonl").touch()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    real = trainer.images.train

    def poisoned(*arguments: Any) -> Any:
        for number, (images, targets) in enumerate(real(*arguments)):
            yield images * (math.nan if number == 0 else 1), targets

    batches = poisoned(0, 0, ALONE, 1)
    trainer.step(0, batches, False)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert (trainer.skipped, trainer.skipped_in_row, trainer.update) == (1, 1, 1)
    trainer.step(0, batches, False)
    assert (trainer.skipped, trainer.skipped_in_row, trainer.update) == (1, 0, 2)
    first, second = map(json.loads, (tmp_path / "run" / "steps.jsonl").read_text().splitlines())
    assert first["loss"] == first["grad_norm"] == "nan" and first["skipped"] == second["skipped"] == 1


def test_too_many_in_a_row_stop_the_run_with_the_last_checkpoint_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(tmp_path, "run.max_skipped=3")
    real = trainer_module.Trainer.descend
    monkeypatch.setattr(
        trainer_module.Trainer, "descend", lambda self: self.skip() if self.update >= 8 else real(self)
    )
    with pytest.raises(EvoViTError, match=r"not finite 3 updates in a row, up to update 11"):
        train_here(recipe, tmp_path / "run")
    assert numbered(tmp_path / "run" / "checkpoints")[0] == "000000010"
    weights = read_weights(tmp_path / "run", "last")
    assert all(value.isfinite().all() for value in weights.values())


def test_the_method_follows_the_epochs(tmp_path: Path) -> None:
    recipe = small(
        tmp_path,
        *("run.epochs=8", "method.switch_at=0.5", "method.keep_ratio=0.5"),
        *("run.reduce_from_epoch=2", "run.reduce_ramp_epochs=3"),
    )
    trainer = make(recipe, tmp_path / "run")
    method: Any = trainer.model.method
    seen = []
    for epoch in range(8):
        trainer.set_epoch(epoch)
        seen.append((method.mode, method.schedule.ratios[3]))
    assert [mode for mode, _ in seen] == ["layer"] * 4 + ["stage"] * 4
    assert [ratio for _, ratio in seen] == pytest.approx([1, 1, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5])
    trainer.set_epoch(0)
    full, whole = trainer.model.run(torch.randn(1, 3, 24, 24), record=True), 16
    assert [tokens.num_patches for tokens in full.trace] == [whole] * 4


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ('name = "subsample"\nblock = 2', "no keep ratio that could start late"),
        ('name = "evit"\nblocks = [1]\nshrink = [0.1, 0.5]', "shrink.* already lowers .* choose one"),
    ],
)
def test_a_method_that_cannot_refuses_a_late_start(method: str, sentence: str, tmp_path: Path) -> None:
    recipe = small(tmp_path)
    text = recipe.to_toml().split("[method]")[0] + f"[method]\n{method}\n[data]"
    path = tmp_path / "other.toml"
    path.write_text(text + recipe.to_toml().split("[data]")[1])
    from evovit.recipe.reading import read_recipe

    with pytest.raises(EvoViTError, match=sentence):
        build_model(read_recipe(path, ["run.reduce_from_epoch=1"]), 10)


def test_precision_and_checkpointing_change_the_rounding_alone(tmp_path: Path) -> None:
    curves = {}
    for name, overrides in {
        "fp32": (),
        "bf16": ("run.precision=bf16",),
        "fp16": ("run.precision=fp16",),
        "recomputed": ("run.activation_checkpointing=true",),
    }.items():
        train_here(small(tmp_path, *SHORT, *overrides), tmp_path / name)
        curves[name] = losses(tmp_path / name)
    assert curves["recomputed"] == curves["fp32"]
    for name in ("bf16", "fp16"):
        assert curves[name] != curves["fp32"]
        assert curves[name] == pytest.approx(curves["fp32"], rel=0.05)
    tensors = json.loads((tmp_path / "fp16" / "checkpoints" / "000000004.json").read_text())
    assert tensors["plain"]["scaler"]["scale"] > 0


@pytest.mark.slow
def test_compiled_training_gives_the_same_curve(tmp_path: Path) -> None:
    for name in ("false", "true"):
        train_here(small(tmp_path, *SHORT, "model.drop_path=0", f"run.compile={name}"), tmp_path / name)
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-4)


def test_a_finished_run_can_teach(tmp_path: Path) -> None:
    train_here(small(tmp_path, *SHORT), tmp_path / "teacher")
    taught = (f"objective.teacher={tmp_path / 'teacher'}", "objective.distillation=soft")
    train_here(small(tmp_path, *SHORT, *taught, "objective.token_distillation=0.1"), tmp_path / "pupil")
    line = json.loads((tmp_path / "pupil" / "steps.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(line["class"] + line["distillation"] + line["tokens"])
    saved = read_weights(tmp_path / "pupil", "last")
    assert not any("teacher" in name for name in saved)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("objective.teacher=deit_tiny_patch16_22",), "objective.teacher is 'deit_tiny_patch16_22'"),
        (("objective.teacher=deit_tiny_patch16_224", "objective.teacher_weights=no.pth"), "no file 'no.pth'"),
        (("objective.teacher=deit_tiny_patch16_224", "objective.teacher_weights=BAD"), "cannot be read as a"),
        (("run.device=cuda",), "PyTorch finds no CUDA"),
        (("data.batch_size=97",), "more than the 96 training images"),
        (("model.num_classes=7",), "model.num_classes is 7, but digits has 10 classes"),
        (("run.log_to=wandb",), "not installed"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_update(
    tmp_path: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    if "cuda" in overrides[0] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no tensors")
    overrides = tuple(text.replace("BAD", str(bad)) for text in overrides)
    if "teacher" in overrides[0]:
        overrides += ("objective.distillation=hard",)
    with pytest.raises(EvoViTError, match=sentence):
        train_here(small(tmp_path, *overrides), tmp_path / "run")
    assert not list((tmp_path / "run").glob("**/*.safetensors"))


def test_sharded_evaluation_counts_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small(tmp_path, "data.test_scenes=41")
    images, model = open_run(recipe)
    whole = evaluate(model, images, recipe, ALONE)
    counts = []
    monkeypatch.setattr(World, "sum", lambda self, values: counts.append(values) or [1.0, 1.0, 1.0])
    for rank in range(3):
        evaluate(model, images, recipe, World(rank, 3, ALONE.device))
    first, five, seen = (sum(column) for column in zip(*counts, strict=True))
    assert seen == whole.images == 41
    assert (100 * first / seen, 100 * five / seen) == pytest.approx((whole.top1, whole.top5))


def test_paired_error_is_that_of_the_differences() -> None:
    ours, theirs = (torch.rand(500, generator=torch.Generator().manual_seed(n)) > 0.4 for n in (0, 1))
    theirs = torch.where(torch.arange(500) < 300, ours, theirs)  # alike in most images
    found = paired(ours, theirs)
    differences = ours.double() - theirs.double()
    assert found.difference == pytest.approx(100 * differences.mean().item())
    assert found.error == pytest.approx(100 * differences.std(correction=0).item() / 500**0.5)
    assert found.won - found.lost == int(differences.sum())
    assert paired(ours, ours).error == 0


def test_an_image_that_several_trainings_share_counts_once() -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.rand(200, generator=generator) < share for share in (0.7, 0.6))
    one = paired(ours, theirs)
    assert paired_over_runs([ours], [theirs]) == pytest.approx((one.difference, one.error))
    assert paired_over_runs([ours] * 3, [theirs] * 3) == pytest.approx((one.difference, one.error))
    others = [torch.rand(200, generator=generator) < 0.6 for _ in range(3)]
    difference, error = paired_over_runs([ours] * 3, others)
    won = sum(ours.double() - other.double() for other in others) / 3
    assert difference == pytest.approx(100 * float(won.mean()))
    assert error == pytest.approx(100 * float(won.std(correction=0)) / 200**0.5)


def test_eval_and_report_read_what_train_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        train_here(small(tmp_path, *SHORT, f"run.seed={seed}"), tmp_path / "runs" / "evo" / f"seed{seed}")
    text = small(tmp_path, *SHORT).to_toml()
    method = text[text.index("[method]") : text.index("[data]")]
    (tmp_path / "dense.toml").write_text(text.replace(method, '[method]\nname = "none"\n\n'))
    monkeypatch.setattr(
        "sys.argv", ["evovit", "train", str(tmp_path / "dense.toml"), "--out", f"{tmp_path}/runs/dense"]
    )
    cli.main()
    report((tmp_path / "runs",), out=tmp_path / "report")
    rows = (tmp_path / "report" / "report.csv").read_text().splitlines()
    assert [row.split(",")[:4] for row in rows[1:]] == [
        ["dense", "dense", "1", "2 of 2"],
        ["evo", "evo_vit", "2", "2 of 2"],
    ]
    assert "±" in rows[2] and "±" not in rows[1] and rows[1].endswith("1.00")
    html = (tmp_path / "report" / "report.html").read_text()
    assert "http" not in re.sub('base64,[^"]*', "", html) and html.count("data:image/png;base64,") == 1
    assert (tmp_path / "report" / "report.md").read_text().count("\n") == 4
    capsys.readouterr()
    run = tmp_path / "runs" / "evo" / "seed0"
    last = json.loads((run / "epochs.jsonl").read_text().splitlines()[-1])
    for weights, expected in (("last", last["top1"]), ("ema", last["ema_top1"])):
        monkeypatch.setattr("sys.argv", ["evovit", "eval", str(run), "--weights", weights])
        cli.main()
        assert f"top-1 {expected:.2f} %" in capsys.readouterr().out
    with pytest.raises(EvoViTError, match="give the folder of a run"):
        eval_command(str(tmp_path / "report"))
    with pytest.raises(EvoViTError, match="No run is at or below"):
        report((tmp_path / "report",), out=tmp_path / "nothing")


def test_every_option_is_listed_by_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["options"])
    shown = capsys.readouterr().out
    for kind in (*TABLES.values(), *(find_method(name).Config for name in list_methods())):
        assert all(f"  {each.name}" in shown and each.meaning in shown for each in describe(kind))
    cli.main(["options", "tome"])
    assert "reduce_ramp_epochs" not in (own := capsys.readouterr().out) and "inflection" in own
    with pytest.raises(SystemExit) as exit_:
        cli.main(["options", "tom"])
    assert exit_.value.code == 2 and "Did you mean 'tome'?" in capsys.readouterr().err
