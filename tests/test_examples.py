"""The worked examples run from a checkout, train something, and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import evovit

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> dict[str, list[str]]:
    """Return the printed table: contestant, then its numbers; two spaces or more lie between columns.

    It takes a minute on two cores; the limit is for machines that do other things too.
    """
    place = {**os.environ, "PYTHONPATH": str(Path(evovit.__file__).parent.parent)}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=place, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = [line.split("  ") for line in done.stdout.splitlines()]
    return {name.strip(): [each.strip() for each in rest if each.strip()] for name, *rest in rows}


@pytest.mark.slow
def test_mask_rcnn_finds_digits_on_a_reduced_backbone() -> None:
    table = run("detect_digits.py")
    assert list(table) == ["backbone", "dense", "evo_vit 0.5"]
    for found, mask_iou, *_ in (table["dense"], table["evo_vit 0.5"]):
        assert float(found) > 0.4 and float(mask_iou) > 0.4
    assert float(table["dense"][-1]) == 0 and float(table["evo_vit 0.5"][-1]) > 0


@pytest.mark.slow
def test_a_linear_head_segments_digits_on_reduced_features() -> None:
    table = run("segment_digits.py")
    quality = {name: float(row[0]) for name, row in table.items() if name != "backbone"}
    assert next(iter(quality)) == "dense" and len(quality) == 5
    assert quality["dense"] > 0.45
    for name in ("evo_vit 0.5", "tome r=18, unmerge"):
        assert quality[name] > quality["dense"] - 0.1
    assert float(table["dense"][-1]) == 0 and float(table["evo_vit 0.5"][-1]) > 0
