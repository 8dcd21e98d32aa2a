"""What a visitor looks at: their own photograph, or one that comes with a package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from evovit.data.digits import MEAN, STD, digit_scenes
from evovit.data.images import TEST_SEED
from evovit.data.photographs import SAMPLES, Photograph, open_each, open_picture, prepared, sample
from evovit.errors import printable, shown
from evovit.models.small_vit import IMAGE_SIZE
from evovit.visualize import fitted

SCENES, THUMBNAIL = 4, 192  # digit scenes offered; pixels of the longer side


class Picked(NamedTuple):
    """A photograph that is chosen, before a model says how it takes it."""

    title: str
    picture: Image.Image | None  # upright, RGB; None: a digit scene, which is drawn for each model
    number: int = 0  # of the digit scene

    def photograph(self, preprocessing: Mapping[str, Any]) -> Photograph:
        """Return it as a model takes it."""
        if self.picture is not None:
            return prepared(self.picture, preprocessing, self.title)
        return list(open_each(["digits"], preprocessing, SCENES))[self.number]


def uploaded(path: str | Path, name: str) -> Picked:
    """Return a photograph from a file.

    Args:
        name: that it had where it came from.

    Raises:
        EvoViTError: no image that can be read, or a huge one.
    """
    return Picked(printable(name), open_picture(path, shown(name)))


def samples() -> list[Picked]:
    """Return the photographs that come with scikit-learn, and some digit scenes."""
    titles = [f"digit {label}" for label in _scenes().labels.tolist()]
    photographs = [Picked(title, sample(title)) for title in SAMPLES]
    return photographs + [Picked(title, None, number) for number, title in enumerate(titles)]


def first_of(samples: Sequence[Picked], classes: Sequence[str]) -> Picked:
    """Return what a model is shown at first: a digit where its classes are digits, else a photograph."""
    reads_digits = bool(classes) and all(name in "0123456789" for name in classes)
    return next(each for each in samples if (each.picture is None) == reads_digits)


def thumbnail(picked: Picked) -> Image.Image:
    """Return a small picture of what is picked."""
    if picked.picture is not None:
        small = picked.picture.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        return small
    scene = _scenes().images[picked.number] * STD + MEAN
    colours = (scene.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return fitted(Image.fromarray(colours.numpy()), THUMBNAIL)


def _scenes() -> Any:
    """Return scenes as the small ViT of the quickstart sees them; each model gets them at its own size."""
    return digit_scenes("test", SCENES, size=IMAGE_SIZE, seed=TEST_SEED)
