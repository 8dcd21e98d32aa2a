"""Keep some patch tokens and drop the others: the plain baselines every comparison needs.

Top-K by class attention, random and evenly spaced, with the counts of DynamicViT. Who is not kept is dropped,
or squeezed into the kept (TPS, Wei et al., CVPR 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from evovit.backbones.base import BackboneSpec, Block
from evovit.methods import register
from evovit.methods.base import Method, check_blocks, require_class_token
from evovit.ops.score import attention_column_mean, class_attention, random_score
from evovit.ops.select import Split, split_even, split_top
from evovit.ops.squeeze import Rest, Temperature, keep_split
from evovit.options import Number, Ratio, option
from evovit.schedule import KeepSchedule
from evovit.tokens import QKV, Tokens

Selection = Literal["class", "column_mean", "random", "even"]


@register("keep")
class Keep(Method):
    """Baselines: keep the top, random or evenly spaced patch tokens at a few blocks, drop the others."""

    needs_class_token = False  # `selection` decides
    keep_all: ClassVar = {"keep_ratio": 1.0}
    example: ClassVar = {"blocks": (1, 2)}

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        """Options of the baselines."""

        keep_ratio: Ratio | tuple[Ratio, ...] = option(
            0.7, "r: r, r^2, ... of all patches; a list has one per reducing block"
        )
        blocks: tuple[Number, ...] = option(
            (3, 6, 9), "that reduce, between attention and FFN; counted from 0"
        )
        selection: Selection = option("class", "top attention from the class token or from all; or plain")
        rest: Rest = option("drop", "squeeze: who goes joins the most similar token that stays")
        temperature: Temperature = option(1.0, "of the cosines that weigh who is squeezed")

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        if config.selection == "class":
            require_class_token(spec, "selection='class'", "'column_mean', 'random' or 'even'")
        check_blocks(config.blocks, spec.depth)
        self.schedule = KeepSchedule.at_blocks(spec.depth, config.keep_ratio, config.blocks)
        self.merges = config.rest == "squeeze"

    def ratios_now(self) -> tuple[float, ...]:
        return tuple(self.schedule.ratios[number] for number in self.config.blocks)

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        tokens, qkv = block.attend(tokens)
        keep = self.schedule.count(block.number, tokens.num_cells)
        if keep is not None and keep < tokens.num_patches:
            split = self.split(tokens, qkv, keep, block.number)
            tokens = keep_split(tokens, split, self.config.rest, self.config.temperature)
        return block.ffn(tokens)

    def split(self, tokens: Tokens, qkv: QKV, keep: int, number: int) -> Split:
        """Choose who stays; random draws afresh in training alone."""
        selection = self.config.selection
        if selection == "even":
            return split_even(tokens.index, keep)
        if selection == "random":
            score = random_score(tokens.index, None if self.training else number)
        else:
            measure = class_attention if selection == "class" else attention_column_mean
            score = measure(qkv, tokens.num_prefix)
        return split_top(score, keep)
