"""LeViT with a class token and absolute positions: the dense host of Evo-LeViT; also in timm's registry.

LeViT (Graham et al., ICCV 2021) as changed by Evo-ViT (Xu et al., AAAI 2022): a class token is added, and
learned positions at each stage's entry take the place of the relative position bias. Parameters have the
names of timm's Levit.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import checkpoint_seq, register_model
from timm.models.levit import LevitMlp, LinearNorm, NormLinear, Stem8, Stem16
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.errors import EvoViTError, check_choice
from evovit.models.named import imagenet_cfg, own_options

__all__: list[str] = []  # timm's registry adds the entry points

STEMS = {"s16": Stem16, "s8": Stem8}
SIZES: dict[str, dict[str, Any]] = {  # as published
    "128s": {"embed_dim": (128, 256, 384), "key_dim": 16, "num_heads": (4, 6, 8), "depth": (2, 3, 4)},
    "128": {"embed_dim": (128, 256, 384), "key_dim": 16, "num_heads": (4, 8, 12), "depth": (4, 4, 4)},
    "192": {"embed_dim": (192, 288, 384), "key_dim": 32, "num_heads": (3, 5, 6), "depth": (4, 4, 4)},
    "256": {"embed_dim": (256, 384, 512), "key_dim": 32, "num_heads": (4, 6, 8), "depth": (4, 4, 4)},
    "384": {"embed_dim": (384, 512, 768), "key_dim": 32, "num_heads": (6, 9, 12), "depth": (4, 4, 4)},
}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return values mixed by fused attention, (B, Q, H * value width), from (B, H, Q or T, width) each."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def projection(width: int, dim: int, first_scale: float) -> nn.Sequential:
    """Return the output projection; its batch norm's weight starts at `first_scale`."""
    norm = LinearNorm(width, dim, bn_weight_init=first_scale)
    return nn.Sequential(OrderedDict(act=nn.Hardswish(), ln=norm))


class Attention(nn.Module):
    """LeViT's attention without position bias; values are twice as wide as keys."""

    def __init__(self, dim: int, key_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, key_dim**-0.5
        self.key_dim, self.val_dim = key_dim, 2 * key_dim
        self.qkv = LinearNorm(dim, num_heads * (2 * key_dim + self.val_dim))
        self.proj = projection(num_heads * self.val_dim, dim, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, 2 D + 2 D)
        return self.proj(attend(*heads.split((self.key_dim, self.key_dim, self.val_dim), -1)))  # type: ignore[no-any-return]


class LevitBlock(nn.Module):
    """Attention and MLP, each with a skip connection."""

    def __init__(self, dim: int, key_dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.attn = Attention(dim, key_dim, num_heads)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = LevitMlp(dim, int(dim * mlp_ratio), act_layer=nn.Hardswish)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(x))
        return x + self.drop_path2(self.mlp(x))  # type: ignore[no-any-return]


class AttentionDownsample(nn.Module):
    """Attention of class token and even cells over all tokens, with positions; values are four keys wide."""

    stride = 2

    def __init__(self, in_dim: int, out_dim: int, key_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        num_heads = in_dim // key_dim
        self.num_heads, self.scale = num_heads, key_dim**-0.5
        self.key_dim, self.val_dim = key_dim, 4 * key_dim
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + 1, in_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.kv = LinearNorm(in_dim, num_heads * (key_dim + self.val_dim))
        self.q = nn.Sequential(OrderedDict(ln=LinearNorm(in_dim, num_heads * key_dim)))
        self.proj = projection(num_heads * self.val_dim, out_dim, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed
        even = x[:, 1:].unflatten(1, self.grid)[:, :: self.stride, :: self.stride].flatten(1, 2)  # type: ignore[no-untyped-call]
        q = self.q(torch.cat((x[:, :1], even), 1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        heads = self.kv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D + 4 D)
        return self.proj(attend(q, *heads.split((self.key_dim, self.val_dim), -1)))  # type: ignore[no-any-return]


class LevitDownsample(nn.Module):
    """From one stage to the next: down-sampling attention without skip connection, then an MLP with one."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        key_dim: int,
        grid: tuple[int, int],
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.attn_downsample = AttentionDownsample(in_dim, out_dim, key_dim, grid)
        self.mlp = LevitMlp(out_dim, int(out_dim * mlp_ratio), act_layer=nn.Hardswish)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn_downsample(x)
        return x + self.drop_path(self.mlp(x))  # type: ignore[no-any-return]


class LevitCls(nn.Module):
    """LeViT with class token and absolute positions.

    Args:
        img_size: pixels, any; the stem and each stage round halves up.
        drop_path_rate: of every block alike, as in LeViT.
        stem_type: "s16" halves the image four times, "s8" three times.
        distilled: a second head on the mean token; predictions are the mean of both.
        class_heads: as many heads on the class token, for the training loss alone.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: tuple[int, ...] = (128, 256, 384),
        key_dim: int = 16,
        depth: tuple[int, ...] = (2, 3, 4),
        num_heads: tuple[int, ...] = (4, 6, 8),
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        stem_type: str = "s16",
        distilled: bool = True,
        class_heads: bool = True,
    ) -> None:
        super().__init__()
        check_choice("stem_type", stem_type, STEMS)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size, self.in_chans, self.num_classes = (height, width), in_chans, num_classes
        self.embed_dim, self.num_features = tuple(embed_dim), embed_dim[-1]
        self.grad_checkpointing = False
        self.stem = STEMS[stem_type](in_chans, embed_dim[0], act_layer=nn.Hardswish)
        grid = (-(-height // self.stem.stride), -(-width // self.stem.stride))
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim[0]))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + 1, embed_dim[0]))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        stages: list[nn.Module] = []
        for i, (dim, blocks, heads) in enumerate(zip(embed_dim, depth, num_heads, strict=True)):
            down: nn.Module = nn.Identity()
            if i:
                down = LevitDownsample(embed_dim[i - 1], dim, key_dim, grid, mlp_ratio, drop_path_rate)
                grid = (-(-grid[0] // 2), -(-grid[1] // 2))
            made = [LevitBlock(dim, key_dim, heads, mlp_ratio, drop_path_rate) for _ in range(blocks)]
            stages.append(nn.Sequential(OrderedDict(downsample=down, blocks=nn.Sequential(*made))))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": self.stem.stride * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(embed_dim)
        ]
        self.distilled, self.class_heads = distilled, class_heads
        self.predicting = ("head", "head_dist") if distilled else ("head",)
        self.reset_classifier(num_classes)
        self.pretrained_cfg = imagenet_cfg(
            self, (in_chans, height, width), first_conv="stem.conv1.linear", classifier=self.predicting
        )

    def embed(self, images: Tensor) -> Tensor:
        """Return class token and patch tokens (B, 1 + N, C) with positions."""
        x = self.stem(images)
        if tuple(x.shape[2:]) != self.grid:
            raise EvoViTError(
                f"The images give a {x.shape[2]} x {x.shape[3]} grid, but the positions are for "
                f"{self.grid[0]} x {self.grid[1]}; create the model with the images' img_size."
            )
        x = x.flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed

    def forward_features(self, images: Tensor) -> Tensor:
        """Return class token and patch tokens (B, 1 + N, C) of the last stage."""
        x = self.embed(images)
        return checkpoint_seq(self.stages, x) if self.grad_checkpointing else self.stages(x)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), the mean of the heads on the mean token, or that token."""
        pooled = x[:, 1:].mean(dim=1)
        if pre_logits:
            return pooled
        logits: list[Tensor] = [self.get_submodule(name)(pooled) for name in self.predicting]
        return logits[0] if len(logits) == 1 else (logits[0] + logits[1]) / 2

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) for images (B, channels, height, width)."""
        return self.forward_head(self.forward_features(images))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model fresh heads for `num_classes`; 0: the heads pass features on."""
        if global_pool not in (None, "avg"):
            raise EvoViTError(f"global_pool is {global_pool!r}; LeViT's heads read the mean token: 'avg'.")
        self.num_classes = num_classes
        cls = ("head_cls", "head_cls_dist") if self.class_heads else ()
        for name in ("head", "head_dist", *cls):
            if self.distilled or not name.endswith("dist"):
                fresh = NormLinear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
                self.add_module(name, fresh.to(self.cls_token).train(self.training))

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the heads that predict."""
        heads = tuple(self.get_submodule(name) for name in self.predicting)
        return heads if self.distilled else heads[0]

    def no_weight_decay(self) -> set[str]:
        """Return the names of the positions; the class token is decayed, as released."""
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's layer groups."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^cls_token|pos_embed|stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable


def build_levit_cls(size: str, pretrained: bool, kwargs: dict[str, Any]) -> LevitCls:
    """Build a host of a published size; `kwargs` are of `LevitCls` and what timm's registry adds."""
    what, call = "weights of LeViT with a class token", "load_official('evo_levit', path)"
    kwargs = own_options(pretrained, kwargs, what, call)
    return LevitCls(**(SIZES[size] | kwargs))


@register_model
def levit_cls_128s(pretrained: bool = False, **kwargs: Any) -> LevitCls:
    """Dense host of Evo-LeViT-128S."""
    return build_levit_cls("128s", pretrained, kwargs)


@register_model
def levit_cls_128(pretrained: bool = False, **kwargs: Any) -> LevitCls:
    """Dense host of Evo-LeViT-128."""
    return build_levit_cls("128", pretrained, kwargs)


@register_model
def levit_cls_192(pretrained: bool = False, **kwargs: Any) -> LevitCls:
    """Dense host of Evo-LeViT-192."""
    return build_levit_cls("192", pretrained, kwargs)


@register_model
def levit_cls_256(pretrained: bool = False, **kwargs: Any) -> LevitCls:
    """Dense host of Evo-LeViT-256."""
    return build_levit_cls("256", pretrained, kwargs)


@register_model
def levit_cls_384(pretrained: bool = False, **kwargs: Any) -> LevitCls:
    """Dense host of Evo-LeViT-384."""
    return build_levit_cls("384", pretrained, kwargs)
