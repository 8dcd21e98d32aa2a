"""Cropr: learnt routers drop patch tokens after each block (Bergner et al., CVPR 2025).

A router's queries rank the tokens. In training they also mix them, without gradient to the host, for an
auxiliary head that learns the labels; evaluation needs the queries alone. Last-layer fusion brings all
dropped tokens back before the last block. Modules have the official names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones.base import BackboneSpec, Block
from evovit.errors import EvoViTError, check_count
from evovit.methods import register
from evovit.methods.base import Method
from evovit.methods.sit import mlp
from evovit.ops.select import keep_rows, put, rows_where, split_top, take
from evovit.options import Count, Number, option
from evovit.tokens import Tokens


class Routed(NamedTuple):
    """Cropr's state beside the tokens."""

    dropped: tuple[tuple[Tensor, Tensor], ...] = ()  # patches (B, R, C), places (B, R), that come back
    logits: tuple[Tensor, ...] = ()  # (B, classes) of each auxiliary head so far, in training


@register("cropr")
class Cropr(Method):
    """Cross-attention pruning: learnt queries rank the tokens after each block; the last ones are dropped.

    The auxiliary heads learn the labels beside the host's own; released trainings add their losses
    (`objective.reduction = "sum"`).
    """

    keeps_grid = True
    needs_class_token = False
    keep_all: ClassVar = {"r": ()}
    example: ClassVar = {"r": 3}

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Options of Cropr; the defaults are the released ones."""

        r: Number | tuple[Number, ...] = option(
            8, "tokens dropped after each block, and one more after the first; a list is taken as it is"
        )
        llf: bool = option(True, "last-layer fusion: dropped tokens come back before the last block")
        num_queries: Annotated[int, Ge(1), Le(4096)] = option(
            1, "learnt queries of a router; more than one needs auxiliary=false"
        )
        router_heads: Count | None = option(
            None, "attention heads of a router; none: as many as the host has"
        )
        pre_attn_norm: bool = option(False, "a router normalises the tokens it reads")
        q_proj: bool = option(False, "a router projects its queries")
        k_proj: bool = option(False, "a router projects its keys")
        v_proj: bool = option(False, "a router projects its values")
        qkv_bias: bool = option(False, "a router's projections of queries, keys and values have a bias")
        mlp: bool = option(True, "a router has an MLP before its auxiliary head")
        mlp_ratio: Annotated[float, Gt(0), Le(64)] = option(
            4.0, "hidden width of a router's MLP over the host's width"
        )
        auxiliary: bool = option(
            True, "routers have auxiliary heads; false: fixed routers without them, to run a trained model"
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        dim, heads = spec.dims[0], config.router_heads or spec.num_heads[0]
        if dim % heads:
            raise EvoViTError(f"router_heads is {heads}; allowed are divisors of the host's width, {dim}.")
        if config.auxiliary and config.num_queries > 1:
            raise EvoViTError(
                f"num_queries is {config.num_queries}, but an auxiliary head learns from one; set auxiliary "
                "to False to run trained routers."
            )
        self.keeps_grid = config.llf
        count = max(0, spec.depth - 1 - config.llf)
        self.removed = removed_per_router(config.r, count, math.prod(spec.grid))
        self.cropr = nn.ModuleList(Router(config, dim, heads, spec.num_classes) for _ in range(count))
        if not config.auxiliary:
            self.requires_grad_(False)  # nothing that they learn from is there

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        if block.number == self.spec.depth - 1:
            tokens = self.finish(tokens)
        tokens = block(tokens)
        return self.route(tokens, block.number) if block.number < len(self.cropr) else tokens

    def route(self, tokens: Tokens, number: int) -> Tokens:
        """Drop the tokens that this block's router ranks last; prefix tokens are not ranked."""
        router: Any = self.cropr[number]
        state: Routed = tokens.carry or Routed()
        if self.training and self.config.auxiliary:
            state = state._replace(logits=(*state.logits, router(tokens.x.detach())))
        removed = min(self.removed[number], tokens.num_patches - 1)
        if removed > 0:
            split = split_top(router.cross_attn.scores(tokens.patches), tokens.num_patches - removed)
            if self.config.llf:
                rows = rows_where(~split.kept, removed)
                gone = take(tokens.patches, rows), tokens.index.gather(1, rows)
                state = state._replace(dropped=(*state.dropped, gone))
            tokens = keep_rows(tokens, split.rows)
        return tokens.change(carry=state)

    def finish(self, tokens: Tokens) -> Tokens:
        """Bring back who was dropped, as they were then, if they wait for the last block; in raster order."""
        state: Routed = tokens.carry or Routed()
        if not state.dropped:
            return tokens
        parts = ((tokens.patches, tokens.index), *state.dropped)
        patches, places = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
        whole = put(torch.zeros_like(patches), places, patches)
        index = torch.arange(places.shape[1], device=places.device).expand_as(places)
        x = torch.cat((tokens.prefix, whole), dim=1)
        return tokens.change(x=x, index=index, carry=state._replace(dropped=()))

    def extra_logits(self, tokens: Tokens) -> dict[str, Tensor]:
        state: Routed = tokens.carry or Routed()
        return {f"cropr_{number}": logits for number, logits in enumerate(state.logits)}

    def reset_classifier(self, num_classes: int) -> None:
        for module in self.modules():
            if isinstance(module, AuxiliaryHead):
                module.reset(num_classes)

    def current_config(self) -> Any:
        most = math.prod(self.spec.grid)
        now = tuple(min(removed, most) for removed in self.removed)
        return self.config if self.reduction == 1 else replace(self.config, r=now)

    def set_reduction(self, share: float) -> None:
        self.reduction = share
        full = removed_per_router(self.config.r, len(self.cropr), math.prod(self.spec.grid))
        self.removed = tuple(int(share * removed) for removed in full)


class Router(nn.Module):
    """Learnt queries and, for training, the head that they learn through."""

    def __init__(self, config: Cropr.Config, dim: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.cross_attn = CrossAttention(config, dim, num_heads)
        self.head = AuxiliaryHead(dim, num_classes) if config.auxiliary else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the auxiliary head's logits, (B, classes), from all tokens (B, P + N, C)."""
        assert self.head is not None
        return self.head(self.cross_attn(x)[:, 0])  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Learnt queries that attend to all tokens."""

    def __init__(self, config: Cropr.Config, dim: int, num_heads: int) -> None:
        super().__init__()

        def linear(wanted: bool, bias: bool = config.qkv_bias) -> nn.Module:
            return nn.Linear(dim, dim, bias=bias) if wanted else nn.Identity()

        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.empty(1, config.num_queries, dim))
        nn.init.trunc_normal_(self.queries, std=dim**-0.5)
        self.attn_norm = nn.LayerNorm(dim, eps=1e-6) if config.pre_attn_norm else nn.Identity()
        self.q, self.k = linear(config.q_proj), linear(config.k_proj)
        if config.auxiliary:
            self.v, self.proj = linear(config.v_proj), linear(num_heads > 1, bias=True)
            self.mlp_norm = nn.LayerNorm(dim, eps=1e-6) if config.mlp else nn.Identity()
            self.mlp = mlp(dim, max(1, int(dim * config.mlp_ratio)), dim) if config.mlp else None

    def scores(self, patches: Tensor) -> Tensor:
        """Return the products of all queries with each token's key, added up, (B, N) float32.

        Heads and queries add up to one vector, which is laid against the tokens; a product and a sum, as no
        engine quantises these.

        Args:
            patches: (B, N, C).
        """
        vector = self.q(self.queries)[0].float().sum(0)  # (C,)
        offset = None
        if isinstance(self.k, nn.Linear):
            offset = None if self.k.bias is None else (vector * self.k.bias.float()).sum()
            vector = (vector[:, None] * self.k.weight.float()).sum(0)
        score: Tensor = (self.attn_norm(patches).float() * vector).sum(-1)
        return score if offset is None else score + offset

    def forward(self, x: Tensor) -> Tensor:
        """Return what each query gathers, (B, queries, C), from all tokens (B, P + N, C)."""
        y = self.attn_norm(x)
        queries = self.q(self.queries).expand(x.shape[0], -1, -1)
        q, k, v = (
            each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each in (queries, self.k(y), self.v(y))
        )
        gathered: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return gathered if self.mlp is None else gathered + self.mlp(self.mlp_norm(gathered))


class AuxiliaryHead(nn.Module):
    """A classifier of what a router gathers."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.head: nn.Module = nn.Identity()
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """Start a fresh classifier for `num_classes`; 0: features pass."""
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = linear = nn.Linear(self.norm.weight.shape[0], num_classes).to(self.norm.weight)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) from (B, C)."""
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def removed_per_router(r: int | Sequence[int], count: int, most: int) -> tuple[int, ...]:
    """Return how many tokens each of `count` routers drops; one token is always left."""
    if isinstance(r, Sequence):
        if len(r) > count:
            raise EvoViTError(f"r lists {len(r)} values for {count} routers; give at most one each.")
        for removed in r:
            check_count("r", removed, 0, most)
        return (*r, *(0,) * (count - len(r)))
    check_count("r", r, 0, most, "tokens dropped after a block")
    return tuple(r + (number == 0 and r > 0) for number in range(count))
