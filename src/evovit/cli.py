"""The command line. A command is imported when it is called; wrong input is one sentence and exit code 2."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial, wraps
from importlib import import_module
from itertools import pairwise
from typing import Any

COMMANDS = {
    "quickstart": "train a small ViT, dense and with Evo-ViT, on built-in digits, in minutes",
    "bench": "time a model and reduced versions of it, in turn",
    "eval": "test a model or a run on images, dense and reduced",
    "calibrate": "find the patches that a model does not need, on unlabelled images",
    "export": "export a model for ONNX Runtime, OpenVINO or PyTorch, and compare the file with PyTorch",
    "tune": "find the schedule that reaches a speed-up with the least damage",
    "show": "show what each block keeps of your photographs, and the dense and reduced predictions",
    "app": "the same in a web page on this machine, with sliders for keep ratio and block",
    "analyse": "show what a model attends to and keeps: the paper's figures 2, 4 and 5",
    "push": "share a saved model or a run on the Hugging Face Hub",
    "train": "train a recipe; the same command again resumes it",
    "compare": "train recipes under equal conditions and compare accuracy and speed",
    "report": "compare finished runs",
    "recipes": "list the recipes that come with evovit, or copy one",
    "methods": "list the token-reduction methods, or describe one",
    "options": "list every option of recipes and methods",
}
PLACES = ("--out", "--images", "--trace", "--calibration")
GO_ON = ("quickstart", "train", "compare", "tune")  # given again, they go on where they stopped


def usage() -> str:
    """Return the help of the command line as a whole."""
    lines = [f"  {name:<11} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "evovit: vision transformers that spend compute only where it matters.",
            "",
            "usage: evovit COMMAND ...        evovit COMMAND --help        evovit --version",
            "",
            *lines,
            "",
            "first steps: evovit quickstart, evovit show photo.jpg, evovit bench deit_small_patch16_224",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` are those of the process by default."""
    for stream in ("stdout", "stderr"):  # there is none where it was closed
        if getattr(sys, stream) is None:
            setattr(sys, stream, io.StringIO())
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return
    name, *rest = given
    if name == "--version":
        from importlib.metadata import version

        print(f"evovit {version('evovit')}")
        return
    if name not in COMMANDS:
        from evovit.errors import nearest, shown

        there = f"the commands are {', '.join(COMMANDS)}"
        sys.exit(_refuse(f"there is no command {shown(name)}; {there}.{nearest(name, COMMANDS)}"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no text of the terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    with _interrupts() as received:
        try:
            _call(name, rest)
        except BaseException as error:
            # With a signal, whatever it is: extension modules turn an interrupt of their import into others.
            if not received and not isinstance(error, KeyboardInterrupt):
                raise
            more = "; run the same command again to resume" if name in GO_ON else ""
            print(f"evovit: interrupted{more}", file=sys.stderr, flush=True)
            if received:
                os._exit(130)  # all is cleaned up, and Python may end as killed by the signal
            sys.exit(130)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect SIGINT, beside the KeyboardInterrupt it raises; extension modules print none of it."""
    received: list[int] = []
    hooks = sys.excepthook, sys.unraisablehook

    def interrupt(kind: int, frame: object) -> None:
        received.append(kind)
        sys.excepthook, sys.unraisablehook = (lambda *error: None), (lambda error: None)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
        sys.excepthook, sys.unraisablehook = hooks


def _call(name: str, rest: Sequence[str]) -> None:
    """Call a command with its arguments; wrong input and a full disk are one sentence."""
    from evovit.errors import EvoViTError, in_one_line, is_out_of_memory, shown

    try:
        command = getattr(import_module(f"evovit.commands.{name}"), name)
        _parsed(command, name, rest)()
        sys.stdout.flush()
    except EvoViTError as error:
        sys.exit(_refuse(str(error)))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _close_output()
        sys.exit(141)
    except OSError as error:
        if error.errno is None or error.strerror is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full:
            _close_output()
        where = shown(error.filename) if error.filename else "where the output goes"
        advice = (
            "make room and run the same command again" if full else "give another path, or repair this one"
        )
        sys.exit(_refuse(f"{error.strerror}: {where}; {advice}."))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(_refuse(f"Not enough memory ({in_one_line(error)}); try less, such as a smaller batch."))


def _parsed(command: Callable[..., None], name: str, rest: Sequence[str]) -> Callable[[], None]:
    """Return a command with its arguments; raises `EvoViTError` with what tyro's box says of wrong ones."""
    import tyro

    from evovit.errors import EvoViTError

    assigned = (word.partition("=")[::2] for word in rest if "=" in word)
    for option, value in (*pairwise(rest), *assigned):
        if option in PLACES and not value:  # a path would read it as the folder that one is in
            raise EvoViTError(f"{option} is empty; give a file or folder, '.' for the one you are in.")

    @wraps(command)
    def later(*arguments: Any, **options: Any) -> Callable[[], None]:
        return partial(command, *arguments, **options)

    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(later, prog=f"evovit {name}", args=rest, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as exit_:
        if not exit_.code:
            raise
        rows = box.getvalue().splitlines()
        lines = [row.strip("│ ") for row in rows if row.startswith(("│", "  "))]  # in UTF-8, in ASCII
        parts = " ".join("" if set(line) <= {"─", "-"} else line for line in lines).split("  ")
        told = "; ".join(part.strip(" .") for part in parts if part and "full helptext" not in part)
        told = told.replace("Argument helptext: ", "")
        raise EvoViTError(f"{told or 'These are not arguments'}; evovit {name} --help lists them.") from None


def _close_output() -> None:
    """Let what is still to be printed go nowhere, at the end of the process too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(sentence: str) -> int:
    print(f"evovit: {sentence}", file=sys.stderr)
    return 2
