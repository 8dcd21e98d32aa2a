"""The command line: one function a command; a wrong input is one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

import tyro

from evovit.errors import EvoViTError
from evovit.methods import describe_options, find_method, list_methods
from evovit.run.bench import bench
from evovit.run.compare import compare
from evovit.run.evaluate import eval_command
from evovit.run.quickstart import quickstart
from evovit.run.runs_report import report
from evovit.run.train_command import train


def methods() -> None:
    """List the token-reduction methods: one line, what they need, options with defaults and meanings."""
    for name in list_methods():
        cls = find_method(name)
        grid = "keeps the grid" if cls.keeps_grid else "drops tokens"
        print(f"{name}: {(cls.__doc__ or '').strip().splitlines()[0]}")
        print(f"  {grid}{'; needs a class token' if cls.needs_class_token else ''}")
        for option, default, meaning in describe_options(cls):
            print(f"  {option}={default!r}  {meaning}")


COMMANDS: dict[str, Callable[..., None]] = {
    "methods": methods,
    "bench": bench,
    "quickstart": quickstart,
    "train": train,
    "eval": eval_command,
    "report": report,
    "compare": compare,
}


def main() -> None:
    """Run the command line."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="evovit",
            description="Vision transformers that spend compute only where it matters.",
        )
    except EvoViTError as error:
        print(f"evovit: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("evovit: interrupted", file=sys.stderr)
        sys.exit(130)
