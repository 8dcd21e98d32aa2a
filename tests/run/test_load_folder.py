"""A saved folder alone is enough: the host is built as it was, or one sentence says what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import evovit
from evovit.errors import EvoViTError
from tests.conftest import disturb, make_host, pictures

REDUCES = {"start_block": 1, "stage_length": 2}


def small(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    return disturb(timm.create_model(name, **options)).eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", {"num_classes": 7, "img_size": 32}),
        ("vit_tiny_patch16_224", {"img_size": (32, 48), "global_pool": "avg", "num_classes": 0}),
        ("eva02_tiny_patch14_224.mim_in22k", {"img_size": 28}),
    ],
)
def test_a_host_of_timm_comes_back_from_its_folder(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    reduced = evovit.reduce_tokens(small(name, **options), "evo_vit", verify=False, **REDUCES)
    evovit.save_reduced(reduced, tmp_path)
    again = evovit.load_reduced(tmp_path)
    images = torch.randn(2, 3, *reduced.model.patch_embed.img_size)
    with torch.no_grad():
        assert torch.equal(again(images), reduced(images))
    told = reduced.pretrained_cfg | {"input_size": tuple(images.shape[1:])}
    assert again.pretrained_cfg == told | {"model_args": again.pretrained_cfg["model_args"]}
    assert not again.training


def test_weights_keep_their_type(tmp_path: Path) -> None:
    host = small(img_size=32).to(torch.bfloat16)
    evovit.save_reduced(evovit.reduce_tokens(host, "evo_vit", **REDUCES), tmp_path)
    assert evovit.load_reduced(tmp_path).dtype == torch.bfloat16


def test_a_host_that_does_not_tell_its_arguments_is_asked_for(tmp_path: Path) -> None:
    options = {"img_size": 32, "init_values": 0.1, "drop_path_rate": 0.2}
    reduced = evovit.reduce_tokens(small(**options), "evo_vit", **REDUCES)
    evovit.save_reduced(reduced, tmp_path)
    with pytest.raises(EvoViTError, match=r"without how to build it; give the host, load_reduced"):
        evovit.load_reduced(tmp_path)
    with pytest.raises(EvoViTError, match=r"builds another host than this \(blocks.1.drop_path1"):
        evovit.save_reduced(
            reduced, tmp_path, host="vit_tiny_patch16_224", host_options={"img_size": 32, "init_values": 0.1}
        )
    evovit.save_reduced(reduced, tmp_path, host="vit_tiny_patch16_224", host_options=options)
    with torch.no_grad():
        assert torch.equal(evovit.load_reduced(tmp_path)(pictures()), reduced(pictures()))


def test_a_host_without_a_name_is_asked_for(tmp_path: Path) -> None:
    evovit.save_reduced(evovit.reduce_tokens(make_host("vit"), "evo_vit", **REDUCES), tmp_path)
    with pytest.raises(EvoViTError, match="VisionTransformer' without how to build it"):
        evovit.load_reduced(tmp_path)


def test_a_method_alone_needs_its_host(tmp_path: Path) -> None:
    reduced = evovit.reduce_tokens(small(img_size=32), "evo_vit", **REDUCES)
    evovit.save_reduced(reduced, tmp_path, include_model=False)
    with pytest.raises(EvoViTError, match="without its weights; give the host"):
        evovit.load_reduced(tmp_path)


def test_a_folder_imports_classes_of_transformers_alone(tmp_path: Path) -> None:
    evovit.save_reduced(evovit.reduce_tokens(small(img_size=32), "evo_vit", **REDUCES), tmp_path)
    manifest = tmp_path / "method.json"
    content = json.loads(manifest.read_text())
    content["build"] = {"transformers": "subprocess.Popen", "config_class": "os.system", "config": {}}
    manifest.write_text(json.dumps(content))
    with pytest.raises(EvoViTError, match="'subprocess.Popen' is not a class of transformers"):
        evovit.load_reduced(tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTForImageClassification", {}),
        ("ViTModel", {"add_pooling_layer": False}),
        ("CLIPVisionModelWithProjection", {}),
        ("SiglipForImageClassification", {}),
        ("DINOv3ViTModel", {}),
    ],
)
def test_a_host_of_transformers_comes_back_from_its_folder(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", "5.18")
    from tests.hf_hosts import make_config, worst

    cls = getattr(transformers, name)
    host = disturb(cls(make_config(cls.config_class), **options)).eval()
    host.config.id2label = dict(enumerate(["cat", "dog", "cow", "owl", "fly"]))
    kept = {} if "Siglip" not in name else {"selection": "column_mean"}
    reduced = evovit.reduce_tokens(host, "evo_vit", **REDUCES, **kept)
    evovit.save_reduced(reduced, tmp_path)
    again = evovit.load_reduced(tmp_path)
    with torch.no_grad():
        assert worst(reduced(pictures()), again(pictures())) == 0
    assert type(again.model) is cls
    assert again.config.to_dict() == host.config.to_dict()


def hf_classifier(folder: Path, **processor: Any) -> Any:
    """Return a host of transformers as `from_pretrained` gives it, with its image processor beside it."""
    transformers = pytest.importorskip("transformers", "5.18")
    from tests.hf_hosts import make_config

    host = disturb(transformers.ViTForImageClassification(make_config(transformers.ViTConfig)))
    host.config.id2label = dict(enumerate(["cat", "dog", "cow", "owl", "fly"]))
    host.save_pretrained(folder)
    told = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}} | processor
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return transformers.ViTForImageClassification.from_pretrained(folder).eval()


def test_a_host_of_transformers_brings_its_image_processor_and_its_names(tmp_path: Path) -> None:
    host = hf_classifier(tmp_path / "secret", image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3, resample=2)
    reduced = evovit.reduce_tokens(host, "evo_vit", **REDUCES)
    evovit.save_reduced(reduced, tmp_path / "saved")
    assert "secret" not in (tmp_path / "saved" / "method.json").read_text()
    again = evovit.load_reduced(tmp_path / "saved")
    told = timm.data.resolve_data_config(model=again)
    assert (told["mean"], told["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4))
    assert (told["interpolation"], told["crop_mode"], told["crop_pct"]) == ("bilinear", "squash", 1.0)
    assert again.pretrained_cfg["label_names"] == ["cat", "dog", "cow", "owl", "fly"]
    with torch.no_grad():
        assert torch.equal(again(pictures()).logits, reduced(pictures()).logits)


@pytest.mark.parametrize(
    "processor",
    [
        {"resample": 3},
        {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
        {
            "size": {"height": 36, "width": 36},
            "do_center_crop": True,
            "crop_size": {"height": 32, "width": 32},
        },
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
    ],
    ids=str,
)
def test_timms_words_prepare_what_the_image_processor_prepares(
    processor: dict[str, Any], tmp_path: Path
) -> None:
    """Up to the rounding of the resize, which is another program's: a level or two of 255."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    from evovit.data.photographs import transform_of
    from evovit.hosts.preprocessing import read_preprocessing

    host = hf_classifier(tmp_path, do_resize=True, image_mean=[0.5] * 3, image_std=[0.25] * 3, **processor)
    from transformers import AutoImageProcessor

    photograph = Image.fromarray(load_sample_image("china.jpg")[:400, :400])
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(photograph, return_tensors="pt").pixel_values[0]
    ours = transform_of(read_preprocessing(host, (3, 32, 32)))(photograph)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.02 * theirs.std()


def test_a_config_of_a_stranger_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = hf_classifier(tmp_path / "host")
    evovit.save_reduced(evovit.reduce_tokens(host, "evo_vit", **REDUCES), tmp_path / "saved")
    manifest = tmp_path / "saved" / "method.json"
    content = json.loads(manifest.read_text())
    bad = {
        "_attn_implementation": "other/kernel",
        "attn_implementation": "other/kernel",
        "auto_map": {"x": "y--z.W"},
    }
    bad |= {"use_pretrained_backbone": True, "backbone": "other/model", "use_kernels": True}
    content["build"] |= {"attention": "other/kernel", "config": content["build"]["config"] | bad}
    content["build"]["options"] = {"trust_remote_code": True}
    manifest.write_text(json.dumps(content))

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("something is fetched")

    monkeypatch.setattr("socket.socket.connect", asked)
    again = evovit.load_reduced(tmp_path / "saved")
    assert again.config._attn_implementation == "sdpa" and not hasattr(again.config, "auto_map")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transformers", "transformers.models.auto.auto_factory.get_class_from_dynamic_module"),
        ("transformers", "transformers.models.vit.modeling_vit.ViTConfig"),
        ("transformers", "transformers.models.vit.modeling_vit.torch"),
        ("transformers", "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperModel"),
        ("config_class", "transformers.models.vit.modeling_vit.ViTModel"),
    ],
)
def test_a_folder_builds_model_classes_alone(key: str, value: str, tmp_path: Path) -> None:
    host = hf_classifier(tmp_path / "host")
    evovit.save_reduced(evovit.reduce_tokens(host, "evo_vit", **REDUCES), tmp_path / "saved")
    manifest = tmp_path / "saved" / "method.json"
    content = json.loads(manifest.read_text())
    content["build"][key] = value
    manifest.write_text(json.dumps(content))
    with pytest.raises(EvoViTError, match=r"is not a (PreTrained\w+|class) of transformers"):
        evovit.load_reduced(tmp_path / "saved")


def test_a_host_of_a_hub_is_described_by_what_it_is(tmp_path: Path) -> None:
    """So that nothing is fetched when it is loaded."""
    reduced = evovit.reduce_tokens(small(img_size=32), "evo_vit", **REDUCES)
    evovit.save_reduced(reduced, tmp_path, host="hf_hub:timm/vit_tiny_patch16_224.augreg_in21k")
    content = json.loads((tmp_path / "method.json").read_text())
    assert content["build"]["timm"] == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.mark.parametrize("key", ["timm", "options"])
@pytest.mark.parametrize("value", [None, 3, "os.system", [], True])
def test_a_manifest_that_tells_the_host_in_wrong_kinds_is_one_sentence(
    key: str, value: Any, tmp_path: Path
) -> None:
    evovit.save_reduced(evovit.reduce_tokens(small(img_size=32), "evo_vit", **REDUCES), tmp_path)
    content = json.loads((tmp_path / "method.json").read_text())
    content["build"][key] = value
    (tmp_path / "method.json").write_text(json.dumps(content))
    with pytest.raises(EvoViTError, match=r"host"):
        evovit.load_reduced(tmp_path)


@pytest.mark.parametrize("wrong", [{"host": 3}, {"host": ""}, {"host": "x", "host_options": 3}])
def test_a_host_told_in_wrong_kinds_is_not_saved(wrong: dict[str, Any], tmp_path: Path) -> None:
    reduced = evovit.reduce_tokens(small(img_size=32), "evo_vit", **REDUCES)
    with pytest.raises(EvoViTError, match=r"host"):
        evovit.save_reduced(reduced, tmp_path, **wrong)
    assert not list(tmp_path.iterdir())
