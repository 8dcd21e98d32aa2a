"""Reference pages, from the code alone: Python names, commands, options of recipes. No list is kept here.

Python pages are mkdocstrings' own, which reads the source and imports nothing.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path, PurePath
from pkgutil import iter_modules
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import griffe
from docstring_parser import parse

import evovit
from evovit.cli import COMMANDS

SOURCE = Path(evovit.__file__).parent
AUTHORS = {  # what methods and adapters are written with; the modules of evovit.ops join by themselves
    "Methods": ("methods.base.Method", "methods.register", "options.option", "schedule.KeepSchedule"),
    "Tokens": ("tokens.Tokens", "tokens.QKV", "tokens.Taught"),
    "Hosts": tuple(f"backbones.base.{name}" for name in ("Backbone", "BackboneSpec", "Block", "Stage")),
    "Training": ("train.objective.Objective", "recipe.tables.ObjectiveTable"),
    "Pictures": ("visualize",),
}
WORDS = {str: "text", int: "whole number", float: "number", Path: "path"}


class Argument(NamedTuple):
    """An argument of a command, as its page shows it."""

    name: str  # --keep-ratio, or MODEL
    values: str
    default: str
    meaning: str


def public_names() -> list[str]:
    """Return the names of `evovit.__all__` that have a page of their own."""
    return sorted((name for name in evovit.__all__ if not name.startswith("__")), key=str.lower)


def python_pages() -> dict[str, str]:
    """Return the page of each public name, and those for authors, by its path in docs/."""
    pages = {f"reference/{name}.md": f"::: evovit.{name}\n" for name in public_names()}
    operators = tuple(f"ops.{module.name}" for module in iter_modules([str(SOURCE / "ops")]))
    for title, parts in (AUTHORS | {"Operators": operators}).items():
        options = "\n    options:\n      heading_level: 2\n      show_root_full_path: true\n"
        entries = (f"::: evovit.{part}{options}" for part in parts)
        pages[f"reference/authors/{title.lower()}.md"] = "\n".join([f"# {title}\n", *entries])
    return pages


def python_table() -> str:
    """Return the table of public names, each with the first line of its docstring."""
    module = griffe.load("evovit", search_paths=[SOURCE.parent])
    rows = [f"| [`evovit.{name}`]({name}.md) | {_first_line(module[name])} |" for name in public_names()]
    return "\n".join(["| name | what it is |", "|---|---|", *rows])


def _first_line(member: Any) -> str:
    docstring = member.final_target.docstring if member.is_alias else member.docstring
    return str(docstring.value).splitlines()[0].replace("|", r"\|")


def arguments_of(command: str) -> list[Argument]:
    """Return the arguments of a command in their order; the meaning is its docstring's, empty if none."""
    function = getattr(import_module(f"evovit.commands.{command}"), command)
    meanings = {param.arg_name: param.description or "" for param in parse(function.__doc__ or "").params}
    hints, found = get_type_hints(function, include_extras=True), []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *extras = get_args(hints[name]) if hasattr(hints[name], "__metadata__") else (hints[name],)
        other = [alias for extra in extras for alias in getattr(extra, "aliases", None) or ()]
        shown = next((extra.metavar for extra in extras if getattr(extra, "metavar", None)), name.upper())
        option = ", ".join([f"--{name.replace('_', '-')}", *other])
        positional = parameter.kind is parameter.POSITIONAL_ONLY
        found.append(
            Argument(
                shown if positional else option,
                _values(kind),
                "" if parameter.default is parameter.empty else _written(parameter.default),
                " ".join(meanings.get(name, "").split()),
            )
        )
    return found


def _values(kind: Any) -> str:
    """Say in words which values an argument takes."""
    members = [each for each in get_args(kind) if each is not NoneType]
    if kind is bool:
        return "switch"
    if get_origin(kind) is Literal:
        return ", ".join(map(str, members))
    if get_origin(kind) in (Union, UnionType):
        return ", ".join(map(_values, members))
    if get_origin(kind) is tuple:
        return f"{_values(members[0])}, several"
    return next((_values(each) for each in members), "") if hasattr(kind, "__metadata__") else WORDS[kind]


def _written(default: Any) -> str:
    if default is None or default is False or default in ("", (), Path()):
        return ""
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return default.as_posix() if isinstance(default, PurePath) else str(default)


def command_pages() -> dict[str, str]:
    """Return a page for each command by its path in docs/."""
    return {f"commands/{name}.md": _command_page(name) for name in COMMANDS}


def _command_page(name: str) -> str:
    function = getattr(import_module(f"evovit.commands.{name}"), name)
    text = inspect.getdoc(function) or ""
    before, _, _ = text.partition("\nArgs:")
    examples = re.findall(r"^\$ (.+)$", before, re.MULTILINE)
    prose = re.sub(r"^\$ .+\n?", "", before, flags=re.MULTILINE).strip()
    arguments = [
        _entry(each.name, [each.values, each.default and f"default `{each.default}`"], each.meaning)
        for each in arguments_of(name)
    ]
    return "\n".join(
        [f"# evovit {name}\n", prose, "", "```bash", *examples, "```", "", "## Arguments", "", *arguments]
    )


def command_table() -> str:
    """Return the table of all commands."""
    rows = [f"| [`evovit {name}`]({name}.md) | {what} |" for name, what in COMMANDS.items()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def option_list(kind: Any) -> str:
    """Return the options of a recipe's table or of a method, one under the other."""
    from evovit.options import describe

    entries = [
        _entry(
            each.name,
            [f"`{each.default}`" if each.default else "has to be given", each.allowed],
            each.meaning,
        )
        for each in describe(kind)
    ]
    return "\n".join(entries) or "It has no options."


def recipe_tables() -> str:
    """Return every table of a recipe with its options."""
    from evovit.recipe.tables import TABLES

    parts = [
        f"## `[{name}]`\n\n{(kind.__doc__ or '').splitlines()[0]}\n\n{option_list(kind)}\n"
        for name, kind in TABLES.items()
    ]
    return "\n".join(parts)


def recipe_list() -> str:
    """Return the recipes that come with evovit, each with its first line."""
    from evovit.recipe.reading import list_recipes

    rows = [f"| `{name}` | {plain(what)} |" for name, what in list_recipes().items()]
    return "\n".join(["| recipe | what it trains |", "|---|---|", *rows])


def _entry(name: str, conditions: list[str], meaning: str) -> str:
    """Return an entry of a definition list."""
    marked = ", ".join(each if "`" in each else plain(each) for each in conditions if each)
    return f"`{name}` *{marked}*\n:   {plain(meaning)}\n"


def plain(text: str) -> str:
    """Return text in which nothing is markup, and which ends no cell of a table."""
    return re.sub(r"([|*_<\[])", r"\\\1", text)
