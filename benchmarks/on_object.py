"""Do the kept patches lie on the object? Precision and recall by block against boxes, for several selections.

    python benchmarks/on_object.py RUN BOXES --method evo_vit:start_block=2 keep:selection=random

RUN is a run of `evovit train` on a folder or tar file of class folders; a reduced run is measured as trained,
too. BOXES is JSON: split ("val"), then "class/file.jpg": [left, top, right, bottom], inclusive, in pixels of
a square image of --side. A patch is on the object if its centre lies in the box. Recall is the share of the
object's patches that are kept, by chance the share of all patches that are kept; precision the share of kept
patches that are on the object, by chance the share of patches that are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from evovit.data.readers import open_reader
from evovit.model import ReducedViT, reduce_tokens
from evovit.options import read_named
from evovit.runtime.world import join_world
from evovit.train.tested import Tested, run_model, weights_by_epoch
from evovit.visualize import OnBox, kept_on_box, kept_patches, patches_on_box


def boxes_of(tested: Tested, path: Path, split: str) -> Tensor:
    """Return left, top, right, bottom (exclusive) of the object in each test image, (images, 4) float32."""
    boxes = json.loads(path.read_text())[split]
    reader = open_reader(tested.recipe.data.source, tested.recipe.data.test_split)
    names = [Path(reader.filename(row)).as_posix() for row in range(len(reader))]
    corners = torch.tensor([boxes["/".join(name.split("/")[-2:])] for name in names]).float()
    corners[:, 2:] += 1  # inclusive
    return corners


def shares(model: ReducedViT, images: Tensor, corners: Tensor, side: int) -> dict[int, OnBox]:
    """Return how the kept patches lie to the objects, by block, where a part of the patches is kept."""
    kept = torch.cat([kept_patches(model, part) for part in images.split(200)])
    on_box = patches_on_box(corners, (kept.shape[2], kept.shape[3]), (side, side))
    return {block: share for block, share in enumerate(kept_on_box(kept, on_box)) if share.kept < 1}


def draw(found: dict[str, dict[int, OnBox]], path: Path) -> None:
    """Draw recall and precision by block, each over chance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    recall, precision = figure.subplots(1, 2, sharex=True)
    for text, by_block in found.items():
        blocks = list(by_block)
        recall.plot(
            blocks, [share.covered / share.kept for share in by_block.values()], "o-", ms=3, label=text
        )
        precision.plot(blocks, [share.on_box for share in by_block.values()], "o-", ms=3)
    chance = [share.box for by_block in found.values() for share in by_block.values()]
    recall.axhline(1, color="grey", ls=":", lw=1)
    precision.axhline(sum(chance) / len(chance), color="grey", ls=":", lw=1)
    recall.set(xlabel="block", title="recall of the object's patches, times chance", ylim=(0, None))
    precision.set(xlabel="block", title="share of kept patches on the object", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("boxes", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--method", nargs="*", default=())
    parser.add_argument(
        "--epochs", type=int, default=0, help="checkpoints of the run, evenly spread; 0: the last"
    )
    parser.add_argument("--set", nargs="*", default=())
    parser.add_argument("--plot", type=Path, help="PNG or SVG")
    given = parser.parse_args()

    tested = run_model(given.run, "last", None, given.set)
    corners = boxes_of(tested, given.boxes, given.split)
    model: nn.Module = tested.model.eval()
    host: nn.Module = model.model if isinstance(model, ReducedViT) else model
    models = {"as trained": model} if isinstance(model, ReducedViT) else {}
    for text in given.method:
        name, options = read_named(text)
        models[text] = reduce_tokens(host, name, **options).eval()
    with join_world("cpu") as world:
        images = torch.cat([batch for batch, _ in tested.images.test(world)])
    if len(images) != len(corners):
        raise SystemExit(f"{len(images)} images and {len(corners)} boxes")
    found: dict[str, dict[int, OnBox]] = {}
    for epoch, weights in weights_by_epoch(given.run, given.epochs) if given.epochs else [("", {})]:
        if weights:
            model.load_state_dict(weights)
        for text, reduced in models.items():
            found[f"{text} {epoch}".strip()] = shares(reduced, images, corners, given.side)
    print("| method | block | kept | recall | precision | by chance | recall over chance |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for text, by_block in found.items():
        for block, share in by_block.items():
            print(
                f"| {text} | {block} | {share.kept:.3f} | {share.covered:.3f} | {share.on_box:.3f} | "
                f"{share.box:.3f} | {share.covered / share.kept:.2f} |"
            )
    if given.plot:
        draw(found, given.plot)


if __name__ == "__main__":
    main()
