"""Photographs of a folder, or of those that are at hand everywhere, as a model takes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from torch import Tensor

from evovit.data.digits import MEAN, STD, digit_scenes
from evovit.data.folder import walk
from evovit.data.images import TEST_SEED
from evovit.data.pictures import as_rgb
from evovit.errors import EvoViTError, printable, shown
from evovit.runtime.files import as_path

BUILT_IN = ("digits", "samples")  # digit scenes; the two photographs that come with scikit-learn


class Photographs(NamedTuple):
    """Images with a title each."""

    images: Tensor  # (N, 3, height, width), prepared
    titles: list[str]  # the class where it is known, else the file's name


def open_photographs(what: str, preprocessing: Mapping[str, Any], most: int) -> Photographs:
    """Return the photographs of a folder, or the built-in ones: digits, samples.

    Args:
        what: one of `BUILT_IN`, or a folder.
        preprocessing, most: as `read_titled`; of digits so many scenes are drawn, those of the test.
    """
    if what == "samples":
        return read_samples(preprocessing)
    if what != "digits":
        return read_titled(what, preprocessing, most)
    channels, height, width = preprocessing["input_size"]
    if channels != 3 or height != width:
        raise EvoViTError(
            f"The model takes {channels} x {height} x {width} values, and digit scenes are squares of three "
            "colours; give a folder of images."
        )
    scenes = digit_scenes("test", most, size=height, seed=TEST_SEED)
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = (scenes.images * (STD / std) + (MEAN - mean) / std).float()
    return Photographs(images, [f"digit {label}" for label in scenes.labels.tolist()])


def read_samples(preprocessing: Mapping[str, Any]) -> Photographs:
    """Return the two sample photographs of scikit-learn."""
    from sklearn.datasets import load_sample_image

    prepare, titles = transform_of(preprocessing), ["china", "flower"]
    images = [prepare(Image.fromarray(load_sample_image(f"{title}.jpg"))) for title in titles]
    return Photographs(torch.stack(images), titles)


def read_photographs(folder: str | Path, preprocessing: Mapping[str, Any], most: int) -> Tensor:
    """Return photographs below a folder without titles, (N, 3, height, width); see `read_titled`."""
    return read_titled(folder, preprocessing, most).images


def read_titled(folder: str | Path, preprocessing: Mapping[str, Any], most: int) -> Photographs:
    """Return photographs below a folder, evenly spread over it.

    Args:
        folder: of images, in folders of their own or not; such a folder's name is the title.
        preprocessing: input_size, mean, std, interpolation, crop_pct and crop_mode, as timm names them.
        most: N at most; an image that cannot be read is left out.

    Raises:
        EvoViTError: no folder, or none of its images can be read.
    """
    place = as_path(folder, "the folder of images")
    if not place.is_dir():
        raise EvoViTError(f"There is no folder {shown(place)}; give one that holds images.")
    paths = [listed.place / name for listed in walk(place) for name in listed.images]
    prepare = transform_of(preprocessing)
    found, titles, last = list[Tensor](), list[str](), "it holds no image that Pillow reads"
    count = min(most, len(paths))
    for path in (paths[len(paths) * i // count] for i in range(count)):
        try:
            with Image.open(path) as opened:
                found.append(prepare(as_rgb(opened)))
            titles.append(path.stem if path.parent == place else class_title(path.parent.name))
        except Exception as error:  # Pillow raises many kinds for damaged files
            last = f"{printable(path.name)}: {type(error).__name__}: {printable(error)}"
    if not found:
        raise EvoViTError(f"No image in {shown(place)} can be read ({last}); give a folder of images.")
    return Photographs(torch.stack(found), titles)


def transform_of(preprocessing: Mapping[str, Any]) -> Any:
    """Return what prepares an image of Pillow, as timm's evaluation does it."""
    asked = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return create_transform(**{key: preprocessing[key] for key in asked})


def class_title(name: str) -> str:
    """Return what a class folder's name means: ImageNet's first word for n01440764, else the name itself."""
    return imagenet_titles().get(name, name)


@cache
def imagenet_titles() -> dict[str, str]:
    """Return the first word that ImageNet has for each of its 1000 classes, by the class's folder."""
    info = ImageNetInfo("imagenet-1k")
    return {
        label: info.index_to_description(number).split(",")[0]
        for number, label in enumerate(info.label_names())
    }
