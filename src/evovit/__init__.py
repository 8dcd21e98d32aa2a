"""evovit: vision transformers that spend compute only where it matters.

The map, in reading order; imports go upwards in this list only.

Model road: image -> tokens -> score -> select -> update -> head
  errors                          the one exception for wrong input
  tokens                          Tokens, the state between two blocks; QKV, what attention saw
  ops                             pure tensor functions
  ops.score                       how informative is a token: class attention, column mean, running score
  ops.select                      which tokens go on: the best, taken and put back
  ops.update                      what becomes of the others: the representative token
  ops.slow_fast                   the slow and the fast update: part, score, rejoin
  ops.merge                       which tokens are alike, and what they become together
  ops.distance                    training losses between tokens
  ops.mask                        masked attention and sampled decisions, for training
  schedule                        how many tokens each block keeps
  backbones                       adapt(model): finds a host's adapter; check_adapter: proves it
  backbones.base                  what a host offers: embed, stages of block views, norm, head
  backbones.timm_blocks           views of timm's pre-norm and post-norm blocks
  backbones.timm_parallel_blocks  views of its parallel blocks
  backbones.timm_vit              ViT, DeiT, DeiT-III, CLIP, SigLIP, DINOv2
  backbones.timm_rope_blocks      views of blocks with rotary positions
  backbones.timm_levit_blocks     views of LeViT's blocks and of its down-sampling
  backbones.timm_levit            LeViT
  backbones.levit_cls             LeViT with a class token and absolute positions
  backbones.timm_rope             EVA, EVA-02, DINOv3, Perception Encoder
  backbones.lv_vit                LV-ViT and SiT's backbones
  methods                         the registry
  methods.base                    what a method is
  methods.evo_vit                 Evo-ViT
  methods.evo_levit               Evo-LeViT
  methods.evit                    EViT
  methods.tome                    ToMe
  methods.idle_vit                IdleViT
  methods.dynamic_vit             DynamicViT
  methods.sit                     SiT
  methods.keep                    plain baselines: top-k, random, even
  methods.subsample               pooling and convolution, for comparison
  model                           ReducedViT, the loop; reduce_tokens, the door
  models                          named models, also in timm's registry
  models.named                    what named models share
  models.evo_deit                 Evo-DeiT, as released
  models.levit_cls                the dense host of Evo-LeViT
  models.evo_levit                Evo-LeViT, as released
  models.lv_vit                   LV-ViT
  models.sit                      SiT and its backbones
  fuse                            batch norms folded into the layers beside them
  visualize                       which patches were kept, as masks and pictures
  data                            digit scenes: built-in images with known boxes

Run road: recipe -> numbers
  run                             everything below
  run.files                       reading weights safely, writing files whole
  run.checkpoint                  save_reduced, load_reduced
  run.official_size               the image size of an official checkpoint
  run.official_lv_vit             official checkpoints in LV-ViT's layout
  run.official                    load_official: checkpoints of the official implementations
  run.official_levit              those of LeViT and Evo-LeViT
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
  run.shards                      WebDataset shards by row
  run.dense_labels                labels of patches, from files
  run.datasets                    images and labels
  run.build                       from a recipe to model, teacher, optimisers
  run.token_labels                a label for every patch token; MixToken
  run.objective                   images and targets to named loss terms
  run.world                       the processes of one training
  run.state                       checkpoints that vouch for themselves
  run.records                     what a training writes down
  run.evaluate                    accuracy; `evovit eval`
  run.trainer                     the training loop
  run.train_command               `evovit train`
  run.runs_report                 `evovit report`
  run.compare_report              what a comparison leaves behind
  run.compare                     `evovit compare`
  run.small_vit                   the quickstart's model
  run.report                      models side by side, in one HTML file
  run.quickstart                  `evovit quickstart`
  cli                             the command line
"""

from evovit.backbones import check_adapter, list_hosts
from evovit.errors import EvoViTError
from evovit.fuse import fuse_batch_norm
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
    "fuse_batch_norm",
    "list_hosts",
    "list_methods",
    "list_models",
    "load_official",
    "load_reduced",
    "reduce_tokens",
    "save_reduced",
]
