"""Images and labels for a training: timm's readers and augmentation as in DeiT, or the built-in digit scenes.

Order, crops, augmentation and mixup follow from (seed, epoch, place in the epoch) alone: a resumed training
continues exactly, and the number of processes only changes which process does what.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor

from evovit.data.digits import NUM_CLASSES, digit_scenes
from evovit.recipe.tables import Recipe
from evovit.runtime.seeds import seed_for, seeded
from evovit.runtime.world import World

TEST_SEED = 2**40  # of the digit scenes for testing, as in the quickstart
TEST_BATCH = 250
Batch = tuple[Tensor, Tensor]
Chosen = Iterable[list[tuple[int, int]]]  # (place in the epoch, image) of each forward


class Images(ABC):
    """The data of a recipe: batches of images (B, 3, side, side) and targets.

    Args:
        recipe: what is read and how it is augmented.
        class_names: one for each class of the targets.
    """

    length: int  # training images per epoch, before a last incomplete batch goes

    def __init__(self, recipe: Recipe, class_names: Sequence[str]) -> None:
        data = recipe.data
        self.recipe, self.class_names, self.num_classes = recipe, tuple(class_names), len(class_names)
        self.unreadable: dict[str, str] = {}  # path: why
        self.mix = None
        if data.mixup or data.cutmix:
            smoothing = recipe.objective.label_smoothing
            self.mix = Mixup(data.mixup, data.cutmix, label_smoothing=smoothing, num_classes=self.num_classes)

    @property
    def updates(self) -> int:
        """Updates per epoch; a last incomplete batch is left out."""
        return self.length // self.recipe.data.batch_size

    def train(self, epoch: int, first: int, world: World, accumulate: int) -> Iterator[Batch]:
        """Yield this process's forwards of an epoch from update `first` on, `accumulate` for each update."""
        read = self.read_train(epoch, self.choose(epoch, first, world, accumulate), world.device)
        for forward, (images, labels) in enumerate(read, first * accumulate):
            if self.mix is None:
                yield images, labels
                continue
            with seeded(self.recipe.run.seed, "mix", epoch, forward, world.rank):
                even = images.shape[0] - images.shape[0] % 2  # timm mixes pairs
                yield self.mix(images[:even], labels[:even])

    def choose(
        self, epoch: int, first: int, world: World, accumulate: int
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield (place in the epoch, image) of each forward; neighbours go to different forwards."""
        order, batch, parts = self.order(epoch), self.recipe.data.batch_size, world.size * accumulate
        for update in range(first, self.updates):
            for forward in range(accumulate):
                start = update * batch + forward * world.size + world.rank
                yield [(place, order[place]) for place in range(start, (update + 1) * batch, parts)]

    def order(self, epoch: int) -> Sequence[int]:
        """Return the image of each place in an epoch; copies for repeated augmentation stand side by side."""
        repeats = self.recipe.data.repeats
        generator = torch.Generator().manual_seed(seed_for(self.recipe.run.seed, "order", epoch))
        shuffled = torch.randperm(self.length, generator=generator)
        return shuffled[: -(-self.length // repeats)].repeat_interleave(repeats)[: self.length].tolist()

    @abstractmethod
    def read_train(self, epoch: int, chosen: Chosen, device: torch.device) -> Iterator[Batch]:
        """Yield a batch for each list of (place in the epoch, image), still to be copied to the device."""

    @abstractmethod
    def test(self, world: World) -> Iterator[Batch]:
        """Yield this process's share of the test images, each image in exactly one process."""


class DigitImages(Images):
    """Scenes of `evovit.data`, drawn anew for each epoch; fragments come in over the first half."""

    def __init__(self, recipe: Recipe, side: int) -> None:
        super().__init__(recipe, [str(digit) for digit in range(NUM_CLASSES)])
        self.length, self.side = recipe.data.scenes, side
        self._test: Any = None

    def read_train(self, epoch: int, chosen: Chosen, device: torch.device) -> Iterator[Batch]:
        run, most = self.recipe.run, self.recipe.data.fragments
        scenes = digit_scenes(
            "train",
            self.length,
            size=self.side,
            num_fragments=min(most, 2 * (most + 1) * epoch // run.epochs),
            seed=seed_for(run.seed, "scenes", epoch),
        )
        for part in chosen:
            rows = [image for _, image in part]
            yield scenes.images[rows], scenes.labels[rows]

    def test(self, world: World) -> Iterator[Batch]:
        data = self.recipe.data
        if self._test is None:
            self._test = digit_scenes(
                "test", data.test_scenes, size=self.side, num_fragments=data.fragments, seed=TEST_SEED
            )
        own = torch.arange(data.test_scenes)[world.rank :: world.size]
        for rows in torch.split(own, TEST_BATCH) if len(own) else ():
            yield self._test.images[rows], self._test.labels[rows]
