"""Any transformers model around one supported vision model: its classes with a head, and PEFT's wrappers.

The host's own forward runs, on a twin of the host whose vision model is replaced by what evovit computes. So
heads, losses and output classes are the host's, and nothing of them is re-stated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from evovit.backbones import adapter, adapter_of
from evovit.backbones.base import Backbone, Road, Stage
from evovit.backbones.hf_trunk import HFTrunk, check_version, values, with_part
from evovit.errors import EvoViTError
from evovit.tokens import Tokens

CLASSIFIERS = ("classifier", "cls_classifier")
HEADS = (*CLASSIFIERS, "visual_projection")  # parts that give one vector an image, (B, ...)
CLASS_TOKEN_HEADS = (  # heads that read prefix tokens alone
    *("ViTForImageClassification", "ViTMSNForImageClassification"),
    *("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
)


def find_trunks(model: nn.Module) -> list[tuple[str, nn.Module, type[HFTrunk]]]:
    """Return (path, module, adapter) of the supported vision models inside a model."""
    found = []
    for path, module in model.named_modules():
        known = adapter_of(type(module))
        if path and known is not None and issubclass(known, HFTrunk):
            found.append((path, module, known))
    return found


@adapter("transformers.modeling_utils.PreTrainedModel", "peft.peft_model.PeftModel")
class HFWhole(Backbone):
    """View of a model that takes images alone and holds one supported vision model."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        self.model = host = model  # type: Any
        name = type(host).__name__
        found = find_trunks(host)
        if not found:
            check_version(host)
            raise EvoViTError(
                f"{name} of transformers holds no vision model that evovit supports; evovit.list_hosts() "
                "names those it does, and docs/adding_a_backbone.md says how to add one."
            )
        if len(found) > 1 or getattr(host, "main_input_name", "") != "pixel_values":
            raise EvoViTError(
                f"{name} reads more than images; reduce its vision model alone, "
                f"evovit.reduce_tokens(model.{found[0][0]}, ...)."
            )
        self.path, trunk, known = found[0]
        self.trunk = known(trunk)
        inner = host.get_base_model() if hasattr(host, "peft_config") else host  # without PEFT's wrapper
        classifies = any(hasattr(inner, name) for name in CLASSIFIERS)
        self.spec = self.trunk.spec_with(inner.num_labels if classifies else 0)
        self.image_shape = self.trunk.image_shape
        self.has_head = any(hasattr(inner, name) for name in HEADS)
        self.head_reads_patches = type(inner).__name__ not in CLASS_TOKEN_HEADS

    def takes(self, height: int, width: int) -> bool:
        return self.trunk.takes(height, width)

    def embed(self, images: Tensor) -> Tokens:
        return self.trunk.embed(images)

    def stages(self) -> Sequence[Stage]:
        return self.trunk.stages()

    def norm(self, x: Tensor) -> Tensor:
        return self.trunk.norm(x)

    def called(self, part: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Return the answer of the host's own forward, with `part` in place of its vision model."""
        return type(self.model).forward(with_part(self.model, self.path, part), **arguments)

    def head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or image embeddings; of hosts that answer maps what the trunk pools."""
        if pre_logits or not self.has_head:
            return self.trunk.head(features)
        arguments = {"pixel_values": None, "return_dict": True}
        answer = self.called(lambda *_, **__: self.trunk.wrapped(features), arguments)
        logits: Tensor | None = getattr(answer, "logits", None)
        return values(answer)[0] if logits is None else logits

    def answer(self, road: Road, images: Tensor, **arguments: Any) -> Any:
        def part(pixel_values: Tensor, **given: Any) -> Any:
            return self.trunk.answer_within(self, road, pixel_values, **given)

        return self.called(part, self.trunk.inputs(images) | arguments)

    def host_answer(self, images: Tensor) -> Any:
        return self.model(**self.trunk.inputs(images), return_dict=True)

    def host_features(self, images: Tensor) -> Tensor:
        return self.trunk.host_features(images)

    def values(self, answer: Any) -> list[Any]:
        return values(answer)

    def bypassed(self) -> Iterator[nn.Module]:
        yield self.model
        yield from self.trunk.bypassed()

    def check_structure(self) -> None:
        self.trunk.check_structure()
