"""Kept patches: masks follow the trace, shares are counted right, pictures show what is kept."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from evovit import ReducedViT, reduce_tokens
from evovit.visualize import (
    DIM,
    draw_kept,
    draw_side_by_side,
    kept_on_box,
    kept_patches,
    patches_on_box,
    plain,
    several_classes,
    shade,
)


@pytest.fixture
def model() -> ReducedViT:
    torch.manual_seed(0)
    host = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=3)
    return reduce_tokens(host.eval(), "evo_vit", start_block=1, stage_length=2)


def test_masks_are_the_awake_patches_of_each_block(model: ReducedViT) -> None:
    images = torch.randn(3, 3, 16, 16)
    kept = kept_patches(model, images)
    assert kept.shape == (3, 4, 4, 4)
    assert kept.flatten(2).sum(2).tolist() == [[16, 8, 8, 8]] * 3
    for block, tokens in enumerate(model.run(images, record=True).trace):
        for image in range(3):
            awake = {i for i in tokens.index[image].tolist() if i >= 0}
            assert set(kept[image, block].flatten().nonzero().flatten().tolist()) == awake


def test_a_pooled_token_stands_for_all_cells_of_its_window(model: ReducedViT) -> None:
    pooled = reduce_tokens(model.model, "subsample", block=2)
    kept = kept_patches(pooled, torch.randn(2, 3, 16, 16))
    assert kept.shape == (2, 4, 4, 4) and kept.all()


def test_a_fused_token_is_no_kept_patch_though_the_count_fits(model: ReducedViT) -> None:
    """15 of 16 are kept and one is fused: 16 tokens."""
    fused, images = reduce_tokens(model.model, "evit", blocks=(1,), keep=(15,)), torch.randn(3, 3, 16, 16)
    kept = kept_patches(fused, images)
    assert kept.flatten(2).sum(2).tolist() == [[16, 15, 15, 15]] * 3
    for image, index in enumerate(fused.run(images).tokens.index.tolist()):
        assert set(kept[image, 3].flatten().nonzero().flatten().tolist()) == set(index) - {-1}


def test_slots_have_no_place_though_the_count_fits(model: ReducedViT) -> None:
    slimmed = reduce_tokens(model.model, "sit", blocks=(1,), keep_ratio=1.0)
    kept = kept_patches(slimmed, torch.randn(2, 3, 16, 16))
    assert kept[:, 0].all() and not kept[:, 1:].any()


def test_models_side_by_side_are_one_picture_each_and_none_is_dark_without_places() -> None:
    images = torch.rand(2, 3, 8, 8)
    kept = {"some": torch.tensor([[[1, 0], [0, 1]]] * 2).bool(), "slots": torch.zeros(2, 2, 2).bool()}
    panels = draw_side_by_side(images, kept, ["one", "two"]).axes
    assert [panel.get_title() for panel in panels] == ["one", "some", "slots", "two", "", ""]
    shown = torch.from_numpy(panels[2].get_images()[0].get_array().data)
    assert torch.equal(shown, images[0].permute(1, 2, 0))
    darkened = torch.from_numpy(panels[1].get_images()[0].get_array().data)
    assert torch.allclose(darkened[0, 7], images[0, :, 0, 7] * DIM)


def test_images_of_as_many_classes_as_possible_are_chosen() -> None:
    labels = torch.tensor([4, 4, 4, 2, 4, 2, 9])
    assert several_classes(labels, 3) == [0, 3, 6] and several_classes(labels, 5) == [0, 3, 6, 1, 5]
    assert several_classes(labels, 99) == [0, 3, 6, 1, 5, 2, 4]


def test_a_name_in_a_picture_is_short_lines_of_plain_letters() -> None:
    assert plain(r"$\frac$") == r"\$\frac\$"
    assert plain("a\x1bb\nc") == r"a\x1bb c"
    lines = plain("a name " * 40).splitlines()
    assert max(map(len, lines)) <= 24 and sum(map(len, lines)) <= 72 and lines[-1].endswith("...")


def test_a_patch_is_on_the_box_if_its_centre_is() -> None:
    on_box = patches_on_box(torch.tensor([[2.5, 0.0, 8.0, 5.0]]), (2, 4), (8, 16))  # patches of 4 x 4 pixels
    assert on_box.tolist() == [[[False, True, False, False], [False, False, False, False]]]


def test_shares_are_counted_over_images() -> None:
    kept = torch.tensor([[[[1, 1], [0, 0]]], [[[1, 0], [0, 1]]]]).bool()  # 2 images, 1 block
    on_box = torch.tensor([[[1, 0], [0, 0]], [[0, 1], [0, 1]]]).bool()
    (share,) = kept_on_box(kept, on_box)
    assert tuple(share) == (0.75, 0.5, 0.5, 0.375)  # (1 + 1/2) / 2, 2 of 4, 1 of 2 each, (1/4 + 2/4) / 2


def test_images_without_a_patch_on_the_box_are_left_out() -> None:
    kept, on_box = torch.ones(2, 1, 2, 2).bool(), torch.zeros(2, 2, 2).bool()
    on_box[0, 0, 0] = True
    assert kept_on_box(kept, on_box)[0].box == 0.25


def test_shading_darkens_what_is_not_kept() -> None:
    shaded = shade(torch.ones(3, 4, 4), torch.tensor([[True, False], [False, True]]))
    assert shaded[0].tolist() == [[1, 1, DIM, DIM]] * 2 + [[DIM, DIM, 1, 1]] * 2


def test_a_picture_has_a_panel_per_block_and_the_image() -> None:
    figure = draw_kept(torch.rand(2, 3, 16, 16), torch.ones(2, 4, 4, 4).bool(), torch.ones(2, 4), ["a", "b"])
    assert len(figure.axes) == 2 * (4 + 1)
