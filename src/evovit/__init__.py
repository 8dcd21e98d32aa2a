"""evovit: vision transformers that spend compute only where it matters.

The parts of the package. A part imports from itself and from those above it in this list only.

The model: image -> tokens -> score -> select -> update -> head
  errors       the exception for all wrong input, and what its sentences share
  options      options declared once: type, range, default, meaning
  tokens       Tokens, the state between two blocks; QKV, Outputs, Taught
  ops          pure tensor functions: score, select, update, merge, mask, distance
  schedule     how many tokens each block keeps
  backbones    adapters, one file per family of hosts: embed, views of blocks, norm, head; check_adapter
  methods      the reduction methods, one file per paper; their registry
  budgets      one model at several keep ratios
  intermediates  features after chosen blocks, with timm's interface; missing cells restored
  model        ReducedViT, which runs a host's blocks by a method; reduce_tokens, which makes it
  calibration  static masks found on unlabelled images
  towers       reduced vision models in their places inside larger ones
  feature_maps  a reduced model as a backbone for dense tasks; the pyramid of ViTDet; how old each cell is
  models       named models, also in timm's registry
  macs         counts the multiply-accumulates of one image
  fuse         batch norms folded into the layers beside them
  slimming     heads and channels masked in training, then removed for good
  visualize    which patches were kept, as masks and pictures
  analyse      what each block attends to and keeps, and how similar its tokens are: figures 2, 4 and 5

Training, measuring and reporting: recipe -> numbers
  runtime      files, processes, seeds, environment
  recipe       the settings of a training: tables, reading, and the recipes that come with the package
  hosts        creates a host by its name
  data         images and labels: digit scenes, folders, shards
  checkpoints  save_reduced, load_reduced, push_to_hub; the authors' checkpoints
  engines      exports for ONNX Runtime, OpenVINO and PyTorch's own engines, compared with eager mode
  bench        benchmarks: dense and reduced models timed in turn
  train        the training of one recipe: build, objective, loop, checkpoints, records
  tuning       finds a schedule for a target speed: latency and sensitivity tables, search
  study        several recipes trained, tested and timed side by side
  look         one photograph, dense and reduced: what each block keeps, the answers, the costs
  report       tables, plots and pages
  app          the web page of `evovit app`
  commands     the commands, one file each
  cli          the command line
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from evovit.backbones import check_adapter as check_adapter
    from evovit.backbones import list_hosts as list_hosts
    from evovit.calibration import calibrate as calibrate
    from evovit.checkpoints.official import load_official as load_official
    from evovit.checkpoints.reduced import load_reduced as load_reduced
    from evovit.checkpoints.reduced import save_reduced as save_reduced
    from evovit.checkpoints.sharing import push_to_hub as push_to_hub
    from evovit.data.digits import digit_scenes as digit_scenes
    from evovit.engines.exporting import export as export
    from evovit.errors import EvoViTError as EvoViTError
    from evovit.feature_maps import FeatureNet as FeatureNet
    from evovit.feature_maps import SimplePyramid as SimplePyramid
    from evovit.feature_maps import features as features
    from evovit.feature_maps import stale_share as stale_share
    from evovit.fuse import fuse_batch_norm as fuse_batch_norm
    from evovit.macs import gmacs as gmacs
    from evovit.methods import list_methods as list_methods
    from evovit.model import ReducedViT as ReducedViT
    from evovit.model import reduce_tokens as reduce_tokens
    from evovit.models import create_model as create_model
    from evovit.models import list_models as list_models
    from evovit.report.show import show as show
    from evovit.slimming import StructuredMasks as StructuredMasks
    from evovit.slimming import slim as slim
    from evovit.tokens import Outputs as Outputs
    from evovit.towers import reduce_tower as reduce_tower
    from evovit.towers import restore_tower as restore_tower
    from evovit.train.run import train_recipe as train_recipe
    from evovit.tuning.tune import tune as tune
    from evovit.visualize import kept_patches as kept_patches

_HOMES = {  # a name is imported from its module when it is first used
    "EvoViTError": "errors",
    "FeatureNet": "feature_maps",
    "Outputs": "tokens",
    "ReducedViT": "model",
    "SimplePyramid": "feature_maps",
    "StructuredMasks": "slimming",
    "calibrate": "calibration",
    "check_adapter": "backbones",
    "create_model": "models",
    "digit_scenes": "data.digits",
    "export": "engines.exporting",
    "features": "feature_maps",
    "fuse_batch_norm": "fuse",
    "gmacs": "macs",
    "kept_patches": "visualize",
    "list_hosts": "backbones",
    "list_methods": "methods",
    "list_models": "models",
    "load_official": "checkpoints.official",
    "load_reduced": "checkpoints.reduced",
    "push_to_hub": "checkpoints.sharing",
    "reduce_tokens": "model",
    "reduce_tower": "towers",
    "restore_tower": "towers",
    "save_reduced": "checkpoints.reduced",
    "show": "report.show",
    "slim": "slimming",
    "stale_share": "feature_maps",
    "train_recipe": "train.run",
    "tune": "tuning.tune",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("evovit")
    if name in _HOMES:
        return getattr(import_module(f"evovit.{_HOMES[name]}"), name)
    if not name.startswith("_") and find_spec(f"evovit.{name}"):
        return import_module(f"evovit.{name}")
    raise AttributeError(f"module 'evovit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


@wrapt.when_imported("timm")  # at once if it is already
def _register_models(timm: Any) -> None:
    """Put the named models into timm's registry, whichever of timm and evovit is imported first."""
    import_module("evovit.models")
