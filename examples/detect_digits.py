"""torchvision's Mask R-CNN on a ViT backbone with ViTDet's simple pyramid, dense beside reduced.

    python examples/detect_digits.py

The task is to find the whole digit among fragments of others in digit scenes, with its box and mask. Both
detectors start from the same weights and see the same scenes. Printed are the share of scenes where the best
detection has a box IoU of 0.5 or more, the mean mask IoU, the backbone's and the detector's speed, and the
share of cells of the map that are older than its last two blocks.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, box_iou

import evovit

SIZE, PATCH, DEPTH, CHANNELS = 96, 8, 6, 48  # pixels, pixels, blocks, of the pyramid
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "evo_vit 0.5": ("evo_vit", {"keep_ratio": 0.5, "start_block": 2, "stage_length": 2}),
}


def detector(method: str, options: dict[str, Any]) -> MaskRCNN:
    """Return a small Mask R-CNN; the backbone's last map becomes a pyramid of strides 4, 8 and 16."""
    host = timm.create_model("small_vit", img_size=SIZE, patch_size=PATCH, depth=DEPTH, num_classes=0)
    maps = evovit.features(evovit.reduce_tokens(host, method, **options), 1, norm=True)
    pyramid = evovit.SimplePyramid(maps, CHANNELS, scales=(2, 1, 0.5))
    levels = [str(number) for number in range(len(pyramid.strides))]
    sizes = tuple((4 * stride,) for stride in pyramid.strides)
    return MaskRCNN(
        pyramid,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(levels)),
        rpn_pre_nms_top_n_train=200, rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=30,
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 2, canonical_scale=48, canonical_level=3),
        box_head=TwoMLPHead(CHANNELS * 49, 128),
        box_predictor=FastRCNNPredictor(128, 2),  # background, digit
        box_batch_size_per_image=32, box_detections_per_img=3,
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2, canonical_scale=48, canonical_level=3),
        mask_head=MaskRCNNHeads(CHANNELS, (32, 32), 1),
        mask_predictor=MaskRCNNPredictor(32, 32, 2),
        image_mean=[0.0] * 3, image_std=[1.0] * 3, fixed_size=(SIZE, SIZE),  # scenes are normalised
    )  # fmt: skip


def train(model: MaskRCNN, steps: int, batch: int, rate: float = 2e-3) -> None:
    """Train on fresh scenes."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(steps, 2), pct_start=0.2)
    model.train()
    for step in range(steps):
        scenes = evovit.digit_scenes("train", batch, size=SIZE, seed=step)
        one = torch.ones(1, dtype=torch.int64)
        targets = [
            {"boxes": box[None], "labels": one, "masks": mask[None].to(torch.uint8)}
            for box, mask in zip(scenes.boxes, scenes.masks, strict=True)
        ]
        loss = sum(model(list(scenes.images), targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def quality(model: MaskRCNN, scenes: Any) -> tuple[float, float]:
    """Return the share of digits found, and the mean IoU of the best detection's mask; 0 where none is."""
    hits = overlap = 0.0
    for image, box, mask in zip(scenes.images, scenes.boxes, scenes.masks, strict=True):
        (found,) = model([image])
        if found["scores"].numel() == 0:
            continue
        hits += float(box_iou(found["boxes"][:1], box[None]).item() >= 0.5)
        drawn = found["masks"][0, 0] > 0.5
        overlap += ((drawn & mask).sum() / (drawn | mask).sum()).item()
    return hits / len(scenes.images), overlap / len(scenes.images)


@torch.inference_mode()
def seconds(models: list[nn.Module], images: Tensor | list[Tensor], rounds: int = 7) -> list[float]:
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
    parser.add_argument("--steps", type=int, default=60, help="of each detector's training")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--test-scenes", type=int, default=100)
    asked = parser.parse_args()
    models = []
    for method, options in CONTESTANTS.values():
        torch.manual_seed(0)
        models.append(detector(method, options))
        train(models[-1], asked.steps, asked.batch)

    test = evovit.digit_scenes("test", asked.test_scenes, size=SIZE, seed=1)
    backbone = seconds([model.backbone.backbone for model in models], test.images[:32])
    whole = seconds(models, list(test.images[:8]))
    header = ("found", "mask IoU", "backbone images/s", "detector images/s", "stale")
    print(f"{'backbone':14s}" + "".join(f"{word:>24s}" for word in header))
    for name, model, part, all_of_it in zip(CONTESTANTS, models, backbone, whole, strict=True):
        found, overlap = quality(model, test)
        stale = evovit.stale_share(model.backbone.backbone.model, test.images[:32], [-1], older_than=2)[0]
        pairs = ((32, part, backbone[0]), (8, all_of_it, whole[0]))
        speeds = [f"{count / took:.0f} ({first / took:.2f}x)" for count, took, first in pairs]
        print(f"{name:14s}{found:24.2f}{overlap:24.2f}{speeds[0]:>24s}{speeds[1]:>24s}{stale:24.2f}")


if __name__ == "__main__":
    main()
