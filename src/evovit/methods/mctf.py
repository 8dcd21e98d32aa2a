"""MCTF: fuse tokens that are similar, uninformative and small (Lee, Choi, Kim, CVPR 2024).

Before attention the pairs of highest weight become one, from both sides of a bipartite split; the weight is
the product of three criteria (arXiv 2403.10030, section 3). The attention map that one of them reads is
aggregated, so that fused tokens attend by it. Training compares with a second pass that fuses less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from evovit.backbones.base import BackboneSpec, Block, Stage
from evovit.methods import register
from evovit.methods.base import check_blocks
from evovit.methods.merging import Merging, sizes_of
from evovit.ops.distance import confidence, confident_distance
from evovit.ops.fusion import Fusion, aggregated, weighted_fusion
from evovit.ops.merge import match_both_ways, match_by, merge_sizes, similarities, unit_rows
from evovit.ops.score import attention_column_mean, attention_map, with_bias
from evovit.options import Number, Share, Weight, option
from evovit.tokens import QKV, Outputs, Tokens

Ahead = Literal["aggregate", "recompute", "off"]
Pooling = Literal["attention", "size", "mean", "largest"]
Fraction = Annotated[float, Ge(0), Lt(1)]
LEAST = 10  # tokens that a whole number r leaves, a class token among them
FAINT = 1e-30  # attention received that counts as none


class Fused(NamedTuple):
    """MCTF's state beside the tokens."""

    r: float  # of this pass, a count or a share
    source: Tensor | None = None  # (B, N at the start) int64, the row of the patch token each cell is part of


@register("mctf")
class MCTF(Merging):
    """Multi-criteria token fusion: similar, uninformative, small patch tokens become one before attention.

    The default is the fast variant, three reducing blocks; the other is blocks 1 to 11 with r=16.
    """

    keep_all: ClassVar = {"r": 0}
    example: ClassVar = {"r": 3, "blocks": (1, 2)}

    @dataclass(frozen=True, kw_only=True)
    class Config(Merging.Config):
        """Options of MCTF; the defaults are the paper's fast variant."""

        r: Number | Fraction = option(
            0.35,
            "patch tokens each of `blocks` removes, a count or a share; at most half, and 10 tokens stay",
        )
        blocks: tuple[Number, ...] = option((3, 6, 9), "blocks that fuse, counted from 0")
        ahead: Ahead = option(
            "aggregate",
            "fuse before attention and aggregate its map, or recompute it; off: fuse after the FFN",
        )
        tau_similarity: Weight = option(
            1.0, "temperature of the criterion cosine similarity; 0 leaves it out"
        )
        tau_information: Weight = option(
            20.0, "temperature of the criterion 1 / attention received; 0 leaves it out"
        )
        tau_size: Weight = option(40.0, "temperature of the criterion 1 / size of a token; 0 leaves it out")
        bidirectional: bool = option(
            True, "each side of the split proposes half of the pairs; false: one side proposes all"
        )
        pooling: Pooling = option(
            "attention",
            "weights of tokens that fuse: attention * size, size, equal; largest: the largest value counts",
        )
        r_teacher: Number | Fraction = option(
            0.15, "training runs a second pass, whose r is drawn at random below this; 0: no second pass"
        )
        pass_weights: tuple[Weight, Weight] = option(
            (1.0, 1.0), "weights of the losses of the first and the second training pass"
        )
        consistency_weight: Weight = option(
            3.0, "loss weight of the distance between the class features of both passes"
        )
        confidence: Share = option(
            0.4, "only images whose label has a higher probability count in the consistency loss"
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        check_blocks(config.blocks, spec.depth)
        self.trains_twice = config.r_teacher > 0
        self.plan(config)

    def plan(self, config: Config) -> None:
        self.fusing: float = config.r  # in force now

    def config_at(self, budget: float) -> Any:
        """Return the options under which each of `blocks` keeps this share of its patch tokens."""
        return replace(self.config, r=1 - budget)

    def begin(self, tokens: Tokens, stages: Sequence[Stage]) -> Tokens:
        return tokens if isinstance(tokens.carry, Fused) else starting(tokens, self.fusing)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        bias, reduces = self.size_bias(tokens), block.number in self.config.blocks
        removed = count_removed(tokens.num_patches + 1, tokens.carry.r) if reduces else 0
        if removed == 0:
            return block(tokens, bias)
        if self.config.ahead == "off":
            after, qkv = block.attend(tokens, bias)
            after = block.ffn(after)
            return self.fuse(after, received(qkv, bias), removed)[0] if after.num_patches > 0 else after
        seen = block.queries_keys(tokens)
        if self.config.ahead == "recompute":
            fused, _ = self.fuse(tokens, received(seen, bias), removed)
            return block(fused, self.size_bias(fused))
        attention = attention_map(with_bias(seen, bias))
        fused, fusion = self.fuse(tokens, attention.detach().mean((1, 2)).float(), removed)
        values = block.values(fused)
        mix = partial(aggregated, fusion=fusion, num_prefix=tokens.num_prefix)
        # the map stands in for queries, so that a host whose attention has groups of heads parts it too
        mixed = block.attention(fused, values._replace(q=attention.to(values.v.dtype)), mix=mix)
        return block.ffn(mixed)

    def fuse(self, tokens: Tokens, attention: Tensor, removed: int) -> tuple[Tokens, Fusion]:
        """Fuse patch tokens; return them, and who became one.

        Args:
            attention: (B, P + N) float32 received by each token, mean over heads and queries, no gradient.
        """
        weight, first = self.weights(tokens, attention), tokens.num_prefix % 2
        if self.config.bidirectional:
            matches = match_both_ways(weight, removed, first)
        else:
            matches = [match_by(weight, removed, first)]
        size, pooling = sizes_of(tokens), self.config.pooling
        pooled = torch.ones_like(size) if pooling == "mean" else size
        if pooling == "attention":
            pooled = size * attention[:, tokens.num_prefix :].clamp_min(FAINT)
        fusion = Fusion(matches, None) if pooling == "largest" else weighted_fusion(matches, pooled)
        for match in matches:
            size, _ = merge_sizes(size, match)
        fused = tokens.change(
            x=torch.cat((tokens.prefix, fusion.merged(tokens.patches)), dim=1),
            index=fusion.places(tokens.index),
            size=size,
            carry=tokens.carry._replace(source=fusion.followed(tokens.carry.source)),
        )
        return fused, fusion

    @torch.no_grad()
    def weights(self, tokens: Tokens, attention: Tensor) -> Tensor:
        """Return how much each pair of the two sides asks to be fused, (B, A, M) float32.

        Sides alternate from the first prefix token on. Two of the criteria are factors of each token alone.
        """
        config, first, unit = self.config, tokens.num_prefix % 2, unit_rows(tokens.patches)
        ours, theirs = slice(first, None, 2), slice(1 - first, None, 2)
        each = torch.ones_like(tokens.index, dtype=torch.float32)
        if config.tau_information > 0:
            attention = attention.clamp_min(FAINT)
            least = attention.amin(-1, keepdim=True)  # 1 / attention, divided by its largest
            each = (least / attention[:, tokens.num_prefix :]) ** (1 / config.tau_information)
        if config.tau_size > 0 and tokens.size is not None:
            smallest = 1.0 if tokens.num_prefix > 0 else tokens.size.amin(-1, keepdim=True)
            each = each * (smallest / tokens.size) ** (1 / config.tau_size)
        weight = each[:, ours, None] * each[:, None, theirs]
        if config.tau_similarity > 0:
            alike = ((similarities(unit[:, ours], unit[:, theirs]) + 1) / 2).clamp_min(0)
            weight = weight * alike ** (1 / config.tau_similarity)
        return weight

    def second_start(self) -> Callable[[Tokens], Tokens] | None:
        most = self.config.r_teacher
        if most == 0:
            return None
        r = draw(int(most)) if most >= 1 else draw(max(1, int(100 * most))) / 100
        return partial(starting, r=r)

    def pair_losses(
        self,
        first: tuple[dict[str, Tensor], Outputs],
        second: tuple[dict[str, Tensor], Outputs],
        targets: Tensor,
    ) -> dict[str, Tensor]:
        config, (ours, student), (theirs, teacher) = self.config, first, second
        terms = {name: config.pass_weights[0] * term for name, term in ours.items()}
        terms |= {f"{name}_teacher": config.pass_weights[1] * term for name, term in theirs.items()}
        whole = (student.features, teacher.features)
        pair = [x[:, 0] if self.spec.has_class_token else x.mean(1) for x in whole]
        counted = confidence(student.logits, targets) > config.confidence
        terms["consistency"] = config.consistency_weight * confident_distance(pair[0], pair[1], counted)
        return terms

    def current_config(self) -> Any:
        return self.config if self.reduction == 1 else replace(self.config, r=self.fusing)

    def set_reduction(self, share: float) -> None:
        r, self.reduction = self.config.r, share
        self.fusing = r if share == 1 else int(share * r) if r >= 1 else share * r


def count_removed(present: int, r: float) -> int:
    """Return how many of the tokens present, a class token among them, a block removes.

    A whole number leaves at least 10. Of more than 10 a share may leave fewer, as released.
    """
    r = min(r, max(0, present - LEAST))
    return min(int((present - 1) * r) if r < 1 else int(r), (present - 1) // 2)


@torch.no_grad()
def received(qkv: QKV, bias: Tensor | None) -> Tensor:
    """Return the attention each token receives, (B, P + N) float32, mean over heads and queries."""
    kind = "cpu" if qkv.q.is_meta else qkv.q.device.type  # autocast knows no meta device
    with torch.autocast(kind, enabled=False):
        return attention_column_mean(with_bias(qkv, bias), 0)


def starting(tokens: Tokens, r: float) -> Tokens:
    """Return the embedded tokens of a pass that fuses with this r."""
    return tokens.change(carry=Fused(r))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def draw(below: int) -> int:
    """Draw a whole number from 0 on with PyTorch's generator."""
    return int(torch.randint(below, ()))
