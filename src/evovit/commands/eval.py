"""`evovit eval`: the accuracy of a model or a run, dense and reduced."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def eval(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    /,
    weights: str = "",
    pretrained: bool = False,
    images: Path | None = None,
    method: tuple[str, ...] = (),
    budgets: tuple[float, ...] = (),
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    device: str = "",
    workers: int | None = None,
) -> None:
    """Test a run, or a timm model, on images: as it is, and with methods that were not trained for it.

    $ evovit eval runs/dense/seed0
    $ evovit eval runs/dense/seed0 --method tome:r=4 evit:keep_ratio=0.7
    $ evovit eval deit_small_patch16_224 --weights deit_small.pth --images imagenet/val --method tome:r=13
    $ evovit eval tuned/deit_small_patch16_224 --images imagenet/val

    Under torchrun the test images are divided among the processes.

    Args:
        model: folder of a run of `evovit train`, one written by save_reduced, a timm name, or hf:NAME.
        weights: for a run: last (default), best or ema, its moving average; for a timm name: a .pth or
            .safetensors file.
        pretrained: for a timm name: download the published weights.
        images: folder with a sub-folder of images for each class; default: the test images of the run.
        method: NAME or NAME:option=value,option=value; each is tested on the same weights, as is dense.
        budgets: keep ratios; each reduced model is tested at each. Default: those a run was trained for.
        set: table.key=value, overrides the recipe of the run: another keep ratio, another precision.
        device: auto, cpu or cuda; default: as the recipe of the run says, or auto.
        workers: processes that read images; default: as the recipe of the run says, or 4.
    """
    from evovit.checkpoints.reduced import is_saved
    from evovit.errors import EvoViTError, shown
    from evovit.runtime.files import as_path
    from evovit.runtime.world import join_world
    from evovit.train.tested import named_model, run_model, saved_model, test_lines

    told = [*set, *([f"run.device={device}"] if device else [])]
    told += [] if workers is None else [f"data.workers={workers}"]
    if as_path(Path(model) / "recipe.toml", "MODEL").is_file():
        if pretrained:
            raise EvoViTError("--pretrained is for a timm name; a run has weights of its own.")
        tested = run_model(Path(model), weights or "last", images, told)
    elif is_saved(model):
        if weights or pretrained:
            raise EvoViTError(f"{shown(model)} has weights of its own; leave --weights and --pretrained out.")
        tested = saved_model(model, images, told)
    elif Path(model).exists():
        raise EvoViTError(f"There is no {str(Path(model) / 'recipe.toml')!r}; give the folder of a run.")
    else:
        tested = named_model(model, weights, pretrained, images, told)
    with join_world(tested.recipe.run.device) as world:
        for line in test_lines(tested, method, world, budgets):
            if world.is_main:
                print(line, flush=True)
