"""`evovit export`: a model as a file for ONNX Runtime, OpenVINO or PyTorch's own engines, proven."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def export(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    /,
    method: str = "",
    keep_ratio: float | None = None,
    to: tuple[str, ...] = ("onnx",),
    precision: tuple[str, ...] = ("fp32",),
    batch: str = "dynamic",
    calibration: Path | None = None,
    pretrained: bool = False,
    weights: str = "",
    out: Path | None = None,
) -> None:
    """Export a model for other engines; each file is compared with PyTorch before it is kept.

    $ evovit export deit_small_patch16_224 --method evo_vit --keep-ratio 0.5 --to onnx openvino pt2
    $ evovit export runs/evo/seed0 --to openvino --precision int8 --batch 1 --calibration photos
    $ python exports/deit_small_patch16_224/run.py photo.jpg

    A model with budgets gets a folder for each of them.

    Args:
        model: a timm name, the folder of a run of evovit train, one written by save_reduced, or hf:NAME, a
            shared model or one of transformers.
        method: NAME or NAME:option=value,option=value, for a timm name or a dense run; default: none.
        keep_ratio: short for the method's option keep_ratio.
        to: onnx, openvino, pt2 (torch.export), aoti (compiled by AOTInductor).
        precision: fp32, fp16, int8 (onnx and openvino); with several, each gets its own folder.
        batch: images per call, or "dynamic" for any number. OpenVINO is faster with a number.
        calibration: folder of photographs from which int8 takes the ranges of activations; the comparison
            with PyTorch uses some of them too.
        pretrained: for a timm name: download the published weights.
        weights: for a timm name: a .pth or .safetensors file; for a run: last (default), best or ema.
        out: folder; default: exports/MODEL.
    """
    from evovit.data.photographs import read_photographs
    from evovit.engines.exporting import ANY, TARGETS, export, preprocessing_of
    from evovit.errors import EvoViTError, check_choice, printable
    from evovit.model import ReducedViT, reduce_tokens
    from evovit.options import read_named
    from evovit.train.tested import open_model

    for each in to:
        check_choice("to", each, TARGETS)
        for kind in precision:
            TARGETS[each].expect_ready(kind)
    if batch != ANY and not batch.isdecimal():
        raise EvoViTError(f"batch is {batch!r}; allowed is a number of images or {ANY!r}.")
    opened, preprocessing, said = open_model(model, weights, pretrained)
    if method or keep_ratio is not None:
        name, options = read_named(method or "evo_vit")
        if isinstance(opened, ReducedViT):
            raise EvoViTError(f"{model!r} is reduced already; leave --method and --keep-ratio out.")
        options |= {} if keep_ratio is None else {"keep_ratio": keep_ratio}
        opened = reduce_tokens(opened, name, **options)
    prepared = preprocessing or preprocessing_of(opened)
    photographs = None if calibration is None else read_photographs(calibration, prepared, 300)
    if said:
        print(f"evovit: {said}")
    base = out or Path("exports") / "_".join(Path(model).parts[-2:])
    budgets = opened.budgets if isinstance(opened, ReducedViT) else ()
    for kind, budget in [(kind, budget) for kind in precision for budget in budgets or (None,)]:
        folder = base if len(precision) == 1 else base / kind
        if budget is not None and isinstance(opened, ReducedViT):
            opened.budget, folder = budget, folder / f"budget_{budget:g}"
        for each in to:
            entry = export(
                opened,
                folder,
                each,
                kind,
                batch=ANY if batch == ANY else int(batch),
                calibration=photographs if kind == "int8" else None,
                images=None if photographs is None else photographs[:16],
                preprocessing=prepared,
            )
            proof = entry["proof"]
            kept = f", same tokens kept on {proof['same_kept']:.0%}" if "same_kept" in proof else ""
            size = f"{entry['bytes'] / 1e6:.1f} MB"
            print(
                f"{printable(folder / entry['file'])}: {entry['engine']} {kind}, {size}, "
                f"{entry['gmacs']:.4g} GMACs; against PyTorch on {proof['images']} images: relative error "
                f"{proof['relative_error']:.1e}, same top-1 on {proof['top1_agreement']:.0%}{kept}",
                flush=True,
            )
        print(f"try it: python {printable(folder / 'run.py')} PHOTO {to[0]}", flush=True)
