"""Vision models reduced in their places: the same tokens out, and with nothing reduced the same model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evovit
from evovit.errors import EvoViTError
from tests.hf_hosts import TINY, make_config, make_hf, worst

transformers: Any = pytest.importorskip("transformers", "5.18")

EXACT = 1e-5
IMAGE = 98  # the id of an image token
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
}
KEEPS = {"start_block": 1, "keep_ratio": 1.0}
REDUCES = {"start_block": 1, "stage_length": 2}
MASS = {"selection": "column_mean"}  # for towers without a class token


def _config(name: str, vision: Any, text: Any, **options: Any) -> Any:
    cls = getattr(transformers, name)
    return cls(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=IMAGE, **options)


def make_vlm(name: str) -> tuple[nn.Module, int, dict[str, Any]]:
    """Return a tiny model, how many tokens an image has in its text, and the options its tower needs."""
    t = transformers
    llama, siglip = t.LlamaConfig(**TEXT), t.SiglipVisionConfig(**TINY)
    square = TINY | {"image_size": [32, 32], "patch_size": [8, 8]}
    made = {
        "llava_clip": lambda: (
            t.LlavaForConditionalGeneration,
            _config("LlavaConfig", t.CLIPVisionConfig(**TINY), llama),
            16,
            {},
        ),
        "llava_siglip": lambda: (
            t.LlavaForConditionalGeneration,
            _config(
                "LlavaConfig",
                siglip,
                llama,
                vision_feature_select_strategy="full",
                vision_feature_layer=-1,
            ),
            16,
            MASS,
        ),
        "paligemma": lambda: (
            t.PaliGemmaForConditionalGeneration,
            _config("PaliGemmaConfig", siglip, t.GemmaConfig(**TEXT), projection_dim=32, hidden_size=32),
            16,
            MASS,
        ),
        "gemma3": lambda: (
            t.Gemma3ForConditionalGeneration,
            _config("Gemma3Config", siglip, t.Gemma3TextConfig(**TEXT), mm_tokens_per_image=4),
            4,
            MASS,
        ),
        "idefics3": lambda: (
            t.Idefics3ForConditionalGeneration,
            _config("Idefics3Config", t.Idefics3VisionConfig(**TINY), llama, scale_factor=2),
            4,
            MASS,
        ),
        "smolvlm": lambda: (
            t.SmolVLMForConditionalGeneration,
            _config("SmolVLMConfig", t.SmolVLMVisionConfig(**TINY), llama, scale_factor=2),
            4,
            MASS,
        ),
        "internvl": lambda: (
            t.InternVLForConditionalGeneration,
            _config(
                "InternVLConfig",
                t.InternVLVisionConfig(**square),
                t.Qwen2Config(**TEXT),
                downsample_ratio=0.5,
            ),
            4,
            {},
        ),
    }
    cls, config, count, options = made[name]()
    return make_hf(cls, config), count, options


def question(name: str, count: int) -> dict[str, Any]:
    """Return a text with two images."""
    image = [IMAGE] * count
    ids = torch.tensor([[1, 5, *image, 7, *image, 9, 11]])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["pixel_values"] = pixels[None] if name in ("idefics3", "smolvlm") else pixels
    if name == "gemma3":
        given["token_type_ids"] = (ids == IMAGE).long()
    if name == "paligemma":
        given["token_type_ids"] = (ids != IMAGE).long()
    return given


VLMS = ["llava_clip", "llava_siglip", "paligemma", "gemma3", "idefics3", "smolvlm", "internvl"]


@pytest.mark.parametrize("name", VLMS)
def test_a_tower_in_its_place(name: str) -> None:
    model, count, options = make_vlm(name)
    given, names = question(name, count), set(model.state_dict())
    with torch.no_grad():
        expected: Tensor = model(**given).logits
        for method, kept in (("evo_vit", KEEPS | options), ("tome", {"r": 0})):
            evovit.reduce_tower(model, method, **kept)
            assert (model(**given).logits - expected).abs().max() <= EXACT * expected.abs().max()
            evovit.restore_tower(model)
        sampled = {"blocks": (1,)} | {k: v for k, v in options.items() if k == "selection"}
        for method, fewer in (("evo_vit", REDUCES | options), ("tome", {"r": 3}), ("ats", sampled)):
            reduced = evovit.reduce_tower(model, method, **fewer)
            assert set(model.state_dict()) == names
            found = model(**given).logits
            assert found.shape == expected.shape
            assert (found - expected).abs().max() > 1e-4 * expected.abs().max()
            assert min(t.num_patches for t in reduced.run(torch.zeros(1, 3, 32, 32), record=True).trace) < 16
            evovit.restore_tower(model)
        evovit.reduce_tower(model, "evo_vit", **REDUCES, **options)
        assert (
            model.generate(**given, max_new_tokens=3, do_sample=False).shape[1] >= given["input_ids"].shape[1]
        )
        evovit.restore_tower(model)
        assert torch.equal(model(**given).logits, expected)


def test_padding_of_a_smaller_image_is_seen_by_no_token() -> None:
    model, count, options = make_vlm("idefics3")
    given = question("idefics3", count)
    mask = torch.ones(1, 2, 32, 32, dtype=torch.bool)
    mask[0, 1, 16:] = False
    given["pixel_values"][0, 1, :, 16:] = 0.0
    given["pixel_attention_mask"] = mask
    with torch.no_grad():
        expected = model(**given).logits
        evovit.reduce_tower(model, "evo_vit", **KEEPS, **options)
        assert (model(**given).logits - expected).abs().max() <= EXACT * expected.abs().max()
        evovit.restore_tower(model)
        evovit.reduce_tower(model, "evo_vit", **REDUCES, **options)
        tower, there = model.model.vision_model, mask[0, :, ::8, ::8].contiguous()
        pixels = given["pixel_values"][0]
        seen = tower(pixels, patch_attention_mask=there).last_hidden_state[1, :8]
        loud = pixels.masked_fill(~mask[0, :, None], 100.0)
        again = tower(loud, patch_attention_mask=there).last_hidden_state[1, :8]
        assert (again - seen).abs().max() <= 1e-4 * seen.abs().max()


@pytest.mark.parametrize("mask", ["all", torch.ones(2, 3, 3), torch.ones(2, 16)])
def test_a_mask_that_does_not_fit_is_one_sentence(mask: Any) -> None:
    model, _, options = make_vlm("smolvlm")
    reduced = evovit.reduce_tower(model, "evo_vit", **KEEPS, **options)
    with pytest.raises(EvoViTError, match=r"patch_attention_mask is .* give a tensor \(2, 4, 4\)"):
        reduced(torch.zeros(2, 3, 32, 32), patch_attention_mask=mask)


def test_a_dual_encoder_keeps_its_text() -> None:
    config = make_config(transformers.SiglipConfig)
    model = make_hf(transformers.SiglipModel, config)
    given = {"input_ids": torch.tensor([[3, 4, 2]]), "pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        expected = model(**given)
        evovit.reduce_tower(model, "evo_vit", **KEEPS, **MASS)
        assert worst(expected, model(**given)) <= EXACT


def test_a_reduced_tower_trains_copies_and_pickles() -> None:
    model, count, options = make_vlm("llava_clip")
    given = question("llava_clip", count)
    reduced = evovit.reduce_tower(model.train(), "evo_vit", **REDUCES, **options)
    loss = model(**given, labels=given["input_ids"]).loss
    loss.backward()
    tower = model.model.vision_tower
    assert tower.encoder.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        expected = model(**given).logits
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(**given).logits, expected)
            evovit.restore_tower(again)
        assert torch.equal(model(**given).logits, expected)
    assert reduced.model is tower
    assert not reduced.training


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("evit", {"blocks": (1,)}, r"leaves \d+ of 16 patch tokens, and the model around"),
        ("keep", {"blocks": (1,)}, r"leaves \d+ of 16"),
        ("subsample", {"block": 1}, r"leaves 4 of 16"),
        ("evo_vit", REDUCES | {"preserve": False, "fast_update": False}, r"leaves \d+ of 16"),
        ("evo_vit", REDUCES | {"assisted_head": True}, "parameters of its own"),
        ("dynamic_vit", {"blocks": (1,)}, "parameters of its own"),
    ],
)
def test_methods_that_drop_or_learn_are_refused(method: str, options: dict[str, Any], reason: str) -> None:
    model, *_ = make_vlm("llava_clip")
    with pytest.raises(EvoViTError, match=reason):
        evovit.reduce_tower(model, method, **options)
    assert "forward" not in vars(model.model.vision_tower)


def test_wrong_calls_are_one_sentence() -> None:
    model, *_ = make_vlm("llava_clip")
    with pytest.raises(EvoViTError, match="no reduced tower"):
        evovit.restore_tower(model)
    with pytest.raises(EvoViTError, match="tower is 'eye'; supported .* model.vision_tower"):
        evovit.reduce_tower(model, "evo_vit", tower="eye")
    evovit.reduce_tower(model, "evo_vit", **REDUCES)
    with pytest.raises(EvoViTError, match="reduced already"):
        evovit.reduce_tower(model, "evo_vit", **REDUCES)
    with pytest.raises(EvoViTError, match="it is one itself: use evovit.reduce_tokens"):
        evovit.reduce_tower(make_hf(transformers.ViTModel, make_config(transformers.ViTConfig)))
    with pytest.raises(EvoViTError, match="no supported vision model"):
        evovit.reduce_tower(nn.Linear(2, 2))
    siglip, *_ = make_vlm("llava_siglip")
    with pytest.raises(EvoViTError, match="needs a class token .* choose 'column_mean'"):
        evovit.reduce_tower(siglip, "evo_vit", **REDUCES)


@pytest.mark.slow
def test_every_model_of_images_and_text_is_supported_or_refused_in_a_sentence() -> None:
    """Built without values, where a config alone is enough."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as CLASSES

    supported, refused = set(), set()
    for config_class, found in CLASSES.items():
        for cls in found if isinstance(found, tuple) else (found,):
            try:
                with torch.device("meta"):
                    model = cls(config_class())
            except Exception:  # it needs values, another library or a config of its own
                continue
            try:
                evovit.reduce_tower(model, "tome", r=4)
                supported.add(cls.__name__)
            except EvoViTError:
                refused.add(cls.__name__)
    named = ["LlavaNext", "LlavaOnevision", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "InternVL", "SmolVLM"]
    assert {f"{name}ForConditionalGeneration" for name in named} <= supported
    assert {"MllamaForConditionalGeneration", "Blip2ForConditionalGeneration"} <= refused
