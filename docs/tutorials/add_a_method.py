# %% [markdown]
# # Add a method
#
# A method is one class; its `run_block` says how a block runs. This page writes a method, checks what the test suite would check, and shows
# which patches it keeps. The method drops the patches with the smallest keys.

# %%
# %matplotlib inline
from dataclasses import dataclass
from typing import ClassVar

import timm
import torch

import evovit
from evovit.backbones.base import BackboneSpec, Block
from evovit.methods import register
from evovit.methods.base import Method
from evovit.ops.select import keep_rows, split_top
from evovit.options import Number, Ratio, option
from evovit.schedule import KeepSchedule
from evovit.tokens import Tokens


@register("smallest_keys")
class SmallestKeys(Method):
    """Drop the patch tokens with the smallest keys, before the FFN of each block from `start_block` on."""

    needs_class_token = False
    keep_all: ClassVar = {"keep_ratio": 1.0}  # options under which nothing is reduced

    @dataclass(frozen=True, kw_only=True)
    class Config(Method.Config):
        keep_ratio: Ratio | tuple[Ratio, ...] = option(
            0.7, "of the first grid; a list has one per block"
        )
        start_block: Number = option(3, "first reducing block, counted from 0")

    def __init__(self, config: Config, spec: BackboneSpec) -> None:
        super().__init__(config, spec)
        self.schedule = KeepSchedule.from_block(
            spec.depth, config.keep_ratio, config.start_block
        )

    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        tokens, qkv = block.attend(tokens)  # the host's own attention
        keep = self.schedule.count(block.number, tokens.num_cells)
        if keep is not None and keep < tokens.num_patches:
            score = (
                qkv.k[:, :, tokens.num_prefix :].float().norm(dim=-1).mean(1)
            )  # (B, N)
            tokens = keep_rows(tokens, split_top(score, keep).rows)
        return block.ffn(tokens)  # the host's own FFN


# %% [markdown]
# The block calls the host's own modules: norms, LayerScale, rotary positions and gates. So the method runs on all
# hosts alike. Options are declared once, with type, range, default and meaning; evovit checks the user's values against this.
#
# ## Try it

# %%
torch.manual_seed(0)
host = timm.create_model("deit_tiny_patch16_224", depth=6).eval()
fast = evovit.reduce_tokens(host, "smallest_keys", keep_ratio=0.5, start_block=2)
images = torch.randn(2, 3, 224, 224)
with torch.inference_mode():
    outputs = fast.run(images, record=True)
print(
    "patch tokens after each block:", [tokens.num_patches for tokens in outputs.trace]
)
try:
    evovit.reduce_tokens(host, "smallest_keys", keep_ratio=1.5)
except evovit.EvoViTError as error:
    print(error)

# %% [markdown]
# ## What has to hold
#
# The suite in `tests/test_contract.py` checks every registered method on every host. Four of its properties:

# %%
with torch.inference_mode():
    whole = evovit.reduce_tokens(host, "smallest_keys", **SmallestKeys.keep_all)
    assert torch.allclose(
        whole(images), host(images), atol=1e-5
    )  # nothing reduced: the host, exactly
    assert torch.allclose(
        fast(images)[:1], fast(images[:1]), atol=1e-5
    )  # an image does not depend on its batch
program = torch.export.export(
    fast, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
)
with torch.inference_mode():
    assert torch.allclose(
        program.module()(images[:1].repeat(3, 1, 1, 1)),
        fast(images[:1]).repeat(3, 1),
        atol=1e-5,
    )
fast.train()(images).sum().backward()
assert all(p.grad is not None for p in fast.parameters())  # every parameter learns
fast.eval()
print("all four hold")

# %% [markdown]
# A test also compares with a naive loop of the paper's equations: here it checks that the patches with the largest keys are kept.

# %%
with torch.inference_mode():
    entering = evovit.reduce_tokens(host, "dense").run(images, record=True).trace[1].x
    keys = (
        host.blocks[2]
        .attn.qkv(host.blocks[2].norm1(entering))
        .chunk(3, dim=-1)[1][:, 1:]
    )
    norms = keys.unflatten(-1, (3, -1)).norm(dim=-1).mean(-1)
for kept, each in zip(outputs.trace[2].index, norms, strict=True):
    assert set(kept.tolist()) == set(each.topk(98).indices.tolist())

# %% [markdown]
# ## See it

# %%
from evovit.data.photographs import read_samples
from evovit.engines.exporting import preprocessing_of
from evovit.visualize import draw_kept

prepared = preprocessing_of(host)
photographs = read_samples(prepared).images  # scikit-learn's two
mean, std = (torch.tensor(prepared[key]).view(3, 1, 1) for key in ("mean", "std"))
draw_kept(
    (photographs * std + mean).clamp(0, 1), evovit.kept_patches(fast, photographs)
)

# %% [markdown]
# The weights are random: this shows what the method does, not what a trained model looks at.
#
# ## Where the file goes
#
# In evovit the method is a file, `src/evovit/methods/smallest_keys.py`, and a test file. You edit nothing else: the commands, the
# test suite and this site's [list of methods](../methods/index.md) find it. In a package of your own it is the same file and two lines:
#
# ```toml
# [project.entry-points."evovit.methods"]
# smallest_keys = "your_package.smallest_keys"
# ```
#
# A method may also have losses, a teacher, masking in training, merging and feature maps: [adding a method](../adding_a_method.md).
