"""A model of transformers by name: `hf:` and a Hub name or a folder; random weights, or those published.

Such a host has what evovit reads from timm's hosts: `num_classes`, `in_chans` and `pretrained_cfg`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from evovit.errors import EvoViTError, in_one_line, shown

PREFIX = "hf:"
NAMES = {"num_classes": "num_labels", "img_size": "image_size", "in_chans": "num_channels"}  # ours: theirs
HEADS = ("classifier", "cls_classifier", "distillation_classifier")
USUAL = (0.5, 0.5, 0.5)  # mean and deviation of ViT's processor


def is_hf(name: str) -> bool:
    """Tell whether a name is of transformers."""
    return name.startswith(PREFIX)


def create_hf(name: str, options: Mapping[str, Any], pretrained: bool, what: str) -> nn.Module:
    """Create a model of transformers on the current default device, in training mode.

    Args:
        name: with `hf:`.
        options: timm's names of classes and image size, else fields of the config.
        pretrained: also load the weights; only a classifier of another number of classes starts afresh.

    Raises:
        EvoViTError: no transformers, no such model, an option the config has not, weights that do not fit.
    """
    source = name.removeprefix(PREFIX)
    try:
        import transformers
        from transformers import AutoConfig
    except ImportError as error:
        raise EvoViTError(
            f"{what} is {shown(name)}, a model of transformers ({in_one_line(error)}); use pip install "
            "'evovit[hf]'."
        ) from error
    asked = {NAMES.get(key, key): value for key, value in options.items()}
    if isinstance(classes := asked.get("num_labels"), int):
        asked |= {"id2label": {number: f"LABEL_{number}" for number in range(classes)}}
    try:
        config, unknown = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **asked)
    except Exception as error:  # no network, no folder, a file that is none
        raise EvoViTError(
            f"{what} is {shown(name)}, and its config cannot be loaded ({type(error).__name__}: "
            f"{in_one_line(error)}); give hf: and a Hub name or a folder with config.json."
        ) from error
    if unknown:
        raise EvoViTError(
            f"{what} is {shown(name)}, and its config has no {', '.join(map(shown, unknown))}; give "
            f"fields of {type(config).__name__}, or num_classes, img_size, in_chans."
        )
    cls = _class_of(config, transformers, "num_classes" in options, f"{what} is {shown(name)}")
    try:
        host = _loaded(cls, source, config, name) if pretrained else cls(config)
    except EvoViTError:
        raise
    except Exception as error:  # a constructor given a stranger's config raises what it likes
        raise EvoViTError(
            f"{what}: {name} cannot be made with {shown(dict(options))} ({type(error).__name__}: "
            f"{in_one_line(error)})."
        ) from error
    return as_timm_says(host.train(), processor_of(source))


def _class_of(config: Any, transformers: Any, classifies: bool, what: str) -> Any:
    """Return the class that the config names, or that classifies images, where classes are asked for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as CLASSIFIERS

    named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    known = CLASSIFIERS.get(type(config), None)
    known = known if known is None or isinstance(known, tuple) else (known,)
    if named is not None and (not classifies or named in (known or ())):
        return named
    if known:
        return known[0]
    if classifies:
        raise EvoViTError(f"{what}, and transformers has no image classifier of {type(config).__name__}.")
    return transformers.AutoModel._model_mapping[type(config)]


def _loaded(cls: Any, source: str, config: Any, name: str) -> Any:
    host, told = cls.from_pretrained(
        source, config=config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    mismatched = [key if isinstance(key, str) else key[0] for key in told["mismatched_keys"]]
    wrong = sorted(key for key in {*mismatched, *told["missing_keys"]} if not key.startswith(HEADS))
    if wrong:
        raise EvoViTError(
            f"The weights of {name} do not fit its config: {wrong[0]} is missing or of another size."
        )
    return host


def processor_of(source: str, **options: Any) -> dict[str, Any]:
    """Return what the image processor of a model says, empty where it has none; options are of loading it."""
    from transformers import AutoImageProcessor

    path = Path(source)
    if path.is_dir() and not (path / "preprocessor_config.json").is_file():
        return {}
    try:
        return AutoImageProcessor.from_pretrained(source, **options).to_dict()  # type: ignore[no-any-return]
    except Exception:  # a host runs without: its images may come from anywhere
        return {}


def hub_name(host: Any) -> str:
    """Return the Hub's name of the weights that a host of transformers began with, empty unless it is sure.

    It is where the host says so and the Hub's cache has that model; else it may be a folder.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = getattr(getattr(host, "config", None), "_name_or_path", "")
    try:
        return name if name and isinstance(try_to_load_from_cache(name, "config.json"), str) else ""
    except HFValidationError:  # a path
        return ""


def cfg_near(host: Any) -> dict[str, Any]:
    """Return what lies where a host of transformers came from about its images, as timm says it."""
    source = getattr(getattr(host, "config", None), "_name_or_path", "")
    if not source or not hasattr(host, "config_class"):
        return {}
    processor = processor_of(source, local_files_only=True)
    return as_timm_prepares(processor) if processor else {}


def as_timm_prepares(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an image processor does in timm's words; what it does not say is left out."""
    found: dict[str, Any] = {}
    scale = 255 * float(processor.get("rescale_factor") or 1 / 255)  # timm's images are 0 to 1
    colours = {name: processor.get(f"image_{name}") or () for name in ("mean", "std")}
    if processor.get("do_normalize") is False:
        colours = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    if all(colours.values()):
        found = {name: tuple(float(value) / scale for value in values) for name, values in colours.items()}
    if (resample := processor.get("resample")) is not None:
        found["interpolation"] = Image.Resampling(resample).name.lower()
    size, crop = (processor.get(key) or {} for key in ("size", "crop_size"))
    edge = size.get("shortest_edge") or size.get("height")
    if edge:
        found["crop_mode"] = "center" if "shortest_edge" in size else "squash"  # which keeps the aspect ratio
        kept = crop.get("height", edge) if processor.get("do_center_crop") else edge
        exact = floor(kept / (kept / edge)) == edge  # timm resizes to so many pixels
        found["crop_pct"] = kept / edge if exact else kept / (edge + 0.5)
    return found


def as_timm_says(host: Any, processor: Mapping[str, Any] = {}) -> nn.Module:
    """Give a model of transformers the attributes by which timm's hosts describe themselves."""
    config = getattr(host.config, "vision_config", host.config)
    size = getattr(config, "image_size", 224)
    rows, columns = (size, size) if isinstance(size, int) else size
    has_head = any(hasattr(host, name) for name in HEADS)
    host.in_chans = getattr(config, "num_channels", 3)
    host.num_classes = host.config.num_labels if has_head else 0
    host.pretrained_cfg = {
        "input_size": (host.in_chans, rows, columns),
        "num_classes": host.num_classes,
        "mean": USUAL,
        "std": USUAL,
        "crop_pct": 1.0,
        "classifier": next((name for name in HEADS if hasattr(host, name)), ""),
        **as_timm_prepares(processor),
    }
    return host  # type: ignore[no-any-return]
