"""One photograph, dense and reduced: what is kept, merged and answered is what the models do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

import evovit
from evovit import EvoViTError, ReducedViT
from evovit.data.photographs import open_each, open_picture, prepared, sample
from evovit.engines.exporting import preprocessing_of
from evovit.hosts.names import class_names
from evovit.look import class_name, groups_of, look_at
from evovit.visualize import DIM, GREY, heat, overlay, sheet
from tests.conftest import make_host

PREPARE: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "mean": (0.2, 0.3, 0.4),
    "std": (0.5, 0.5, 0.6),
    "interpolation": "bicubic",
    "crop_pct": 0.8,
    "crop_mode": "center",
}


def reduced(method: str, host: str = "vit", **options: Any) -> ReducedViT:
    return evovit.reduce_tokens(make_host(host), method, **options)


def colours(picture: Image.Image) -> Tensor:
    return torch.from_numpy(numpy.array(picture)).float()


def test_a_look_is_what_the_models_do() -> None:
    model = reduced("evit", blocks=(1,), keep_ratio=0.5)
    photograph = prepared(sample("china"), PREPARE, "china")
    look = look_at(model.model, model, photograph, ["ant, insect", "bee"])
    images = photograph.image[None]
    trace = model.run(images, record=True).trace
    assert [block.tokens for block in look.blocks] == [16, 9, 9, 9]  # 8 kept and the fused one
    for block, tokens in zip(look.blocks, trace, strict=True):
        kept = {place for place in tokens.index[0].tolist() if place >= 0}
        assert {*block.kept.flatten().nonzero().flatten().tolist()} == kept and block.groups is None
    with torch.no_grad():
        for answer, vector in ((look.dense, model.model(images)[0]), (look.reduced, model(images)[0])):
            assert torch.equal(answer.vector, vector)
            assert [guess.number for guess in answer.top] == vector.argsort(descending=True).tolist()
            assert answer.top[0].share == pytest.approx(float(vector.softmax(0).max()))
    assert {guess.name for guess in look.dense.top} == {"ant", "bee", "class 2", "class 3", "class 4"}
    assert look.agrees == (look.dense.top[0].number == look.reduced.top[0].number)
    assert look.cost.dense_gmacs == evovit.gmacs(model.model, (3, 32, 32)) > look.cost.gmacs
    assert look.cost.ms is None and look.method == "evit keep_ratio=0.5 blocks=(1,)"
    assert look.blocks[1].score is not None and look.blocks[2].score is None


def test_merged_patches_are_groups_named_by_their_first_cell() -> None:
    model = reduced("tome", r=3)
    photograph = prepared(sample("china"), PREPARE)
    for block, tokens in zip(
        look_at(model.model, model, photograph).blocks,
        model.run(photograph.image[None], record=True).trace,
        strict=True,
    ):
        source = tokens.carry.source[0]
        assert block.groups is not None
        names = block.groups.flatten()
        assert len({*names.tolist()}) == block.tokens == tokens.num_patches
        for cell, name in enumerate(names.tolist()):
            assert name == min(other for other in range(16) if source[other] == source[cell])
    assert groups_of(torch.tensor([0, 2, 1])) is None
    assert groups_of(torch.tensor([4, -1, 4, 0])).tolist() == [0, -1, 0, 3]  # type: ignore[union-attr]


def test_tokens_without_places_are_told_from_kept_ones() -> None:
    look = look_at(make_host("vit"), reduced("sit", blocks=(1,)), prepared(sample("flower"), PREPARE))
    assert [block.has_places for block in look.blocks] == [True, False, False, False]
    assert look.blocks[1].draw(look.photograph.seen).tobytes() == look.photograph.seen.tobytes()


def test_times_are_of_both_in_this_run() -> None:
    model = reduced("evo_vit", start_block=1, stage_length=3)
    cost = look_at(model.model, model, prepared(sample("china"), PREPARE), rounds=3).cost
    assert cost.dense_ms and cost.ms and cost.speedup and cost.verdict
    assert "1 thread, float32, batch 1, eager PyTorch, 3 rounds" in cost.conditions
    assert any("only 3 rounds" in note for note in cost.notes)


def test_a_model_that_classifies_nothing_is_compared_by_its_features() -> None:
    host = make_host("vit_avg")
    host.reset_classifier(0)
    same = look_at(host, evovit.reduce_tokens(host, "dense"), prepared(sample("china"), PREPARE))
    assert same.dense.top == () and same.agrees and same.similarity == pytest.approx(1)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(128, 128), (128, 96)])
def test_what_is_drawn_on_is_what_the_model_sees(mode: str, size: tuple[int, int]) -> None:
    prepare = PREPARE | {"crop_mode": mode, "input_size": (3, *size)}
    photograph = prepared(sample("china"), prepare)
    mean, std = (torch.tensor(PREPARE[key]).view(-1, 1, 1) for key in ("mean", "std"))
    seen = photograph.seen.resize(size[::-1], Image.Resampling.LANCZOS)
    difference = photograph.image * std + mean - colours(seen).permute(2, 0, 1) / 255
    assert difference.abs().mean() < 0.03
    shifted = photograph.image.roll(2, 2) * std + mean - colours(seen).permute(2, 0, 1) / 255
    assert shifted.abs().mean() > 2 * difference.abs().mean()


def test_pictures_are_upright_whatever_their_kind(tmp_path: Path) -> None:
    turned = Image.new("RGB", (4, 2), "red")
    turned.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = open_picture(tmp_path / "turned.png")
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (0, 0, 255)
    for number, kind in enumerate(("L", "P", "RGBA", "CMYK", "1", "I;16", "LA")):
        Image.new(kind, (5, 3)).save(tmp_path / f"{number}.tiff")
        assert open_picture(tmp_path / f"{number}.tiff").mode == "RGB"
    titles = [photograph.title for photograph in open_each([tmp_path], PREPARE, 3)]
    assert len(titles) == 3 and titles[0] == "0.tiff"


def test_broken_huge_and_missing_pictures_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:400])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "drawn.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    Image.new("1", (20_000, 9_000)).save(tmp_path / "huge.png")
    Image.new("1", (1, 9_000)).save(tmp_path / "thin.png")
    for name, told in (
        ("cut.jpg", "cannot be read"),
        ("text.jpg", "is not an image that Pillow reads"),
        ("drawn.jpg", "is not an image that Pillow reads"),
        ("huge.png", "is larger than 150 million pixels"),
        ("missing.jpg", "There is no file"),
    ):
        with pytest.raises(EvoViTError, match=told):
            open_picture(tmp_path / name)
    monkeypatch.setattr("evovit.data.photographs.MOST_PIXELS", 100_000)
    with pytest.raises(EvoViTError, match="1 x 9000 pixels, too narrow"):
        prepared(open_picture(tmp_path / "thin.png"), PREPARE)
    with pytest.raises(EvoViTError, match="is larger than"):
        open_picture(sample("china"))


def test_digits_are_drawn_as_the_model_takes_them() -> None:
    first, second = open_each(["digits"], PREPARE, 2)
    drawn = evovit.digit_scenes("test", 2, size=32, seed=2**40)
    mean, std = (torch.tensor(PREPARE[key]).view(-1, 1, 1) for key in ("mean", "std"))
    assert torch.allclose(first.image * std + mean, drawn.images[0] * 0.25 + 0.5, atol=1e-6)
    assert second.title == f"digit {drawn.labels[1]}" and second.seen.size == (448, 448)


def test_classes_have_names_where_a_host_or_its_data_set_tells() -> None:
    assert class_names(timm.create_model("test_vit"))[1] == "goldfish, Carassius auratus"
    assert class_names(make_host("vit")) == []
    for named in (["ant", "bee"], ["LABEL_0", "LABEL_1"]):
        config = SimpleNamespace(id2label=dict(enumerate(named)), num_labels=2)
        assert class_names(SimpleNamespace(config=config)) == (named if named[0] == "ant" else [])
    names = preprocessing_of(timm.create_model("test_vit", num_classes=7))["class_names"]
    assert names == [] and class_name(names, 6) == "class 6"
    assert class_name(["tench, Tinca tinca"], 0) == "tench"


def test_an_overlay_darkens_what_is_not_kept_and_nothing_where_no_token_has_a_place() -> None:
    picture = Image.new("RGB", (8, 8), (40, 80, 120))
    drawn = colours(overlay(picture, torch.tensor([[True, False], [False, True]])))
    assert drawn[0, 0].tolist() == [40, 80, 120] == drawn[7, 7].tolist()
    assert drawn[0, 7].mean() == pytest.approx(DIM * 80, abs=1) and drawn[0, 7].max() < 30
    assert overlay(picture, torch.zeros(2, 2).bool()).tobytes() == picture.tobytes()


def test_a_group_has_the_mean_colour_of_its_patches_and_an_outline() -> None:
    values = torch.tensor([[10, 30], [90, 200]]).repeat_interleave(8, 0).repeat_interleave(8, 1)
    picture = Image.fromarray(values.to(torch.uint8).numpy()).convert("RGB")
    drawn = colours(overlay(picture, torch.ones(2, 2).bool(), torch.tensor([[0, 0], [2, -1]])))
    assert drawn[4, 4].tolist() == drawn[4, 12].tolist() == [20, 20, 20]
    assert drawn[12, 4].tolist() == [90, 90, 90] and drawn[12, 12].tolist() == pytest.approx([50] * 3, abs=1)
    assert drawn[4, 7].tolist() == drawn[4, 8].tolist() == [20, 20, 20]  # no line within the group
    assert drawn[8, 4].tolist() not in ([20, 20, 20], [90, 90, 90])


def test_a_heat_map_grows_brighter_with_the_score_and_is_grey_without() -> None:
    picture = Image.new("RGB", (8, 8), (128, 128, 128))
    drawn = colours(heat(picture, torch.tensor([[0.0, 1.0], [3.0, torch.nan]]))).mean(2)
    assert drawn[0, 0] < drawn[0, 7] < drawn[7, 0]
    assert drawn[7, 7] == GREY
    assert colours(heat(picture, torch.full((2, 2), torch.nan)))[0, 0].tolist() == [GREY] * 3


def test_a_sheet_has_room_for_every_tile_and_a_long_title() -> None:
    tiles = [Image.new("RGB", (30, 20), colour) for colour in ("red", "lime", "blue")]
    whole = sheet(tiles, ["a", "b" * 99, "c"], columns=2, side=60)
    shown = colours(whole)
    for colour in ([255, 0, 0], [0, 255, 0], [0, 0, 255]):
        assert (shown == torch.tensor(colour).float()).all(2).sum() == 60 * 40
