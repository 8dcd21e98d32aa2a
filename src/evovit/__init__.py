"""evovit: vision transformers that spend compute only where it matters.

The map, in reading order; imports go upwards in this list only.

Model road: image -> tokens -> score -> select -> update -> head
  errors                          the one exception for wrong input
  tokens                          Tokens, the state between two blocks; QKV, what attention saw
  ops                             pure tensor functions
  ops.score                       how informative is a token: class attention, column mean, running score
  ops.select                      which tokens go on: the best, taken and put back
  ops.update                      what becomes of the others: the representative token
  ops.merge                       which tokens are alike, and what they become together
  ops.distance                    training losses between tokens
  schedule                        how many tokens each block keeps
  backbones                       adapt(model): finds a host's adapter; check_adapter: proves it
  backbones.base                  what a host offers: embed, stages of block views, norm, head
  backbones.timm_blocks           views of timm's pre-norm and post-norm blocks
  backbones.timm_parallel_blocks  views of its parallel blocks
  backbones.timm_vit              ViT, DeiT, DeiT-III, CLIP, SigLIP, DINOv2
  backbones.timm_rope_blocks      views of blocks with rotary positions
  backbones.timm_rope             EVA, EVA-02, DINOv3, Perception Encoder
  methods                         the registry
  methods.base                    what a method is
  methods.evo_vit                 Evo-ViT
  methods.evit                    EViT
  methods.tome                    ToMe
  methods.idle_vit                IdleViT
  methods.keep                    plain baselines: top-k, random, even
  methods.subsample               pooling and convolution, for comparison
  model                           ReducedViT, the loop; reduce_tokens, the door
  models                          named models, also in timm's registry
  models.evo_deit                 Evo-DeiT, as released
  visualize                       which patches were kept, as masks and pictures
  data                            digit scenes: built-in images with known boxes

Run road: recipe -> numbers
  run                             everything below
  run.files                       reading weights safely, writing files whole
  run.checkpoint                  save_reduced, load_reduced
  run.official                    load_official: checkpoints of the official implementations
  run.macs                        multiply-accumulates, by formula and counted
  run.row                         one row of a benchmark: ratios and their noise
  run.setting                     what a benchmark compares
  run.subject                     a model made ready to be timed
  run.benchmark                   timing, dense and reduced in turn
  run.profile                     where the time goes
  run.bench_report                what a benchmark leaves behind
  run.bench                       `evovit bench`
  run.recipe                      what a training is, knob by knob
  run.config                      recipes from TOML, overrides, complete checks
  run.datasets                    images and labels
  run.build                       from a recipe to model, teacher, optimisers
  run.objective                   images and targets to named loss terms
  run.world                       the processes of one training
  run.state                       checkpoints that vouch for themselves
  run.records                     what a training writes down
  run.evaluate                    accuracy; `evovit eval`
  run.trainer                     the training loop
  run.train_command               `evovit train`
  run.runs_report                 `evovit report`
  run.small_vit                   the quickstart's model
  run.train                       the quickstart's training loop
  run.report                      models side by side, in one HTML file
  run.quickstart                  `evovit quickstart`
  cli                             the command line
"""

from evovit.backbones import check_adapter, list_hosts
from evovit.errors import EvoViTError
from evovit.methods import list_methods
from evovit.model import Outputs, ReducedViT, reduce_tokens
from evovit.models import create_model, list_models
from evovit.run.checkpoint import load_reduced, save_reduced
from evovit.run.official import load_official

__all__ = [
    "EvoViTError",
    "Outputs",
    "ReducedViT",
    "check_adapter",
    "create_model",
    "list_hosts",
    "list_methods",
    "list_models",
    "load_official",
    "load_reduced",
    "reduce_tokens",
    "save_reduced",
]
