"""transformers' backbones for dense tasks: DINOv2, also with registers, and DINOv3. They answer feature maps.

The host's own forward makes the maps, on a twin whose encoder is what evovit computes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from evovit.backbones import adapter
from evovit.backbones.base import Backbone, Road
from evovit.backbones.hf_blocks import full
from evovit.backbones.hf_dinov3 import HFDINOv3
from evovit.backbones.hf_trunk import HFTrunk, with_part
from evovit.backbones.hf_vit import HFDinov2, HFDinov2WithRegisters


class Features(HFTrunk):
    """What the three share: every hidden state is read, so a method has to keep the grid."""

    def host_features(self, images: Tensor) -> Tensor:
        states = self.model(images, output_hidden_states=True, return_dict=True).hidden_states
        return self.norm(states[-1])

    def answer_within(self, whole: Backbone, road: Road, images: Tensor, **arguments: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        self.refuse(arguments)
        _, trace = road.blocks(whole, self.suited(images), record=True)
        states = self.hidden_states([road.method.finish(after) for after in trace], True)

        def encoder(*_: Any, **__: Any) -> Any:
            return BaseModelOutput(last_hidden_state=states[-1], hidden_states=states)

        twin = with_part(self.model, self.stack.partition(".")[0], encoder)
        return type(self.model).forward(twin, pixel_values=images, **arguments)


@adapter(*full("dinov2.Dinov2Backbone"))
class HFDinov2Features(Features, HFDinov2):
    """View of `Dinov2Backbone`."""


@adapter(*full("dinov2_with_registers.Dinov2WithRegistersBackbone"))
class HFDinov2WithRegistersFeatures(Features, HFDinov2WithRegisters):
    """View of `Dinov2WithRegistersBackbone`."""


@adapter(*full("dinov3_vit.DINOv3ViTBackbone"))
class HFDINOv3Features(Features, HFDINOv3):
    """View of `DINOv3ViTBackbone`."""
