"""`evovit calibrate`: masks of patch slimming for a model, found on a folder of photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

RANDOM_IMAGES = 32


def calibrate(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    /,
    out: Path,
    images: Path | None = None,
    tolerance: float = 0.01,
    error: str = "relative",
    step: int = 10,
    count: int = 1000,
    epochs: int = 0,
    rate: float = 1e-4,
    batch: int = 8,
    pretrained: bool = False,
    weights: str = "",
    device: str = "auto",
) -> None:
    """Find patches that a model does not need in any image, block by block, and save the slimmed model.

    No label is read. evovit.load_reduced(OUT) loads the result; evovit export takes it too.

    $ evovit calibrate deit_small_patch16_224 --pretrained --images photos --out slimmed
    $ evovit calibrate runs/dense/seed0 --images photos --tolerance 0.02 --out slimmed

    Args:
        model: a timm name, or the folder of a dense run of evovit train.
        images: folder of photographs, with or without sub-folders. Without it the images are random, and the
            masks do not suit photographs.
        out: folder to write.
        tolerance: largest error that a block's mask may cause in the next block's output (paper: 0.01, 0.02).
        error: relative (squared difference over squared value) or squared (mean squared difference).
        step: number of patches tried together.
        count: largest number of photographs read, evenly spread.
        epochs: passes that train a block's own weights for each number of patches tried; 0: no training.
        rate: learning rate of this training.
        batch: images at once.
        pretrained: for a timm name: download the published weights.
        weights: for a timm name: a .pth or .safetensors file; for a run: last (default), best or ema.
        device: auto, cpu or cuda.
    """
    import torch

    from evovit.calibration import Kept
    from evovit.calibration import calibrate as find
    from evovit.checkpoints.reduced import save_reduced
    from evovit.data.photographs import read_photographs
    from evovit.engines.exporting import preprocessing_of
    from evovit.errors import EvoViTError, check_choice, check_count, printable
    from evovit.hosts.preprocessing import tell_preprocessing
    from evovit.macs import gmacs
    from evovit.model import ReducedViT, backbone_of
    from evovit.runtime.files import make_folder
    from evovit.runtime.world import join_world
    from evovit.train.tested import open_model

    check_choice("device", device, ("auto", "cpu", "cuda"))
    check_count("count", count, 1, 10**6)
    host, preprocessing, said = open_model(model, weights, pretrained)
    if isinstance(host, ReducedViT):
        raise EvoViTError(f"{model!r} is reduced already; give a dense model.")
    prepared = preprocessing or preprocessing_of(host)
    shape = backbone_of(host).image_shape
    if images is None:
        photographs = torch.randn(RANDOM_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
        print(
            f"evovit: without --images the masks are found on {RANDOM_IMAGES} random images: "
            "they say nothing about photographs"
        )
    else:
        photographs = read_photographs(images, prepared, count)
        print(f"evovit: {len(photographs)} photographs of {printable(images)}")
    if said:
        print(f"evovit: {said}")
    make_folder(out)
    cells = backbone_of(host).spec.grid[0] * backbone_of(host).spec.grid[1]

    def tell(kept: Kept) -> None:
        print(
            f"block {kept.number}: keeps {kept.patches} of {cells} patches, error {kept.error:.2g}",
            flush=True,
        )

    with join_world(device) as world:
        reduced = find(
            host.to(world.device),
            photographs,
            tolerance=tolerance,
            error=error,  # type: ignore[arg-type]  # the function checks it
            step=step,
            epochs=epochs,
            rate=rate,
            batch=batch,
            told=tell,
        ).to("cpu")
    if preprocessing is not None:  # of a run
        tell_preprocessing(reduced.model, preprocessing)
    save_reduced(reduced.eval(), out)
    print(f"{gmacs(host, shape):.4g} GMACs dense, {gmacs(reduced, shape):.4g} reduced")
    print(f"{printable(out)}: evovit.load_reduced opens it")
