"""timm's VisionTransformer: ViT, DeiT (also distilled), DeiT-III, AugReg, MAE, CLIP, SigLIP, DINOv2, hybrids.

Checked with timm 1.0.28 to 1.0.31.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from evovit.backbones import adapter
from evovit.backbones.base import (
    Backbone,
    BackboneSpec,
    Block,
    Stage,
    class_path,
    expect_class,
    expect_parts,
    raster_tokens,
)
from evovit.backbones.timm_blocks import PostNormBlock, PreNormBlock
from evovit.backbones.timm_heads import masked_logits
from evovit.backbones.timm_parallel_blocks import ParallelScalingBlock, ParallelThingsBlock
from evovit.errors import EvoViTError
from evovit.tokens import QKV, Tokens

BLOCKS: dict[str, type[PreNormBlock]] = {
    "timm.models.vision_transformer.Block": PreNormBlock,
    "timm.models.vision_transformer.ResPostBlock": PostNormBlock,
    "timm.models.vision_transformer.ParallelThingsBlock": ParallelThingsBlock,
    "timm.models.vision_transformer.ParallelScalingBlock": ParallelScalingBlock,
}
HOST_PARTS = (
    *("patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre"),
    *("blocks", "norm", "attn_pool", "fc_norm", "head_drop", "head"),
)


def timm_spec(host: Any, num_heads: int) -> BackboneSpec:
    """Return what a flat timm host offers; raises `EvoViTError` where no adapter can be exact."""
    patch_drop: Any = getattr(host, "patch_drop", None)  # identity, None, absent: patches are not dropped
    if getattr(patch_drop, "prob", 0.0) > 0:
        raise EvoViTError(
            f"The host drops {patch_drop.prob:.0%} of its patches at random in training, which breaks "
            "the grid that methods need; create it with patch_drop_rate=0."
        )
    if getattr(host.patch_embed, "grid_size", None) is None:  # timm allows img_size=None, and any embed_layer
        raise EvoViTError(
            f"The patch embedding ({type(host.patch_embed).__name__}) names no grid, which methods need; "
            "create the host with img_size."
        )
    return BackboneSpec(
        depths=(len(host.blocks),),
        dims=(host.embed_dim,),
        num_heads=(num_heads,),
        grid=tuple(host.patch_embed.grid_size),
        num_prefix=host.num_prefix_tokens,
        has_class_token=host.cls_token is not None,
        num_classes=host.num_classes,
        has_probe=timm_has_probe(getattr(host, "attn_pool", None)),
    )


def timm_has_probe(pool: Any) -> bool:
    """Tell whether a timm host's pooling has one learnt query, and no places of its own."""
    known = pool is not None and class_path(pool) == "timm.layers.attention_pool.AttentionPoolLatent"
    return known and pool.latent_len == 1 and pool.pos_embed is None


def timm_grid(host: Any, embedded: Tensor) -> tuple[int, int]:
    """Return (rows, columns) of the patch embedding's output: (B, rows, columns, C), or else (B, N, C)."""
    rows, columns = embedded.shape[1:3] if host.dynamic_img_size else host.patch_embed.grid_size
    return rows, columns


def timm_takes(host: Any, height: int, width: int) -> bool:
    """Tell whether a flat timm host runs on images of this size in pixels."""
    if not host.dynamic_img_size:
        return (height, width) == tuple(host.patch_embed.img_size)
    rows, columns = host.patch_embed.patch_size
    return getattr(host.patch_embed, "dynamic_img_pad", False) or not (height % rows or width % columns)


class TimmFlat(Backbone):
    """What views of timm's flat hosts share: one stage, and the host's own norm, head and features."""

    model: Any
    pools_prefix = False  # whether a head that pools reads the prefix tokens too

    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """Return fresh views of the blocks."""

    def stages(self) -> Sequence[Stage]:
        return [Stage(None, self.with_probe(self.blocks()))]

    def probe_qkv(self, tokens: Tokens) -> QKV:
        pool = self.model.attn_pool
        x = self.norm(tokens.x if self.pools_prefix else tokens.patches)
        k, q = pool.kv(x).chunk(2, dim=-1)[0], pool.q(pool.latent)
        q, k = (y.reshape(*y.shape[:2], pool.num_heads, -1).transpose(1, 2) for y in (q, k))
        q, k = pool.q_norm(q), pool.k_norm(k)
        return QKV(q.expand(k.shape[0], -1, -1, -1), k, k[:, :, :0], pool.scale)

    def norm(self, x: Tensor) -> Tensor:
        return self.model.norm(x)  # type: ignore[no-any-return]

    def head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(features, pre_logits=pre_logits)  # type: ignore[no-any-return]

    def masked_head(self, features: Tensor, mask: Tensor) -> Tensor:
        if self.head_reads_patches:
            logits = masked_logits(self.model, features, mask, self.pools_prefix)
            if logits is not None:
                return logits
        return super().masked_head(features, mask)

    def host_features(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)  # type: ignore[no-any-return]


@adapter("timm.models.vision_transformer.VisionTransformer")
class TimmViT(TimmFlat):
    """View of timm's `VisionTransformer` and its subclasses."""

    def __init__(self, model: nn.Module) -> None:
        self.model = host = model  # type: Any
        for number, block in enumerate(host.blocks):
            expect_class(block, BLOCKS, f"Block {number}")
        self.spec = timm_spec(host, self.blocks()[0].num_heads)
        self.image_shape = (host.in_chans, *host.patch_embed.img_size)
        self.head_reads_patches = host.global_pool != "token" or host.attn_pool is not None
        self.pools_prefix = host.pool_include_prefix

    def blocks(self) -> list[PreNormBlock]:
        return [BLOCKS[class_path(b)](b, i) for i, b in enumerate(self.model.blocks)]

    def takes(self, height: int, width: int) -> bool:
        return timm_takes(self.model, height, width)

    def embed(self, images: Tensor) -> Tokens:
        x = self.model.patch_embed(images)
        grid = timm_grid(self.model, x)
        x = self.model.norm_pre(self.model._pos_embed(x))
        return raster_tokens(x, self.spec.num_prefix, grid)

    def head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        out: Tensor | tuple[Tensor, Tensor] = self.model.forward_head(features, pre_logits=pre_logits)
        if isinstance(out, tuple):
            raise EvoViTError(
                "The distilled host gives two predictions in training, but evovit returns one; call "
                "set_distilled_training(False) on the host to train their mean."
            )
        return out

    def bypassed(self) -> Iterator[nn.Module]:
        yield from (self.model, self.model.patch_drop, self.model.blocks)
        for block in self.blocks():
            yield from block.bypassed()

    def check_structure(self) -> None:
        expect_parts(self.model, (*HOST_PARTS, "dist_token", "head_dist"), "The host")
        for block in self.blocks():
            block.check()
