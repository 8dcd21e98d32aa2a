"""Readers of images by number: a folder, tar files, shards, a Hugging Face data set; and their classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.data.readers import create_reader

from evovit.data.folder import FolderReader
from evovit.data.shards import ShardReader
from evovit.errors import EvoViTError, shown
from evovit.runtime.files import as_path


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
        return ShardReader(as_path(source[4:], "data.source"), split)
    if Path(split).is_absolute() or ".." in Path(split).parts or Path(split) == Path():
        raise EvoViTError(f"The split {shown(split)} is not a sub-folder of {shown(Path(source))}; name one.")
    place = as_path(Path(source) / split, "data.source with its split")
    if not place.exists():
        inside = sorted(path.name for path in Path(source).iterdir()) if Path(source).is_dir() else []
        there = f"it holds {', '.join(inside[:8])}" if inside else "nothing is there"
        raise EvoViTError(
            f"There is no {str(place)!r} to read images from ({there}); set data.source and splits."
        )
    if place.is_dir():
        return FolderReader(place)
    try:
        return create_reader("", root=str(place))
    except Exception as error:  # a damaged archive raises many kinds
        raise EvoViTError(
            f"{str(place)!r} cannot be read as a tar file of class folders: {error}."
        ) from error


def names_of_classes(train: Any, test: Any, source: str) -> list[str]:
    """Return the names of the classes in their order, which both splits must agree on."""
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
    return [str(name) for name in sorted(train_names, key=lambda name: train_names[name])]
