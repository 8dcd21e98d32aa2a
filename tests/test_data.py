"""Digit scenes: what is held out stays held out, a seed decides everything, the box is the digit's."""

import pytest
import torch

from evovit.data.digits import SOURCE_SIZE, Scenes, _enlarge, _ink_boxes, colours, digit_scenes, digits
from evovit.errors import EvoViTError


def test_splits_share_no_source_digit() -> None:
    train, test = set(digits("train").source.tolist()), set(digits("test").source.tolist())
    assert not train & test
    assert train | test == set(range(1797))


def test_scenes_come_from_their_split_alone() -> None:
    for split in ("train", "test"):
        assert set(digit_scenes(split, 300).source.tolist()) <= set(digits(split).source.tolist())


def test_a_scene_has_the_label_of_its_source() -> None:
    from sklearn.datasets import load_digits

    scenes = digit_scenes("train", 64)
    assert scenes.labels.tolist() == load_digits().target[scenes.source.numpy()].tolist()


def test_equal_seeds_give_equal_scenes_and_others_do_not() -> None:
    first, again, other = (digit_scenes("train", 300, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.images, other.images)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    digit_scenes("train", 4)
    assert torch.equal(before, torch.get_rng_state())


def test_shapes_and_types() -> None:
    scenes = digit_scenes("test", 5, size=40)
    assert scenes.images.shape == (5, 3, 40, 40) and scenes.images.dtype == torch.float32
    assert scenes.labels.shape == (5,) and scenes.labels.dtype == torch.int64
    assert scenes.boxes.shape == (5, 4)
    assert colours(scenes.images).min() >= 0 and colours(scenes.images).max() <= 1


def test_boxes_lie_on_the_canvas() -> None:
    boxes = digit_scenes("train", 500, size=48).boxes
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 48 + 1e-4).all()
    assert (boxes[:, 2:] - boxes[:, :2] > 2).all()


def test_the_box_holds_the_ink_and_its_edges_touch_it() -> None:
    ink = torch.zeros(1, SOURCE_SIZE, SOURCE_SIZE)
    ink[0, 2:5, 3] = 1  # rows 2 to 4, column 3
    corner, side = torch.tensor([[10.0, 4.0]]), torch.tensor([16.0])  # left, top; 2 pixels per source pixel
    box = _ink_boxes(ink, corner, side)
    assert box.tolist() == [[16.0, 8.0, 18.0, 14.0]]
    drawn = _enlarge(ink, corner, side, 32)[0] > 0.5
    rows, columns = drawn.nonzero().unbind(1)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (8, 14, 16, 18)


def test_without_fragments_all_bright_pixels_lie_in_the_box() -> None:
    scenes: Scenes = digit_scenes("test", 50, size=48, num_fragments=0)
    bright = colours(scenes.images).mean(1) > 0.72  # background 0.4 at most, noise 0.06
    for shown, box in zip(bright, scenes.boxes, strict=True):
        rows, columns = shown.nonzero().unbind(1)
        left, top, right, bottom = box.tolist()
        assert ((columns + 1 > left) & (columns < right) & (rows + 1 > top) & (rows < bottom)).all()


def test_the_mask_is_the_digits_ink_and_lies_in_its_box() -> None:
    scenes = digit_scenes("test", 300, size=48, num_fragments=0)
    assert scenes.masks.shape == (300, 48, 48) and scenes.masks.dtype == torch.bool
    bright = colours(scenes.images).mean(1) > 0.55  # background 0.3, ink 0.6 to 1, noise 0.06
    overlap = (bright & scenes.masks).flatten(1).sum(1) / (bright | scenes.masks).flatten(1).sum(1)
    assert overlap.mean() > 0.7
    for mask, box in zip(scenes.masks, scenes.boxes, strict=True):
        rows, columns = mask.nonzero().unbind(1)
        left, top, right, bottom = box.tolist()
        assert left <= columns.min() + 1 and columns.max() <= right
        assert top <= rows.min() + 1 and rows.max() <= bottom


@pytest.mark.parametrize(
    "bad", [{"num_scenes": 0}, {"size": 8}, {"num_fragments": -1}, {"split": "validation"}]
)
def test_wrong_arguments_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(EvoViTError):
        digit_scenes(**{"split": "train", "num_scenes": 4, **bad})


def test_scenes_that_do_not_fit_into_memory_are_refused_before_any_is_drawn() -> None:
    with pytest.raises(EvoViTError, match="do not fit into memory; draw fewer"):
        digit_scenes("train", 100_000_000, size=4096)
