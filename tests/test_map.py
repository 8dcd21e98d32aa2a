"""The tree keeps its own rules: the map names every place, imports go one way, large files are looked at."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import evovit

ROOT = Path(evovit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PLACES = re.findall(r"^  (\w+) {2,}\S", evovit.__doc__ or "", re.MULTILINE)  # from the ground up
CEILING = {"methods": 150, "backbones": 150}  # lines of one idea; elsewhere 300


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def place_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(path: Path) -> set[str]:
    """Return the modules of evovit that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("evovit"):
            rest = node.module.removeprefix("evovit").removeprefix(".")
            found |= {rest} if rest else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("evovit.") for a in node.names if a.name.startswith("evovit.")}
    return found


def test_the_map_names_every_place_and_no_other() -> None:
    places = {place_of(module_of(path)) for path in FILES} - {"__init__", "__main__", "evovit"}
    assert places - {""} == set(PLACES)


def test_imports_go_up_the_map_only() -> None:
    """What stands above in the map is lower in the house: a file imports from its own place or from above."""
    downwards = [
        f"{module_of(path)} imports {target}"
        for path in FILES
        if module_of(path) not in ("__init__", "__main__", "")
        for target in imports_of(path)
        if PLACES.index(place_of(target)) > PLACES.index(place_of(module_of(path)))
    ]
    assert not downwards


def test_no_circle_within_a_place() -> None:
    graph = {module_of(path): imports_of(path) for path in FILES if path.stem != "__init__"}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for target in graph.get(module, ()):
                walk(target, (*trail, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_large_files_and_places_are_looked_at() -> None:
    """A smell detector: it warns, so that no code is bent to meet it."""
    sizes = {path: len(path.read_text().splitlines()) for path in FILES}
    places = [place_of(module_of(path)) for path in FILES]
    told = []
    for path, lines in sizes.items():
        ceiling = 300 if path.stem in ("__init__", "base") else CEILING.get(path.parent.name, 300)
        told += [f"{module_of(path)} has {lines} lines: is it one concept?"] if lines > ceiling else []
    for place in set(places):
        share = sum(n for n, own in zip(sizes.values(), places, strict=True) if own == place)
        share /= sum(sizes.values())
        told += [f"{place} holds {share:.1%} of the lines: has it rooms?"] if share > 0.13 else []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for text in told:
            warnings.warn(text, stacklevel=1)


def test_every_method_has_its_tests() -> None:
    tests = Path(__file__).parent
    for path in (ROOT / "methods").glob("*.py"):
        if path.stem not in ("__init__", "base"):
            assert (tests / "methods" / f"test_{path.stem}.py").exists(), path.stem
