# %% [markdown]
# # Export and serve
#
# A reduced model can be exported to one file, for ONNX Runtime, OpenVINO, or PyTorch's own runtimes. Each file is loaded again and
# compared with PyTorch before it is kept. This page needs `pip install "evovit[onnx]"`.

# %%
import timm
import torch

import evovit

torch.manual_seed(0)
model = timm.create_model(
    "vit_tiny_patch16_224", img_size=96, depth=6, num_classes=10
).eval()
fast = evovit.reduce_tokens(
    model, "evo_vit", keep_ratio=0.5, start_block=2, stage_length=2
)
record = evovit.export(fast, "exported", to="onnx")
record["proof"]

# %% [markdown]
# `largest_error` is relative to the largest logit; in every image the same patches were kept in every block. A file that fails
# the comparison is not kept. On the command line: `evovit export MODEL --method evo_vit --keep-ratio 0.5 --to onnx openvino`.

# %%
# !ls exported

# %% [markdown]
# ## Run it, without evovit
#
# `run.py` needs only NumPy, Pillow and the engine, and does the preprocessing:

# %%
from PIL import Image
from sklearn.datasets import load_sample_image

Image.fromarray(load_sample_image("china.jpg")).save("photo.jpg")

# %%
# !python exported/run.py photo.jpg onnx

# %% [markdown]
# or in a server of your own:

# %%
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("exported/model.onnx")
images = torch.randn(5, 3, 96, 96)  # any number of images
(logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
with torch.inference_mode():
    assert np.abs(logits - fast(images).numpy()).max() < 1e-4
logits.shape

# %% [markdown]
# Which engine is fastest? `evovit bench MODEL --engine eager compiled onnxruntime openvino --precision fp32 int8` times all of them; our measurements
# are in [speed](../speed.md#engines).
#
# ## In PyTorch: one model, several speeds
#
# A busy server may spend less computation on each image. `budgets` are the keep ratios that a model can switch between
# without being rebuilt:

# %%
several = evovit.reduce_tokens(
    model, "evo_vit", start_block=2, stage_length=2, budgets=(1.0, 0.7, 0.4)
)
several.warm_budgets(images)
for budget in several.budgets:
    several.budget = budget
    with torch.inference_mode():
        answer = several(images)
    print(
        f"budget {several.budget}: {evovit.gmacs(several, (3, 96, 96)):.3f} GMACs, logits {tuple(answer.shape)}"
    )

# %% [markdown]
# [Serving by deadline](../../examples/serve_by_deadline.py) is a program that picks the largest budget with which no waiting request
# misses its deadline. Train for several budgets with `run.budgets` ([how](../tune.md#one-checkpoint-many-speeds)).
#
# ## Next
#
# Precisions, calibration, how files are compared and what is not supported: [exporting](../exporting.md).
