# %% [markdown]
# # Your timm model
#
# You have a vision transformer from timm. This page makes it faster in one line, shows what the line does, and how to
# save, change or undo it. Nothing is trained.

# %%
# %matplotlib inline
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_model_data_config

import evovit

torch.manual_seed(0)
model = timm.create_model("deit_tiny_patch16_224").eval()  # yours: add pretrained=True

# %% [markdown]
# This page is built without a network, so the weights are random. The two photographs come with scikit-learn; for your
# own, use `Image.open("photo.jpg")` instead.

# %%
prepare = create_transform(**resolve_model_data_config(model))
photographs = [
    Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")
]
images = torch.stack([prepare(photograph) for photograph in photographs])
images.shape

# %% [markdown]
# ## One line
#
# `tome` merges similar patches, 13 in each block. `reduce_tokens` first checks on random images that evovit computes the
# same as your model. A model that it does not support is refused with an error message.

# %%
fast = evovit.reduce_tokens(model, "tome", r=13)
with torch.inference_mode():
    dense_logits, fast_logits = model(images), fast(images)
print(
    fast_logits.shape,
    "first class kept:",
    (dense_logits.argmax(1) == fast_logits.argmax(1)).tolist(),
)

# %% [markdown]
# `fast` is called like `model` and returns the same kind of output. Your model is `fast.model`, with its own keys and weights:

# %%
assert fast.model is model
gmacs = [evovit.gmacs(each, (3, 224, 224)) for each in (model, fast)]
print("{:.2f} GMACs dense, {:.2f} reduced".format(*gmacs))

# %% [markdown]
# ## How much faster?
#
# Fewer multiply-accumulates do not always mean less time. `evovit bench` times the dense model and the reduced ones in turn, in the
# same engine and precision. A speed-up within the noise is called "about 1".

# %%
# !evovit bench deit_tiny_patch16_224 --method tome:r=13 evit:keep_ratio=0.7 --batch 4 --engine eager --rounds 5 --threads 1

# %% [markdown]
# The *ceiling* is the ratio of the multiply-accumulates; *conversion* is how much of it becomes speed-up. This page is built on
# any machine, so measure on yours.
#
# ## See it
#
# The patches that take part in each block, as masks:

# %%
evo = evovit.reduce_tokens(model, "evo_vit", keep_ratio=0.5)
kept = evovit.kept_patches(evo, images)
print(kept.shape, "share of the patches, block by block:")
print(kept.float().mean((0, 2, 3)).tolist())

# %% [markdown]
# and as a picture. With random weights it shows what the method does, not what a trained model looks at.

# %%
from evovit.visualize import draw_side_by_side

config = resolve_model_data_config(model)
mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
colours = (images * std + mean).clamp(0, 1)
draw_side_by_side(
    colours,
    {f"after block {n}": kept[:, n] for n in (3, 4, 8, 11)},
    ["china", "flower"],
)

# %% [markdown]
# ## Change it
#
# Every [method](../methods/index.md) is used like `tome`. Options are checked when you give them; for a wrong value the
# error message says what is allowed:

# %%
try:
    evovit.reduce_tokens(model, "evit", keep_ratio=0)
except evovit.EvoViTError as error:
    print(error)

# %% [markdown]
# You can change the speed of a reduced model at run time: `budget` is its current keep ratio.

# %%
for budget in (1.0, 0.7, 0.3):
    evo.budget = budget
    print(f"budget {budget}: {evovit.gmacs(evo, (3, 224, 224)):.2f} GMACs")

# %% [markdown]
# With your photographs, the command `evovit tune MODEL --target 1.5x --images FOLDER` finds the schedule with the least
# damage at the speed-up you name ([how](../tune.md)).
#
# ## Save it, undo it

# %%
evovit.save_reduced(fast, "fast")
again = evovit.load_reduced("fast")  # builds the timm model too
with torch.inference_mode():
    assert torch.equal(again(images), fast_logits)
model = fast.model  # undone: nothing in it was changed
with torch.inference_mode():
    assert torch.equal(model(images), dense_logits)

# %% [markdown]
# ## Next
#
# [Win the accuracy back](fine_tune_on_your_folder.md) by fine-tuning, [in your own loop](your_own_loop.md) if you have
# one, or [export it](export_and_serve.md).
