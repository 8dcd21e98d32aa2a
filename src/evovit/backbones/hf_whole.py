"""Any transformers model around one supported vision model: its classes with a head, and PEFT's wrappers.

The host's own forward runs, on a twin of the host whose vision model is replaced by what evovit computes. So
heads, losses and output classes are the host's, and nothing of them is re-stated here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evovit.backbones import adapter, adapter_of
from evovit.backbones.base import Backbone, Road, Stage, expect_class
from evovit.backbones.hf_trunk import HFTrunk, check_version, values, with_part
from evovit.errors import EvoViTError, shown
from evovit.tokens import Tokens

CLASSIFIERS = ("classifier", "cls_classifier")
PLAIN_CLASSIFIERS = ("torch.nn.modules.linear.Linear", "torch.nn.modules.linear.Identity")
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


def unwrapped(host: Any) -> Any:
    """Return a model without the wrapper of PEFT, if it has one."""
    return host.get_base_model() if hasattr(host, "peft_config") else host


class Stand:
    """What stands where the vision model was: hosts of depth call a backbone by another name."""

    def __init__(self, part: Callable[..., Any]) -> None:
        self.forward_with_filtered_kwargs = self.part = part

    def __call__(self, *images: Any, **given: Any) -> Any:
        return self.part(*images, **given)


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
                f"evovit.reduce_tokens(model.{found[0][0]}, ...), or in its place: "
                "evovit.reduce_tower(model, ...)."
            )
        self.path, trunk, known = found[0]
        self.trunk = known(trunk)
        inner = unwrapped(host)
        classifies = any(hasattr(inner, name) for name in CLASSIFIERS)
        self.spec = self.trunk.spec_with(inner.num_labels if classifies else 0)
        self.image_shape = self.trunk.image_shape
        self.has_head = any(hasattr(inner, name) for name in HEADS)
        self.head_reads_grid = not self.has_head  # reconstructs, segments
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
        twin = with_part(self.model, self.path, Stand(part))
        return type(self.model).forward(twin, **arguments)

    def head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or image embeddings; of hosts that answer maps what the trunk pools."""
        if pre_logits or not self.has_head:
            return self.trunk.head(features)
        arguments = {"pixel_values": None, "return_dict": True}
        answer = self.called(lambda *_, **__: self.trunk.wrapped(features), arguments)
        logits: Tensor | None = getattr(answer, "logits", None)
        return values(answer)[0] if logits is None else logits

    def heads_of(self, inner: Any) -> list[str]:
        """Return the names of the classifiers, without PEFT's wrapper; raises where there is none."""
        names = [name for name in (*CLASSIFIERS, "distillation_classifier") if hasattr(inner, name)]
        for name in names:
            expect_class(getattr(inner, name), PLAIN_CLASSIFIERS, f"The host's {name}")
        return names or self.trunk.classifier()  # says that there is none

    def classifier(self) -> Any:
        """Return the host's classifier; of one with a second for a teacher, both."""
        inner = unwrapped(self.model)
        found = tuple(getattr(inner, name) for name in self.heads_of(inner))
        return found if len(found) > 1 else found[0]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the host fresh classifiers, drawn as the host draws its own."""
        if global_pool is not None:
            raise EvoViTError(
                f"global_pool is {shown(global_pool)}, but a host of transformers pools as its class does; "
                "leave it out."
            )
        inner = unwrapped(self.model)
        names, like = self.heads_of(inner), next(p for p in inner.parameters() if p.is_floating_point())
        config = copy.deepcopy(inner.config)
        config.num_labels = num_classes
        with torch.device("meta"):
            fresh = type(inner)(config)
        for name in names:
            part = getattr(fresh, name).to_empty(device=like.device).to(like.dtype)
            part.apply(inner._init_weights)
            setattr(inner, name, part.train(inner.training))
        inner.num_labels = inner.config.num_labels = num_classes
        self.spec = self.trunk.spec_with(num_classes)

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
