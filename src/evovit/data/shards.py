"""WebDataset shards by row: tar files whose members share a key, such as 0001.jpg beside 0001.cls.

The `webdataset` package streams shards in an order of its own. A training that resumes exactly reads
images by number, so the headers are read once and each image is found at its offset.
"""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from evovit.errors import EvoViTError, shown

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm")
LABEL = "cls"
MOST_CLASSES = 1_000_000
LONGEST_LABEL = 64  # bytes


class Sample(NamedTuple):
    """Where an image lies."""

    shard: int
    name: str
    start: int  # byte in the shard
    size: int  # bytes
    label: int


class ShardReader:
    """The images of all shards of one split, in the order of the shards, with timm's reader interface.

    Args:
        folder: holds the shards.
        split: part of the names of the split's shards, such as train of imagenet-train-0000.tar.
    """

    def __init__(self, folder: Path, split: str) -> None:
        if not split or set(split) & set("*?[]/\\"):
            raise EvoViTError(
                f"The split {shown(split)} cannot be part of a file's name; give one that can, such as train."
            )
        self.shards = sorted(path for path in folder.glob(f"*{split}*.tar") if path.is_file())
        if not self.shards:
            raise EvoViTError(f"{str(folder)!r} holds no shard *{split}*.tar; set data.source and splits.")
        self.samples = [sample for i in range(len(self.shards)) for sample in self._read_shard(i)]
        if not self.samples:
            raise EvoViTError(
                f"No image ({', '.join(IMAGES)}) with a .{LABEL} beside it is in the {len(self.shards)} "
                f"shards *{split}*.tar of {str(folder)!r}."
            )
        most = max(sample.label for sample in self.samples)
        self.class_to_idx = {str(label): label for label in range(most + 1)}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> tuple[BinaryIO, int]:
        sample = self.samples[row]
        with self.shards[sample.shard].open("rb") as file:
            file.seek(sample.start)
            return BytesIO(file.read(sample.size)), sample.label

    def filename(self, row: int, absolute: bool = False) -> str:
        """Return shard and member."""
        sample = self.samples[row]
        shard = self.shards[sample.shard]
        return f"{shard.absolute() if absolute else shard.name}:{sample.name}"

    def _read_shard(self, number: int) -> list[Sample]:
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        path = self.shards[number]
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    folder, _, name = member.name.rpartition("/")
                    key, _, kind = name.partition(".")
                    if member.isfile() and kind.lower() in IMAGES:
                        images[f"{folder}/{key}"] = member
                    elif member.isfile() and kind == LABEL:
                        labels[f"{folder}/{key}"] = self._label(archive, member)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise EvoViTError(f"The shard {str(path)!r} cannot be read: {error}.") from error
        lacking = [key for key in images if key not in labels]
        if lacking:
            raise EvoViTError(
                f"{str(path)!r} has {len(lacking)} images without a class number in .{LABEL}, first "
                f"{images[lacking[0]].name!r}."
            )
        return [Sample(number, m.name, m.offset_data, m.size, labels[key]) for key, m in images.items()]

    @staticmethod
    def _label(archive: tarfile.TarFile, member: tarfile.TarInfo) -> int:
        """Return the class number in a member; raises ValueError where it is none."""
        content = archive.extractfile(member)
        assert content is not None
        label = int(content.read(LONGEST_LABEL)) if member.size <= LONGEST_LABEL else -1
        if not 0 <= label < MOST_CLASSES:
            raise ValueError(f"{member.name} holds no class number below {MOST_CLASSES}")
        return label
