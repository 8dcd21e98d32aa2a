"""DynamicViT: small predictors drop patch tokens at a few blocks (Rao et al., NeurIPS 2021).

Evaluation drops all but the best. Training keeps every row: decisions are sampled (Gumbel, straight-through)
and mask the attention of every block, so that their gradient reaches the predictors. `rest="squeeze"` is dTPS
(Wei et al., CVPR 2023): each dropped token is first merged into the most similar kept one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from evovit.backbones.base import BackboneSpec, Block
from evovit.methods import register
from evovit.methods.base import Method, Ranking, ScheduledConfig, run_masked, schedule_at_blocks
from evovit.ops.distance import kept_distance, logit_divergence
from evovit.ops.mask import gumbel_keep, gumbel_noise
from evovit.ops.select import split_top
from evovit.ops.squeeze import Rest, Temperature, keep_split, squeeze_masked
from evovit.options import Number, Ratio, Weight, option
from evovit.tokens import Tokens

RatioOf = Literal["image", "batch"]
TokenLoss = Literal["squared", "divergence"]


class Decided(NamedTuple):
    """DynamicViT's state beside the tokens, in training."""

    keeps: tuple[Tensor, ...] = ()  # (B, N) float32 after each decision: 1 kept, 0 dropped


class ScorePredictor(nn.Module):
    """Tells how likely each token is kept, from itself and the mean of those kept so far."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        widths = ((dim, dim), (dim, dim // 2), (dim // 2, dim // 4), (dim // 4, 2))
        layers = [nn.Linear(*pair) for pair in widths]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, eps=1e-5), layers[0], nn.GELU())
        self.out_conv = nn.Sequential(layers[1], nn.GELU(), layers[2], nn.GELU(), layers[3])

    def forward(self, patches: Tensor, mask: Tensor) -> Tensor:
        """Return log-probabilities of keep and drop, (B, N, 2) float32, from patches (B, N, C).

        Args:
            mask: (B, N) 1 for tokens kept so far.
        """
        local, whole = self.in_conv(patches).chunk(2, dim=-1)
        weight = mask.unsqueeze(-1).float()
        mean = (whole * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
        scores = self.out_conv(torch.cat((local, mean.to(local.dtype).expand_as(local)), dim=-1))
        return scores.float().log_softmax(-1)  # type: ignore[no-any-return]


@register("dynamic_vit")
class DynamicViT(Method):
    """Dynamic token sparsification: before a few blocks a predictor drops the tokens it finds dispensable.

    With a teacher, `losses` compares logits and tokens with the teacher's; this is added to the recipe's own
    `objective.distillation`, which the released training leaves off.
    """

    needs_class_token = False
    learns_from_teacher = True
    samples_in_training = True
    keep_all: ClassVar = {"keep_ratio": 1.0}
    example: ClassVar = {"blocks": (1, 3)}

    @dataclass(frozen=True, kw_only=True)
    class Config(ScheduledConfig):
        """Options of DynamicViT; the defaults are the released ones for DeiT-S."""

        keep_ratio: Ratio | tuple[Ratio, ...] = option(
            0.7, "share of all patches kept: r, r^2, ... for a number r; a list has one per reducing block"
        )
        blocks: tuple[Number, ...] = option(
            (3, 6, 9), "blocks before which tokens are dropped, counted from 0"
        )
        rest: Rest = option(
            "drop", "what becomes of tokens not kept; squeeze merges each into the most similar kept one"
        )
        temperature: Temperature = option(
            1.0, "temperature of the cosine similarities that weight squeezed tokens"
        )
        ratio_weight: Weight = option(
            2.0, "loss weight of the squared difference between kept share and ratio"
        )
        ratio_of: RatioOf = option(
            "image", "the ratio loss takes the kept share of each image, or of the whole batch"
        )
        logit_weight: Weight = option(0.5, "loss weight of KL(teacher || student) of the logits")
        token_weight: Weight = option(
            0.5, "loss weight of the distance between tokens kept to the end and the teacher's"
        )
        token_loss: TokenLoss = option(
            "squared", "distance of tokens; divergence, KL, is for hosts that classify every token"
        )

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        self.merges = config.rest == "squeeze"
        self.plan(config)
        self.learns_from_teacher = config.logit_weight > 0 or config.token_weight > 0
        self.score_predictor = nn.ModuleList(ScorePredictor(spec.dims[-1]) for _ in self.reducing)

    def plan(self, config: Config) -> None:
        self.schedule, self.reducing = schedule_at_blocks(config, self.spec)

    def ratios_now(self) -> tuple[float, ...]:
        return tuple(self.schedule.ratios[number] for number in self.reducing)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        if not self.training:
            return block(self.drop(tokens, block.number))
        if block.number in self.reducing:
            tokens = self.sample(tokens, block.number)
        return run_masked(block, tokens)

    def scores(self, tokens: Tokens, number: int) -> Tensor:
        """Return log-probabilities of keep and drop before block `number`, (B, N, 2) float32."""
        predictor = self.score_predictor[self.reducing.index(number)]
        return predictor(tokens.patches, tokens.taking_part)  # type: ignore[no-any-return]

    def drop(self, tokens: Tokens, number: int) -> Tokens:
        """Keep the tokens of highest score, in their order (evaluation)."""
        keep = self.schedule.count(number, tokens.num_cells)
        if keep is None or keep >= tokens.num_patches:
            return tokens
        split = split_top(self.scores(tokens, number)[..., 0], keep)
        return keep_split(tokens, split, self.config.rest, self.config.temperature)

    def ranking(self, block: Block, tokens: Tokens) -> Ranking | None:
        if self.schedule.ratios[block.number] == 1:
            return None
        return Ranking(self.scores(tokens, block.number)[..., 0], tokens.index)

    def sample(self, tokens: Tokens, number: int) -> Tokens:
        """Mask tokens out at random, by their scores; who is out stays out (training)."""
        scores, before = self.scores(tokens, number), tokens.taking_part
        if self.schedule.ratios[number] == 1:
            keep = before + 0 * scores[..., 0]  # the predictor stays in the graph
        else:
            keep = gumbel_keep(scores, gumbel_noise(scores)) * before
            if self.config.rest == "squeeze":
                patches = squeeze_masked(tokens.patches, keep, before, self.config.temperature)
                tokens = tokens.with_x(torch.cat((tokens.prefix, patches), dim=1))
        keeps = tokens.carry.keeps if tokens.carry else ()
        return tokens.change(mask=keep, carry=Decided((*keeps, keep)))

    def losses(self, outputs: Any, teacher: Any) -> dict[str, Tensor]:
        config, keeps = self.config, outputs.tokens.carry.keeps if outputs.tokens.carry else ()
        if not keeps:
            return {}
        pairs = zip(keeps, (self.schedule.ratios[number] for number in self.reducing), strict=True)
        dims = 1 if config.ratio_of == "image" else (0, 1)
        gaps = torch.stack([(keep.mean(dims) - ratio).square().mean() for keep, ratio in pairs])
        terms = {"ratio": config.ratio_weight * gaps.mean()}
        if teacher is not None and self.learns_from_teacher:
            pair, on_tokens = (outputs, teacher), outputs.token_logits is not None
            student, taught = (x.class_logits if on_tokens else x.logits for x in pair)
            terms["logits"] = config.logit_weight * logit_divergence(student, taught)
            first = outputs.tokens.num_prefix
            student, taught = (x.token_logits if on_tokens else x.features[:, first:] for x in pair)
            distance = kept_distance(student, taught, keeps[-1] > 0.5, config.token_loss)
            terms["kept_tokens"] = config.token_weight * distance
        return terms
