"""Images: order, augmentation as a function of place, sharing out, damaged files, and the sentences."""

from __future__ import annotations

import json
import os
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from evovit.data.images import DigitImages
from evovit.data.pictures import PictureImages, open_images, posterize
from evovit.data.readers import open_reader
from evovit.errors import EvoViTError
from evovit.recipe.reading import parse_recipe
from evovit.recipe.tables import Recipe
from evovit.runtime.world import World
from tests.run.processes import train_here

COLOURS = ((0.5,) * 3, (0.25,) * 3)
CPU = torch.device("cpu")


def write_images(folder: Path, classes: int = 3, each: int = 4) -> Path:
    """Write a tree split/class/image of small JPEGs, every image of one colour of its own."""
    for split in ("train", "val"):
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(each):
                shade = 20 * number + 5
                Image.new("RGB", (40, 30), (shade, 80 * label, 255 - shade)).save(place / f"{number}.jpg")
    return folder


def recipe_for(source: str | Path, **data: Any) -> Recipe:
    model = {
        "name": "vit_tiny_patch16_224",
        "options": {"img_size": 24, "patch_size": 6, "embed_dim": 32, "depth": 2, "num_heads": 2},
    }
    return parse_recipe(
        {
            "model": model,
            "data": {
                "source": str(source),
                "batch_size": 4,
                **({} if source == "digits" else {"workers": 0}),
                **data,
            },
            "learning_rate": {"base": 1e-3, "warm_up_epochs": 1},
            "run": {"epochs": 2, "device": "cpu"},
        }
    )


def read(images: Any, epoch: int = 0, first: int = 0, size: int = 1, accumulate: int = 1) -> list[Any]:
    return [list(images.train(epoch, first, World(rank, size, CPU), accumulate)) for rank in range(size)]


DEIT = {"rand_augment": "rand-m9-mstd0.5-inc1", "erase": 0.5, "repeats": 3}


def test_augmentation_follows_from_the_place_alone(tmp_path: Path) -> None:
    images = open_images(recipe_for(write_images(tmp_path), **DEIT), 24, COLOURS)
    (whole,) = read(images)
    (later,) = read(images, first=1)
    assert len(whole) == 3 and len(later) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[1:], later, strict=True))
    parts = [batch for rank in read(images, size=2) for batch in rank]
    halves = read(images, accumulate=2)[0]
    every = [torch.cat([batch[0] for batch in batches]) for batches in (whole, parts, halves)]
    keys = [sorted(image.flatten().tolist() for image in pile) for pile in every]
    assert keys[0] == keys[1] == keys[2]
    (other,) = read(images, epoch=1)
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(whole, other, strict=True))


def test_augmentation_leaves_the_generators_alone(tmp_path: Path) -> None:
    images = open_images(recipe_for(write_images(tmp_path), mixup=0.8, cutmix=1.0, **DEIT), 24, COLOURS)
    state = torch.random.get_rng_state()
    (batch, targets), *_ = read(images)[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert targets.shape == (4, 3) and torch.allclose(targets.sum(1), torch.ones(4))
    assert batch.shape == (4, 3, 24, 24)


def test_repeated_augmentation_shows_a_third_of_the_images_three_times() -> None:
    images = DigitImages(recipe_for("digits", scenes=12), 24)
    assert sorted(images.order(0)) == list(range(12)) and images.order(0) != images.order(1)
    object.__setattr__(images.recipe.data, "repeats", 3)
    order = images.order(0)
    assert len(order) == 12 and len(set(order)) == 4
    assert all(len(set(order[i : i + 3])) == 1 for i in range(0, 12, 3))


def test_the_strongest_augmentation_works_with_this_pillow(tmp_path: Path) -> None:
    """timm's posterize keeps 0 bits at magnitude 10, which Pillow 13 refuses."""
    strongest = {"rand_augment": "rand-m10-inc1", "flip": 0.0}
    images = open_images(recipe_for(write_images(tmp_path), **strongest), 24, COLOURS)
    for epoch in range(8):
        assert all(batch.isfinite().all() for batch, _ in read(images, epoch)[0])
    assert posterize(Image.new("RGB", (2, 2), "white"), 0).getpixel((0, 0)) == (0, 0, 0)
    assert posterize(Image.new("RGB", (2, 2), (255, 127, 1)), 1).getpixel((0, 0)) == (128, 0, 0)


def test_every_test_image_is_in_exactly_one_process(tmp_path: Path) -> None:
    images = open_images(recipe_for(write_images(tmp_path)), 24, COLOURS)
    shares = [sum(len(y) for _, y in images.test(World(rank, 5, CPU))) for rank in range(5)]
    assert sum(shares) == 12 and max(shares) - min(shares) == 1


def test_reading_for_the_cpu_leaves_cuda_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, a training on the CPU must not open it; batches for it are not pinned."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ((images, labels), *_) = read(open_images(recipe_for(write_images(tmp_path)), 24, COLOURS))[0]
    assert images.shape == (4, 3, 24, 24) and labels.dtype == torch.int64
    assert not torch.cuda.is_initialized()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm keeps tar files open
def test_tar_files_give_the_images_of_the_folder(tmp_path: Path) -> None:
    write_images(tmp_path)
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(tmp_path / split, arcname=".")
    names = {"train_split": "train.tar", "test_split": "val.tar"}
    folder, tar_images = (open_images(recipe_for(tmp_path, **extra), 24, COLOURS) for extra in ({}, names))
    for a, b in zip(folder.test(World(0, 1, CPU)), tar_images.test(World(0, 1, CPU)), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def damage(folder: Path, count: int) -> list[Path]:
    victims = sorted((folder / "train").glob("*/*.jpg"))[:count]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:100])
    return victims


def test_a_corrupt_image_is_reported_by_path_and_counted(tmp_path: Path) -> None:
    victims = damage(write_images(tmp_path / "data"), 2)
    said = train_here(recipe_for(tmp_path / "data"), tmp_path / "run")
    epochs = [json.loads(line) for line in (tmp_path / "run" / "epochs.jsonl").read_text().splitlines()]
    assert epochs[-1]["unreadable"] == sorted(map(str, victims)) and epochs[-1]["test_images"] == 12
    for victim in victims:
        assert said.count(f"unreadable: {victim}") == 1


def test_a_limit_of_corrupt_images_stops_the_run(tmp_path: Path) -> None:
    victims = damage(write_images(tmp_path / "data"), 2)
    with pytest.raises(EvoViTError, match=r"2 images cannot be read, but data.max_corrupt is 1; .*jpg"):
        train_here(recipe_for(tmp_path / "data", max_corrupt=1), tmp_path / "run")
    for victim in victims:
        victim.unlink()
        Image.new("RGB", (40, 30)).save(victim)
    assert "finished" in train_here(recipe_for(tmp_path / "data", max_corrupt=1), tmp_path / "run")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_workers_give_what_one_process_gives(tmp_path: Path) -> None:
    write_images(tmp_path)
    alone, helped = (
        read(open_images(recipe_for(tmp_path, workers=n, **DEIT), 24, COLOURS))[0] for n in (0, 2)
    )
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda folder: folder.rename(folder.with_name("moved")), "nothing is there"),
        (lambda folder: (folder / "val").rename(folder / "test"), r"it holds test, train"),
        (
            lambda folder: (folder / "val" / "class2").rename(folder / "val" / "other"),
            "only in one of them: class2",
        ),
    ],
)
def test_wrong_folders_are_sentences(tmp_path: Path, break_it: Any, sentence: str) -> None:
    folder = write_images(tmp_path / "data")
    break_it(folder)
    with pytest.raises(EvoViTError, match=sentence):
        PictureImages(recipe_for(folder), 24, COLOURS)


@pytest.mark.parametrize(
    "split", ["", ".", "..", "../x", "val/../train", "/", "/etc", "a" * 300, "a/" * 3000]
)
def test_a_split_is_a_sub_folder(split: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    with pytest.raises(EvoViTError, match="not a sub-folder|is not a path"):
        open_reader(str(tmp_path), split)


@pytest.mark.parametrize("split", ["", "*", "tr*", "[a]", "?", "train/..", "a/" * 3000])
def test_a_split_of_shards_is_a_part_of_their_names(split: str, tmp_path: Path) -> None:
    write_shards(tmp_path, "train", [0, 1])
    with pytest.raises(EvoViTError, match="cannot be part of a file's name"):
        open_reader(f"wds/{tmp_path}", split)


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "original-mstd0.5", "v0r", "3a", "augmix-m10-w2-d1-b1"]
)
def test_every_policy_of_timm_augments(policy: str, tmp_path: Path) -> None:
    images = PictureImages(recipe_for(write_images(tmp_path), rand_augment=policy), 24, COLOURS)
    for epoch in range(6):
        assert all(batch[0].isfinite().all() for batch in read(images, epoch)[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("workers", [0, 1 + (os.cpu_count() or 1)])
def test_what_fails_in_a_process_that_reads_is_one_sentence(workers: int, tmp_path: Path) -> None:
    images = PictureImages(recipe_for(write_images(tmp_path), workers=workers), 24, COLOURS)
    assert len(read(images)[0]) == 3  # and nothing is warned of, however few the cores
    images.pictures.transform = fails
    with pytest.raises(EvoViTError) as caught:
        read(images)
    text = str(caught.value)
    assert "cannot be augmented (ValueError: no way)" in text and "Traceback" not in text and len(text) < 300


def fails(image: Any) -> Any:
    raise ValueError("no\nway")


def test_an_empty_folder_and_a_missing_package_are_sentences(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(EvoViTError, match="holds no images"):
        PictureImages(recipe_for(tmp_path), 24, COLOURS)
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(EvoViTError, match="pip install datasets"):
            PictureImages(recipe_for("hfds/cifar10"), 24, COLOURS)


def write_shards(folder: Path, split: str, labels: list[int], broken: bool = False) -> None:
    """Write two shards; each image in one grey of its own, beside it its class number."""
    folder.mkdir(exist_ok=True)
    for shard in range(2):
        with tarfile.open(folder / f"set-{split}-{shard:04d}.tar", "w") as archive:
            for row in range(shard, len(labels), 2):
                picture = BytesIO()
                Image.new("RGB", (40, 30), (20 * row + 5,) * 3).save(picture, "png")
                members = {"png": picture.getvalue(), "json": b"{}"}
                members |= {} if broken and row == 1 else {"cls": str(labels[row]).encode()}
                for kind, content in members.items():
                    info = tarfile.TarInfo(f"deep/er/{row:06d}.{kind}")
                    info.size = len(content)
                    archive.addfile(info, BytesIO(content))


def test_shards_are_read_by_row_like_folders(tmp_path: Path) -> None:
    labels = [2, 0, 1, 2, 1, 0]
    write_shards(tmp_path / "data", "train", labels)
    write_shards(tmp_path / "data", "val", labels[:3])
    reader = open_reader(f"wds/{tmp_path / 'data'}", "train")
    rows = [
        (Image.open(file).getpixel((0, 0))[0], label) for file, label in map(reader.__getitem__, range(6))
    ]  # type: ignore[index]
    order = [0, 2, 4, 1, 3, 5]  # shard by shard
    assert rows == [(20 * i + 5, labels[i]) for i in order]
    assert reader.filename(3) == "set-train-0001.tar:deep/er/000001.png"
    images = open_images(recipe_for(f"wds/{tmp_path / 'data'}"), 24, COLOURS)
    assert images.num_classes == 3 and images.length == 6
    batches = read(images)[0]
    assert sum(targets.shape[0] for _, targets in batches) == 4 and batches[0][0].shape == (4, 3, 24, 24)
    for epoch in (0, 1):  # the label belongs to the picture: grey tells the row
        for pictures, targets in read(images, epoch)[0]:
            greys = ((pictures * 0.25 + 0.5) * 255).mean((1, 2, 3))
            assert targets.tolist() == [labels[round((float(grey) - 5) / 20)] for grey in greys]


@pytest.mark.parametrize(
    ("splits", "sentence"), [((), "holds no shard"), (("train",), "without a class number")]
)
def test_wrong_shards_are_refused_in_a_sentence(
    splits: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    for split in splits:
        write_shards(tmp_path, split, [0, 1, 2], broken=True)
    with pytest.raises(EvoViTError, match=sentence):
        open_reader(f"wds/{tmp_path}", "train")


def test_a_cut_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", [0, 1, 2, 0])
    shard = tmp_path / "set-train-0000.tar"
    shard.write_bytes(shard.read_bytes()[:1700])
    with pytest.raises(EvoViTError, match=r"set-train-0000\.tar.*cannot be read"):
        open_reader(f"wds/{tmp_path}", "train")


def test_every_format_that_pillow_reads_is_a_class_of_its_own(tmp_path: Path) -> None:
    for kind in ("webp", "bmp", "tiff", "gif", "JPG"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "train" / kind / f"a.{kind}")
    reader = open_reader(str(tmp_path), "train")
    assert list(reader.class_to_idx) == ["bmp", "gif", "JPG", "tiff", "webp"]
    images = open_images(recipe_for(tmp_path, test_split="train"), 24, COLOURS)
    assert sum(len(labels) for _, labels in images.test(World(0, 1, CPU))) == 5 and not images.unreadable


def test_sixteen_bits_are_scaled_not_white(tmp_path: Path) -> None:
    (tmp_path / "val" / "grey").mkdir(parents=True)
    levels = (numpy.linspace(0, 1, 64)[:, None] * numpy.ones(64) * 65535).astype(numpy.uint16)
    Image.fromarray(levels).save(tmp_path / "val" / "grey" / "deep.png")
    Image.fromarray((levels // 257).astype(numpy.uint8)).save(tmp_path / "val" / "grey" / "plain.png")
    images = open_images(recipe_for(tmp_path, batch_size=1, train_split="val"), 24, COLOURS)
    ((batch, _),) = images.test(World(0, 1, CPU))
    assert torch.equal(batch[0], batch[1]) and batch[0].std() > 0.5


@pytest.mark.parametrize("odd", ["fifo", "loop", "socket name", "nowhere"])
def test_odd_things_among_the_images_neither_hang_nor_end(odd: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    place = tmp_path / "train" / "class0"
    if odd == "fifo":
        os.mkfifo(place / "pipe.jpg")
    elif odd == "loop":
        (place / "again").symlink_to(tmp_path / "train")
    elif odd == "nowhere":
        (place / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    else:
        (Path(os.fsdecode(bytes(place) + b"/\xff\xfe.jpg"))).write_bytes(b"no image")
    images = open_images(recipe_for(tmp_path), 24, COLOURS)
    whole = [batch for batches in read(images) for batch in batches]
    assert len(whole) == 3
    broken = odd in ("nowhere", "socket name")
    assert len(images.unreadable) == broken
    print(list(images.unreadable))  # can be printed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda train: Image.new("RGB", (9, 9)).save(train / "stray.png"), "holds images beside its class"),
        (lambda train: (train / "notes").mkdir() or (train / "notes" / "a.heic").write_text(""), "a.heic"),
    ],
)
def test_a_class_never_vanishes_in_silence(change: Any, sentence: str, tmp_path: Path) -> None:
    write_images(tmp_path)
    change(tmp_path / "train")
    with pytest.raises(EvoViTError, match=sentence):
        open_reader(str(tmp_path), "train")


@pytest.mark.parametrize("content", [b"1000000000000", b"9" * 5000, b"-1", b"cat", b"\xff"])
def test_a_giant_or_foreign_class_number_in_a_shard_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data-train-0.tar", "w") as archive:
        for name, data in (("0.jpg", b"x"), ("0.cls", content)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    with pytest.raises(EvoViTError, match="cannot be read"):
        open_reader(f"wds/{tmp_path}", "train")


def test_a_damaged_tar_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "train.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(EvoViTError, match="cannot be read as a tar file"):
        open_reader(str(tmp_path), "train.tar")


def test_the_order_is_that_of_timms_reader(tmp_path: Path) -> None:
    """So that a training of before goes on with the same bits."""
    for name in ("b/img10", "b/img2", "a/x/img1", "a/Img3", "c 2/y", "c 10/z"):
        path = tmp_path / "train" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    ours, theirs = open_reader(str(tmp_path), "train"), ReaderImageFolder(str(tmp_path / "train"))
    assert ours.class_to_idx == theirs.class_to_idx
    assert [(str(path), label) for path, label in ours.samples] == theirs.samples
    assert [ours.filename(row) for row in range(6)] == [theirs.filename(row) for row in range(6)]
