# %% [markdown]
# # Dense tasks
#
# Segmentation and detection read a map with a value in every cell. A reduced model still gives complete maps. This
# page puts a linear segmentation head on a reduced backbone and measures how old the values in its cells are.

# %%
# %matplotlib inline
import timm
import torch
from torch import nn

import evovit

torch.manual_seed(0)
host = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=96,
    patch_size=8,
    depth=6,
    embed_dim=96,
    num_heads=3,
    num_classes=0,
)
fast = evovit.reduce_tokens(
    host, "evo_vit", keep_ratio=0.5, start_block=2, stage_length=2
)
backbone = evovit.features(fast, out_indices=(2, 5))
scenes = evovit.digit_scenes("train", 64, size=96)
[tuple(each.shape) for each in backbone(scenes.images[:2])]

# %% [markdown]
# `features` makes a backbone like that of `timm.create_model(..., features_only=True)`, for any method: a decoder reads
# `feature_info.channels()` and `.reduction()`.

# %%
print(backbone.feature_info.channels(), backbone.feature_info.reduction())

# %% [markdown]
# ## Train a head
#
# The head is a 1 x 1 convolution on both maps, and `PixelShuffle` back to pixels. Backbone and head are trained together for a few steps to find
# the digit's pixels.

# %%
channels = sum(backbone.feature_info.channels())
head = nn.Sequential(
    nn.BatchNorm2d(channels), nn.Conv2d(channels, 64, 1), nn.PixelShuffle(8)
)


def segment(images: torch.Tensor) -> torch.Tensor:
    return head(torch.cat(backbone(images), 1))[:, 0]  # (B, 96, 96) logits


optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], 1e-3)
for step in range(30):
    batch = evovit.digit_scenes("train", 16, size=96, num_fragments=0, seed=step)
    logits, masks = segment(batch.images), batch.masks.float()
    both = (logits.sigmoid() * masks).sum((1, 2))
    dice = 1 - (2 * both / (logits.sigmoid() + masks).sum((1, 2))).mean()
    loss = dice + nn.functional.binary_cross_entropy_with_logits(logits, masks)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
backbone.eval()
head.eval()
test = evovit.digit_scenes("test", 64, size=96, num_fragments=0)
with torch.inference_mode():
    found = segment(test.images) > 0
iou = (found & test.masks).flatten(1).sum(1) / (found | test.masks).flatten(1).sum(1)
print(f"digit's IoU {iou.mean():.2f}")
assert iou.mean() > 0.3

# %%
from matplotlib import pyplot as plt

from evovit.data.digits import colours

figure, panels = plt.subplots(3, 4, figsize=(8, 6), layout="constrained")
for image, truth, mask, column in zip(
    colours(test.images), test.masks, found, panels.T, strict=False
):
    for panel, shown, title in zip(
        column,
        (image.permute(1, 2, 0), truth, mask),
        ("scene", "digit", "found"),
        strict=True,
    ):
        panel.imshow(shown, cmap="gray")
        panel.set_title(title)
        panel.axis("off")

# %% [markdown]
# ## How old is a cell?
#
# A complete map may still contain old values. With Evo-ViT the placeholders are updated by the representative token. With a method that drops tokens a
# cell keeps its last value (`restore="hold"`); with one that merges, it takes the value of the token it was merged into (`"unmerge"`).

# %%
for name, options in (
    ("evo_vit", {"start_block": 2, "stage_length": 2}),
    ("tome", {"r": 12}),
    ("keep", {"blocks": (2, 4)}),
):
    reduced = evovit.reduce_tokens(host, name, **options).eval()
    (stale,) = evovit.stale_share(reduced, test.images[:8], [5], older_than=2)
    print(f"{name}: {stale:.0%} of the cells are older than the last two blocks")

# %% [markdown]
# [Cells without a token](../feature_maps.md#cells-without-a-token) lists every way to restore a cell, and which method allows which.
#
# ## Next
#
# Two longer programs: [Mask R-CNN on a reduced ViT](../../examples/detect_digits.py) with `evovit.SimplePyramid`, and
# [a linear head on frozen features](../../examples/segment_digits.py) for several methods.
