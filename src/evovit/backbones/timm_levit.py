"""timm's Levit (LeViT, Graham et al., ICCV 2021): three stages, relative position bias, no class token.

For methods that keep the grid: attention sub-samples it between stages. Checked with timm 1.0.28 to 1.0.31.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from evovit.backbones import adapter
from evovit.backbones.base import Backbone, BackboneSpec, Stage, expect_class, expect_parts, raster_tokens
from evovit.backbones.timm_levit_blocks import LevitBlock, LevitEntry
from evovit.errors import EvoViTError
from evovit.tokens import Tokens

DOWNSAMPLES = (
    "torch.nn.modules.linear.Identity",
    "timm.models.levit.LevitDownsample",
    "evovit.models.levit_cls.LevitDownsample",
)


def levit_stages(host: Any) -> list[Stage]:
    """Return fresh views of a LeViT's stages; blocks are numbered through."""
    stages, number = [], 0
    for stage in host.stages:
        blocks = [LevitBlock(block, number + i) for i, block in enumerate(stage.blocks)]
        enter = None if isinstance(stage.downsample, nn.Identity) else LevitEntry(stage.downsample)
        stages.append(Stage(enter, blocks))
        number += len(blocks)
    return stages


def check_stages(host: Any) -> None:
    """Raise `EvoViTError` where a stage of a LeViT holds a part that its views do not know."""
    for stage, view in zip(host.stages, levit_stages(host), strict=True):
        expect_parts(stage, ("downsample", "blocks"), "A stage")
        expect_class(stage.downsample, DOWNSAMPLES, "A stage's beginning")
        if isinstance(view.enter, LevitEntry):
            view.enter.check()
        for block in view.blocks:
            if isinstance(block, LevitBlock):
                block.check()


def bypassed_in_stages(host: Any) -> Iterator[nn.Module]:
    """Return the modules of a LeViT's stages whose forward is never called."""
    yield host.stages
    for stage in host.stages:
        yield from (stage, stage.downsample, stage.blocks)
        for block in stage.blocks:
            yield from (block, block.attn)
        if not isinstance(stage.downsample, nn.Identity):
            asking = stage.downsample.attn_downsample.q
            yield from (stage.downsample.attn_downsample, asking)
            yield from (part for name, part in asking.named_children() if name == "down")


@adapter("timm.models.levit.Levit")
class TimmLevit(Backbone):
    """View of timm's `Levit` and `LevitDistilled`, linear variant."""

    model: Any
    head_reads_patches = True

    def __init__(self, model: nn.Module) -> None:
        self.model = host = model  # type: Any
        if host.use_conv:
            raise EvoViTError(
                "The convolutional LeViT keeps its tokens as an image, which methods cannot shorten; use the "
                "linear variant of the same name without 'conv', its weights are equal but for their shape."
            )
        first = host.stages[0].blocks[0].attn
        self.spec = BackboneSpec(
            depths=tuple(len(stage.blocks) for stage in host.stages),
            dims=tuple(host.embed_dim),
            num_heads=tuple(stage.blocks[0].attn.num_heads for stage in host.stages),
            grid=tuple(first.resolution),
            num_prefix=0,
            has_class_token=False,
            num_classes=host.num_classes,
        )
        stride = host.feature_info[0]["reduction"]
        self.image_shape = (host.in_chans, self.spec.grid[0] * stride, self.spec.grid[1] * stride)

    def embed(self, images: Tensor) -> Tokens:
        x = self.model.stem(images)
        grid = (x.shape[2], x.shape[3])
        if grid != self.spec.grid:
            raise EvoViTError(
                f"The images give a {grid[0]} x {grid[1]} grid, but this LeViT's position biases are for "
                f"{self.spec.grid[0]} x {self.spec.grid[1]}; create it with the images' img_size."
            )
        return raster_tokens(x.flatten(2).transpose(1, 2), 0, grid)

    def stages(self) -> Sequence[Stage]:
        return levit_stages(self.model)

    def norm(self, x: Tensor) -> Tensor:
        return x

    def head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or not self._splits_heads():
            return self.model.forward_head(features, pre_logits)  # type: ignore[no-any-return]
        return self.model.head(self.model.forward_head(features, True))  # type: ignore[no-any-return]

    def extra_logits(self, features: Tensor) -> dict[str, Tensor]:
        if not self._splits_heads():
            return {}
        return {"distilled": self.model.head_dist(self.model.forward_head(features, True))}

    def _splits_heads(self) -> bool:
        """Tell whether the host, at this moment, gives a prediction for labels and one for a teacher."""
        return bool(self.model.training and getattr(self.model, "distilled_training", False))

    def host_features(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)  # type: ignore[no-any-return]

    def bypassed(self) -> Iterator[nn.Module]:
        yield self.model
        yield from bypassed_in_stages(self.model)

    def check_structure(self) -> None:
        expect_parts(self.model, ("stem", "stages", "head", "head_dist"), "The host")
        check_stages(self.model)
