# %% [markdown]
# # Your own training loop
#
# A reduced model is an ordinary module: any training loop works. Three things are easy to miss, and this page shows each of
# them in a plain loop, in Accelerate, in Lightning and in transformers' Trainer:
#
# 1. **The method may have losses of its own**: an assisted head, a ratio loss, a distance from a teacher. Calling the model
#    gives logits only.
# 2. **The method may change during the training**: Evo-ViT selects in every block for the first two thirds, then once per stage. Tell it
#    how far the training is, and when it is done.
# 3. **A teacher** may be needed: any classifier, frozen.

# %%
import timm
import torch
from torch import nn

import evovit

torch.manual_seed(0)
scenes = evovit.digit_scenes(
    "train", 192
)  # built-in images: digits on a canvas, 48 pixels
batches = list(zip(scenes.images.split(32), scenes.labels.split(32), strict=True))


def new_model() -> evovit.ReducedViT:
    host = timm.create_model("small_vit", depth=4)
    options = {
        "start_block": 1,
        "stage_length": 3,
        "assisted_head": True,
        "switch_at": 2 / 3,
    }
    return evovit.reduce_tokens(host, "evo_vit", keep_ratio=0.5, **options).train()


# %% [markdown]
# ## A plain loop
#
# `run` returns more than logits: `extra_logits` has the logits of heads that are used only in training (here the assisted head on the class
# token, eq. 8 of the paper). `method.losses` gives the method's own losses. `set_progress` takes the share of the epochs done; a
# method that does not change during training ignores it.

# %%
model = new_model()
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
epochs = 3
for epoch in range(epochs):
    model.method.set_progress(epoch / epochs)
    for images, labels in batches:
        outputs = model.run(images)
        heads = [outputs.logits, *outputs.extra_logits.values()]
        loss = sum(nn.functional.cross_entropy(head, labels) for head in heads)
        loss = loss + sum(model.method.losses(outputs, None).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: {model.method.mode} mode, loss {loss.item():.2f}")
model.method.set_progress(1.0)  # the training is done
assert model.method.mode == "stage"

# %% [markdown]
# After training call it as usual, in evaluation mode: `model.eval()(images)`.
#
# ## With a teacher, and for many processes: `Objective`
#
# `Objective` puts model, teacher and losses into one module: images and labels go in, named loss terms come out. `evovit train`
# uses it, and it is what DistributedDataParallel should wrap, so that every parameter is used inside its forward.
#
# The teacher is a plain module that returns logits; here a small convolutional network takes its place.

# %%
from evovit.recipe.tables import ObjectiveTable
from evovit.train.objective import Objective

teacher = nn.Sequential(
    nn.Conv2d(3, 8, 5, 4),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(8, 10),
)
goal = ObjectiveTable(distillation="hard", label_smoothing=0.1)


def new_objective() -> Objective:
    return Objective(new_model(), goal, teacher)


terms = new_objective()(*batches[0])
print({name: round(term.item(), 2) for name, term in terms.items()})

# %% [markdown]
# With distillation the class head learns the labels and the assisted head learns from the teacher, as in DeiT. Methods that compare
# tokens with a dense teacher (`sit`, `idle_vit`, `dynamic_vit`) get their teacher the same way; it has to be a ViT of the same
# shape. [All options of the objective](../reference/recipe_options.md#objective).
#
# ## Accelerate

# %%
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
objective = new_objective()
objective, optimizer = accelerator.prepare(
    objective, torch.optim.AdamW(objective.parameters(), 1e-3)
)
method = accelerator.unwrap_model(objective).model.method
for epoch in range(2):
    method.set_progress(epoch / 2)
    for images, labels in batches:
        loss = sum(objective(images, labels).values())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
method.set_progress(1.0)
print(f"loss {loss.item():.2f}")

# %% [markdown]
# ## Lightning
#
# The objective becomes part of the LightningModule (tried with Lightning 2.6). This page is built without Lightning, so the last cell calls
# the hooks as Lightning does; with Lightning, use `lightning.Trainer(max_epochs=2).fit(Classifier(), loader)` instead.

# %%
try:
    from lightning import LightningModule
except ImportError:
    LightningModule = nn.Module


class Classifier(LightningModule):
    def __init__(self, max_epochs: int = 2) -> None:
        super().__init__()
        self.objective, self.max_epochs = new_objective(), max_epochs

    def on_train_epoch_start(self, epoch: int | None = None) -> None:
        epoch = self.current_epoch if epoch is None else epoch
        self.objective.model.method.set_progress(epoch / self.max_epochs)

    def on_train_end(self) -> None:
        self.objective.model.method.set_progress(1.0)

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        return sum(self.objective(*batch).values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.objective.parameters(), 1e-3)


# %%
classifier = Classifier()
optimizer = classifier.configure_optimizers()
for epoch in range(2):
    classifier.on_train_epoch_start(epoch)
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = classifier.training_step(batch, number)
        loss.backward()
        optimizer.step()
classifier.on_train_end()
print(f"loss {loss.item():.2f}")

# %% [markdown]
# ## transformers' Trainer
#
# A reduced transformers model returns a loss if it is given labels, and goes into `Trainer` as it is
# ([how](../transformers.md#in-the-hosts-place)). To add the method's own losses or a teacher, wrap the objective in a module that returns its loss:

# %%
from transformers import Trainer, TrainerCallback, TrainingArguments


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.objective = new_objective()

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        looked = self.objective.look(images, labels)
        return {"loss": sum(looked.terms.values()), "logits": looked.heads["class"]}


class Progress(TrainerCallback):
    def on_epoch_begin(self, args, state, control, model=None, **others) -> None:
        model.objective.model.method.set_progress(state.epoch / args.num_train_epochs)

    def on_train_end(self, args, state, control, model=None, **others) -> None:
        model.objective.model.method.set_progress(1.0)


samples = [
    {"images": image, "labels": label}
    for image, label in zip(scenes.images, scenes.labels, strict=True)
]
arguments = TrainingArguments(
    "trainer",
    per_device_train_batch_size=32,
    num_train_epochs=2,
    learning_rate=1e-3,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
trainer = Trainer(WithLoss(), arguments, train_dataset=samples, callbacks=[Progress()])
print(f"loss {trainer.train().training_loss:.2f}")
trained = trainer.model.objective.model
assert trained.method.mode == "stage"

# %% [markdown]
# ## Save the trained model
#
# `save_reduced` does not save teacher and optimiser. `host` and `host_options` say how to build a timm model that was made with options.

# %%
evovit.save_reduced(trained, "trained", host="small_vit", host_options={"depth": 4})
again = evovit.load_reduced("trained").eval()
with torch.inference_mode():
    assert torch.equal(again(scenes.images[:8]), trained.eval()(scenes.images[:8]))
