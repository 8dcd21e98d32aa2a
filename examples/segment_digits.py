"""A linear segmentation head on frozen features of a DINOv2-style ViT, dense beside reduced.

    python examples/segment_digits.py

No weights are downloaded: a small ViT with DINOv2's parts (registers, LayerScale) first learns, dense, to
find the digit in digit scenes. Then it is frozen, and each contestant trains a linear head (batch norm and
one 1 x 1 convolution, as in DINOv2's evaluation) on its maps: the dense model, and the same model reduced
without further training, its missing cells restored. Printed are the digit's IoU, the backbone's speed, and
the share of cells of the last map that are older than its last two blocks.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import evovit

SIZE, PATCH, DEPTH = 96, 8, 6  # pixels, pixels, blocks
BLOCKS = (3, 5)  # whose maps the head reads
CONTESTANTS: dict[str, tuple[str, dict[str, Any], str]] = {  # method, options, restore
    "dense": ("dense", {}, "auto"),
    "evo_vit 0.5": ("evo_vit", {"keep_ratio": 0.5, "start_block": 2, "stage_length": 2}, "auto"),
    "tome r=18, unmerge": ("tome", {"r": 18}, "unmerge"),
    "keep 0.7, hold": ("keep", {"keep_ratio": 0.7, "blocks": (2, 4)}, "hold"),
    "keep 0.7, interpolate": ("keep", {"keep_ratio": 0.7, "blocks": (2, 4)}, "interpolate"),
}


class Segmenter(nn.Module):
    """A backbone of maps and a linear head: images (B, 3, size, size) to logits (B, size, size)."""

    def __init__(self, backbone: evovit.FeatureNet) -> None:
        super().__init__()
        self.backbone, dim = backbone, sum(backbone.feature_info.channels())
        self.head = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, PATCH**2, 1), nn.PixelShuffle(PATCH))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.cat(self.backbone(images), dim=1))[:, 0]


def small_dinov2() -> nn.Module:
    """Return a small ViT with DINOv2's parts, its weights random."""
    host = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=SIZE, patch_size=PATCH, embed_dim=96, depth=DEPTH,
        num_heads=6, init_values=0.1,
    )  # fmt: skip
    for name, weight in host.named_parameters():
        if name.startswith("blocks.") and weight.ndim == 2:  # timm's 0.02 is made for wider models
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return host


def train(model: Segmenter, steps: int, batch: int, learns: nn.Module, rate: float) -> None:
    """Train the part `learns` on fresh scenes."""
    model.requires_grad_(False)
    learns.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(learns.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(steps, 2), pct_start=0.2)
    for step in range(steps):
        scenes = evovit.digit_scenes("train", batch, size=SIZE, seed=step)
        logits, masks = model(scenes.images), scenes.masks.float()
        both, sizes = (logits.sigmoid() * masks).sum((1, 2)), (logits.sigmoid() + masks).sum((1, 2))
        dice = 1 - (2 * both / sizes).mean()
        loss = F.binary_cross_entropy_with_logits(logits, masks) + dice
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def iou(model: Segmenter, scenes: Any) -> float:
    """Return the mean over scenes of the digit's intersection over union."""
    found = torch.cat([model(images) > 0 for images in scenes.images.split(32)])
    both, either = (found & scenes.masks).flatten(1).sum(1), (found | scenes.masks).flatten(1).sum(1)
    return (both / either).mean().item()


@torch.inference_mode()
def seconds(models: list[nn.Module], images: Tensor, rounds: int = 7) -> list[float]:
    """Return the median time of a forward of each model, timed in turn."""
    times: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):
        for model, own in zip(models, times, strict=True):
            start = time.perf_counter()
            model(images)
            own += [time.perf_counter() - start] if turn else []  # the first warms up
    return [sorted(own)[len(own) // 2] for own in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of the dense model's training")
    parser.add_argument("--head-steps", type=int, default=30, help="of each linear head's training")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test-scenes", type=int, default=128)
    asked = parser.parse_args()
    torch.manual_seed(0)
    host = small_dinov2()
    dense = Segmenter(evovit.features(evovit.reduce_tokens(host, "dense"), BLOCKS, norm=True))
    train(dense, asked.steps, asked.batch, dense, 2e-3)

    test = evovit.digit_scenes("test", asked.test_scenes, size=SIZE, seed=1)
    models: list[Segmenter] = []
    for method, options, restore in CONTESTANTS.values():
        torch.manual_seed(0)
        reduced = evovit.reduce_tokens(host, method, **options).eval()
        models.append(Segmenter(evovit.features(reduced, BLOCKS, norm=True, restore=restore)))
        models[-1].head.load_state_dict(dense.head.state_dict())
        train(models[-1], asked.head_steps, asked.batch, models[-1].head, 2e-3)
    took = seconds([model.backbone for model in models], test.images[:32])
    print(f"{'backbone':24s} {'IoU':>6s} {'images/s':>9s} {'speed-up':>9s} {'stale':>6s}")
    for name, model, each in zip(CONTESTANTS, models, took, strict=True):
        stale = evovit.stale_share(model.backbone.model, test.images[:32], BLOCKS[-1:], older_than=2)[0]
        print(f"{name:24s} {iou(model, test):6.3f} {32 / each:9.0f} {took[0] / each:8.2f}x {stale:6.2f}")


if __name__ == "__main__":
    main()
