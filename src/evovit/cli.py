"""The command line: one function a command; a wrong input is one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys

import tyro

from evovit.errors import EvoViTError
from evovit.methods import find_method, list_methods


def methods() -> None:
    """List the token-reduction methods with their options."""
    for name in list_methods():
        cls = find_method(name)
        print(f"{name}: {(cls.__doc__ or '').strip().splitlines()[0]}")


COMMANDS = {"methods": methods}


def main() -> None:
    """Run the command line."""
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="evovit", description=__doc__)
    except EvoViTError as error:
        print(f"evovit: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("evovit: interrupted", file=sys.stderr)
        sys.exit(130)
