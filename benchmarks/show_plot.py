"""The picture of the README: what methods leave of scikit-learn's two photographs.

    python benchmarks/show_plot.py RUN docs/show.jpg --method evo_vit:start_block=2,stage_length=3 tome:r=6

Each method in the block that leaves the fewest tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import evovit
from evovit.report.show import decisive
from evovit.report.show_pictures import counted
from evovit.visualize import sheet

SIDE = 320  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--method", nargs="+", required=True)
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        looks = evovit.show(given.run, method=given.method, rounds=0, out=folder).looks
    tiles, titles = [], []
    for row in looks:
        tiles.append(row[0].photograph.seen)
        titles.append(f"{Path(row[0].photograph.title).stem}, what the model sees")
        for look in row:
            block = decisive(look)
            if block is None:
                raise SystemExit(f"{look.method} has no block whose tokens have places.")
            tiles.append(block.draw(look.photograph.seen))
            titles.append(f"{look.method.split()[0]}: {counted(block)}")
    sheet(tiles, titles, 1 + len(given.method), SIDE).save(given.picture, quality=88)


if __name__ == "__main__":
    main()
