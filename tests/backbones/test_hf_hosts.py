"""Models of transformers as hosts: exact when nothing is reduced, or refused in one sentence."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import evovit
from evovit.errors import EvoViTError
from tests.conftest import pictures
from tests.hf_hosts import FAMILIES, SIZE, TINY, inputs_of, make_config, make_hf, worst

transformers = pytest.importorskip("transformers", "5.18")

EXACT = 1e-5
HOSTS = [
    *("ViTModel", "ViTForImageClassification", "DeiTForImageClassificationWithTeacher"),
    *("Dinov2WithRegistersForImageClassification", "DINOv3ViTModel", "BeitForImageClassification"),
    *("CLIPVisionModelWithProjection", "SiglipForImageClassification", "Siglip2VisionModel"),
    *("ViTMAEModel", "IJepaForImageClassification", "InternVLVisionModel"),
]
METHODS = [name for name in evovit.list_methods() if name != "dense"]


def make(name: str, **options: Any) -> nn.Module:
    cls = getattr(transformers, name)
    return make_hf(cls, make_config(cls.config_class, **options))


def reduced_by(model: nn.Module, method: str, **options: Any) -> evovit.ReducedViT:
    """Wrap a host; one without class token gets the score that is made for it."""
    from evovit.methods import find_method
    from evovit.model import backbone_of

    if not backbone_of(model).spec.has_class_token:
        without = {"selection": "column_mean", "compared": "active", "assisted_head": False}
        options |= {k: v for k, v in without.items() if hasattr(find_method(method).Config, k)}
    return evovit.reduce_tokens(model, method, **options)


@pytest.mark.parametrize("name", HOSTS)
def test_keeping_everything_is_the_host_exactly_and_reducing_keeps_its_shapes(name: str) -> None:
    from evovit.methods import find_method

    model, images = make(name), pictures(2, SIZE)
    given = inputs_of(model, images) | {"output_hidden_states": True}
    with torch.no_grad():
        expected = model(**given)
        for method in ("dense", "evo_vit", "tome"):
            cls = find_method(method)
            whole = reduced_by(copy.deepcopy(model), method, **cls.example | cls.keep_all)
            assert worst(expected, whole(**given)) <= EXACT, method
        fewer = reduced_by(model, "evo_vit", start_block=1, stage_length=2)
        assert [t.x.shape[1] for t in fewer.run(images, record=True).trace][-1] < expected.hidden_states[
            0
        ].shape[1]
        answer = fewer(**given)
    assert type(answer) is type(expected)
    assert list(answer) == list(expected)
    for ours, host in zip(answer.hidden_states, expected.hidden_states, strict=True):
        assert ours.shape == host.shape
    assert not torch.equal(answer.hidden_states[-1], expected.hidden_states[-1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "DINOv3ViTModel", "BeitForImageClassification"]
)
def test_every_method_runs_and_an_image_ignores_its_batch(name: str, method: str) -> None:
    from evovit.methods import find_method

    images, cls = pictures(3, SIZE), find_method(method)
    model = make(name)
    try:
        reduced = reduced_by(model, method, **cls.example)
    except EvoViTError as refusal:
        assert "stage" in str(refusal) or "class" in str(refusal)  # of methods made for LeViT
        return
    with torch.no_grad():
        outputs, alone = reduced.run(images, record=True), reduced.run(images[1:2])
        assert min(t.num_patches for t in outputs.trace) < 16
        assert outputs.logits[1].isfinite().all()
        assert (outputs.logits[1] - alone.logits[0]).abs().max() <= 1e-5 * outputs.logits.abs().max()
    masks = method in ("dynamic_vit", "svite_plus")
    if not (masks and reduced_heads_read_patches(reduced)):
        reduced.train()(pixel_values=images)
    else:
        with pytest.raises(EvoViTError, match="masked patch tokens"):
            reduced.train()(pixel_values=images)


def reduced_heads_read_patches(reduced: evovit.ReducedViT) -> bool:
    from evovit.model import backbone_of

    return backbone_of(reduced).head_reads_patches


def test_masked_autoencoders_follow_the_noise() -> None:
    model, noise = make("ViTMAEModel"), torch.rand(2, 16)
    reduced = evovit.reduce_tokens(model, "dense")
    with torch.no_grad():
        assert worst(model(pictures(), noise=noise), reduced(pictures(), noise=noise)) <= EXACT
    model.config.mask_ratio = 0.75
    with pytest.raises(EvoViTError, match=r"75%.*mask_ratio = 0"):
        evovit.reduce_tokens(model, "dense")


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2Model", "DINOv3ViTModel", "BeitModel"])
def test_other_image_sizes(name: str) -> None:
    model, images = make(name), torch.randn(2, 3, 48, 24)
    reduced = evovit.reduce_tokens(model, "evo_vit", start_block=1, keep_ratio=1.0)
    asked = {"interpolate_pos_encoding": True} if name.startswith("ViT") else {}
    with torch.no_grad():
        assert worst(model(images, **asked), reduced(images, **asked)) <= EXACT
    if asked:
        with pytest.raises(EvoViTError, match="48 x 24 pixels"):
            reduced(images)


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_both_ways_to_compute_attention(own: str) -> None:
    model = make("CLIPVisionModel")
    model.set_attn_implementation(own)
    reduced = evovit.reduce_tokens(model, "dense")
    with torch.no_grad():
        assert worst(model(pictures()), reduced(pictures())) <= EXACT


def test_another_way_to_compute_attention_is_refused() -> None:
    model = make("ViTModel")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(EvoViTError, match=r"flash_attention_2.*sdpa"):
        evovit.reduce_tokens(model, "dense")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_takes_float32_images_as_the_host_does(kind: torch.dtype) -> None:
    model = make("ViTForImageClassification").to(kind)
    reduced = evovit.reduce_tokens(model, "evo_vit", start_block=1, keep_ratio=1.0)
    with torch.no_grad():
        host, ours = model(pictures()), reduced(pixel_values=pictures())
    assert ours.logits.dtype == kind
    assert worst(host, ours) <= 0.05


def test_the_hosts_own_recorder_of_hidden_states_is_no_obstacle() -> None:
    model = make("ViTModel")
    model(pictures(), output_hidden_states=True)  # installs hooks of transformers on every block
    reduced = evovit.reduce_tokens(model, "dense")
    assert len(reduced(pictures(), output_hidden_states=True).hidden_states) == 5
    model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(EvoViTError, match="layers.1 has a hook"):
        evovit.reduce_tokens(model, "dense")


def test_a_model_of_text_and_images_is_told_what_to_reduce() -> None:
    config = make_config(transformers.CLIPConfig)
    model = make_hf(transformers.CLIPModel, config)
    with pytest.raises(EvoViTError, match="model.vision_model"):
        evovit.reduce_tokens(model, "dense")
    model.vision_model = evovit.reduce_tokens(model.vision_model, "evo_vit", start_block=1, keep_ratio=1.0)
    text = torch.tensor([[3, 4, 2]])
    with torch.no_grad():
        ours = model(input_ids=text, pixel_values=pictures())
        model.vision_model = model.vision_model.model
        assert worst(model(input_ids=text, pixel_values=pictures()), ours) <= EXACT


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("ViTModel")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(EvoViTError, match=r"transformers 4.57.1.*5.18.*evovit\[hf\]"):
        evovit.reduce_tokens(model, "dense")


@pytest.mark.parametrize("name", ["ViTModel", "ViTForImageClassification", "DINOv3ViTModel"])
def test_fullgraph(name: str) -> None:
    if name == "ViTForImageClassification" and torch.__version__ < "2.15":
        pytest.skip("older versions of torch break the graph where the twin of the host is made")
    reduced = evovit.reduce_tokens(make(name), "evo_vit", start_block=1, stage_length=2)
    compiled = torch.compile(reduced, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert worst(reduced(pixel_values=pictures()), compiled(pixel_values=pictures())) <= EXACT


@pytest.mark.parametrize("method", ["evo_vit", "tome", "evit", "idle_vit"])
@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_the_last_block_leaves_out_what_no_head_reads(name: str, method: str) -> None:
    from evovit.methods import find_method

    model = make(name)
    reduced = reduced_by(model, method, **find_method(method).example)
    with torch.no_grad():
        narrow, work = reduced(pictures()), evovit.gmacs(reduced, (3, SIZE, SIZE))
        reduced.last_block = "all"
        whole = reduced(pictures())
        assert worst(whole, narrow) <= EXACT
        assert work < 0.95 * evovit.gmacs(reduced, (3, SIZE, SIZE))
        reduced.last_block = "prefix"
        assert (
            reduced(pictures(), labels=torch.tensor([1, 2])).loss.isfinite()
            if "Teacher" not in name
            else True
        )


def test_bias_of_distance_follows_the_tokens() -> None:
    """A BEiT block on some tokens gives what the host's block gives when the others are masked out."""
    from evovit.backbones import adapt
    from evovit.ops.select import keep_rows

    model: Any = make("BeitModel")
    backbone = adapt(model)
    tokens = backbone.embed(pictures())
    block = backbone.stages()[0].blocks[2]
    rows = torch.tensor([[3, 9, 12], [0, 1, 15]])
    few = block(keep_rows(tokens, rows))
    hidden = torch.full((2, 1, 17, 17), -torch.inf)
    for image, kept in enumerate(rows):
        hidden[image, :, :, [0, *(kept + 1)]] = 0.0
    all_there = block(tokens, hidden)
    for image, kept in enumerate(rows):
        expected = all_there.x[image, [0, *(kept + 1)]]
        assert (few.x[image] - expected).abs().max() <= EXACT * expected.abs().max()


def vision_classes() -> Iterator[tuple[str, str]]:
    """Yield (family, class) of every model class that reads images, in the families of plain encoders."""
    for family in FAMILIES:
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        for name in module.__all__:
            cls = getattr(module, name)
            if inspect.isclass(cls) and "PreTrained" not in name and "image" in cls.input_modalities:
                yield family, name


REFUSED = {  # of the families' classes, by the reason
    "reads more than images": {
        *("CLIPModel", "MetaClip2Model", "AltCLIPModel", "ChineseCLIPModel", "SiglipModel", "Siglip2Model"),
        *("InternVLModel", "InternVLForConditionalGeneration"),
        *("Idefics3Model", "Idefics3ForConditionalGeneration"),
        *("SmolVLMModel", "SmolVLMForConditionalGeneration"),
    },
    "values that are not finite": {"ViTMAEForPreTraining"},  # its loss of no masked patch is 0 / 0
}
EXACT_COUNT = 40  # as docs/transformers.md says


@pytest.mark.slow
def test_walk_over_the_classes_of_these_families() -> None:
    outcomes: dict[str, str] = {}
    for _, name in vision_classes():
        cls = getattr(transformers, name)
        model = make_hf(cls, make_config(cls.config_class))
        try:
            reduced = reduced_by(model, "evo_vit", start_block=1, keep_ratio=1.0)
        except EvoViTError as refusal:
            outcomes[name] = str(refusal)
            continue
        given = inputs_of(model, pictures())
        with torch.no_grad():
            error = worst(model(**given), reduced(**given))
        assert error <= EXACT, f"{name}: {error:.1e}"
        outcomes[name] = "exact"
    for reason, names in REFUSED.items():
        assert {name for name, outcome in outcomes.items() if reason in outcome} == names
    assert list(outcomes.values()).count("exact") == EXACT_COUNT
    assert len(outcomes) == EXACT_COUNT + sum(map(len, REFUSED.values()))


SUPPORTED = {
    *("BeitForImageClassification", "CLIPForImageClassification", "DeiTForImageClassification"),
    *("DeiTForImageClassificationWithTeacher", "Dinov2ForImageClassification"),
    *("Dinov2WithRegistersForImageClassification", "IJepaForImageClassification"),
    *("MetaClip2ForImageClassification", "SiglipForImageClassification", "Siglip2ForImageClassification"),
    *("ViTForImageClassification", "ViTMSNForImageClassification"),
}


@pytest.mark.slow
def test_walk_over_every_image_classifier_of_transformers() -> None:
    """Classes of other kinds are refused in a sentence; built without values, where they can be built."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as CLASSES

    supported, refused = set(), 0
    for config_class, found in CLASSES.items():
        for cls in found if isinstance(found, tuple) else (found,):
            try:
                with torch.device("meta"):
                    model = cls(config_class())
            except (ValueError, ImportError):  # needs another library, or another config
                continue
            try:
                evovit.reduce_tokens(model, "dense")
            except EvoViTError:
                refused += 1
                continue
            supported.add(cls.__name__)
    assert supported == SUPPORTED
    assert refused >= 25


@pytest.mark.parametrize("name", [*HOSTS, "Idefics3VisionTransformer"])
def test_parts_of_the_projection_are_those_of_the_whole(name: str) -> None:
    """Queries and keys, and values, asked for alone; tokens in another order, biases and padding too."""
    from evovit.backbones import adapt

    if name == "Idefics3VisionTransformer":
        from transformers.models.idefics3 import modeling_idefics3 as idefics3

        config = make_config(idefics3.Idefics3VisionConfig)
        backbone: Any = adapt(make_hf(idefics3.Idefics3VisionTransformer, config))
    else:
        backbone = adapt(make(name))
    images = pictures(2, SIZE)
    if name == "Idefics3VisionTransformer":
        mask = torch.ones(2, *backbone.spec.grid, dtype=torch.bool)
        mask[1, 1:] = False
        backbone.hide(mask)
    with torch.no_grad():
        tokens = backbone.embed(images)
        order = torch.stack([torch.randperm(tokens.num_patches) for _ in range(2)])
        patches = tokens.patches.take_along_dim(order[:, :, None], 1)
        tokens = tokens.change(x=torch.cat((tokens.prefix, patches), dim=1), index=order)
        block = backbone.stages()[0].blocks[1]
        whole, parts, values = block.qkv(tokens), block.queries_keys(tokens), block.values(tokens)
    for part in ("q", "k", "bias"):
        ours, theirs = getattr(parts, part), getattr(whole, part)
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert torch.equal(values.v, whole.v)
    if name in ("BeitForImageClassification", "Idefics3VisionTransformer"):
        assert whole.bias is not None


@pytest.mark.parametrize(
    ("method", "options"),
    [("keep", {"keep_ratio": 0.5}), ("keep", {"keep_ratio": 0.25}), ("subsample", {}), ("evit", {})],
)
@pytest.mark.parametrize("name", ["ViTForMaskedImageModeling", "BeitForSemanticSegmentation", "ViTMAEModel"])
def test_a_head_that_reads_a_token_for_each_patch_is_not_given_fewer(
    name: str, method: str, options: dict[str, Any]
) -> None:
    """Also where what is left would look like a smaller grid."""
    from evovit.methods import find_method

    model = make(name)
    cls = find_method(method)
    reduced = evovit.reduce_tokens(model, method, **cls.example | options)
    given = inputs_of(model, pictures(2, SIZE))
    with pytest.raises(EvoViTError, match=r"a token for each patch|keeps the grid"):
        reduced(**given)


def test_a_model_of_depth_around_a_backbone_is_one_host() -> None:
    backbone = transformers.Dinov2Config(**TINY, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    sizes = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=8, head_hidden_size=4, head_in_index=-1, **sizes
    )
    model = make_hf(transformers.DepthAnythingForDepthEstimation, config)
    whole = evovit.reduce_tokens(model, "evo_vit", start_block=1, keep_ratio=1.0)
    with torch.no_grad():
        expected = model(pictures())
        assert worst(expected, whole(pixel_values=pictures())) <= EXACT
        fewer = evovit.reduce_tokens(model, "evo_vit", start_block=1)(pixel_values=pictures())
        assert fewer.predicted_depth.shape == expected.predicted_depth.shape
        with pytest.raises(EvoViTError, match="keep the|keeps the"):
            evovit.reduce_tokens(model, "keep", blocks=(1,))(pixel_values=pictures())
