"""transformers' ViT, DeiT, MSN, I-JEPA, ViT-MAE's encoder, DINOv2 (also with registers), InternVL's ViT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from evovit.backbones import adapter
from evovit.backbones.base import Backbone, Road
from evovit.backbones.hf_blocks import full
from evovit.backbones.hf_trunk import HFTrunk
from evovit.errors import EvoViTError
from evovit.ops.select import take


@adapter(*full("vit.ViTModel"))
class HFViT(HFTrunk):
    """View of `ViTModel`."""

    parts = ("embeddings", "layers", "layernorm", "pooler")


@adapter(*full("deit.DeiTModel"))
class HFDeiT(HFViT):
    """View of `DeiTModel`: a class token and a distillation token."""

    num_prefix = 2


@adapter(*full("vit_msn.ViTMSNModel"))
class HFViTMSN(HFViT):
    """View of `ViTMSNModel`."""

    def pooled(self, features: Tensor) -> Tensor | None:
        return None

    def wrapped(self, features: Tensor, hidden: Any = None) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=features, hidden_states=hidden)


@adapter(*full("ijepa.IJepaModel"))
class HFIJepa(HFViT):
    """View of `IJepaModel`: no class token; its pooler, if any, reads the first patch."""

    num_prefix = 0


@adapter(*full("vit_mae.ViTMAEModel"))
class HFViTMAE(HFViT):
    """View of `ViTMAEModel` where nothing is masked; without noise its patches stay in raster order."""

    refused = ("attention_mask",)
    order: Tensor | None = None  # (B, N) int64, of the patches in the answer; None: raster

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if self.config.mask_ratio > 0:
            raise EvoViTError(
                f"The host masks {self.config.mask_ratio:.0%} of its patches at random, which breaks the "
                "grid that methods need; set model.config.mask_ratio = 0."
            )

    def pooled(self, features: Tensor) -> Tensor | None:
        return None

    def inputs(self, images: Tensor) -> dict[str, Any]:
        """Return images with the noise (B, N) under which the host leaves its patches in raster order."""
        noise = torch.arange(math.prod(self.grid_of(images)), device=images.device)
        return {"pixel_values": images, "noise": noise.expand(images.shape[0], -1)}

    def embeddings(self, images: Tensor) -> Tensor:
        noise = self.inputs(images)["noise"]
        x, _, _ = self.model.embeddings(images, noise=noise, interpolate_pos_encoding=self.interpolate)
        return x  # type: ignore[no-any-return]

    def answer_within(self, whole: Backbone, road: Road, images: Tensor, **arguments: Any) -> Any:
        noise = arguments.pop("noise", None)
        self.order = None if noise is None else noise.argsort(1)
        return super().answer_within(whole, road, images, **arguments)

    def reads_grid(self, whole: Backbone) -> bool:
        return super().reads_grid(whole) or self.order is not None

    def ordered(self, x: Tensor) -> Tensor:
        """Return tokens (B, 1 + N, C) in the order that the noise asks for."""
        return x if self.order is None else torch.cat((x[:, :1], take(x[:, 1:], self.order)), 1)

    def wrapped(self, features: Tensor, hidden: Any = None) -> Any:
        from transformers.models.vit_mae.modeling_vit_mae import ViTMAEModelOutput

        place = torch.arange(features.shape[1] - 1, device=features.device).expand(features.shape[0], -1)
        return ViTMAEModelOutput(
            last_hidden_state=self.ordered(features),
            mask=torch.zeros(place.shape, device=features.device),
            ids_restore=place if self.order is None else self.order.argsort(1),
            hidden_states=hidden and tuple(None if x is None else self.ordered(x) for x in hidden),
        )


@adapter(*full("dinov2.Dinov2Model"))
class HFDinov2(HFTrunk):
    """View of `Dinov2Model`."""

    parts = ("embeddings", "encoder", "layernorm")
    stack = "encoder.layer"
    fits_any_size, interpolates = True, False

    def pooled(self, features: Tensor) -> Tensor | None:
        return features[:, 0]


@adapter(*full("dinov2_with_registers.Dinov2WithRegistersModel"))
class HFDinov2WithRegisters(HFDinov2):
    """View of `Dinov2WithRegistersModel`."""

    def count_prefix(self) -> int:
        return 1 + self.config.num_register_tokens  # type: ignore[no-any-return]


@adapter(*full("internvl.InternVLVisionModel"))
class HFInternVL(HFDinov2):
    """View of `InternVLVisionModel`."""

    refused = ("bool_masked_pos",)

    def pooled(self, features: Tensor) -> Tensor | None:
        return None

    def wrapped(self, features: Tensor, hidden: Any = None) -> Any:
        from transformers.models.internvl.modeling_internvl import InternVLVisionModelOutputWithPooling

        return InternVLVisionModelOutputWithPooling(last_hidden_state=features, hidden_states=hidden)
