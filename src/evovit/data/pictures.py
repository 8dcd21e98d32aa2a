"""Images from folders, tar files and Hugging Face data sets: read, augmented as in DeiT, batched."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evovit.data.dense_labels import DenseLabels
from evovit.data.images import TEST_BATCH, Batch, Chosen, DigitImages, Images
from evovit.data.readers import names_of_classes, open_reader
from evovit.errors import EvoViTError, in_one_line, printable, shown
from evovit.recipe.tables import Recipe
from evovit.runtime.seeds import seeded
from evovit.runtime.world import World

GRACE = 60  # seconds
LOOKED_AT = 1000  # images whose dense labels are looked for before a training


class Unreadable(NamedTuple):
    """An image that could not be read."""

    path: str
    why: str


Item = tuple[Tensor, int | Tensor] | Unreadable | EvoViTError  # image and target, or why there are none


@dataclass
class Pictures(Dataset[Any]):
    """Images of a timm reader by (seeds, row)."""

    reader: Any
    transform: Callable[[Any], Tensor]
    dense: DenseLabels | None = None

    def __getitem__(self, key: tuple[tuple[object, ...], int]) -> Item:
        place, row = key
        try:
            file, label = self.reader[row]
            with file, Image.open(file) as opened:
                image = as_rgb(opened)
        except Exception as error:  # Pillow raises many kinds for damaged files
            name = printable(self.reader.filename(row, absolute=True))
            return Unreadable(name, printable(f"{type(error).__name__}: {error}"))
        try:
            with seeded(*place):
                augmented = self.transform(image)
            if self.dense is None:
                return augmented, int(label)
            return augmented, self.dense(place, self.reader.filename(row, absolute=True), image, int(label))
        except EvoViTError as error:  # raised here, it would bring the trace of this process along
            return error
        except Exception as error:
            told = f"{type(error).__name__}: {in_one_line(error)}"
            name = shown(Path(self.reader.filename(row, absolute=True)))
            return EvoViTError(f"{name} cannot be augmented ({told}); change [data], or move it away.")


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image as three channels of 8 bits; 16 bits are scaled, where Pillow cuts them to white."""
    if image.mode.startswith("I"):  # I;16, I;16B, and I, as which some versions open 16 bits
        levels = numpy.asarray(image).astype(numpy.int64).clip(0, 65535) // 257
        image = Image.fromarray(levels.astype(numpy.uint8))
    elif image.mode == "F":
        raise ValueError("an image of floating-point numbers, whose range is not known")
    return image.convert("RGB")


class PictureImages(Images):
    """Folders, tar files and Hugging Face data sets through timm's readers."""

    def __init__(
        self,
        recipe: Recipe,
        side: int,
        colours: tuple[tuple[float, ...], tuple[float, ...]],
        resize: Mapping[str, Any] = {},
    ) -> None:
        data = recipe.data
        readers = {split: open_reader(data.source, split) for split in (data.train_split, data.test_split)}
        super().__init__(
            recipe, names_of_classes(readers[data.train_split], readers[data.test_split], data.source)
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
        if dense:
            check_labels(dense, readers[data.train_split])
        self.pictures = Pictures(readers[data.train_split], augment, dense)
        plain = create_transform(**{**shared, **resize}, crop_pct=data.crop_pct)
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
        with warnings.catch_warnings():
            # Twice, and long; more processes than cores are right where the disk is slow.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader = DataLoader(
                pictures,
                batch_sampler=keys,
                collate_fn=list,
                num_workers=workers,
                generator=own,
                worker_init_fn=outlive_sigterm,
            )
            batches = begin(loader)
        try:
            for items in batches:
                images, labels = zip(*self._readable(items), strict=True)
                yield (
                    stacked(images, device),
                    stacked(labels, device) if pictures.dense else torch.tensor(labels),
                )
        finally:
            del batches  # an error holds this frame, and would hold the processes with it

    def _readable(self, items: list[Any]) -> list[Any]:
        """Return the items of a batch that could be read, and report the others."""
        for item in items:
            if isinstance(item, EvoViTError):
                raise item
            if isinstance(item, Unreadable):
                self._report(item)
        whole = [item for item in items if not isinstance(item, Unreadable)]
        if not whole:
            raise EvoViTError("No image of a batch can be read; repair the data, or make the batch larger.")
        return whole

    def _report(self, item: Unreadable) -> None:
        self.unreadable.setdefault(item.path, item.why)
        limit = self.recipe.data.max_corrupt
        if len(self.unreadable) > limit:
            raise EvoViTError(
                f"{len(self.unreadable)} images cannot be read, but data.max_corrupt is {limit}; the last: "
                f"{item.path} ({item.why})."
            )


def check_labels(dense: DenseLabels, reader: Any) -> None:
    """Raise `EvoViTError` where not one of many images has a file of labels."""
    rows = range(0, len(reader), -(-len(reader) // LOOKED_AT))
    if not any(dense.path_of(reader.filename(row, absolute=True)).is_file() for row in rows):
        raise EvoViTError(
            f"data.token_labels is {shown(dense.folder)}, where no image has its labels, such as "
            f"{shown(dense.path_of(reader.filename(0, absolute=True)))}; give the folder of class folders."
        )


def begin(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return the batches of a loader; its processes begin with SIGTERM held back."""
    if sys.platform == "win32":
        return iter(loader)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def outlive_sigterm(worker: int) -> None:
    """Let SIGTERM end a process that reads images only after a while.

    Cluster managers send it to all processes; the main one needs images until it has saved.
    """
    if sys.platform != "win32":
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stack tensors; for a CUDA device in pinned memory, from which it copies while the host goes on."""
    out = tensors[0].new_empty((len(tensors), *tensors[0].shape), pin_memory=device.type == "cuda")
    return torch.stack(tuple(tensors), out=out)


def allow_black(augment: Any) -> None:
    """Let the posterize of timm's policies keep 0 bits, an all-black image, which Pillow 13 refuses."""
    for part in augment.transforms:
        policy = getattr(part, "policy", ())
        for op in [*getattr(part, "ops", ()), *(op for ops in policy for op in ops)]:
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` of each colour, 0 to 8."""
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def open_images(
    recipe: Recipe,
    side: int,
    colours: tuple[tuple[float, ...], tuple[float, ...]],
    resize: Mapping[str, Any] = {},
) -> Images:
    """Open the data of a recipe for images of `side` pixels, normalised by `colours`.

    Args:
        resize: of the test images: timm's interpolation and crop_mode; default: bicubic, center.
    """
    is_digits = recipe.data.source == "digits"
    images = DigitImages(recipe, side) if is_digits else PictureImages(recipe, side, colours, resize)
    if images.updates < 1:
        raise EvoViTError(
            f"data.batch_size is {recipe.data.batch_size}, more than the {images.length} training images."
        )
    return images
