"""`evovit analyse`: the pictures of the Evo-ViT paper, of the user's own model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from evovit.model import ReducedViT
    from evovit.report.analysis import Moment

MOMENT_IMAGES = 128  # by which checkpoints are compared


def analyse(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")],
    /,
    method: str = "",
    weights: str = "",
    pretrained: bool = False,
    blocks: tuple[int, ...] = (),
    count: int = 512,
    pictures: int = 6,
    checkpoints: int = 6,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path = Path("runs/analysis"),
) -> None:
    """Show what a model attends to and keeps: figures 2, 4 and 5 of the Evo-ViT paper, for your own model.

    $ evovit analyse runs/evo/seed0 digits
    $ evovit analyse deit_tiny_patch16_224 photos --pretrained
    $ evovit analyse deit_small_patch16_224 photos --weights deit.pth --method evo_vit:keep_ratio=0.5

    Args:
        model: a timm name, the folder of a run of evovit train, one written by save_reduced, or hf:NAME, a
            shared model or one of transformers.
        images: a folder of photographs, with or without class folders; digits (built-in scenes) or samples
            (two photographs that come with scikit-learn).
        method: NAME or NAME:option=value,option=value, for a timm name or a dense run; default: none.
        weights: for a timm name: a .pth or .safetensors file; for a run: last (default), best or ema.
        pretrained: for a timm name: download the published weights.
        blocks: blocks whose attention is drawn, from 0; default: four, evenly spread.
        count: number of images for the numbers; the paper has 512.
        pictures: number of images drawn.
        checkpoints: of a run, how many at most are shown side by side; run.keep_every in its recipe keeps
            more than the last two.
        device: where to compute; auto uses CUDA if available.
        out: folder for analysis.html, analysis.json and the pictures.
    """
    import torch

    from evovit.analyse import as_reduced, in_mode, look, measure, other_mode
    from evovit.data.photographs import open_photographs
    from evovit.engines.exporting import preprocessing_of
    from evovit.errors import EvoViTError, check_count
    from evovit.look import described
    from evovit.methods import DENSE, name_of
    from evovit.model import ReducedViT, reduce_tokens
    from evovit.options import read_named
    from evovit.report.analysis import Analysis, write_analysis
    from evovit.runtime.files import hold_folder, told
    from evovit.runtime.world import is_alone, join_world
    from evovit.study import Shown
    from evovit.train.tested import open_model
    from evovit.visualize import several_classes

    for name, value, least in (
        ("count", count, 1),
        ("pictures", pictures, 1),
        ("checkpoints", checkpoints, 2),
    ):
        check_count(name, value, least, 100_000)
    if not is_alone():
        raise EvoViTError("evovit analyse runs in one process; start it without torchrun.")
    opened, preprocessing, said = open_model(model, weights, pretrained)
    if method:
        if isinstance(opened, ReducedViT):
            raise EvoViTError(f"{model!r} is reduced already; leave --method out.")
        name, options = read_named(method)
        opened = reduce_tokens(opened, name, **options)
    reduced = as_reduced(opened).eval()
    depth, prepared = reduced.method.spec.depth, preprocessing or preprocessing_of(opened)
    for number in blocks:
        check_count("blocks", number, 0, depth - 1, "blocks count from 0")
    photographs = open_photographs(images, prepared, count)
    numbers = {title: place for place, title in enumerate(dict.fromkeys(photographs.titles))}
    rows = several_classes(torch.tensor([numbers[title] for title in photographs.titles]), pictures)
    mean, std = (torch.tensor(prepared[key]).view(-1, 1, 1) for key in ("mean", "std"))
    few = photographs.images[rows]
    drawn = Shown(few, (few * std + mean).clamp(0, 1), [photographs.titles[row] for row in rows])
    if said:
        print(f"evovit: {said}")
    with hold_folder(out), join_world(device) as world:
        reduced = reduced.to(world.device)
        print(f"{len(photographs.images)} images, {depth} blocks", flush=True)
        measures, other = measure(reduced, photographs.images), other_mode(reduced)
        is_dense = name_of(reduced.method) == DENSE
        first = next((block.number for block in measures.blocks if 0 < block.kept < 1), None)
        found = Analysis(
            model=model,
            method="" if is_dense else described(reduced),
            images=images,
            has_class_token=reduced.method.spec.has_class_token,
            measures=measures,
            shown=drawn,
            views=look(reduced, few),
            blocks=tuple(sorted(set(blocks))) or spread_blocks(depth),
            first_block=first,
            unreduced=None if is_dense else measure(reduced.model, photographs.images).jaccard,
            mode=getattr(reduced.method, "mode", "") if other else "",
            moments=moments(reduced, Path(model), photographs.images, few, first, checkpoints)
            if first is not None and not method and (Path(model) / "recipe.toml").is_file()
            else (),
        )
        if other:
            with in_mode(reduced, other):
                found = found.beside(other, measure(reduced, photographs.images), look(reduced, few))
        with told(out):
            print(write_analysis(out, found))


def spread_blocks(depth: int) -> tuple[int, ...]:
    """Return four blocks, evenly spread, the last among them; all where there are fewer."""
    return tuple(sorted({round(part * (depth - 1) / 4) for part in range(1, 5)}))


def moments(
    model: ReducedViT, run: Path, images: Tensor, few: Tensor, block: int, most: int
) -> tuple[Moment, ...]:
    """Return what a run kept in a block by its checkpoints, oldest first; nothing where there is only one."""
    from copy import deepcopy

    import torch

    from evovit.analyse import jaccard
    from evovit.report.analysis import Moment
    from evovit.train.build import fit
    from evovit.train.tested import weights_by_epoch
    from evovit.visualize import kept_patches

    def kept(images: Tensor) -> Tensor:
        parts = torch.split(images.to(then.device), 32)
        return torch.cat([kept_patches(then, part)[:, block].cpu() for part in parts])

    found, then = [], deepcopy(model)
    for name, state in weights_by_epoch(run, most):
        fit(then, state, f"The checkpoint of {name} in {str(run)!r}")
        found.append((name, kept(few), kept(images[:MOMENT_IMAGES]).flatten(1)[:, None]))
    if len(found) < 2:
        return ()
    end = found[-1][2]
    return tuple(Moment(name, drawn, float(jaccard(many, end)[0, 0])) for name, drawn, many in found)
