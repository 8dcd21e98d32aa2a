"""Photographs from a folder, one by one, or samples that come with a package, as a model takes them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import floor
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform
from torch import Tensor

from evovit.data.digits import MEAN, STD, digit_scenes
from evovit.data.folder import walk
from evovit.data.images import TEST_SEED
from evovit.data.pictures import as_rgb
from evovit.errors import EvoViTError, in_one_line, printable, shown
from evovit.runtime.files import as_path

BUILT_IN = ("digits", "samples")  # digit scenes; the two photographs that come with scikit-learn
SAMPLES = ("china", "flower")
DRAWN_ELSEWHERE = ("EPS", "WMF")  # Pillow gives these to another program
MOST_PIXELS = 150_000_000  # of a photograph, and of it once resized
SHARP = 896  # pixels of the longer side of a picture to draw on


class Photographs(NamedTuple):
    """Images with a title each."""

    images: Tensor  # (N, 3, height, width), prepared
    titles: list[str]  # the class where it is known, else the file's name


class Photograph(NamedTuple):
    """One photograph."""

    title: str
    whole: Image.Image  # upright, RGB
    seen: Image.Image  # the part of it that the model sees, at most `SHARP` pixels a side
    image: Tensor  # (channels, height, width), as the model takes it
    box: tuple[float, float, float, float] | None = None  # of `seen` in `whole`: left, top, right, bottom


def open_picture(source: str | Path | IO[bytes] | Image.Image, name: str = "") -> Image.Image:
    """Return a picture upright, as its EXIF data tell, in RGB; of several in one file the first.

    Args:
        source: a file, or an image of Pillow.
        name: of the source in sentences; default: the file's.

    Raises:
        EvoViTError: no such file, no image that Pillow reads by itself, a damaged or a huge one.
    """
    if isinstance(source, str | Path):
        source = as_path(source, "the image")
        name = name or shown(source)
        if not source.is_file():
            raise EvoViTError(f"There is no file {name}; give an image, such as a JPEG or PNG file.")
    name = name or "The image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: of large and of slightly damaged files
            if isinstance(source, Image.Image):
                return _upright(source, name)
            Image.init()
            with Image.open(source, formats=[k for k in Image.OPEN if k not in DRAWN_ELSEWHERE]) as opened:
                return _upright(opened, name)
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except UnidentifiedImageError as error:
        raise EvoViTError(f"{name} is not an image that Pillow reads; give a JPEG or PNG file.") from error
    except (EvoViTError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        told = f"{type(error).__name__}: {in_one_line(error)}"
        raise EvoViTError(f"{name} cannot be read ({told}); give another image.") from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    if image.width * image.height > MOST_PIXELS:
        raise _too_large(name)
    return as_rgb(ImageOps.exif_transpose(image))


def _too_large(name: str) -> EvoViTError:
    most = f"{MOST_PIXELS // 1_000_000} million pixels"
    return EvoViTError(f"{name} is larger than {most}; give a smaller copy of it.")


def prepared(picture: Image.Image, preprocessing: Mapping[str, Any], title: str = "") -> Photograph:
    """Return a picture as a model takes it.

    Args:
        picture: from `open_picture`.
        preprocessing: as of `read_titled`.
    """
    _, height, width = preprocessing["input_size"]
    box = seen_box(picture.size, preprocessing)
    scale = width / (box[2] - box[0]), height / (box[3] - box[1])
    if picture.width * scale[0] * picture.height * scale[1] > MOST_PIXELS:
        raise EvoViTError(
            f"{title or 'The image'} has {picture.width} x {picture.height} pixels, too narrow to be resized "
            f"to {width} x {height}; crop it first."
        )
    fill = tuple(round(255 * value) for value in preprocessing["mean"])
    left, top, right, bottom = map(round, box)
    canvas = Image.new("RGB", (max(1, right - left), max(1, bottom - top)), fill if len(fill) == 3 else 0)
    canvas.paste(picture, (-left, -top))
    shrink = max(width, height) / min(SHARP, max(canvas.size))
    seen = canvas.resize(
        (max(1, round(width / shrink)), max(1, round(height / shrink))), Image.Resampling.LANCZOS
    )
    return Photograph(title, picture, seen, transform_of(preprocessing)(picture), box)


def as_photograph(image: Tensor, preprocessing: Mapping[str, Any], title: str = "") -> Photograph:
    """Return an image (3, height, width), prepared already, with a picture of it."""
    mean, std = (torch.tensor(preprocessing[key]).view(-1, 1, 1) for key in ("mean", "std"))
    colours = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    picture = Image.fromarray(colours.numpy())
    times = max(1, SHARP // 2 // max(picture.size))
    seen = picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
    return Photograph(title, picture, seen, image)


def seen_box(size: tuple[int, int], preprocessing: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of what a model sees of a picture; it may lie outside.

    Args:
        size: (width, height) of the picture in pixels.
    """
    _, height, width = preprocessing["input_size"]
    part, mode = preprocessing["crop_pct"], preprocessing["crop_mode"]
    scales = [side / floor(target / part) for side, target in zip(size, (width, height), strict=True)]
    if mode != "squash":
        scales = [max(scales) if mode == "border" else min(scales)] * 2
    spans = []
    for side, target, scale in zip(size, (width, height), scales, strict=True):
        resized = max(1, round(side / scale))
        first = round((resized - target) / 2) if resized >= target else -((target - resized) // 2)
        spans.append((first * side / resized, (first + target) * side / resized))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def open_each(sources: Sequence[Any], preprocessing: Mapping[str, Any], most: int) -> Iterator[Photograph]:
    """Yield photographs one by one: of files, of folders, built-in ones, or images of Pillow.

    Args:
        sources: each a file, a folder, one of `BUILT_IN`, or an image of Pillow.
        most: of each folder, and of the digits.
    """
    for number, source in enumerate(sources):
        if isinstance(source, Image.Image):
            yield prepared(open_picture(source), preprocessing, f"image {number}")
        elif source == "samples":
            for title in SAMPLES:
                yield prepared(sample(title), preprocessing, title)
        elif source == "digits":
            drawn = open_photographs("digits", preprocessing, most)
            for image, title in zip(drawn.images, drawn.titles, strict=True):
                yield as_photograph(image, preprocessing, title)
        else:
            place = as_path(source, "the image")
            inside = (
                [listed.place / name for listed in walk(place) for name in listed.images]
                if place.is_dir()
                else [place]
            )
            if not inside:
                raise EvoViTError(
                    f"{shown(place)} holds no image that Pillow reads; give another folder, or files."
                )
            count = min(most, len(inside))
            for path in (
                inside if len(inside) == 1 else (inside[len(inside) * i // count] for i in range(count))
            ):
                yield prepared(open_picture(path), preprocessing, printable(path.name))


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
            f"The model takes {channels} x {height} x {width} values, but digit scenes are squares of three "
            "colours; give a folder of images."
        )
    scenes = digit_scenes("test", most, size=height, seed=TEST_SEED)
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = (scenes.images * (STD / std) + (MEAN - mean) / std).float()
    return Photographs(images, [f"digit {label}" for label in scenes.labels.tolist()])


def read_samples(preprocessing: Mapping[str, Any]) -> Photographs:
    """Return the two sample photographs of scikit-learn."""
    prepare = transform_of(preprocessing)
    return Photographs(torch.stack([prepare(sample(title)) for title in SAMPLES]), list(SAMPLES))


def sample(title: str) -> Image.Image:
    """Return a sample photograph of scikit-learn, one of `SAMPLES`."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(f"{title}.jpg"))


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
