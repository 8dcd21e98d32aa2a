"""Tiny models of transformers, random weights, every parameter disturbed; no network is asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import disturb

SIZE = 32  # pixels of a tiny image: 4 x 4 patches
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "projection_size": 32,
    "project_dim": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {  # by the folder of transformers: what a config needs besides TINY
    "vit": {},
    "deit": {},
    "vit_msn": {},
    "ijepa": {},
    "vit_mae": {"mask_ratio": 0.0},
    "dinov2": {"use_swiglu_ffn": True, "drop_path_rate": 0.1, "layerscale_value": 0.5},
    "dinov2_with_registers": {"num_register_tokens": 2},
    "dinov3_vit": {"num_register_tokens": 2, "use_gated_mlp": True, "pos_embed_rescale": 2.0},
    "beit": {
        "use_relative_position_bias": True,
        "use_shared_relative_position_bias": True,
        "use_absolute_position_embeddings": True,
        "layer_scale_init_value": 0.1,
        "drop_path_rate": 0.1,
        "out_indices": [1, 2, 3, 4],
    },
    "clip": {},
    "metaclip_2": {},
    "altclip": {},
    "chinese_clip": {},
    "siglip": {},
    "siglip2": {"num_patches": 16},
    "internvl": {"use_qk_norm": True, "norm_type": "rms_norm", "use_absolute_position_embeddings": True},
    "idefics3": {},
    "smolvlm": {},
}


def make_config(cls: Any, **options: Any) -> Any:
    """Return a tiny config of a class; one of two towers gets a tiny one for each."""
    family = cls.__module__.split(".")[2]
    vision = TINY | FAMILIES.get(family, {}) | options
    parts = getattr(cls, "sub_configs", {})
    if not parts:
        return cls(**({"num_labels": 5} | vision))
    small = {"text_config": TEXT, "vision_config": vision}
    return cls(**{name: small[name] for name in parts if name in small}, num_labels=5)


def make_hf(cls: Any, config: Any) -> nn.Module:
    """Return a tiny disturbed model, in evaluation mode."""
    torch.manual_seed(0)
    return disturb(cls(config)).eval()


def inputs_of(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return images as the arguments of a host: SigLIP2 takes patches, MAE the order of its patches."""
    from evovit.model import backbone_of

    backbone: Any = backbone_of(model)
    return getattr(backbone, "trunk", backbone).inputs(images)  # type: ignore[no-any-return]


def tensors(answer: Any) -> list[Tensor]:
    """Return every tensor of an answer, in order."""
    if answer is None:
        return []
    parts = answer.values() if isinstance(answer, dict) else answer
    return [answer] if isinstance(answer, Tensor) else [t for part in parts for t in tensors(part)]


def worst(host: Any, ours: Any) -> float:
    """Return the largest difference between two answers, relative to the host's largest value."""
    assert type(host) is type(ours)
    pairs = list(zip(tensors(host), tensors(ours), strict=True))
    return max(
        ((a.float() - b.float()).abs().max() / a.float().abs().max().clamp_min(1e-12)).item()
        for a, b in pairs
    )
