"""The tree keeps its own rules: the map is complete, imports go one way, files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import evovit

ROOT = Path(evovit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LOW = ["errors", "tokens", "ops", "schedule", "backbones", "methods", "model", "models"]
LEVELS = [*LOW, "fuse", "visualize", "data", "run", "cli"]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def level_of(module: str) -> int:
    return LEVELS.index(module.split(".")[0])


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("evovit."):
            found.add(node.module.removeprefix("evovit."))
    return found


def test_the_map_names_every_module() -> None:
    text = evovit.__doc__ or ""
    modules = [module_of(path) for path in FILES]
    assert not [m for m in modules if m not in ("__init__", "__main__") and f" {m} " not in text]


def test_imports_go_down_the_map_only() -> None:
    upwards = [
        f"{module_of(path)} imports {target}"
        for path in FILES
        if module_of(path) not in ("__init__", "__main__")
        for target in imports_of(path)
        if level_of(target) > level_of(module_of(path))
    ]
    assert not upwards


def test_files_stay_small() -> None:
    for path in FILES:
        lines = len(path.read_text().splitlines())
        one_idea = path.parent.name in ("methods", "backbones") and path.stem not in ("__init__", "base")
        assert lines <= (150 if one_idea else 300), f"{path.name} has {lines} lines"


def test_every_method_and_adapter_has_its_tests() -> None:
    tests = Path(__file__).parent
    for path in (ROOT / "methods").glob("*.py"):
        if path.stem not in ("__init__", "base"):
            assert (tests / "methods" / f"test_{path.stem}.py").exists(), path.stem
