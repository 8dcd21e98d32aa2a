"""Masks of patch slimming, found on unlabelled images, from the last block up (Tang et al., 2022).

Algorithm 1, from the last block up: score the patches of a block by what the answer reads of them, and keep
as few of the best as leave the next block's output as it was, up to a tolerance. Nothing is trained
unless `epochs` is above 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from evovit.backbones import Backbone, adapt
from evovit.backbones.base import Block, evaluating
from evovit.errors import EvoViTError, check_choice, check_count, check_kind, shown
from evovit.methods.patch_slimming import PatchSlimming
from evovit.model import ReducedViT, reduce_tokens
from evovit.ops.select import keep_rows
from evovit.ops.significance import own_weight, path_weight, precise_map
from evovit.tokens import Tokens

ErrorKind = Literal["relative", "squared"]


class Kept(NamedTuple):
    """What was decided for one block."""

    number: int  # of the block
    patches: int  # that it keeps
    error: float  # that dropping the others makes


def calibrate(
    model: nn.Module,
    images: Tensor,
    *,
    tolerance: float = 0.01,
    error: ErrorKind = "relative",
    step: int = 10,
    epochs: int = 0,
    rate: float = 1e-4,
    batch: int = 8,
    told: Callable[[Kept], object] = lambda kept: None,
) -> ReducedViT:
    """Return the host with `patch_slimming`, its masks fitted to images; no label is read.

    Args:
        model: a host of one stage; its weights stay as they are where epochs is 0.
        images: (N, channels, height, width), prepared as the host takes them.
        tolerance: largest error that the masks of one block may make in the output of the next; 0 keeps all.
        error: of the tokens that the next block keeps: "relative", squared difference over squared value;
            "squared", its mean.
        step: patches tried together.
        epochs: passes over the images that train a block's own weights, for each number of patches tried, to
            reduce this error (paper: 3). This changes the host.
        rate: learning rate of this training, by AdamW.
        batch: images per forward.
        told: a function that is called after each block with what was decided.

    Raises:
        EvoViTError: a host that patch slimming does not run on, images that do not suit it.
    """
    check_choice("error", error, get_args(ErrorKind))
    check_count("step", step, 1, 10**6)
    check_count("epochs", epochs, 0, 10**6)
    check_count("batch", batch, 1, 10**6)
    for name, value in (("tolerance", tolerance), ("rate", rate)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise EvoViTError(f"{name} is {shown(value)}; allowed is a finite number, 0 or more.")
    images = check_kind("images", images, Tensor, "prepared images, a tensor (N, channels, height, width)")
    if len(images) == 0:
        raise EvoViTError("images is empty; give one or more.")
    whole = reduce_tokens(model, "patch_slimming", keep_ratio=1.0)  # refuses hosts it does not run on
    search = Search(model, images, batch, error == "relative", epochs > 0)
    with evaluating(model), torch.no_grad():
        for number in reversed(range(whole.method.spec.depth)):
            told(search.decide(number, tolerance, step, epochs, rate))
    cells = len(search.order)
    ratios = tuple(max(1, count) / cells for count in search.counts)
    reduced = reduce_tokens(model, "patch_slimming", verify=False, keep_ratio=ratios)
    assert isinstance(reduced.method, PatchSlimming)
    reduced.method.set_order(search.order)
    return reduced


class Seen(NamedTuple):
    """What one batch of images is around a block."""

    before: Tokens  # that enter it, all of them
    after: Tokens  # that leave it where it is unpruned
    target: Tensor  # (B, Q, C) of the tokens that the next block keeps, or (B, classes), unpruned


class Search:
    """The state of a search: what the blocks behind keep, and the order of the cells so far.

    Args:
        learns: blocks are trained, so the unpruned network is kept beside.
    """

    def __init__(self, model: nn.Module, images: Tensor, batch: int, relative: bool, learns: bool) -> None:
        self.model, self.backbone, self.relative = model, adapt(model), relative
        self.original = adapt(copy.deepcopy(model).eval()) if learns else self.backbone
        weight = next(p for p in model.parameters() if p.is_floating_point())
        self.batches = [part.to(weight) for part in torch.split(images, batch)]
        self.backbone.expect_images(self.batches[0])
        spec = self.backbone.spec
        self.cells, self.last = spec.grid[0] * spec.grid[1], spec.depth - 1
        self.order: list[int] = []  # of the cells that are decided, kept longest first
        self.counts = [0] * spec.depth  # patches that each block keeps

    def decide(self, number: int, tolerance: float, step: int, epochs: int, rate: float) -> Kept:
        """Decide which patches block `number` keeps; the blocks behind it are decided."""
        if number == self.last and not self.backbone.head_reads_patches:
            return Kept(number, 0, 0.0)  # as the paper has it: the class token alone
        score, seen = self.look(number)
        ranked = self.order + [
            cell for cell in score.argsort(descending=True, stable=True).tolist() if cell not in self.order
        ]
        count = len(self.order)
        if number == self.last:
            count = min(step, self.cells)  # a head that pools has to have something to pool
        while True:
            if epochs:
                self.fit(number, seen, ranked[:count], epochs, rate)
            error = self.error(number, seen, ranked[:count], learnt=epochs > 0)
            if error <= tolerance or count == self.cells:
                break
            count = min(count + step, self.cells)
        self.order, self.counts[number] = ranked[:count] if number else ranked, count
        return Kept(number, count, error)

    def look(self, number: int) -> tuple[Tensor, list[Seen]]:
        """Run the images: blocks up to `number` unpruned, those behind as decided.

        Returns:
            (cells,) float64, significance of the patches that leave block `number`, mean over images; and
            what each batch is around it.
        """
        others = sorted(set(range(self.cells)) - set(self.order))
        score, seen = torch.zeros(self.cells, dtype=torch.float64), list[Seen]()
        for images in self.batches:
            tokens = self.original.embed(images)
            self.backbone.embed(images)  # its views know the places of this image size from here on
            blocks, num_prefix = self.original.stages()[0].blocks, tokens.num_prefix
            for block in blocks[:number]:
                tokens = block(tokens)
            own = own_weight(precise_map(blocks[number].qkv(tokens)), tokens.x)
            after = blocks[number](tokens)
            arranged = arrange(after, self.order + others)
            seen.append(Seen(tokens, after, self.read(self.original, number, arranged)))
            path = self.follow(number, arranged)
            at = torch.tensor(self.order + others, device=own.device)
            found = path[:, num_prefix:] * own[:, num_prefix:].index_select(1, at)
            score[at.cpu()] += found.sum(0).cpu()
        return score / sum(len(images) for images in self.batches), seen

    def follow(self, number: int, tokens: Tokens) -> Tensor:
        """Return `path_weight` of the tokens that leave block `number`, (B, T), through the pruned blocks."""
        maps = []
        for block in self.backbone.stages()[0].blocks[number + 1 :]:
            asking = tokens.num_prefix + self.counts[block.number]
            tokens, qkv = block.attend(tokens, asking=asking)
            tokens = block.ffn(tokens)
            maps.append(precise_map(qkv)[:, :, :asking])
        return path_weight(maps) if maps else tokens.x.new_ones(tokens.x.shape[:2], dtype=torch.float64)

    def read(self, backbone: Backbone, number: int, tokens: Tokens) -> Tensor:
        """Return what is read of the tokens that leave block `number`: by the next block, or by the head."""
        if number == self.last:
            return backbone.head(backbone.norm(tokens.x))
        block = backbone.stages()[0].blocks[number + 1]
        asking = tokens.num_prefix + self.counts[number + 1]
        return block.ffn(block.attend(tokens, asking=asking)[0]).x

    def pruned(self, number: int, tokens: Tokens, kept: Sequence[int]) -> Tensor:
        """Return `read` of the tokens `kept` alone."""
        return self.read(self.backbone, number, arrange(tokens, kept))

    def error(self, number: int, seen: Sequence[Seen], kept: Sequence[int], learnt: bool) -> float:
        """Return the error over all images where block `number` keeps the cells `kept`."""
        block, difference, whole, values = self.block(number), 0.0, 0.0, 0
        for each in seen:
            found = self.pruned(number, block(each.before) if learnt else each.after, kept)
            difference += float((found.double() - each.target.double()).square().sum())
            whole += float(each.target.double().square().sum())
            values += each.target.numel()
        return difference / (max(whole, 1e-300) if self.relative else values)

    def block(self, number: int) -> Block:
        """Return the view of a block that may have been trained."""
        return self.backbone.stages()[0].blocks[number]

    @torch.enable_grad()
    def fit(self, number: int, seen: Sequence[Seen], kept: Sequence[int], epochs: int, rate: float) -> None:
        """Train the weights of block `number` alone to lessen the error; they go on from where they are."""
        block, first = self.block(number), seen[0]
        named = [p for p in self.model.parameters() if p.requires_grad]
        reached = torch.autograd.grad(block(first.before).x.square().sum(), named, allow_unused=True)
        own = [p for p, gradient in zip(named, reached, strict=True) if gradient is not None]
        optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=0.0)
        for _ in range(epochs):
            for each in seen:
                found = self.pruned(number, block(each.before), kept)
                loss = (found - each.target).square().sum() / each.target.square().sum()
                for p, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
                    p.grad = gradient
                optimizer.step()
        optimizer.zero_grad()


def arrange(tokens: Tokens, cells: Sequence[int]) -> Tokens:
    """Return the prefix and these cells alone, in this order, from raster order."""
    rows = torch.tensor(cells, dtype=torch.int64, device=tokens.x.device)
    return keep_rows(tokens, rows.expand(tokens.x.shape[0], -1))
