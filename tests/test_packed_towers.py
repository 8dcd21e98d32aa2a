"""Packed towers (Qwen-VL): images of any size one after another, decisions per merge block, windows, taps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evovit
from evovit.backbones import adapt
from evovit.errors import EvoViTError
from evovit.ops.select import keep_rows
from tests.hf_hosts import make_hf, worst

transformers: Any = pytest.importorskip("transformers", "5.18")

EXACT = 1e-5
IMAGE = 98  # the id of an image token
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "intermediate_size": 64,
    "out_hidden_size": 32,
}
OWN: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"embed_dim": 32, "mlp_ratio": 2},
    "Qwen2_5_VL": {"window_size": 16, "fullatt_block_indexes": [1, 3]},
    "Qwen3VL": {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
}
SIZES = torch.tensor([[1, 8, 12], [1, 6, 4]])  # frames, rows, columns of patches: two images
COUNTS = (24, 6)  # their merge blocks
MASS = {"selection": "column_mean"}
KEEPS = MASS | {"start_block": 1, "keep_ratio": 1.0}
REDUCES = MASS | {"start_block": 1, "stage_length": 2}


def make(name: str) -> nn.Module:
    marks = {"image_token_id": IMAGE, "video_token_id": 95, "vision_start_token_id": 97}
    config = getattr(transformers, f"{name}Config")(
        vision_config=VISION | OWN[name], text_config=TEXT, vision_end_token_id=96, **marks
    )
    return make_hf(getattr(transformers, f"{name}ForConditionalGeneration"), config)


def patches(sizes: Tensor, seed: int = 0) -> Tensor:
    count = int(sizes.prod(-1).sum())
    return torch.randn(count, 3 * 2 * 16, generator=torch.Generator().manual_seed(seed))


def question() -> dict[str, Any]:
    """Return a text with two images of different sizes."""
    first, second = ([IMAGE] * count for count in COUNTS)
    ids = torch.tensor([[1, 97, *first, 96, 7, 97, *second, 96, 11]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": SIZES}
    return given | {"pixel_values": patches(SIZES), "mm_token_type_ids": (ids == IMAGE).int()}


@pytest.mark.parametrize("name", OWN)
def test_a_packed_tower_in_its_place(name: str) -> None:
    model, given = make(name), question()
    names = set(model.state_dict())
    with torch.no_grad():
        expected = model(**given).logits
        whole = model.model.visual(given["pixel_values"], grid_thw=SIZES)
        for method, kept in (
            ("evo_vit", KEEPS),
            ("idle_vit", MASS | {"keep_ratio": 1.0}),
            ("tome", {"r": 0}),
        ):
            evovit.reduce_tower(model, method, **kept)
            assert worst(whole, model.model.visual(given["pixel_values"], grid_thw=SIZES)) <= EXACT
            assert (model(**given).logits - expected).abs().max() <= EXACT * expected.abs().max()
            evovit.restore_tower(model)
        fewer = {"evo_vit": REDUCES, "idle_vit": MASS | {"keep_ratio": 0.5}, "tome": {"r": 2}}
        fewer |= {"pitome": {"r": 2}, "ppt": MASS | {"blocks": (1,), "r": 2, "threshold": 1.0}}
        fewer["ats"] = {"selection": "column_mean", "blocks": (1,)}
        for method, options in fewer.items():
            evovit.reduce_tower(model, method, **options)
            found = model.model.visual(given["pixel_values"], grid_thw=SIZES)
            assert [t.shape for t in found.to_tuple() if isinstance(t, Tensor)] == [
                t.shape for t in whole.to_tuple() if isinstance(t, Tensor)
            ]
            assert (found.pooler_output - whole.pooler_output).abs().max() > 1e-4
            assert (
                model.generate(**given, max_new_tokens=2, do_sample=False).shape[1]
                > given["input_ids"].shape[1]
            )
            assert set(model.state_dict()) == names
            evovit.restore_tower(model)
        assert torch.equal(model(**given).logits, expected)


@pytest.mark.parametrize("name", OWN)
def test_merge_blocks_are_parked_whole_and_as_many_as_asked_for(name: str) -> None:
    tower = make(name).model.visual
    reduced = evovit.reduce_tokens(tower, "evo_vit", **REDUCES, fast_update=False)
    backbone: Any = adapt(tower)
    maps = torch.randn(2, backbone.image_shape[0], 2, 8)
    with torch.no_grad():
        _, trace = reduced.blocks(backbone, maps, record=True)
    assert [tokens.num_patches for tokens in trace] == [16, 8, 8, 8]
    before, after = (reduced.method.finish(trace[i]).x for i in (0, 2))
    changed = (before != after).reshape(2, 16, 4, -1).any(-1)  # of each patch of each merge block
    assert torch.equal(changed.all(-1), changed.any(-1))
    assert (changed.all(-1).sum(1) == 8).all()


@pytest.mark.parametrize("name", OWN)
def test_an_image_ignores_its_neighbours_and_frames_are_images(name: str) -> None:
    tower = make(name).model.visual
    given = patches(SIZES)
    with torch.no_grad():
        reduced = evovit.reduce_tokens(tower, "evo_vit", **REDUCES)
        both = reduced(given, grid_thw=SIZES).pooler_output
        alone = reduced(given[96:], grid_thw=SIZES[1:]).pooler_output
        assert (both[24:] - alone).abs().max() <= EXACT * both.abs().max()
        film = torch.tensor([[3, 4, 6]])
        frames = torch.tensor([[1, 4, 6]] * 3)
        shown = patches(film)
        assert worst(reduced(shown, grid_thw=frames), reduced(shown, grid_thw=film)) <= EXACT
        kept = evovit.reduce_tokens(tower, "evo_vit", **KEEPS)
        assert worst(tower(shown, grid_thw=film), kept(shown, grid_thw=film)) <= EXACT


def test_a_tower_of_experts_is_one_too() -> None:
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeVisionConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

    tower = make_hf(Qwen3VLMoeVisionModel, Qwen3VLMoeVisionConfig(**VISION, **OWN["Qwen3VL"]))
    kept = evovit.reduce_tokens(tower, "evo_vit", **KEEPS)
    with torch.no_grad():
        assert worst(tower(patches(SIZES), grid_thw=SIZES), kept(patches(SIZES), grid_thw=SIZES)) <= EXACT


def test_taps_read_the_whole_grid() -> None:
    tower = make("Qwen3VL").model.visual
    reduced = evovit.reduce_tokens(tower, "evo_vit", **REDUCES)
    with torch.no_grad():
        host = tower(patches(SIZES), grid_thw=SIZES)
        ours = reduced(patches(SIZES), grid_thw=SIZES)
    assert [tap.shape for tap in ours.deepstack_features] == [tap.shape for tap in host.deepstack_features]
    near = (ours.deepstack_features[0] - host.deepstack_features[0]).abs().max()
    assert near <= EXACT * host.deepstack_features[0].abs().max()  # tapped before anything waits
    assert not torch.allclose(ours.deepstack_features[1], host.deepstack_features[1])


def test_attention_stays_within_windows_for_those_who_are_left() -> None:
    tower = make("Qwen2_5_VL").model.visual
    backbone: Any = adapt(tower)
    maps = torch.randn(1, backbone.image_shape[0], 4, 6)  # windows of 2 x 2 merge blocks
    with torch.no_grad():
        tokens = backbone.embed(maps)
        block = backbone.stages()[0].blocks[0]
        rows = torch.tensor([[0, 1, 7, 9, 14, 23]])
        few = keep_rows(tokens, rows)
        other = few.with_x(torch.where(torch.tensor([0, 0, 0, 1, 0, 0]).bool()[None, :, None], 9.0, few.x))
        moved = (block(other).x - block(few).x).abs().amax(-1)[0] > 1e-6
    window = (rows[0] // 6 // 2) * 3 + rows[0] % 6 // 2
    assert moved.tolist() == [bool(own == window[3]) for own in window]


def test_what_is_refused() -> None:
    model = make("Qwen3VL")
    tower = model.model.visual
    with pytest.raises(EvoViTError, match=r"leaves \d+ of 64 patch tokens"):
        evovit.reduce_tower(model, "evo_vit", **REDUCES, preserve=False, fast_update=False)
    with pytest.raises(EvoViTError, match="needs a class token"):
        evovit.reduce_tower(model, "evit", blocks=(1,))
    with pytest.raises(EvoViTError, match="leaves 16 of 64 patch tokens"):
        evovit.reduce_tower(model, "subsample", block=1)
    with pytest.raises(EvoViTError, match="leaves 6 of 24 merge blocks"):
        evovit.reduce_tokens(tower, "subsample", block=1)(patches(SIZES), grid_thw=SIZES)
    reduced = evovit.reduce_tokens(tower, "evo_vit", **REDUCES)
    with pytest.raises(EvoViTError, match="cu_seqlens: a reduced Qwen3VLVisionModel cannot take"):
        reduced(patches(SIZES), grid_thw=SIZES, cu_seqlens=torch.tensor([0, 96, 120]))
    with pytest.raises(EvoViTError, match="gives only its taps and its last output"):
        reduced(patches(SIZES), grid_thw=SIZES, output_hidden_states=True)


@pytest.mark.parametrize("name", OWN)
def test_a_merge_block_has_the_mean_length_of_its_patches_keys(name: str) -> None:
    from evovit.ops.score import key_norm

    tower: Any = make(name).model.visual
    backbone: Any = adapt(tower)
    with torch.no_grad():
        tokens = backbone.embed(torch.randn(2, backbone.image_shape[0], 2, 8))
        block = backbone.stages()[0].blocks[1]
        attn, x = tower.blocks[1].attn, tower.blocks[1].norm1(block.patches(tokens.x))
        keys = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))[:, :, 1]  # turning changes no length
        length = keys.norm(dim=-1).mean(-1).unflatten(1, (16, 4)).mean(-1)
        expected = length / length.sum(1, keepdim=True)
        assert torch.allclose(key_norm(block.qkv(tokens), 0), expected, rtol=1e-4)
        for method, options in (("evo_vit", {"start_block": 1}), ("idle_vit", {"keep_ratio": 0.5})):
            evovit.reduce_tower(model := make(name), method, selection="key_norm", **options)
            assert model(**question()).logits.isfinite().all()
    with pytest.raises(EvoViTError, match="selection='probe' needs a head"):
        evovit.reduce_tower(make(name), "evo_vit", start_block=1, selection="probe")


def test_fusing_by_the_map_is_refused_and_by_a_new_one_is_not() -> None:
    """A packed tower mixes the patches of each merge block, for which no map of the method's can stand."""
    model, given = make(next(iter(OWN))), question()
    with torch.no_grad():
        whole = model.model.visual(given["pixel_values"], grid_thw=SIZES).pooler_output
        for ahead in ("recompute", "off"):
            evovit.reduce_tower(model, "mctf", r=0.3, blocks=(1,), ahead=ahead)
            found = model.model.visual(given["pixel_values"], grid_thw=SIZES).pooler_output
            assert found.shape == whole.shape and (found - whole).abs().max() > 1e-4
            evovit.restore_tower(model)
        with pytest.raises(EvoViTError, match="computes attention itself, which packed towers do not allow"):
            evovit.reduce_tower(model, "mctf", r=0.3, blocks=(1,))
