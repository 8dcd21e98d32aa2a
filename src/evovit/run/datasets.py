"""Images and labels for a training: timm's readers and augmentation as in DeiT, or the built-in digit scenes.

Order, crops, augmentation and mixup follow from (seed, epoch, place in the epoch) alone: a resumed training
goes on exactly, and the number of processes changes nothing but who does what.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import RandAugment
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evovit.data import NUM_CLASSES, digit_scenes
from evovit.errors import EvoViTError
from evovit.run.dense_labels import DenseLabels
from evovit.run.recipe import Recipe
from evovit.run.shards import ShardReader
from evovit.run.world import World, number, seeded

TEST_SEED = 2**40  # of the digit scenes for testing, as in the quickstart
TEST_BATCH = 250
Batch = tuple[Tensor, Tensor]
Chosen = Iterable[list[tuple[int, int]]]  # (place in the epoch, image) of each forward


class Images(ABC):
    """The data of a recipe: batches of images (B, 3, side, side) and targets.

    Args:
        recipe: what is read and how it is augmented.
        num_classes: of the targets.
    """

    length: int  # training images per epoch, before a last incomplete batch goes

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        data = recipe.data
        self.recipe, self.num_classes = recipe, num_classes
        self.unreadable: dict[str, str] = {}  # path: why
        self.mix = None
        if data.mixup or data.cutmix:
            smoothing = recipe.objective.label_smoothing
            self.mix = Mixup(data.mixup, data.cutmix, label_smoothing=smoothing, num_classes=num_classes)

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
        generator = torch.Generator().manual_seed(number(self.recipe.run.seed, "order", epoch))
        shuffled = torch.randperm(self.length, generator=generator)
        return shuffled.repeat_interleave(repeats)[: self.length].tolist()

    @abstractmethod
    def read_train(self, epoch: int, chosen: Chosen, device: torch.device) -> Iterator[Batch]:
        """Yield a batch for each list of (place in the epoch, image), still to be copied to the device."""

    @abstractmethod
    def test(self, world: World) -> Iterator[Batch]:
        """Yield this process's share of the test images, each image in exactly one process."""


class DigitImages(Images):
    """Scenes of `evovit.data`, drawn anew for each epoch; fragments come in over the first half."""

    def __init__(self, recipe: Recipe, side: int) -> None:
        super().__init__(recipe, NUM_CLASSES)
        self.length, self.side = recipe.data.scenes, side
        self._test: Any = None

    def read_train(self, epoch: int, chosen: Chosen, device: torch.device) -> Iterator[Batch]:
        run, most = self.recipe.run, self.recipe.data.fragments
        scenes = digit_scenes(
            "train",
            self.length,
            size=self.side,
            num_fragments=min(most, 2 * (most + 1) * epoch // run.epochs),
            seed=number(run.seed, "scenes", epoch),
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
        for rows in torch.split(torch.arange(data.test_scenes)[world.rank :: world.size], TEST_BATCH):
            yield self._test.images[rows], self._test.labels[rows]


class Unreadable(NamedTuple):
    """An image that could not be read."""

    path: str
    why: str


@dataclass
class Pictures(Dataset[Any]):
    """Images of a timm reader by (seeds, row)."""

    reader: Any
    transform: Callable[[Any], Tensor]
    dense: DenseLabels | None = None

    def __getitem__(self, key: tuple[tuple[object, ...], int]) -> tuple[Tensor, int | Tensor] | Unreadable:
        place, row = key
        try:
            file, label = self.reader[row]
            with file, Image.open(file) as opened:
                image = opened.convert("RGB")
        except Exception as error:  # PIL raises many kinds for damaged files
            return Unreadable(
                str(self.reader.filename(row, absolute=True)), f"{type(error).__name__}: {error}"
            )
        with seeded(*place):
            augmented = self.transform(image)
        if self.dense is None:
            return augmented, int(label)
        return augmented, self.dense(place, self.reader.filename(row, absolute=True), image, int(label))


class PictureImages(Images):
    """Folders, tar files and Hugging Face data sets through timm's readers."""

    def __init__(
        self, recipe: Recipe, side: int, colours: tuple[tuple[float, ...], tuple[float, ...]]
    ) -> None:
        data = recipe.data
        readers = {split: open_reader(data.source, split) for split in (data.train_split, data.test_split)}
        super().__init__(
            recipe, count_classes(readers[data.train_split], readers[data.test_split], data.source)
        )
        self.length = len(readers[data.train_split])
        mean, std = colours
        shared = {"input_size": side, "mean": mean, "std": std, "interpolation": "bicubic"}
        augment = create_transform(
            **shared,
            is_training=True,
            scale=(data.crop_scale, 1.0),
            hflip=data.flip,
            color_jitter=data.colour_jitter or None,
            auto_augment=data.rand_augment or None,
            re_prob=data.erase,
            re_mode="pixel",
        )
        allow_black(augment)
        smoothing, crop = recipe.objective.label_smoothing, augment.transforms[0]
        shared_labels = (data.token_label_grid, self.num_classes, smoothing, crop, data.flip)
        dense = DenseLabels(Path(data.token_labels), *shared_labels) if data.token_labels else None
        self.pictures = Pictures(readers[data.train_split], augment, dense)
        plain = create_transform(**shared, crop_pct=data.crop_pct)
        self.test_pictures = Pictures(readers[data.test_split], plain)

    def read_train(self, epoch: int, chosen: Chosen, device: torch.device) -> Iterator[Batch]:
        seed = self.recipe.run.seed
        keys = ([((seed, epoch, place), image) for place, image in part] for part in chosen)
        yield from self._load(self.pictures, keys, device)

    def test(self, world: World) -> Iterator[Batch]:
        rows = range(world.rank, len(self.test_pictures.reader), world.size)
        keys = [
            [(("test",), row) for row in rows[i : i + TEST_BATCH]] for i in range(0, len(rows), TEST_BATCH)
        ]
        yield from self._load(self.test_pictures, keys, world.device)

    def _load(self, pictures: Pictures, keys: Iterable[list[Any]], device: torch.device) -> Iterator[Batch]:
        workers, own = self.recipe.data.workers, torch.Generator()  # else it draws from the training's
        loader = DataLoader(pictures, batch_sampler=keys, collate_fn=list, num_workers=workers, generator=own)
        for items in loader:
            for item in items:
                if isinstance(item, Unreadable):
                    self._report(item)
            whole = [item for item in items if not isinstance(item, Unreadable)]
            if not whole:
                raise EvoViTError(
                    "No image of a batch can be read; repair the data, or make the batch larger."
                )
            images, labels = zip(*whole, strict=True)
            yield stacked(images, device), stacked(labels, device) if pictures.dense else torch.tensor(labels)

    def _report(self, item: Unreadable) -> None:
        self.unreadable.setdefault(item.path, item.why)
        limit = self.recipe.data.max_corrupt
        if len(self.unreadable) > limit:
            raise EvoViTError(
                f"{len(self.unreadable)} images cannot be read, data.max_corrupt is {limit}; the last: "
                f"{item.path} ({item.why})."
            )


def stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stack tensors; for a CUDA device in pinned memory, from which it copies while the host goes on."""
    out = tensors[0].new_empty((len(tensors), *tensors[0].shape), pin_memory=device.type == "cuda")
    return torch.stack(tuple(tensors), out=out)


def allow_black(augment: Any) -> None:
    """Let the posterize of timm's RandAugment keep 0 bits, an all-black image, which Pillow 13 refuses."""
    for part in augment.transforms:
        for op in part.ops if isinstance(part, RandAugment) else []:
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` of each colour, 0 to 8."""
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def open_images(recipe: Recipe, side: int, colours: tuple[tuple[float, ...], tuple[float, ...]]) -> Images:
    """Open the data of a recipe for images of `side` pixels, normalised by `colours`."""
    is_digits = recipe.data.source == "digits"
    images = DigitImages(recipe, side) if is_digits else PictureImages(recipe, side, colours)
    if images.updates < 1:
        raise EvoViTError(
            f"data.batch_size is {recipe.data.batch_size}, more than the {images.length} training images."
        )
    return images


def open_reader(source: str, split: str) -> Any:
    """Open one split of a folder of images or tar files, of shards, or of a Hugging Face data set."""
    if source.lower().startswith("hfds/"):
        try:
            return create_reader(source, split=split)
        except ImportError as error:
            raise EvoViTError(f"{source} needs the package 'datasets': pip install datasets.") from error
        except Exception as error:
            raise EvoViTError(f"{source}, split {split!r}, cannot be opened: {error}.") from error
    if source.lower().startswith("wds/"):
        return ShardReader(Path(source[4:]), split)
    place = Path(source) / split
    if not place.exists():
        inside = sorted(path.name for path in Path(source).iterdir()) if Path(source).is_dir() else []
        there = f"it holds {', '.join(inside[:8])}" if inside else "nothing is there"
        raise EvoViTError(
            f"There is no {str(place)!r} to read images from ({there}); set data.source and splits."
        )
    try:
        return create_reader("", root=str(place))
    except RuntimeError as error:
        raise EvoViTError(f"{str(place)!r} holds no images in class folders: {error}.") from error


def count_classes(train: Any, test: Any, source: str) -> int:
    """Return the number of classes, which both splits must agree on."""
    train_names, test_names = (
        getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", {})
        for reader in (train, test)
    )
    if train_names != test_names:
        differ = sorted(set(train_names) ^ set(test_names))
        raise EvoViTError(
            f"The splits of {source} have {len(train_names)} and {len(test_names)} classes; only in one of "
            f"them: {', '.join(map(str, differ[:5]))}."
        )
    if not train_names:
        raise EvoViTError(
            f"{source} does not say what its classes are; use class folders or a 'label' column."
        )
    return len(train_names)
