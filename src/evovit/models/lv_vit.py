"""LV-ViT (Jiang et al., "All Tokens Matter", NeurIPS 2021); also in timm's registry.

timm's VisionTransformer with a convolutional stem, q/k/v without bias, residual branches divided by a
constant and a second classifier on the patch tokens. Parameters have the official names.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from evovit.errors import EvoViTError, check_choice
from evovit.models.named import imagenet_cfg, own_options
from evovit.ops.mask import masked_max

__all__: list[str] = []  # timm's registry adds the entry points

STEMS = ("4_2", "4c", "6c")  # the official names


def stem_layers(stem: str, embed_dim: int, width: int) -> tuple[tuple[int, int, int], ...]:
    """Return (channels, kernel, stride) of the stem's convolutions with batch norm.

    "4_2", of LV-ViT, also ends in a projection of what is left of a patch; "4c" and "6c", of SiT, do not.
    """
    check_choice("stem", stem, STEMS)
    if stem == "4_2":
        return ((width, 7, 2), (width, 3, 1), (width, 3, 1))
    whole, half, quarter, eighth = embed_dim, embed_dim // 2, embed_dim // 4, embed_dim // 8
    further = () if stem == "4c" else ((eighth, 3, 1), (eighth, 3, 1))
    return ((eighth, 3, 2), *further, (quarter, 3, 2), (half, 3, 2), (whole, 3, 2))


class ConvStem(nn.Module):
    """Images to patch tokens by convolutions with batch norm and an activation between them.

    Args:
        stem: see `stem_layers`; `width` is of "4_2" alone.
        others: as timm's VisionTransformer gives them; images are never padded.
    """

    def __init__(
        self,
        stem: str,
        width: int,
        *,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dynamic_img_pad:
            raise EvoViTError("dynamic_img_pad is for timm's own patch embedding; leave it out.")
        layers = stem_layers(stem, embed_dim, width)
        self.patch_size = (patch_size, patch_size)
        self.set_input_size(img_size)
        self.depth, left, channels = len(layers), patch_size, in_chans
        for number, (out, kernel, stride) in enumerate(layers, 1):
            conv = nn.Conv2d(
                channels, out, kernel, stride, kernel // 2, bias=False, device=device, dtype=dtype
            )
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(out, device=device, dtype=dtype))
            left, channels = left // stride, out
        self.act = nn.ReLU() if stem == "4_2" else nn.GELU()
        self.proj: nn.Conv2d | None = None
        if stem == "4_2":
            self.proj = nn.Conv2d(channels, embed_dim, left, left, bias=bias, device=device, dtype=dtype)
        elif left != 1:
            raise EvoViTError(f"patch_size is {patch_size}; the stem {stem!r} makes patches of 16 pixels.")

    def set_input_size(
        self, img_size: int | tuple[int, int], patch_size: tuple[int, int] | None = None
    ) -> None:
        """Prepare for images of another size, (height, width) in pixels; patches keep theirs."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % self.patch_size[0] or width % self.patch_size[1] or patch_size is not None:
            raise EvoViTError(
                f"img_size is {height} x {width}; allowed are multiples of the patch's "
                f"{self.patch_size[0]} pixels, which are fixed."
            )
        self.img_size, self.grid_size = (height, width), self.dynamic_feat_size((height, width))
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns) of the patches of an image, which timm asks for."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, N, C), raster order."""
        if images.shape[2:] != self.img_size:
            raise EvoViTError(
                f"The images have {images.shape[2]} x {images.shape[3]} pixels, the model is for "
                f"{self.img_size[0]} x {self.img_size[1]}; create it with img_size."
            )
        x = images
        for number in range(1, self.depth + 1):
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))
            x = x if number == self.depth and self.proj is None else self.act(x)
        x = x if self.proj is None else self.proj(x)
        return x.flatten(2).transpose(1, 2)


class Divide(nn.Module):
    """Divide by a constant; stands where timm's block has its LayerScale."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor


def divided_block(skip_lam: float, **options: Any) -> Any:
    """Return timm's `Block` with both residual branches divided by `skip_lam`."""
    block = Block(**options)
    block.ls1, block.ls2 = Divide(skip_lam), Divide(skip_lam)
    return block


class LVViT(VisionTransformer):  # type: ignore[misc]
    """LV-ViT, and with another stem and no `aux_weight` the backbones of SiT.

    Args:
        skip_lam: every residual branch is divided by it.
        stem: "4_2" is LV-ViT's; "4c" and "6c" are SiT's. `stem_width`: channels of "4_2".
        aux_weight: logits are class logits + aux_weight * (max over patch tokens of theirs); 0 leaves the
            second head unused and frozen.
        aux_in_training: False trains on class logits alone; the loss has to read `token_logits`.
        options: further ones of timm's `VisionTransformer`.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        skip_lam: float = 2.0,
        stem: str = "4_2",
        stem_width: int = 64,
        aux_weight: float = 0.5,
        aux_in_training: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=False,
            norm_layer=nn.LayerNorm,  # eps 1e-5
            embed_layer=partial(ConvStem, stem, stem_width),
            block_fn=partial(divided_block, skip_lam),
            **options,
        )
        self.aux_weight, self.aux_in_training = aux_weight, aux_in_training
        self.aux_head = self._fresh_aux_head()
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def _fresh_aux_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.pos_embed
        head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head.requires_grad_(self.aux_weight > 0)

    def class_logits(self, features: Tensor) -> Tensor:
        """Return logits (B, classes) of the class token alone, from normed features (B, 1 + N, C)."""
        return super().forward_head(features)  # type: ignore[no-any-return]

    def token_logits(self, features: Tensor) -> Tensor:
        """Return logits (B, N, classes) of the patch tokens, from normed features (B, 1 + N, C)."""
        return self.aux_head(features[:, self.num_prefix_tokens :])  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, classes) of both heads, or what enters the class head.

        Args:
            x: (B, 1 + N, C), normed.
            mask: (B, N) 1 where the second head reads a patch token; None: all.
        """
        logits: Tensor = super().forward_head(x, pre_logits=pre_logits)
        used = self.aux_weight > 0 and self.num_classes > 0 and (self.aux_in_training or not self.training)
        if pre_logits or not used:
            return logits
        each = self.token_logits(x)  # (B, N, classes)
        return logits + self.aux_weight * (each.amax(1) if mask is None else masked_max(each, mask))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give both heads another number of classes."""
        if global_pool not in (None, "token"):
            raise EvoViTError(f"global_pool is {global_pool!r}; LV-ViT's heads take only 'token'.")
        super().reset_classifier(num_classes)
        self.aux_head = self._fresh_aux_head()


def build_lv_vit(crop_pct: float, pretrained: bool, **options: Any) -> LVViT:
    """Build a named host with random weights; raises `EvoViTError` if published ones are asked for."""
    what, call = "weights of LV-ViT or SiT", "load_official('lv_vit', path)"
    model = LVViT(**own_options(pretrained, options, what, call))
    shape = (model.in_chans, *model.patch_embed.img_size)
    names = {"first_conv": "patch_embed.conv1", "classifier": ("head", "aux_head")}
    model.pretrained_cfg = model.default_cfg = imagenet_cfg(model, shape, crop_pct=crop_pct, **names)
    return model


@register_model
def lv_vit_tiny(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T: 8.53 M parameters; 79.1 top-1 as published."""
    size = {"embed_dim": 240, "depth": 12, "num_heads": 4, "skip_lam": 1.0}
    return build_lv_vit(0.9, pretrained, **(size | kwargs))


@register_model
def lv_vit_small(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S: 26.15 M parameters, 6.55 GMACs; 83.3 top-1 as published."""
    return build_lv_vit(0.9, pretrained, **kwargs)


@register_model
def lv_vit_medium(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M: 55.83 M parameters, 12.68 GMACs; 84.0 top-1 as published."""
    size = {"embed_dim": 512, "depth": 20, "num_heads": 8}
    return build_lv_vit(1.0, pretrained, **(size | kwargs))


@register_model
def lv_vit_large(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L at 448 pixels: 150.5 M parameters; 86.2 top-1 as published."""
    size = {
        "img_size": 448,
        "embed_dim": 768,
        "depth": 24,
        "num_heads": 12,
        "skip_lam": 3.0,
        "stem_width": 128,
    }
    return build_lv_vit(1.0, pretrained, **(size | kwargs))
