"""Is there anything to select? Accuracy of a dense run with patches chosen by more than a method can know.

    python benchmarks/oracles.py RUN ... --blocks 1 3 --keep-ratio 0.5 0.25 0.1 --boxes boxes.json

Nothing is trained. In one block all but a share of the patches are dropped, chosen by

- random: chance, which the others are paired with, image by image, over all runs;
- even: evenly spaced;
- class: the class token's attention in that block, as EViT and Evo-ViT without history read it;
- least: the lowest of these first, a control;
- class, spread: by class attention, but each window of 2 x 2 patches gives one before any gives its second;
- random, spread: the same by chance;
- last: the class token's attention in the last block of the dense model, which no method has yet;
- occlusion: how far the dense model's logit of its own answer falls with the patch painted in mean colour;
- box, outside: patches whose centre lies in the object's box first, or last (--boxes, as in on_object.py).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import product
from pathlib import Path

import torch
from on_object import boxes_of
from torch import Tensor, nn
from untrained import accuracy, difference

from evovit.analyse.measures import as_reduced
from evovit.analyse.watch import watch
from evovit.backbones.base import Block
from evovit.methods.keep import Keep
from evovit.model import ReducedViT, backbone_of, reduce_tokens
from evovit.runtime.world import join_world
from evovit.tokens import QKV, Tokens, logits_of
from evovit.train.tested import run_model
from evovit.visualize import patches_on_box

PART = 100  # images a step


class Given(Keep):
    """Keeps the patches with the best of the scores that it is given, (B, cells)."""

    given: Tensor

    def score(self, block: Block, tokens: Tokens, qkv: QKV) -> Tensor:
        return self.given.gather(1, tokens.index)


def in_windows(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return scores, (B, cells), by which each 2 x 2 window gives one before any gives its second."""
    by_window = scores.unflatten(1, (grid[0] // 2, 2, grid[1] // 2, 2)).transpose(2, 3).flatten(3)
    turn = by_window.argsort(-1, descending=True).argsort(-1)
    place = turn.unflatten(3, (2, 2)).transpose(2, 3).flatten(1)
    return scores / scores.abs().amax(1, keepdim=True) - 3 * place


@torch.inference_mode()
def occlusion(model: nn.Module, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return how far the logit of the model's answer falls without each patch, (B, cells)."""
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    logits = logits_of(model(images))
    answer = logits.argmax(1, keepdim=True)
    before = logits.gather(1, answer)
    falls = []
    for cell in range(grid[0] * grid[1]):
        row, column = divmod(cell, grid[1])
        hidden = images.clone()
        hidden[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width] = 0
        falls.append(before - logits_of(model(hidden)).gather(1, answer))
    return torch.cat(falls, 1).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--boxes", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--keep-ratio", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--set", nargs="*", default=())
    asked = parser.parse_args()

    hits: dict[tuple[int, float, str], list[Tensor]] = defaultdict(list)
    dense = []
    for run in asked.runs:
        tested = run_model(run, "last", None, asked.set)
        model = tested.model.eval()
        with join_world("cpu") as world:
            batches = list(tested.images.test(world))
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        seen = [list(watch(as_reduced(model), part)) for part in images.split(PART)]
        grid = seen[0][0].grid
        attention = [torch.cat([part[block].attention for part in seen]) for block in range(len(seen[0]))]
        chance = torch.rand(attention[0].shape, generator=torch.Generator().manual_seed(0))
        scores = {"random": chance, "random, spread": in_windows(chance, grid), "last": attention[-1]}
        scores["occlusion"] = torch.cat([occlusion(model, part, grid) for part in images.split(PART)])
        if asked.boxes:
            corners = boxes_of(tested, asked.boxes, asked.split)
            on_box = patches_on_box(corners, grid, (asked.side, asked.side)).flatten(1)
            scores |= {"box": on_box + chance / 2, "outside": ~on_box + chance / 2}
        dense.append(right(model, images, labels))
        for block, share in product(asked.blocks, asked.keep_ratio):
            chosen = Given.Config(keep_ratio=share, blocks=(block,))
            given = ReducedViT(model, Given(chosen, backbone_of(model).spec))
            even = reduce_tokens(model, "keep", selection="even", blocks=(block,), keep_ratio=share).eval()
            hits[block, share, "even"].append(right(even, images, labels))
            own = {"class": attention[block], "least": -attention[block]}
            own["class, spread"] = in_windows(attention[block], grid)
            for name, values in (own | scores).items():
                hits[block, share, name].append(right(given, images, labels, values))

    print(f"dense: {accuracy(dense)} % of {len(labels)} images\n")
    print("| block | kept | chosen by | top-1 % | against random |\n| --- | --- | --- | --- | --- |")
    for (block, share, name), found in hits.items():
        told = difference(found, hits[block, share, "random"])
        print(f"| {block} | {share} | {name} | {accuracy(found)} | {told} |")


@torch.inference_mode()
def right(model: nn.Module, images: Tensor, labels: Tensor, scores: Tensor | None = None) -> Tensor:
    """Return which answers are right, (images,) bool."""
    found = []
    for start in range(0, len(images), PART):
        if scores is not None:
            model.method.given = scores[start : start + PART]
        found.append(logits_of(model(images[start : start + PART])).argmax(1).cpu())
    return torch.cat(found) == labels


if __name__ == "__main__":
    main()
