"""A reduced model of transformers in its host's place: arguments, pipeline, Trainer, accelerate, PEFT."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import evovit
from evovit.errors import EvoViTError
from tests.conftest import pictures
from tests.hf_hosts import make_config, make_hf, worst

transformers = pytest.importorskip("transformers", "5.18")

RENAMED = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")
REDUCES = {"start_block": 1, "stage_length": 2}


def make(name: str = "ViTForImageClassification", **options: Any) -> nn.Module:
    cls = getattr(transformers, name)
    return make_hf(cls, make_config(cls.config_class, **options))


def make_reduced(name: str = "ViTForImageClassification", **options: Any) -> evovit.ReducedViT:
    return evovit.reduce_tokens(make(name), "evo_vit", **REDUCES, **options)


class Labelled(Dataset[dict[str, Any]]):
    """Eight random images with labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"pixel_values": pictures(1, seed=number)[0], "labels": number % 5}


# arguments


def test_labels_give_the_hosts_loss_and_its_gradient() -> None:
    model, labels = make(), torch.tensor([1, 3])
    reduced = evovit.reduce_tokens(copy.deepcopy(model), "dense")
    expected, found = model(pictures(), labels=labels), reduced(pixel_values=pictures(), labels=labels)
    assert (found.loss - expected.loss).abs() <= 1e-6
    expected.loss.backward()
    found.loss.backward()
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for own, host in zip(reduced.model.parameters(), model.parameters(), strict=True):
        if host.grad is not None:  # a bias of keys has none, which rounding shows as 1e-8 of the largest
            assert (own.grad - host.grad).abs().max() <= 1e-5 * host.grad.abs().max() + 1e-8 * largest


@pytest.mark.parametrize("name", ["ViTModel", "ViTForImageClassification", "CLIPVisionModel"])
def test_return_dict_false_gives_a_tuple(name: str) -> None:
    model = make(name)
    reduced = evovit.reduce_tokens(model, "dense")
    host, ours = (m(pictures(), return_dict=False, output_hidden_states=True) for m in (model, reduced))
    assert isinstance(ours, tuple)
    assert worst(host, ours) <= 1e-5
    if name == "ViTModel":  # the classes around it cannot do this themselves
        model.config.return_dict = False
        assert isinstance(reduced(pictures()), tuple)


def test_some_hidden_states_alone() -> None:
    model = make("ViTModel")
    model.config.output_hidden_states = True
    reduced = evovit.reduce_tokens(model, "dense")
    assert len(reduced(pictures()).hidden_states) == 5
    states = reduced(pictures(), output_hidden_states=[1, -1]).hidden_states
    assert [state is not None for state in states] == [False, True, False, False, True]


def test_what_cannot_be_honoured_is_one_sentence() -> None:
    reduced = make_reduced()
    with pytest.raises(EvoViTError, match="output_attentions: the attention maps"):
        reduced(pictures(), output_attentions=True)
    with pytest.raises(EvoViTError, match="attention_mask: a reduced ViTModel"):
        reduced(pictures(), attention_mask=torch.ones(2, 17))
    with pytest.raises(EvoViTError, match="images is None"):
        reduced(labels=torch.tensor([1, 2]))
    drops = evovit.reduce_tokens(make("ViTModel"), "evit", **{"blocks": (1,)})
    assert drops(pictures()).last_hidden_state.shape[1] < 17
    with pytest.raises(EvoViTError, match="the method leaves fewer; choose one that keeps the grid"):
        drops(pictures(), output_hidden_states=True)


def test_a_host_of_timm_takes_images_alone() -> None:
    from tests.conftest import make_host

    reduced = evovit.reduce_tokens(make_host("vit"), "dense")
    assert torch.equal(reduced(pixel_values=pictures()), reduced(pictures()))
    with pytest.raises(EvoViTError, match="labels: TimmViT hosts take only images"):
        reduced(pictures(), labels=torch.tensor([1, 2]))


def test_the_methods_loss_reads_the_hosts_logits() -> None:
    reduced = make_reduced(assisted_head=True).train()
    outputs = reduced.run(pictures())
    assert outputs.logits.shape == outputs.extra_logits["class_token"].shape == (2, 5)
    assert reduced.num_classes == 5


def test_copies_and_pickles() -> None:
    reduced = make_reduced()
    again = pickle.loads(pickle.dumps(copy.deepcopy(reduced)))
    assert worst(reduced(pictures()), again(pictures())) == 0


def test_checkpointed_blocks_give_the_same_gradient() -> None:
    model = make().train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    reduced = evovit.reduce_tokens(model, "evo_vit", **REDUCES)
    assert reduced.grad_checkpointing
    grads = []
    for _ in range(2):
        reduced.zero_grad()
        reduced(pictures(), labels=torch.tensor([1, 2])).loss.backward()
        grads.append([p.grad.clone() for p in reduced.parameters() if p.grad is not None])
        reduced.gradient_checkpointing_disable()
    for first, second in zip(*grads, strict=True):
        assert torch.allclose(first, second, atol=1e-6)


# in the host's place


def test_pipeline() -> None:
    pytest.importorskip("torchvision")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    image = Image.effect_mandelbrot((40, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    model = make()
    host = transformers.pipeline("image-classification", model=model, image_processor=processor)(image)
    whole = evovit.reduce_tokens(model, "evo_vit", start_block=1, keep_ratio=1.0)
    ours = transformers.pipeline("image-classification", model=whole, image_processor=processor)(image)
    assert [found["label"] for found in ours] == [found["label"] for found in host]
    assert ours[0]["score"] == pytest.approx(host[0]["score"], abs=1e-5)
    assert (
        len(
            transformers.pipeline("image-classification", model=make_reduced(), image_processor=processor)(
                image
            )
        )
        == 5
    )


@RENAMED
def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    reduced = make_reduced()
    before = {name: p.detach().clone() for name, p in reduced.named_parameters()}
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model=reduced, args=arguments, train_dataset=Labelled(), eval_dataset=Labelled()
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(Labelled()).predictions.shape == (8, 5)
    changed = [name for name, p in reduced.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) > len(before) // 2
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert set(saved) == set(reduced.state_dict())


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    reduced = make_reduced()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(reduced, torch.optim.SGD(reduced.parameters(), 0.1))
    first = None
    for _ in range(5):
        loss = model(pixel_values=pictures(), labels=torch.tensor([1, 2])).loss
        first = first or loss.item()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < first
    assert accelerator.unwrap_model(model) is reduced


@RENAMED
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning")
def test_a_lora_adapted_host_is_a_host(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(make(), config).eval()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            p.add_(torch.randn_like(p) * 0.1 * ("lora" in name))
        whole = evovit.reduce_tokens(adapted, "evo_vit", start_block=1, keep_ratio=1.0)
        assert worst(adapted(pixel_values=pictures()), whole(pixel_values=pictures())) <= 1e-5
    reduced = evovit.reduce_tokens(adapted, "evo_vit", **REDUCES).train()
    reduced(pixel_values=pictures(), labels=torch.tensor([1, 2])).loss.backward()
    learnt = {name for name, p in reduced.named_parameters() if p.grad is not None}
    assert learnt
    assert all("lora" in name or "modules_to_save" in name for name in learnt)
    adapted.save_pretrained(str(tmp_path))  # the adapter alone, as ever
    assert (tmp_path / "adapter_model.safetensors").is_file()


@RENAMED
def test_lora_adapts_a_reduced_model() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_reduced(), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    loss: Tensor = adapted(pixel_values=pictures(), labels=torch.tensor([1, 2])).loss
    loss.backward()
    assert any(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize(
    "name",
    [
        *("ViTForImageClassification", "DeiTForImageClassificationWithTeacher"),
        *("Dinov2ForImageClassification", "SiglipForImageClassification", "BeitForImageClassification"),
    ],
)
def test_a_fresh_classifier(name: str) -> None:
    model: Any = make(name)
    fitting = {"selection": "key_norm"} if "Siglip" in name else {"assisted_head": True}
    reduced = evovit.reduce_tokens(model, "evo_vit", start_block=1, stage_length=2, **fitting)
    heads = reduced.get_classifier()
    first = heads[0] if isinstance(heads, tuple) else heads
    assert first.out_features == 5 and len(heads if isinstance(heads, tuple) else (heads,)) == 1 + (
        "Teacher" in name
    )
    inputs, others = first.in_features, {k: v for k, v in model.state_dict().items() if "classifier" not in k}
    for count in (3, 0, 7):
        torch.manual_seed(0)
        reduced.reset_classifier(count)
        assert reduced.num_classes == model.config.num_labels == model.num_labels == count
        logits = reduced(pictures()).logits
        assert logits.shape == (2, count or inputs)
    classifier = reduced.get_classifier()
    classifier = classifier[0] if isinstance(classifier, tuple) else classifier
    assert classifier.weight.shape == (7, inputs) and classifier.weight.std() > 0
    assert classifier.weight.requires_grad and not classifier.weight.is_meta
    assert all(torch.equal(value, others[key]) for key, value in model.state_dict().items() if key in others)
    if "Teacher" not in name:
        assert reduced(pictures(), labels=torch.tensor([6, 0])).loss.isfinite()
    assert len(model.config.id2label) == 7
    with pytest.raises(EvoViTError, match="global_pool is 'avg'"):
        reduced.reset_classifier(3, "avg")
    with pytest.raises(EvoViTError, match="num_classes is -1"):
        reduced.reset_classifier(-1)


@pytest.mark.parametrize("name", ["ViTModel", "BeitForSemanticSegmentation", "CLIPVisionModelWithProjection"])
def test_a_host_without_classifier_says_so(name: str) -> None:
    reduced = evovit.reduce_tokens(make(name), "evo_vit", start_block=1)
    with pytest.raises(EvoViTError, match="has no classifier; wrap a class that has one"):
        reduced.get_classifier()
    with pytest.raises(EvoViTError, match="has no classifier; wrap a class that has one"):
        reduced.reset_classifier(3)
    with pytest.raises(EvoViTError, match="has no group_matcher"):
        reduced.group_matcher()


@RENAMED
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning")
def test_a_classifier_that_peft_trains_is_left_to_peft() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(make("ViTForImageClassification"), lora)
    reduced = evovit.reduce_tokens(adapted, "evo_vit", start_block=1)
    with pytest.raises(EvoViTError, match="classifier is a ModulesToSaveWrapper"):
        reduced.reset_classifier(3)
    plain = peft.get_peft_model(make("ViTForImageClassification"), peft.LoraConfig(target_modules=["q_proj"]))
    reduced = evovit.reduce_tokens(plain, "evo_vit", start_block=1)
    reduced.reset_classifier(3)
    assert reduced(pictures()).logits.shape == (2, 3)
