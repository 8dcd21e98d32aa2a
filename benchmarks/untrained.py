"""Methods on the weights of dense runs, nothing trained: accuracy over seeds, paired image by image.

    python benchmarks/untrained.py RUN RUN RUN --method evo_vit evo_vit:selection=random

RUNs are dense runs of `evovit train` on the same test images, one a seed. Each method is compared with the
dense model and, where --against names one of the methods, with that. A difference is the mean over images of
what an image wins or loses, itself the mean over the runs; its standard error is of the images, and so holds
for these runs. ± of top-1 is the standard deviation over the runs. A method's random selection is the same
in each call.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from evovit.macs import gmacs
from evovit.model import backbone_of, reduce_tokens
from evovit.options import read_named
from evovit.report.tables import spread
from evovit.runtime.world import join_world
from evovit.train.evaluate import evaluate, paired_over_runs
from evovit.train.tested import run_model


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> str:
    """Return the paired difference in points with its standard error."""
    return "{:+.2f} ± {:.2f}".format(*paired_over_runs(ours, theirs))


def accuracy(right: Sequence[Tensor]) -> str:
    """Return top-1 in percent, mean ± standard deviation over runs; (images,) bool each."""
    return spread([100 * float(run.float().mean()) for run in right])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--method", nargs="+", required=True)
    parser.add_argument("--against", default="")
    parser.add_argument("--set", nargs="*", default=())
    given = parser.parse_args()

    right: dict[str, list[Tensor]] = {text: [] for text in ("dense", *given.method)}
    work = {}
    with join_world("cpu") as world:
        for run in given.runs:
            tested = run_model(run, "last", None, given.set)
            for text in right:
                name, options = read_named(text)
                model = reduce_tokens(tested.model, name, **options).eval()
                work[text] = gmacs(model, backbone_of(model).image_shape)
                right[text].append(evaluate(model, tested.images, tested.recipe, world).right)
    other = right.get(given.against)
    heads = ["method", "GMACs", "top-1 %", "against dense"]
    heads += [] if other is None else [f"against {given.against}"]
    print(f"| {' | '.join(heads)} |")
    print(f"|{' --- |' * len(heads)}")
    for text, found in right.items():
        cells = [text, f"{work[text]:.4f}", accuracy(found), difference(found, right["dense"])]
        if other is not None:
            cells.append(difference(found, other))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
