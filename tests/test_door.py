"""The door: quick, short, and lazy; whoever is imported first, timm knows the named models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evovit
from evovit import cli


def in_a_fresh_process(code: str) -> str:
    """Return what a piece of Python prints."""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"]])
def test_help_is_short_and_imports_no_torch(arguments: list[str]) -> None:
    code = f"import sys; from evovit.cli import main; main({arguments}); assert 'torch' not in sys.modules"
    shown = in_a_fresh_process(code)
    assert 0 < len(shown.splitlines()) <= 22
    if not arguments:
        assert all(f"  {command} " in shown for command in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command_fits_two_screens_and_imports_no_torch(command: str) -> None:
    code = f"""
import sys
from evovit.cli import main
try:
    main([{command!r}, "--help"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) <= 80
    assert f"$ evovit {command}" in done.stdout  # an example


def test_importing_evovit_imports_neither_torch_nor_timm() -> None:
    in_a_fresh_process("import sys, evovit; assert not {'torch', 'timm', 'numpy'} & set(sys.modules)")


@pytest.mark.parametrize("order", ["import timm, evovit", "import evovit, timm"])
def test_timm_knows_the_named_models_whichever_comes_first(order: str) -> None:
    in_a_fresh_process(f"{order}; assert timm.is_model('evo_deit_small_patch16_224')")


@pytest.mark.parametrize("module", ["model", "report.tables"])
def test_any_place_may_be_imported_first(module: str) -> None:
    in_a_fresh_process(f"import evovit.{module}")


def test_every_public_name_is_there_and_no_other() -> None:
    for name in evovit.__all__:
        assert getattr(evovit, name) is not None
        assert name in dir(evovit)
    with pytest.raises(AttributeError, match="no attribute 'reduce_token'"):
        _ = evovit.reduce_token  # type: ignore[attr-defined]


def test_an_unknown_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["trian"])
    told = capsys.readouterr().err
    assert exit_.value.code == 2
    assert told.startswith("evovit: there is no command 'trian'") and "Did you mean 'train'?" in told


def test_interrupted_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from evovit.commands import train

    def interrupted(recipe: str = "") -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train"])
    assert exit_.value.code == 130
    assert "run the same command again to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(36, "File name too long", "a" * 5000), "evovit: File name too long: 'aaa"),
        (PermissionError(13, "Permission denied", "x\ny"), r"evovit: Permission denied: 'x\ny'"),
        (MemoryError(), "evovit: Not enough memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "evovit: Not enough memory",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "evovit: Not enough"),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from evovit.commands import train

    def fails(recipe: str = "") -> None:
        raise error

    monkeypatch.setattr(train, "train", fails)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train"])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and said.startswith(told) and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("bench test_vit --rounds x", "Error parsing --rounds: .*; --rounds INT how often"),
        ("bench test_vit --ruonds 3", "Unrecognized options: --ruonds, 3; Perhaps you meant: --rounds INT"),
        ("bench test_vit --nope", "Unrecognized options: --nope; evovit bench --help"),
        ("bench test_vit --batch --", "No batch is given"),
        ("bench test_vit --precision --", "No precision is given"),
        ("bench test_vit --threads 1000000000", "threads is 1000000000; allowed is 1 to 1024"),
        ("bench test_vit --size 1000000000", "size is 1000000000; allowed is 1 to 16384"),
        ("bench test_vit --rounds 1000000000", "rounds is 1000000000; allowed is 1 to 100000"),
        ("eval", "Missing from evovit eval: MODEL folder of a run"),
        ("quickstart --device tpu", "invalid choice 'tpu' for argument '--device'"),
        ("quickstart x\udcff", r"Unrecognized options: x\\udcff"),
        ("recipes list x", "evovit recipes list takes no name; evovit recipes show 'x' shows one"),
        ("recipes show /etc/passwd", "No recipe '/etc/passwd' with this name comes with evovit"),
        ("recipes copy /dev/null", "No recipe '/dev/null' with this name comes with evovit"),
        ("train digits/dense --seeds 0 0", "seeds lists 0 twice"),
        ("report /nowhere", "No run is at or below '/nowhere'"),
        ("bench test_vit --out /dev/null", "The folder '/dev/null' cannot be created"),
        ("bench test_vit --trace /dev/null/x", "The folder '/dev/null' cannot be created"),
        ("bench test_vit --trace /", "trace is '/', a folder; give a file"),
        ("recipes xopy", "invalid choice 'xopy' for argument 'action'"),
        ("train a \x1b[31m", r"Unrecognized options: \\x1b\[31m"),
    ],
)
def test_wrong_words_are_one_sentence(
    line: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(line.split(" "))
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and re.match(f"evovit: {told}", said), said
    assert said.count("\n") == 1 and said.strip().isprintable()


def test_names_that_are_no_text_are_printed_all_the_same(tmp_path: Path) -> None:
    call = [
        sys.executable,
        "-m",
        "evovit",
        "recipes",
        "copy",
        "digits/dense",
        "--to",
        os.fsencode(tmp_path) + b"/a\xff",
    ]
    done = subprocess.run(
        call, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0 and rb"a\udcff/dense.toml written" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "code"), [(["methods"], 0), (["--help"], 0), (["nope"], 2), (["eval", "x"], 2)]
)
def test_a_closed_output_is_no_traceback(words: list[str], code: int) -> None:
    call = 'exec "$@" >&-'
    done = subprocess.run(
        ["sh", "-c", call, "", sys.executable, "-m", "evovit", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code and done.stderr.count("\n") == (1 if code else 0), done.stderr


def test_a_reader_who_leaves_early_is_no_traceback() -> None:
    pipe = subprocess.Popen(
        [sys.executable, "-m", "evovit", "options"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert pipe.stdout is not None and pipe.stderr is not None
    pipe.stdout.read(10)
    pipe.stdout.close()
    assert pipe.stderr.read() == b""
    pipe.stderr.close()
    assert pipe.wait() in (0, 141)


def test_an_interrupt_that_an_import_turned_into_another_error_is_told_as_one() -> None:
    program = """
import os, signal, sys
from evovit import cli
from evovit.commands import train

def interrupted(recipe: str = "") -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # as extension modules do
        raise TypeError("expected a message argument") from None

train.train = interrupted
cli.main(["train"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "evovit: interrupted; run the same command again to resume\n"


@pytest.mark.parametrize("words", [["quickstart", "--out", ""], ["train", "digits/dense", "--out="]])
def test_an_empty_place_is_not_the_folder_one_is_in(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell gives it where a variable is not set."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    assert (
        capsys.readouterr().err
        == "evovit: --out is empty; give a file or folder, '.' for the one you are in.\n"
    )
    assert not list(tmp_path.iterdir())
