# %% [markdown]
# # Your transformers model
#
# A reduced classifier of Hugging Face transformers is used as before: same arguments, same output class, same pipeline. Only its blocks
# run differently. This page needs `pip install "evovit[hf]"`.

# %%
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import evovit

torch.manual_seed(0)
config = ViTConfig(
    hidden_size=192,
    num_hidden_layers=12,
    num_attention_heads=3,
    intermediate_size=768,
    num_labels=10,
)
model = ViTForImageClassification(config).eval()

# %% [markdown]
# Yours is `ViTForImageClassification.from_pretrained("google/vit-base-patch16-224")`; here nothing is downloaded.
# ViT, DeiT, DINOv2, DINOv3, BEiT, CLIP, SigLIP and related models work the same way: [which classes](../transformers.md#hosts).

# %%
fast = evovit.reduce_tokens(model, "evit", keep_ratio=0.7)
images = torch.randn(2, 3, 224, 224)
with torch.inference_mode():
    answer = fast(pixel_values=images, labels=torch.tensor([1, 2]))
print(type(answer).__name__, answer.logits.shape, f"loss {answer.loss:.2f}")
gmacs = [evovit.gmacs(each, (3, 224, 224)) for each in (model, fast)]
print("{:.2f} GMACs dense, {:.2f} reduced".format(*gmacs))

# %% [markdown]
# ## In a pipeline

# %%
from PIL import Image
from sklearn.datasets import load_sample_image

photograph = Image.fromarray(load_sample_image("china.jpg"))
classify = pipeline(
    "image-classification", model=fast, image_processor=ViTImageProcessor(), top_k=2
)
classify(photograph)

# %% [markdown]
# ## Without a class token
#
# SigLIP has no class token. `tome` needs none; a method that selects by class attention needs another score, and the error message says so:

# %%
from transformers import SiglipVisionConfig, SiglipVisionModel

siglip = SiglipVisionModel(
    SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
    )
).eval()
try:
    evovit.reduce_tokens(siglip, "evo_vit")
except evovit.EvoViTError as error:
    print(error)

# %%
reduced = evovit.reduce_tokens(
    siglip, "evo_vit", selection="probe", start_block=2, stage_length=2
)
with torch.inference_mode():
    print(reduced(images).pooler_output.shape)

# %% [markdown]
# [What each score reads](../transformers.md#without-a-class-token).
#
# ## The vision tower of a larger model
#
# `reduce_tower` reduces the vision model inside a larger one, for example of a vision-language model. Here it is a small CLIP:

# %%
from transformers import CLIPConfig, CLIPModel

small = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
}
clip = CLIPModel(
    CLIPConfig(vision_config=small, text_config=small, projection_dim=32)
).eval()
tower = evovit.reduce_tower(
    clip, "evo_vit", keep_ratio=0.5, start_block=2, stage_length=2
)
words = torch.tensor([[1, 5, 7, 49407], [1, 6, 8, 49407]])
with torch.inference_mode():
    reduced_answer = clip(input_ids=words, pixel_values=images).logits_per_image
evovit.restore_tower(clip)
with torch.inference_mode():
    dense_answer = clip(input_ids=words, pixel_values=images).logits_per_image
print("reduced:", reduced_answer.tolist(), "dense:", dense_answer.tolist())
assert not torch.equal(reduced_answer, dense_answer)

# %% [markdown]
# LLaVA, PaliGemma and the Qwen-VL family: [vision towers](../transformers.md#vision-towers).
#
# ## Save it
#
# The folder contains the weights, the host's config and the method; `load_reduced` builds the transformers model again.

# %%
evovit.save_reduced(fast, "fast")
again = evovit.load_reduced("fast")
with torch.inference_mode():
    assert torch.equal(again(images).logits, fast(images).logits)
print(type(again.model).__name__)

# %% [markdown]
# ## Next
#
# Train it with [Trainer or Accelerate](your_own_loop.md) or with PEFT's LoRA
# ([how](../transformers.md#in-the-hosts-place)), or [export it](export_and_serve.md).
