"""The docs: links lead somewhere, every public name has a page, every argument and option a meaning."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import evovit
from evovit.cli import COMMANDS
from evovit.methods import find_method, list_methods
from evovit.options import describe
from evovit.recipe.tables import TABLES

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.py")]
)
FENCED = re.compile(r"^(```+).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The part of the site that makes reference pages; it needs what [docs] brings."""
    pytest.importorskip("griffe")
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "site"))
    yield importlib.import_module("reference")
    sys.modules.pop("reference", None)


def text_of(page: Path) -> str:
    """Return a page's Markdown without code; of a tutorial what its text cells say."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".py":
        text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]+`", "", FENCED.sub("", text))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    if page.suffix != ".md":
        return set()
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    made = {
        ROOT / "docs" / "tutorials" / f"{path.stem}.md" for path in (ROOT / "docs" / "tutorials").glob("*.py")
    }
    for link in LINK.findall(text_of(page)):
        target, _, anchor = link.partition("#")
        if ":" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists() or path in made, f"{link} of {page.name}: there is no such file"
        if anchor and "<!-- site:" not in path.read_text(encoding="utf-8"):  # whose headings the site makes
            assert anchor in anchors_of(path), f"{link} of {page.name}: there is no such heading"


def test_every_page_of_a_method_is_that_of_a_method_and_says_what_is_asked_first() -> None:
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        if page.stem != "index":
            assert page.stem in list_methods(), page.name
            text = page.read_text(encoding="utf-8")
            for part in (
                "## When to take it",
                "<!-- site: facts -->",
                "<!-- site: options -->",
                "<!-- site: cost -->",
            ):
                assert part in text, f"{page.name} lacks {part}"


def test_every_public_name_has_a_page_and_a_first_line(site: ModuleType) -> None:
    pages, table = site.python_pages(), site.python_table()
    for name in evovit.__all__:
        if name != "__version__":
            assert f"::: evovit.{name}" in pages[f"reference/{name}.md"]
            assert re.search(rf"^\| \[`evovit\.{name}`\]\({name}\.md\) \| \S.+ \|$", table, re.MULTILINE), (
                name
            )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_of_a_command_has_a_meaning(command: str, site: ModuleType) -> None:
    for argument in site.arguments_of(command):
        assert argument.meaning, f"evovit {command} {argument.name}"
        assert argument.values


def test_every_option_has_a_meaning() -> None:
    for kind in [*TABLES.values(), *(find_method(name).Config for name in list_methods())]:
        for each in describe(kind):
            assert each.meaning, f"{kind.__qualname__}.{each.name}"


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == project["version"]
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
