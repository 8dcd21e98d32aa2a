# %% [markdown]
# # Fine-tune on your folder
#
# You have images in folders, one folder per class, and want a faster model for them that is as accurate as before. This
# page trains a dense model, reduces it, measures how much accuracy that costs, fine-tunes it, and loads the result. All of it runs on
# a CPU in under a minute, because images and model are tiny; for your own, only change the names.
#
# ## Your images
#
# `images/train/<class>/<image>` and `images/val/<class>/<image>`, any format and size. Here they are made from
# scikit-learn's handwritten digits:

# %%
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
for number, (ink, label) in enumerate(
    zip(digits.images[:720], digits.target[:720], strict=True)
):
    folder = Path("images", "train" if number < 480 else "val", f"digit_{label}")
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((ink * 15.9).astype("uint8")).resize((48, 48)).save(
        folder / f"{number}.png"
    )
print(
    *sorted(str(folder) for folder in Path("images/train").iterdir())[:3],
    "...",
    sep="\n",
)

# %% [markdown]
# ## A recipe
#
# A recipe is a TOML file that describes a training. `evovit recipes` lists those that come with evovit; `evovit recipes copy finetune` gives you the
# one for a published DeiT-S on a GPU. This one is for a tiny model on a CPU. [All options](../reference/recipe_options.md).

# %%
recipe = """
[model]
name = "small_vit"
options = {depth = 4}

[method]
name = "evo_vit"
keep_ratio = 0.5
start_block = 1
stage_length = 3

[data]
source = "images"
batch_size = 32
workers = 0
crop_scale = 0.7
flip = 0.0

[optimizer]
name = "muon"
clip_norm = 1.0

[learning_rate]
base = 2e-3
reference_batch = 32
warm_up_epochs = 0.2

[run]
epochs = 2
device = "cpu"
"""
_ = Path("mine.toml").write_text(recipe)

# %% [markdown]
# ## The dense model first
#
# `--set` changes any option; a keep ratio of 1 reduces nothing. Skip this step if you have a trained model: `model.weights` takes its file, and
# `model.pretrained=true` the published weights of a timm model.

# %%
# !evovit train mine.toml --set method.keep_ratio=1.0 --out runs/dense

# %% [markdown]
# If a training was killed, the same command resumes it. For many GPUs: `torchrun --nproc_per_node 8 -m evovit train ...`.
#
# ## What does a method cost before any training?

# %%
# !evovit eval runs/dense --method evo_vit:start_block=1,stage_length=3 tome:r=8

# %% [markdown]
# ## Fine-tune
#
# This starts from the dense weights and trains one more epoch with Evo-ViT.

# %%
# !evovit train mine.toml --set model.weights=runs/dense/model/model.safetensors --set run.epochs=1 --out runs/evo

# %% [markdown]
# The run folder has the recipe with every option, a line per update and epoch, the last checkpoints, and the model:
# [what a run folder holds](../training.md#what-a-run-folder-holds). `evovit report runs` compares runs.
#
# ## Use it
#
# The folder contains the network, the preprocessing and the class names.

# %%
import torch
from timm.data import create_transform, resolve_data_config

import evovit

fast = evovit.load_reduced("runs/evo/model").eval()
prepare = create_transform(**resolve_data_config(model=fast))
classes = fast.pretrained_cfg["label_names"]
some = sorted(Path("images/val").glob("*/*.png"))[::40]
images = torch.stack([prepare(Image.open(path).convert("RGB")) for path in some])
with torch.inference_mode():
    found = fast(images).argmax(1)
for path, number in zip(some, found.tolist(), strict=True):
    print(f"{path}: {classes[number]}")

# %% [markdown]
# ## Next
#
# [Share it](../sharing.md) with one line. Which method is best for your images? `evovit compare` trains several from the same dense weights with the same
# settings: [methods side by side](../comparison.md). To use your own training loop: [your own loop](your_own_loop.md). Everything about training:
# [training](../training.md).
