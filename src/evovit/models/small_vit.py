"""The quickstart's model: a small timm vision transformer with a convolutional stem, for 48 x 48 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from evovit.errors import check_choice
from evovit.models.named import own_options

__all__: list[str] = []  # timm's registry adds the entry points

NAME = "vit_stem_reg2_d8_w96_48"  # in results
IMAGE_SIZE = 48  # pixels a side


class ConvStem(nn.Module):
    """Patch embedding by overlapping convolutions: (B, 3, size, size) to (B, N, width), a token per patch.

    Early convolutions let a small transformer learn from few images (Xiao et al., NeurIPS 2021). It has the
    attributes that timm asks of a patch embedding; `patch_size` is an even number of pixels.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        middle = embed_dim // 4
        self.layers = nn.Sequential(
            *_conv(in_chans, middle, kernel=3, stride=2),
            *_conv(middle, 2 * middle, kernel=5, stride=patch_size // 2),
            *_conv(2 * middle, embed_dim, kernel=3, stride=1),
            nn.Conv2d(embed_dim, embed_dim, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]  # (B, N, width)


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> Sequence[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


@register_model
def small_vit(
    pretrained: bool = False, *, seed: int = 0, stem: str = "conv", **kwargs: Any
) -> VisionTransformer:
    """Small ViT for digit scenes: 8 blocks, width 96, one token per 6 x 6 pixels, weights random from `seed`.

    Registers take over what a transformer otherwise stores in background patches (Darcet et al., ICLR 2024),
    so that class attention follows the digit.

    Args:
        stem: conv, or patch for the plain patch embedding of a ViT, each patch by itself.
    """
    check_choice("stem", stem, ("conv", "patch"))
    kwargs = own_options(pretrained, kwargs, "weights of small_vit", "load_reduced(folder, model)")
    own: dict[str, Any] = {"img_size": IMAGE_SIZE, "patch_size": 6, "embed_dim": 96, "depth": 8}
    own |= {"num_heads": 6, "mlp_ratio": 3, "num_classes": 10, "global_pool": "token", "reg_tokens": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(
            **(own | {"embed_layer": ConvStem if stem == "conv" else PatchEmbed} | kwargs)
        )
        for name, weight in model.named_parameters():
            if name.startswith("blocks.") and weight.ndim == 2:  # timm's 0.02 is made for width 768
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model
