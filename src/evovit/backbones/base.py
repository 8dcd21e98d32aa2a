"""What a host must offer: embed, stages of block views, final norm, head; and the refusals adapters share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.errors import EvoViTError, shown
from evovit.ops.select import keep_leading, leading_queries, take_qkv
from evovit.tokens import QKV, Tokens

RECORDER = "transformers.utils.output_capturing"  # its hooks note hidden states for those who ask the host

Mix = Callable[[QKV, Tensor | None], Tensor]  # q, k, v and all additive bias to mixed values, (B, H, Q, D)
Probe = Callable[[Tokens], QKV]  # tokens to what a pooling head would see of them, see `probe_qkv`


class Block(ABC):
    """A view of one transformer block: the host's own modules, called in the host's order.

    It holds the block, owns no parameter and is made anew in each forward.
    """

    number: int  # counted from 0 through all stages
    probe: Probe | None = None  # of the host's pooling head, if it has one

    @abstractmethod
    def qkv(self, tokens: Tokens) -> QKV:
        """Return what the attention of this block sees."""

    @abstractmethod
    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        """Return tokens + attention branch.

        Args:
            bias: added to the logits, broadcast to (B, H, Q, K).
            mix: takes the place of softmax attention (see `mixed_values`).
        """

    @abstractmethod
    def ffn(self, tokens: Tokens) -> Tokens:
        """Return tokens + feed-forward branch."""

    def attention_input(self, tokens: Tokens) -> Tensor:
        """Return what is projected to queries, keys and values, (B, P + N, C); default: the tokens."""
        return tokens.x

    def scoring_qkv(self, tokens: Tokens) -> QKV:
        """Return enough to choose rows by: queries of the prefix at least, keys of all; default: `qkv`."""
        return self.qkv(tokens)

    def qkv_of_rows(self, active: Tokens, scored: QKV, rows: Tensor) -> QKV:
        """Return what attention sees of the chosen rows alone.

        Args:
            active: the chosen tokens, P + K of them.
            scored: `scoring_qkv` of all tokens.
            rows: (B, P + K) int64, where they stood among all.
        """
        return take_qkv(scored, rows)

    def queries_keys(self, tokens: Tokens) -> QKV:
        """Return queries and keys of all, which is enough for the attention map; default: `qkv`."""
        return self.qkv(tokens)

    def values(self, tokens: Tokens) -> QKV:
        """Return values (and `extra`) of all, for `attention` with a `mix` of its own; default: `qkv`."""
        return self.qkv(tokens)

    def leading_qkv(self, tokens: Tokens, count: int) -> QKV:
        """Return queries (and `extra`) of the first `count` rows, keys and values of all.

        Default: rows of `qkv`. The prefix is always among them: P <= count <= P + N.
        """
        return leading_queries(self.qkv(tokens), count)

    def attend(
        self, tokens: Tokens, bias: Tensor | None = None, asking: int | None = None
    ) -> tuple[Tokens, QKV]:
        """Run qkv, then attention.

        In the last block both may hold less: where the head reads prefix tokens only, `prefix.PrefixBlock`
        leaves no patch tokens after attention, and the queries it returns are the prefix tokens' own.

        Args:
            asking: number of leading rows, prefix included, that are queries; the others are only keys and
                values and are dropped afterwards. None: all rows are queries.
        """
        if asking is None:
            qkv = self.qkv(tokens)
            return self.attention(tokens, qkv, bias), qkv
        qkv = self.leading_qkv(tokens, asking)
        bias = None if bias is None else bias[..., :asking, :]
        return self.attention(keep_leading(tokens, asking), qkv, bias), qkv

    @final
    def __call__(self, tokens: Tokens, bias: Tensor | None = None) -> Tokens:
        """Run the unreduced block."""
        return self.ffn(self.attend(tokens, bias)[0])


class Stage(NamedTuple):
    """Blocks that share a grid; `enter` down-samples into it (raster order first), None if nothing does."""

    enter: Callable[[Tokens], Tokens] | None
    blocks: Sequence[Block]


Change = Callable[[Sequence[Stage]], Sequence[Stage]]


@dataclass(frozen=True)
class BackboneSpec:
    """What a method may know of its host before the first forward; tuples have one entry per stage."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    grid: tuple[int, int]
    num_prefix: int
    has_class_token: bool
    num_classes: int
    has_probe: bool = False  # whether the head pools by attention with one learnt query

    @property
    def depth(self) -> int:
        """Number of blocks of all stages."""
        return sum(self.depths)


class Finish(Protocol):
    """What an answer needs from a method."""

    @property
    def merges(self) -> bool: ...

    def finish(self, tokens: Tokens) -> Tokens: ...


class Road(Protocol):
    """What runs the blocks for `Backbone.answer`, image to tokens: a `ReducedViT`, or the plain blocks."""

    @property
    def method(self) -> Finish: ...

    def logits(self, images: Tensor, backbone: Backbone) -> Tensor: ...

    def narrows(self, backbone: Backbone) -> bool: ...

    def blocks(
        self, backbone: Backbone, images: Tensor, record: bool = False, *, prefix_only: bool = False
    ) -> tuple[Tokens, list[Tokens]]: ...


class Backbone(ABC):
    """A view of a host: image -> tokens -> blocks -> features -> logits. A plain object, not a module."""

    spec: BackboneSpec
    image_shape: tuple[int, int, int]  # (channels, height, width) the host was built for
    head_reads_patches: bool  # False where the head reads prefix tokens alone
    head_reads_grid: bool = False  # True where it reads a token for each patch, in its place

    @abstractmethod
    def __init__(self, model: nn.Module) -> None: ...

    @abstractmethod
    def embed(self, images: Tensor) -> Tokens:
        """Return the tokens that enter the first block; images (B, channels, height, width)."""

    @abstractmethod
    def stages(self) -> Sequence[Stage]:
        """Return the stages in order. Call after `embed`: positions may depend on the image size."""

    @abstractmethod
    def norm(self, x: Tensor) -> Tensor:
        """Apply the host's norm after the last block; (B, P + N, C) to the same."""

    @abstractmethod
    def head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or what enters the classifier, from normed features (B, P + N, C)."""

    def probe_qkv(self, tokens: Tokens) -> QKV:
        """Return what the pooling head's attention would see, were these the last tokens.

        For hosts with `spec.has_probe`: one query, (B, H, 1, D), no values, and keys of which the last N are
        those of the patch tokens.
        """
        raise NotImplementedError

    def with_probe(self, blocks: Sequence[Block]) -> Sequence[Block]:
        """Return the views of blocks, which know the pooling head's probe, if there is one."""
        for block in blocks:
            block.probe = self.probe_qkv if self.spec.has_probe else None
        return blocks

    def masked_head(self, features: Tensor, mask: Tensor) -> Tensor:
        """Return `head` of the patch rows that take part alone; default: for heads that read no patches.

        Args:
            features: (B, P + N, C).
            mask: (B, N) 1 where a patch row takes part; has a gradient at 0 and 1.
        """
        if self.head_reads_patches:
            raise EvoViTError(
                f"{type(self).__name__} cannot leave masked patch tokens out of the host's head, as training "
                "with masks needs; choose a host with global_pool 'token', 'avg', 'max', 'avgmax' or 'map', "
                "or a method that does not mask."
            )
        return self.head(features)

    def class_logits(self, features: Tensor) -> Tensor:
        """Return the logits of the class head alone, where `head` adds another; default: `head`."""
        return self.head(features)

    def token_logits(self, features: Tensor) -> Tensor | None:
        """Return logits of each patch token, (B, N, classes), from normed features; None: no such head."""
        return None

    def extra_logits(self, features: Tensor) -> dict[str, Tensor]:
        """Return logits (B, classes) of the host's further heads, for the training loss, by name.

        A name that ends in "distilled" learns from the teacher, if there is one.
        """
        return {}

    def classifier(self) -> Any:
        """Return the host's classifier; default: it says itself."""
        host: Any = next(self.bypassed())
        return host.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the host a fresh classifier; default: it does so itself."""
        host: Any = next(self.bypassed())
        host.reset_classifier(num_classes, global_pool)

    def answer(self, road: Road, images: Tensor, **arguments: Any) -> Any:
        """Return what the host's own call returns, its blocks run by `road`; default: logits (B, classes).

        Args:
            arguments: of the host's forward; raises `EvoViTError` for one that cannot be honoured.
        """
        if arguments:
            raise EvoViTError(
                f"{', '.join(arguments)}: {type(self).__name__} hosts take only images and return logits."
            )
        return road.logits(images, self)

    def host_answer(self, images: Tensor) -> Any:
        """Return the host's own answer, which `answer` is compared with."""
        return next(self.bypassed())(images)

    def values(self, answer: Any) -> list[Any]:
        """Return the tensors of an answer, for comparisons; default: it is one."""
        return [answer]

    @abstractmethod
    def host_features(self, images: Tensor) -> Tensor:
        """Return the normed features (B, P + N, C) of the host's own forward: the truth to compare with."""

    @abstractmethod
    def bypassed(self) -> Iterator[nn.Module]:
        """Return the modules whose forward is never called, as the views call what is inside them.

        The host comes first; its blocks and their attentions are among them.
        """

    @final
    def expect_unsharded(self) -> None:
        """Raise `EvoViTError` where a module that is never called is sharded."""
        for module in self.bypassed():
            expect_unsharded(module, f"The host's {type(module).__name__.removeprefix('FSDP')}")

    def takes(self, height: int, width: int) -> bool:
        """Tell whether the host runs on images of this size in pixels; default: it says so itself."""
        return True

    @final
    def expect_images(self, images: Tensor) -> None:
        """Raise `EvoViTError` unless images suit the host: shape, type and device."""
        channels, rows, columns = self.image_shape
        what = f"give a tensor (B, {channels}, height, width), such as (1, {channels}, {rows}, {columns})"
        if not isinstance(images, Tensor):
            raise EvoViTError(f"images is {shown(images)}; {what}.")
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != channels or 0 in shape:
            raise EvoViTError(f"images is a tensor {shape}; {what}.")
        if not self.takes(*shape[2:]):
            raise EvoViTError(
                f"images has {shape[2]} x {shape[3]} pixels, but the host takes {rows} x {columns}; create "
                "it with the images' img_size."
            )
        kind = images.device.type
        mixes = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        mixes = mixes and images.is_floating_point()
        weights = (p for p in next(self.bypassed()).parameters() if p.is_floating_point())
        kinds = [f"{images.dtype} on {images.device}"]
        for p in weights:  # the first one suits, as a rule
            if images.device == p.device and (mixes or images.dtype == p.dtype) and not images.is_sparse:
                return
            kinds.append(f"{p.dtype} on {p.device}")
        if len(kinds) == 1:  # a replica of DataParallel lists no weights
            return
        given, first, *_ = [kind.removeprefix("torch.") for kind in kinds]
        given = f"sparse {given}" if images.is_sparse else given
        raise EvoViTError(f"images is {given}, but the host's weights are {first}; use images.to(...).")

    @abstractmethod
    def check_structure(self) -> None:
        """Raise `EvoViTError` where the host holds a part that this adapter does not know."""


def mixed_values(qkv: QKV, bias: Tensor | None, mix: Mix | None, dropout: float) -> Tensor:
    """Return the values mixed by attention, (B, H, Q, D): fused softmax attention, or what `mix` gives.

    Args:
        bias: of the method, of any floating type; the host's own (`QKV.bias`) is added to it.
        dropout: of the host's attention weights, at this moment.
    """
    if bias is not None and bias.is_floating_point():
        bias = bias.to(qkv.q.dtype)
    if qkv.bias is not None:
        bias = qkv.bias if bias is None else qkv.bias + bias
    if mix is None:
        return F.scaled_dot_product_attention(qkv.q, qkv.k, qkv.v, bias, dropout, scale=qkv.scale)
    if dropout > 0:
        raise EvoViTError(
            "The method computes attention itself and cannot apply the host's attention dropout "
            f"of {dropout:g}; create the host without it."
        )
    return mix(qkv, bias)


def expect_module(model: object, what: str) -> None:
    """Raise `EvoViTError` unless something is a network, with weights."""
    if not isinstance(model, nn.Module):
        raise EvoViTError(f"{what} is {shown(model)}; give a network, a torch.nn.Module.")
    if not any(p.is_floating_point() for p in model.parameters()):
        raise EvoViTError(f"{what} is a {type(model).__name__} without weights; give a network.")


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a call of the module does more than its class says: hooks, or a forward of its own."""
    before = module._forward_pre_hooks
    after = [hook for hook in module._forward_hooks.values() if getattr(hook, "__module__", "") != RECORDER]
    backward = module._backward_pre_hooks or module._backward_hooks
    return bool(before or after or backward or "forward" in module.__dict__)


def expect_unsharded(module: nn.Module, what: str) -> None:
    """Raise `EvoViTError` if `fully_shard` was applied to a module that is never called (FSDP2)."""
    if type(module).__mro__[1].__name__ == "FSDPModule":  # `fully_shard` puts it first among the bases
        raise EvoViTError(
            f"{what} is sharded by fully_shard, which gathers weights as a module is called, while evovit "
            "calls those inside it; shard the reduced model as a whole, fully_shard(reduced), or modules "
            "inside the blocks, such as mlp."
        )


def expect_class(module: nn.Module, known: Iterable[str], what: str) -> None:
    """Raise `EvoViTError` if the class of `module` is none of those whose forward an adapter re-states.

    Args:
        known: full class paths; a class of the same name from elsewhere may compute something else.
    """
    if class_path(module) not in known:
        expect_unsharded(module, what)
        raise EvoViTError(
            f"{what} is a {type(module).__name__} of {type(module).__module__}, which this version of evovit "
            "does not support (supported: "
            f"{', '.join(sorted(known))}); use a host with these, or extend the adapter "
            "(docs/adding_a_backbone.md)."
        )


def class_path(module: nn.Module) -> str:
    """Return the full path of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def expect_parts(module: nn.Module, known: Iterable[str], what: str) -> None:
    """Raise `EvoViTError` if `module` directly holds a child, parameter or buffer whose name is not `known`.

    A part that starts at zero (a gate, a scale) leaves the output unchanged at first, so no comparison of
    outputs can see it; its name can.
    """
    held = {name for name, _ in module.named_children()}
    held |= {name for name, _ in module.named_parameters(recurse=False)}
    held |= {name for name, _ in module.named_buffers(recurse=False)}
    unknown = sorted(held - set(known))
    if unknown:
        raise EvoViTError(
            f"{what} ({type(module).__name__}) holds {', '.join(unknown)}, which this version of evovit does "
            "not know and would ignore; use a library version evovit was checked with, or extend the adapter "
            "(docs/adding_a_backbone.md)."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode; each gets its own mode back."""
    training = {id(module) for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        model.train()  # a host that caches weights for evaluation, as LeViT does, lets go of them
        for module in model.modules():
            module.training = id(module) in training


def raster_tokens(x: Tensor, num_prefix: int, grid: tuple[int, int]) -> Tokens:
    """Wrap freshly embedded x, (B, P + N, C), with raster positions 0..N-1; N must be rows * columns."""
    num_patches = x.shape[1] - num_prefix
    if num_patches != grid[0] * grid[1]:
        raise EvoViTError(
            f"The host embeds {num_patches} patch tokens on a {grid[0]} x {grid[1]} grid; use a host whose "
            "patch embedding and prefix tokens leave one token per grid cell."
        )
    index = torch.arange(num_patches, device=x.device).expand(x.shape[0], num_patches)
    return Tokens(x, index, num_prefix, grid)


@torch.no_grad()
def last_qkv(stages: Sequence[Stage], tokens: Tokens) -> QKV:
    """Run embedded tokens to the last block, nothing reduced, and return what its attention would see."""
    last = stages[-1].blocks[-1]
    for stage in stages:
        tokens = stage.enter(tokens) if stage.enter else tokens
        for block in stage.blocks:
            if block.number < last.number:
                tokens = block(tokens)
    return last.qkv(tokens)


def trace_dense(backbone: Backbone, images: Tensor, change: Change | None = None) -> list[Tokens]:
    """Return the tokens after each block of the host, through its views, nothing reduced.

    Args:
        change: gives the views to run instead of the host's own.
    """
    tokens, trace = backbone.embed(images), []
    stages = backbone.stages()
    for stage in stages if change is None else change(stages):
        tokens = stage.enter(tokens) if stage.enter else tokens
        for block in stage.blocks:
            tokens = block(tokens)
            trace.append(tokens)
    return trace


def run_dense(backbone: Backbone, images: Tensor, change: Change | None = None) -> Tensor:
    """Return the normed features (B, P + N, C) of the host through its views; `change` as `trace_dense`."""
    return backbone.norm(trace_dense(backbone, images, change)[-1].x)
