"""Run folders are hard to break: one holder at a time, no damage by a full or a read-only disk, no strays."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from evovit import cli
from evovit.bench.row import Row, append_rows
from evovit.errors import EvoViTError
from evovit.runtime.files import hold_folder
from evovit.train import records
from tests.run import faults
from tests.run.processes import (
    CONTEXT,
    ONCE,
    finish,
    on_pictures,
    outcome,
    small,
    start,
    start_world,
    strays,
    train_here,
)

Outcome = tuple[dict[str, bytes], list[float]]


def wait_for_updates(child: Any, folder: Path) -> None:
    """Wait until a training has written its first update."""
    steps = folder / "steps.jsonl"
    while child.exitcode is None and not (steps.exists() and steps.stat().st_size):
        child.join(0.005)
    assert child.exitcode is None


@pytest.mark.parametrize("overrides", [(), ("run.seed=5",)], ids=["the same", "another recipe"])
def test_a_second_training_in_a_folder_is_refused_and_the_first_is_undisturbed(
    tmp_path: Path, overrides: tuple[str, ...], whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = small(tmp_path), tmp_path / "run"
    first = start(recipe, folder)
    wait_for_updates(first, folder)
    os.kill(first.pid or 0, signal.SIGSTOP)  # so that it does not end before the second begins
    words = ["train", str(tmp_path / "small.toml"), "--out", str(folder)]
    for text in overrides:
        words += ["--set", text]
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    os.kill(first.pid or 0, signal.SIGCONT)
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and repr(str(folder)) in said.err and "another process" in said.err
    assert finish(first) == [0]
    assert outcome(folder) == outcome(whole_run)


def test_a_folder_is_free_again_when_its_holder_was_killed(tmp_path: Path) -> None:
    """Also at once: processes that read images, forked from the holder, do not hold on."""
    recipe = on_pictures(tmp_path)
    first = start(recipe, tmp_path / "run")
    wait_for_updates(first, tmp_path / "run")
    first.kill()
    finish(first)
    assert "finished" in train_here(recipe, tmp_path / "run")


def test_two_studies_in_a_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold_folder(tmp_path / "out"):
        for words in (["quickstart"], ["compare", "digits/dense"]):
            with pytest.raises(SystemExit):
                cli.main([*words, "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.count("another process") == 2
    assert not list((tmp_path / "out").iterdir())


def append_often(folder: Path, method: str) -> None:
    row = dict.fromkeys(Row.__dataclass_fields__) | {"method": method}
    for _ in range(100):
        append_rows(folder, [Row(**row)], {})  # type: ignore[arg-type]


def test_two_benches_in_a_folder_lose_no_row(tmp_path: Path) -> None:
    writers = [CONTEXT.Process(target=append_often, args=(tmp_path, name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    assert finish(*writers) == [0, 0]
    methods = [json.loads(line)["method"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted(methods) == ["a"] * 100 + ["b"] * 100
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_recipe_that_reads_back_as_another_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = small(tmp_path, *ONCE)
    made = replace(
        recipe, model=replace(recipe.model, options={**recipe.model.options, "img_size": (24, 24)})
    )
    with pytest.raises(EvoViTError, match=r"img_size is \(24, 24\), read back \[24, 24\]"):
        train_here(made, tmp_path / "run")
    made = replace(recipe, model=replace(recipe.model, options={**recipe.model.options, "norm_layer": None}))
    with pytest.raises(EvoViTError, match="cannot be written as TOML"):
        train_here(made, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*"))


def test_another_number_of_processes_is_told_and_old_checkpoints_are_silent(tmp_path: Path) -> None:
    recipe, folder = small(tmp_path, *ONCE), tmp_path / "run"
    assert finish(*start_world(recipe, folder, 2)) == [0, 0]
    assert "an update was 2 x 1 forwards" in (said := train_here(recipe, folder)) and "is now 1 x 1" in said
    halves = small(tmp_path, *ONCE, "run.batch_per_device=8")
    assert "an update was" not in train_here(halves, tmp_path / "alone")
    assert "an update was" not in train_here(halves, tmp_path / "alone")
    assert "was 1 x 2 forwards" in train_here(recipe, tmp_path / "alone")
    for path in (tmp_path / "alone" / "checkpoints").glob("*.json"):
        forget(path)
    assert "an update was" not in train_here(recipe, tmp_path / "alone")


def forget(path: Path) -> None:
    """Make a checkpoint one of the former version, which did not say how many processes there were."""
    from evovit.train.state import _hash

    content = json.loads(path.read_text())
    del content["self"], content["plain"]["processes"], content["plain"]["forwards"]
    path.write_text(json.dumps({**content, "self": _hash(content)}))


def blocked(folder: Path, name: str) -> None:
    """Let a file stand where the run needs a folder, or a folder where it needs a file."""
    path = folder / name
    if path.is_dir():
        path.rename(path.with_name("aside"))
        path.write_text("")
    else:
        path.unlink()
        path.mkdir()
        (path / "inside").write_text("")


@pytest.mark.parametrize(
    "name", ["steps.jsonl", "epochs.jsonl", "environment.json", "checkpoints", "model", "model/method.json"]
)
def test_what_cannot_be_written_at_resume_is_one_sentence(tmp_path: Path, name: str, once_run: Path) -> None:
    recipe, folder = small(tmp_path, *ONCE), tmp_path / "run"
    shutil.copytree(once_run, folder)
    blocked(folder, name)
    with pytest.raises(EvoViTError, match=f"{folder}.*(cannot be written|is a file)") as told:
        train_here(recipe, folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("moment", ["open", "send"])
def test_a_logger_that_cannot_write_is_one_sentence(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(records, "open_logger", refuse if moment == "open" else lambda *_: refuse)
    with pytest.raises(EvoViTError, match="cannot be written .No space left on device"):
        train_here(small(tmp_path, *ONCE), tmp_path / "run")
    monkeypatch.undo()
    assert "finished" in train_here(small(tmp_path, *ONCE), tmp_path / "run")


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.toml").write_text(small(tmp_path, *ONCE).to_toml())
    (tmp_path / "run").write_text("")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", str(tmp_path / "small.toml"), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.count("\n") == 1 and str(tmp_path / "run") in said


def refusals(first: int, step: int) -> list[Any]:
    """Return where a disk is full, and between these places where one may only be read."""
    return [(errno.ENOSPC, first, step), (errno.EROFS, first + step // 2, step)]


@pytest.mark.parametrize(
    ("error", "place", "step"),
    [
        *refusals(0, 20),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in refusals(0, 2)),
        *(pytest.param(*case, marks=pytest.mark.full) for case in refusals(0, 1)),
    ],
)
def test_a_disk_that_refuses_at_any_moment_is_one_sentence_and_loses_nothing(
    tmp_path: Path, error: int, place: int, step: int, once_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, undisturbed = small(tmp_path, *ONCE), outcome(once_run)
    while True:
        folder = tmp_path / str(place)
        with monkeypatch.context() as patch:
            faults.watch(folder, partial(faults.refuse_from, place, error), patch.setattr)
            try:
                train_here(recipe, folder)
                break
            except EvoViTError as told:
                assert os.strerror(error) in str(told) and "\n" not in str(told)
        assert "finished" in train_here(recipe, folder)
        assert outcome(folder) == undisturbed and not strays(folder)
        place += step
    assert place > 60


@pytest.mark.slow
def test_a_disk_that_is_really_full_is_one_sentence_and_loses_nothing(tmp_path: Path, once_run: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    try:
        recipe, said = small(tmp_path, *ONCE), []
        ballast = disk / "ballast"
        for free in range(20, 1000, 60):  # kB
            ballast.write_bytes(bytes(3 * 2**20 - 1024 * free))
            try:
                train_here(recipe, disk / "run")
            except EvoViTError as told:
                said.append(str(told))
            ballast.unlink()
            train_here(recipe, disk / "run")
            assert outcome(disk / "run") == outcome(once_run) and not strays(disk / "run")
            subprocess.run(["rm", "-r", str(disk / "run")], check=True)
        assert len(said) >= 5 and all("No space left on device" in text for text in said)
        assert not any("\n" in text for text in said)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_killed_processes_left_half_written_goes_also_if_their_numbers_are_taken(
    tmp_path: Path, once_run: Path
) -> None:
    """The folder is held, so nobody else writes there: also names of the former version, and safetensors'."""
    recipe, folder = small(tmp_path, *ONCE), tmp_path / "run"
    shutil.copytree(once_run, folder)
    names = (f".steps.jsonl.{os.getppid()}.0123456789abcdef.tmp", f".a.{os.getppid()}.tmp", ".tmpA1b2C3")
    left = [folder / place / name for place in ("", "checkpoints", "model") for name in names]
    for path in left:
        path.write_bytes(b"half")
    (folder / "checkpoints" / f".b.{os.getppid()}.01.tmp").mkdir()
    (folder / "checkpoints" / f".b.{os.getppid()}.01.tmp" / "b").write_bytes(b"half")
    train_here(recipe, folder)
    assert not strays(folder)


def test_checkpoints_that_a_kill_left_too_many_go(tmp_path: Path, whole_run: Path) -> None:
    recipe, folder = small(tmp_path), tmp_path / "run"
    shutil.copytree(whole_run, folder)
    before = outcome(folder)
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    for old, new in (("000000024", "000000003"), ("best-*", "best-000000001")):
        for path in [*(folder / "checkpoints").glob(f"{old}.*")]:
            (path.parent / f"{new}{path.suffix}").write_bytes(path.read_bytes())
    train_here(recipe, folder)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == kept
    assert outcome(folder) == before


def test_a_second_sigterm_is_harmless(tmp_path: Path, whole_run: Path) -> None:
    """One comes at every step of writing, from the first file of the run on."""
    recipe, folder = small(tmp_path), tmp_path / "run"
    assert finish(start(recipe, folder, act=partial(faults.ask_to_stop_from, 0))) == [0]
    assert "stopped and saved after update 1" in (tmp_path / "run.said").read_text()
    assert "going on after update 1 of 24" in train_here(recipe, folder)
    assert outcome(folder) == outcome(whole_run)


def test_a_sigterm_while_the_final_weights_are_written_is_harmless(tmp_path: Path) -> None:
    recipe, folder, steps = small(tmp_path, *ONCE), tmp_path / "run", list[str]()
    with pytest.MonkeyPatch.context() as patch:
        faults.watch(tmp_path / "undisturbed", lambda number, kind: steps.append(kind), patch.setattr)
        train_here(recipe, tmp_path / "undisturbed")
    child = start(recipe, folder, act=partial(faults.ask_to_stop_from, len(steps) - 20))
    assert finish(child) == [0] and "finished" in (tmp_path / "run.said").read_text()
    assert outcome(folder) == outcome(tmp_path / "undisturbed") and not strays(folder)


def command(words: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    faults.watch(folder, partial(faults.ask_to_stop_from, 0))
    cli.main(words)


@pytest.mark.parametrize(
    ("words", "first", "second"),
    [
        (["train", "small.toml", "--seeds", "0", "1"], "seed0", "seed1"),
        (["compare", "small.toml", "dense.toml"], "dense/seed0", "small"),
        pytest.param(
            ["quickstart", "--epochs", "2", "--test-scenes", "20", "--device", "cpu"],
            *("dense", "evo_vit"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_sigterm_ends_the_whole_command(tmp_path: Path, words: list[str], first: str, second: str) -> None:
    """Not the first of several trainings alone."""
    text = small(tmp_path, *ONCE).to_toml()
    dense = text[: text.index("[method]")] + text[text.index("[data]") :]
    for name, content in (("small", text), ("dense", dense)):
        (tmp_path / f"{name}.toml").write_text(content)
    words = [str(tmp_path / word) if word.endswith(".toml") else word for word in words]
    out = tmp_path / "out"
    child = CONTEXT.Process(target=command, args=([*words, "--out", str(out)], out / first))
    child.start()
    assert finish(child) == [0]
    assert list((out / first).glob("checkpoints/*.json"))
    assert not (out / second).exists() and not list(out.glob("*.html"))


def children_of(process: Any) -> list[int]:
    return [int(x) for x in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "wait", [0.0, *(pytest.param(wait, marks=pytest.mark.slow) for wait in (0.03, 0.06, 0.09))]
)
def test_sigterm_to_every_process_of_a_training_stops_it_as_one_to_the_main_process(
    tmp_path: Path, wait: float
) -> None:
    """So do cluster managers; the processes that read images live on until the main one has saved."""
    recipe, folder = on_pictures(tmp_path, "run.checkpoint_every=0"), tmp_path / "run"
    child = start(recipe, folder)
    wait_for_updates(child, folder)
    child.join(wait)
    for pid in (*children_of(child), child.pid or 0):
        os.kill(pid, signal.SIGTERM)
    assert finish(child) == [0]
    assert "stopped and saved after update" in (tmp_path / "run.said").read_text()
    assert "finished" in train_here(recipe, folder)


def test_a_folder_that_is_no_run_keeps_what_is_in_it(tmp_path: Path) -> None:
    names = ("checkpoints/mine.safetensors", ".mine.tmp", ".tmp123456", "model/.a.1.tmp")
    for name in names:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    recipe = small(tmp_path, *ONCE)
    train_here(recipe, tmp_path / "run")
    assert all((tmp_path / "run" / name).read_text() == "mine" for name in names)
    train_here(recipe, tmp_path / "run")  # now it is one
    assert (tmp_path / "run" / names[0]).read_text() == "mine"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_one_sentence(tmp_path: Path) -> None:
    recipe, folder = small(tmp_path), tmp_path / "run"
    words = [sys.executable, "-m", "evovit", "train", str(tmp_path / "small.toml"), "--out", str(folder)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr
    assert "finished" in train_here(recipe, folder)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    recipe, folder = small(tmp_path), tmp_path / "run"
    words = [sys.executable, "-m", "evovit", "train", str(tmp_path / "small.toml"), "--out", str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        while child.poll() is None and not (folder / "steps.jsonl").exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.005)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=120)
    assert child.returncode == 130
    assert said == "evovit: interrupted; run the same command again to resume\n"
    assert "finished" in train_here(recipe, folder)
