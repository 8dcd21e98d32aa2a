"""The site's hooks: what MkDocs shows beside the files of docs/. `mkdocs.yml` names this file."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import method_pages
import outside
import reference
import tutorials
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from evovit.cli import COMMANDS
from evovit.methods import list_methods

AT_ONCE = 2  # tutorials that run at the same time, each on one thread
FETCHED = re.compile(r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\s>]*")
MARKER = re.compile(r"<!-- site: ([\w ]+) -->")
TABLES = {  # what a marker stands for on any page
    "methods": method_pages.method_table,
    "names": reference.python_table,
    "commands": reference.command_table,
    "recipe tables": reference.recipe_tables,
    "recipes": reference.recipe_list,
}
OF_METHOD = {  # on the page of a method
    "facts": method_pages.facts,
    "options": method_pages.options,
    "cost": method_pages.cost,
    "measured": method_pages.measured,
}


def on_config(config: MkDocsConfig) -> None:
    """Complete the navigation: pages made here join, and a page that is not there yet is left out."""
    made = {
        "methods/": [f"methods/{name}.md" for name in list_methods()],
        "commands/": [{name: f"commands/{name}.md"} for name in COMMANDS],
        "reference/": [{name: f"reference/{name}.md"} for name in reference.public_names()],
        "reference/authors/": [page for page in reference.python_pages() if "/authors/" in page],
    }
    there = _pages_there(Path(config.docs_dir))
    config.nav = _completed(config.nav, made, there)


def _pages_there(docs: Path) -> set[str]:
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    there |= {f"tutorials/{path.stem}.md" for path in (docs / "tutorials").glob("*.py")}
    return there | {*outside.outside_pages(), *reference.python_pages(), *reference.command_pages()}


def _completed(nav: Any, made: dict[str, list[Any]], there: set[str]) -> list[Any]:
    """Return the navigation with folders replaced by the pages made for them."""
    found: list[Any] = []
    for entry in nav:
        title, value = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        if isinstance(value, list):
            found.append({title: _completed(value, made, there)})
        elif value in made:
            found += made[value]
        elif value in there:
            found.append(entry)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, pictures and notebooks that are made here."""
    docs = Path(config.docs_dir)

    def add(name: str, content: str | bytes) -> None:
        files.append(File.generated(config, name, content=content))

    for name, text in (
        outside.outside_pages() | reference.python_pages() | reference.command_pages()
    ).items():
        add(name, text)
    for name in list_methods():
        if f"methods/{name}.md" not in files.src_uris:
            add(f"methods/{name}.md", method_pages.unwritten_page(name))
        if (picture := method_pages.picture(name)) is not None:
            add(f"methods/{name}.png", picture)
    sources = sorted((docs / "tutorials").glob("*.py"))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        pages = pool.map(partial(tutorials.make_page, execute=config.extra["run_tutorials"]), sources)
        for path, made in zip(sources, pages, strict=True):
            add(f"tutorials/{path.stem}.md", made.markdown)
            add(f"tutorials/{path.stem}.ipynb", made.notebook)
            for name, picture in made.pictures.items():
                add(f"tutorials/{name}", picture)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put what markers stand for into a page, and lead its links to pages."""
    place = PurePosixPath(page.file.src_uri)

    def stands_for(marker: re.Match[str]) -> str:
        what, name = marker[1], place.stem
        if what in TABLES:
            return TABLES[what]()
        if place.parent.name != "methods" or name not in list_methods():
            raise PluginError(f"{place}: nothing is known of the marker {marker[0]}")
        if what == "picture":
            return method_pages.picture_section(name, f"methods/{name}.png" in files.src_uris)
        return OF_METHOD[what](name)

    return outside.lead(MARKER.sub(stands_for, markdown), "docs" / place)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would fetch something from elsewhere."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: the page would fetch {found[0]} from elsewhere")
    return output
