"""What transformers' bare vision models share: the view of one, and its answer in the host's own class.

Checked with transformers 5.18 to 5.24; version 4 and the first of 5 nest their blocks in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from evovit.backbones.base import (
    Backbone,
    BackboneSpec,
    Road,
    Stage,
    class_path,
    expect_class,
    expect_parts,
    raster_tokens,
)
from evovit.backbones.hf_blocks import BLOCKS, HFBlock
from evovit.errors import EvoViTError, shown
from evovit.tokens import Tokens

OLDEST = (5, 18)  # of transformers
IMPLEMENTATIONS = ("eager", "sdpa")  # of attention: the softmax that `mixed_values` computes


def pair(size: Any) -> tuple[int, int]:
    """Return a config's size as (rows, columns)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def check_version(host: nn.Module) -> None:
    """Raise `EvoViTError` for a host of a transformers that nests its blocks in another way."""
    import transformers

    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST:
        raise EvoViTError(
            f"This {type(host).__name__} is of transformers {transformers.__version__}, and evovit supports "
            f"{'.'.join(map(str, OLDEST))} and later; use pip install 'evovit[hf]'."
        )


class HFTrunk(Backbone):
    """View of a bare vision model: embeddings, a stack of blocks, a norm, perhaps a pooler."""

    model: Any
    parts: ClassVar[tuple[str, ...]]  # children and parameters the host may hold
    stack: ClassVar[str] = "layers"  # where its blocks are
    norm_name: ClassVar[str | None] = "layernorm"  # None: features are not normed
    num_prefix: ClassVar[int] = 1
    fits_any_size: ClassVar[bool] = False  # without being asked to interpolate positions
    interpolates: ClassVar[bool] = True  # takes the argument interpolate_pos_encoding
    refused: ClassVar[tuple[str, ...]] = ("bool_masked_pos", "attention_mask")  # arguments of the host's
    views: ClassVar[dict[str, type[HFBlock]]] = BLOCKS
    head_reads_patches = True  # the answer itself holds every token

    def __init__(self, model: nn.Module) -> None:
        self.model = host = model  # type: Any
        if not torch.compiler.is_compiling():
            check_version(host)
        self.config: Any = host.config
        self.interpolate = False  # positions to the size of the images
        self.embedded: Tensor | None = None  # (B, P + N, C), what entered the first block last
        for number, block in enumerate(self.layers):
            expect_class(block, self.views, f"Block {number}")
        self.patch_size = pair(self.config.patch_size)
        rows, columns = self.image_size()
        self.image_shape = (self.config.num_channels, rows, columns)
        self.spec = BackboneSpec(
            depths=(len(self.layers),),
            dims=(self.config.hidden_size,),
            num_heads=(self.config.num_attention_heads,),
            grid=(rows // self.patch_size[0], columns // self.patch_size[1]),
            num_prefix=self.count_prefix(),
            has_class_token=self.count_prefix() > 0,
            num_classes=0,
            has_probe=self.has_probe(),
        )

    def spec_with(self, num_classes: int) -> BackboneSpec:
        """Return `spec` with the classes of a head around the host."""
        return replace(self.spec, num_classes=num_classes)

    @property
    def layers(self) -> Any:
        """The host's blocks."""
        return attrgetter(self.stack)(self.model)

    def image_size(self) -> tuple[int, int]:
        """Return (rows, columns) in pixels that the host was built for."""
        return pair(self.config.image_size)

    def count_prefix(self) -> int:
        """Return P."""
        return self.num_prefix

    def has_probe(self) -> bool:
        """Tell whether a pooling head with one learnt query is there."""
        return False

    def blocks(self) -> list[HFBlock]:
        """Return fresh views of the blocks."""
        return [self.views[class_path(block)](block, number) for number, block in enumerate(self.layers)]

    def takes(self, height: int, width: int) -> bool:
        if self.fits_any_size or self.interpolate:
            return height >= self.patch_size[0] and width >= self.patch_size[1]
        return (height, width) == self.image_shape[1:]

    def embeddings(self, images: Tensor) -> Tensor:
        """Return what enters the first block, (B, P + N, C)."""
        options = {"interpolate_pos_encoding": self.interpolate} if self.interpolates else {}
        return self.model.embeddings(images, **options)  # type: ignore[no-any-return]

    def embed(self, images: Tensor) -> Tokens:
        self.embedded = self.embeddings(images)
        return raster_tokens(self.embedded, self.spec.num_prefix, self.grid_of(images))

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return (rows, columns) of the patches of images."""
        return images.shape[2] // self.patch_size[0], images.shape[3] // self.patch_size[1]

    def stages(self) -> Sequence[Stage]:
        return [Stage(None, self.with_probe(self.blocks()))]

    def norm(self, x: Tensor) -> Tensor:
        return x if self.norm_name is None else getattr(self.model, self.norm_name)(x)

    def pooled(self, features: Tensor) -> Tensor | None:
        """Return the host's `pooler_output` (B, C), None where it has none; default: by `pooler`."""
        pooler = self.model.pooler
        return None if pooler is None else pooler(features)

    def head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return what stands for the image, (B, C): pooled, or else the class token, or the patches' mean."""
        pooled = self.pooled(features)
        if pooled is not None:
            return pooled
        return features[:, 0] if self.spec.has_class_token else features.mean(1)

    def classifier(self) -> Any:
        raise EvoViTError(
            f"{type(self.model).__name__} has no classifier; wrap a class that has one, such as "
            "...ForImageClassification."
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.classifier()  # says that there is none

    def host_features(self, images: Tensor) -> Tensor:
        return self.host_answer(images).last_hidden_state  # type: ignore[no-any-return]

    def inputs(self, images: Tensor) -> dict[str, Any]:
        """Return images as the host's arguments."""
        return {"pixel_values": images}

    def host_answer(self, images: Tensor) -> Any:
        return self.model(**self.inputs(images), return_dict=True)

    def values(self, answer: Any) -> list[Any]:
        return values(answer)

    def wrapped(self, features: Tensor, hidden: Any = None) -> Any:
        """Return the host's output object."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=self.pooled(features), hidden_states=hidden
        )

    def answer(self, road: Road, images: Tensor, **arguments: Any) -> Any:
        return self.answer_within(self, road, images, **arguments)

    def answer_within(self, whole: Backbone, road: Road, images: Tensor, **arguments: Any) -> Any:
        """Return the host's answer, where it is perhaps a part of the host that `road` runs, `whole`."""
        self.refuse(arguments)
        if self.interpolates:
            self.interpolate = bool(arguments.get("interpolate_pos_encoding"))
        asked = asked_for(arguments, self.config, "output_hidden_states")
        hidden = asked is not None and asked is not False
        narrow = not hidden and road.narrows(whole)  # the head reads the prefix alone, and nobody else asks
        tokens, trace = road.blocks(whole, self.suited(images), record=hidden, prefix_only=narrow)
        self.expect_apart(whole, road, tokens)
        tokens = tokens if narrow else road.method.finish(tokens)
        if self.reads_grid(whole) and self.lost(tokens):
            raise EvoViTError(
                f"{type(next(whole.bypassed())).__name__} needs a token for each patch, but "
                f"{type(road.method).__name__} as configured leaves fewer; choose a method that brings all "
                "back: evo_vit, idle_vit or tome."
            )
        if tokens.mask is not None and whole.head_reads_patches:
            whole.masked_head(tokens.x, tokens.mask)  # says why not
        states = None
        if hidden:
            states = self.hidden_states([road.method.finish(after) for after in trace], asked)
        answer = self.wrapped(self.norm(tokens.x), states)
        return answer if asked_for(arguments, self.config, "return_dict", True) else answer.to_tuple()

    def reads_grid(self, whole: Backbone) -> bool:
        """Tell whether the answer needs a token for each patch."""
        return whole.head_reads_grid

    def lost(self, tokens: Tokens) -> bool:
        """Tell whether some of the tokens embedded last are gone."""
        return self.embedded is not None and tokens.x.shape[1] < self.embedded.shape[1]

    def expect_apart(self, whole: Backbone, road: Road, tokens: Tokens) -> None:
        """Raise `EvoViTError` where padding mixed with what the last block left; default: there is none."""

    def suited(self, images: Tensor) -> Tensor:
        """Return images in the type of the weights, as the host does."""
        weight = next((p for p in self.model.embeddings.parameters() if p.is_floating_point()), None)
        suits = weight is None or not isinstance(images, Tensor) or not images.is_floating_point()
        return images if suits else images.to(weight.dtype)  # type: ignore[union-attr]

    def refuse(self, arguments: dict[str, Any]) -> None:
        """Raise `EvoViTError` for arguments that cannot be honoured."""
        given = [name for name in self.refused if arguments.get(name) is not None]
        if given:
            raise EvoViTError(
                f"{', '.join(given)}: a reduced {type(self.model).__name__} cannot take what changes "
                "its patches; call the host itself, reduced.model."
            )
        if asked_for(arguments, self.config, "output_attentions"):
            raise EvoViTError(
                "output_attentions: the attention maps of reduced blocks are not those of the host; call the "
                "host itself, reduced.model."
            )

    def hidden_states(self, trace: list[Tokens], asked: Any) -> tuple[Tensor | None, ...]:
        """Return what entered the first block and what left each, (B, P + N, C), as the host does.

        Args:
            asked: True, or of newer versions one number or several; the others are then None.
        """
        first: Any = self.embedded
        states = [first, *(tokens.x for tokens in trace)]
        if any(self.lost(tokens) for tokens in trace):
            raise EvoViTError(
                "The hidden states need all tokens after each block, but the method leaves fewer; "
                "choose one that keeps the grid (evo_vit, idle_vit, tome), or read "
                "reduced.run(images, record=True).trace."
            )
        if asked is True:
            return tuple(states)
        numbers = {number % len(states) for number in ([asked] if isinstance(asked, int) else asked)}
        return tuple(state if number in numbers else None for number, state in enumerate(states))

    def bypassed(self) -> Iterator[nn.Module]:
        yield self.model
        inner = self.model
        for name in self.stack.split("."):
            inner = getattr(inner, name)
            yield inner
        for block in self.blocks():
            yield from block.bypassed()

    def check_structure(self) -> None:
        expect_parts(self.model, self.parts, "The host")
        own = getattr(self.config, "_attn_implementation", "eager")
        if own not in IMPLEMENTATIONS:
            raise EvoViTError(
                f"The host's attn_implementation is {shown(own)}, but evovit computes only what "
                f"{' and '.join(IMPLEMENTATIONS)} do; load it with attn_implementation='sdpa', which uses "
                "flash kernels where it can."
            )
        for block in self.blocks():
            block.check()


def with_part(module: Any, path: str, part: Callable[..., Any]) -> Any:
    """Return a twin of a module that shares all with it, but for what `path` names: there stands `part`."""
    name, _, rest = path.partition(".")
    inner = with_part(module._modules[name], rest, part) if rest else part
    twin = object.__new__(type(module))
    twin.__dict__ = {**module.__dict__, "_modules": {**module._modules, name: inner}}
    return twin


def asked_for(arguments: dict[str, Any], config: Any, name: str, default: Any = False) -> Any:
    """Return an argument's value, or else the config's."""
    value = arguments.get(name)
    return getattr(config, name, default) if value is None else value


def values(answer: Any) -> list[Any]:
    """Return the tensors in an output object, a tuple or a tensor, in order."""
    if answer is None:
        return []
    if isinstance(answer, dict):
        answer = tuple(answer.values())
    if isinstance(answer, tuple | list):
        return [tensor for part in answer for tensor in values(part)]
    return [answer]
