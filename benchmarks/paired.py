"""Two trained runs against each other, image by image, over all seeds.

    python benchmarks/paired.py runs/photos/compare evo_vit:random idle_vit:evit
    python benchmarks/paired.py runs/photos evo_vit:random evo_vit:dense

Each pair names two folders of runs, FOLDER/NAME/seed<n>, as `evovit train` and `evovit compare` write them,
tested on the same images. The difference is the mean over images of what an image wins or loses, itself the
mean over the seeds that both have; its standard error is of the images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor
from untrained import accuracy, difference

from evovit.runtime.world import join_world
from evovit.train.evaluate import evaluate
from evovit.train.tested import run_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pairs", nargs="+")
    parser.add_argument("--set", nargs="*", default=())
    given = parser.parse_args()

    tested: dict[Path, Tensor] = {}

    def right(run: Path) -> Tensor:
        if run not in tested:
            found = run_model(run, "last", None, given.set)
            with join_world("cpu") as world:
                tested[run] = evaluate(found.model.eval(), found.images, found.recipe, world).right
        return tested[run]

    print("| pair | seeds | first, top-1 % | second, top-1 % | difference |")
    print("| --- | --- | --- | --- | --- |")
    for pair in given.pairs:
        first, _, second = pair.partition(":")
        seeds = sorted(
            {run.name for run in (given.folder / first).glob("seed*")}
            & {run.name for run in (given.folder / second).glob("seed*")}
        )
        ours, theirs = ([right(given.folder / name / seed) for seed in seeds] for name in (first, second))
        print(
            f"| {first} against {second} | {len(seeds)} | {accuracy(ours)} | {accuracy(theirs)} | "
            f"{difference(ours, theirs)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
