"""Pages of what lies outside docs/: files of the repository's root, and examples. Links are led there."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent.parent
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def outside_pages() -> dict[str, str]:
    """Return pages made of files outside docs/, by their path in docs/."""
    pages = {
        page: lead((ROOT / name).read_text(encoding="utf-8"), PurePosixPath("CONTRIBUTING.md"))
        for name, page in ROOT_PAGES.items()
        if name != "README.md" and (ROOT / name).is_file()
    }
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        pages[f"examples/{path.stem}.md"] = f"# {path.name}\n\n```python\n{source}```\n"
    return pages


def lead(markdown: str, place: PurePosixPath) -> str:
    """Return Markdown whose links to files that are pages elsewhere lead to these pages.

    Args:
        place: of the file, in the repository, such as docs/index.md.
    """

    def led(link: re.Match[str]) -> str:
        before, target, anchor, after = link.groups()
        path = _normal(place.parent / target)
        page = ROOT_PAGES.get(path) or re.sub(r"^examples/(.+)\.py$", r"examples/\1.md", path)
        page = page.removeprefix("docs/")
        if ":" in target or page == path:
            return link[0]
        depth = len(place.parent.parts) - 1 if place.parts[0] == "docs" else 0
        return f"{before}{'../' * depth}{page}{anchor or ''}{after}"

    return LINK.sub(led, markdown)


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)
