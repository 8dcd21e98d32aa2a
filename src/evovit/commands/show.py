"""`evovit show`: photographs through a model, dense and reduced: what each block keeps, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def show(
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")] = ("samples",),
    /,
    model: str = "",
    method: tuple[str, ...] = (),
    keep_ratio: tuple[float, ...] = (),
    budgets: tuple[float, ...] = (),
    weights: str = "",
    pretrained: bool = False,
    count: int = 6,
    rounds: int = 30,
    gif: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path = Path("runs/show"),
) -> None:
    """Show what a reduced model keeps of your photographs, and what it and the dense model predict.

    Writes one page with the photograph, what each block keeps or merges, both predictions, the GMACs and the
    measured time; and a picture for each photograph and method.

    $ evovit show photo.jpg
    $ evovit show photo.jpg --model deit_small_patch16_224 --pretrained --method evo_vit evit tome:r=13
    $ evovit show digits --model runs/quickstart/evo_vit

    Args:
        images: image files of any kind that Pillow reads, folders of them, samples (two photographs that
            come with scikit-learn) or digits (built-in scenes).
        model: a timm name, hf: and a name of transformers, the folder of a run of evovit train, or one
            written by save_reduced. Default: deit_small_patch16_224 with the published weights; for digits
            the run of evovit quickstart.
        method: methods shown side by side, each NAME or NAME:option=value,option=value. Default: the model's
            own, else evo_vit.
        keep_ratio: short for the option keep_ratio; several are shown side by side.
        budgets: the share of patch tokens kept, for any method; several are shown side by side.
        weights: for a timm name: a .pth or .safetensors file; for a run: last (default), best or ema.
        pretrained: for a timm name: download the published weights.
        count: largest number of images from each folder, or of digits.
        rounds: how often each model is timed, all in turn; 0: no timing.
        gif: also write the blocks one after another as a GIF.
        device: where to compute; auto uses CUDA if available.
        out: folder for show.html and the pictures.
    """
    from evovit.bench.setting import parse_variants
    from evovit.data.photographs import open_each
    from evovit.errors import EvoViTError, check_count
    from evovit.look import default_subject, open_subject
    from evovit.report.show import MOST, said, write_show
    from evovit.runtime.files import hold_folder, told
    from evovit.runtime.world import is_alone, join_world

    check_count("count", count, 1, MOST)
    check_count("rounds", rounds, 0, 100_000)
    if not is_alone():
        raise EvoViTError("evovit show runs in one process; start it without torchrun.")
    names = method or (("evo_vit",) if keep_ratio or budgets else ())
    variants = parse_variants(names, (), keep_ratio, budgets)
    if model:
        subject = open_subject(model, variants, weights, pretrained)
    else:
        subject = default_subject(images, variants, weights, pretrained, print)
    photographs = list(open_each(images, subject.preprocessing, count))
    with hold_folder(out), join_world(device) as world:
        for each in (subject.dense, *subject.reduced):
            each.to(world.device)
        looks = subject.look(photographs, rounds)
        with told(out):
            page = write_show(out, subject, looks, gif)
        print("\n".join([*said(subject, looks), f"{page} written"]))
