"""Draw docs/engines.png from the first engine table of docs/speed.md: milliseconds of an image.

python benchmarks/engine_plot.py
"""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"
MODELS = {
    "dense": (2, "#9aa5b1"),
    "Evo-ViT, keep ratio 0.5": (4, "#2f6fde"),
    "EViT, keep ratio 0.5": (6, "#14a37f"),
}
NAMES = {
    "eager": "PyTorch eager",
    "compiled": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def main() -> None:
    lines = (DOCS / "speed.md").read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| 1 | ")
    ]
    first: dict[str, list[str]] = {}
    for row in rows:
        if row[1].split()[-1] in NAMES:
            first.setdefault(row[1], row)
    rows = list(first.values())
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, (name, (column, colour)) in enumerate(MODELS.items()):
        ms = [float(re.match(r"[\d.]+", row[column])[0]) for row in rows]  # type: ignore[index]
        bars = axes.bar([x + 0.27 * (i - 1) for x in range(len(rows))], ms, 0.26, color=colour, label=name)
        axes.bar_label(bars, [f"{each:.0f}" for each in ms], fontsize=8, padding=2)
    words = [row[1].split() for row in rows]
    axes.set_xticks(range(len(rows)), [f"{NAMES[engine]}\n{precision}" for precision, engine in words])
    axes.set_ylabel("ms per image")
    axes.set_title("DeiT-S, 224 px, batch 1, one thread of an AMD EPYC", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(DOCS / "engines.png", dpi=150)


if __name__ == "__main__":
    main()
