"""Images of class folders by number, for every format that Pillow reads; the order is timm's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image
from timm.utils import natural_key

from evovit.errors import EvoViTError, printable

FOREIGN = (".eps", ".ps", ".wmf", ".emf")  # formats that Pillow gives to another program to draw


class Listed(NamedTuple):
    """A folder and what it holds."""

    place: Path
    images: list[str]
    others: list[str]  # further files


class FolderReader:
    """The images below a folder, a class for each folder that holds some, with timm's reader interface.

    Links are followed, but not round in circles; what is neither a file nor a folder is left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, found = folder, list(walk(folder))
        for place, images, others in found:
            if images and place == folder:
                raise EvoViTError(
                    f"'{printable(folder)}' holds images beside its class folders, such as "
                    f"'{printable(images[0])}'; put each image into the folder of its class."
                )
            if others and not images and place != folder:
                raise EvoViTError(
                    f"'{printable(place)}' holds files but no image that Pillow reads, such as "
                    f"'{printable(others[0])}'; convert its images, or move the folder away."
                )
        names = sorted({listed.place.name for listed in found if listed.images}, key=natural_key)
        self.class_to_idx = {name: number for number, name in enumerate(names)}
        self.samples = sorted(
            (
                (listed.place / image, self.class_to_idx[listed.place.name])
                for listed in found
                for image in listed.images
            ),
            key=lambda sample: natural_key(str(sample[0])),
        )
        if not self.samples:
            raise EvoViTError(f"'{printable(folder)}' holds no images in class folders.")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[row]
        return path.open("rb"), label

    def filename(self, row: int, absolute: bool = False) -> str:
        """Return the path of an image."""
        path = self.samples[row][0]
        return str(path.absolute() if absolute else path.relative_to(self.folder))


@cache
def extensions() -> frozenset[str]:
    """Return the extensions of files that Pillow can open itself."""
    kinds = Image.registered_extensions()
    return frozenset(e for e, kind in kinds.items() if kind in Image.OPEN and e not in FOREIGN)


def walk(place: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Listed]:
    """Yield a folder and all below it, once each on a way down; `above` are the folders it lies in."""
    try:
        own = place.stat()
        with os.scandir(place) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise EvoViTError(f"The folder '{printable(place)}' cannot be read: {error.strerror}.") from error
    key = (own.st_dev, own.st_ino)
    if key in above:
        return
    here = Listed(place, [], [])
    for entry in entries:
        mode = _mode(entry)
        if stat.S_ISDIR(mode):
            yield from walk(place / entry.name, above | {key})
        elif stat.S_ISREG(mode) or not mode:
            is_image = Path(entry.name).suffix.lower() in extensions()
            (here.images if is_image else here.others).append(entry.name)
    yield here


def _mode(entry: os.DirEntry[str]) -> int:
    """Return what an entry is, links followed; 0 for a link to nowhere, which is told when it is read."""
    try:
        return entry.stat().st_mode
    except OSError:
        return 0
