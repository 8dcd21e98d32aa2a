"""How a saved host is built again: timm's name and arguments, or transformers' class and config.

A description is kept only if the host it builds has the same modules with the same settings; this is tried
without values (on the meta device) when it is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import nn

from evovit.errors import EvoViTError, in_one_line, shown
from evovit.hosts import create_host
from evovit.hosts.hf import as_timm_says, hub_name

ARGUMENTS = (
    "num_classes",
    "global_pool",
    "dynamic_img_size",
    "dynamic_img_pad",
)  # of timm, kept as attributes
OF_THE_MOMENT = {"training", "grad_checkpointing", "gradient_checkpointing", "_is_hf_initialized"}
OURS = "transformers.models."  # classes of these modules alone are imported by name
ATTENTION = ("eager", "sdpa")  # others may be code that transformers fetches
OPTIONS = ("add_pooling_layer", "use_mask_token")  # arguments of a host of transformers beside its config
FETCHES = (  # parts of fields of a config by which transformers would fetch code or other models
    *("attn_implementation", "experts_implementation", "use_kernels", "auto_map", "per_layer_config"),
    *("use_pretrained_backbone", "use_timm_backbone"),
)
NAMES = ("backbone", "architecture")  # fields that would name a model elsewhere


def describe(host: nn.Module, name: str | None = None, options: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Return how to build a host again, empty where it does not tell.

    Args:
        name, options: what it was created with, where it does not tell it itself.

    Raises:
        EvoViTError: `name` and `options` build another host.
    """
    name = None if name and ":" in name else name  # a hub's; the host tells which of timm's it is
    if name is None and type(host).__module__.startswith(OURS):
        found = _of_transformers(host)
    else:
        found = _of_timm(host) if name is None else {"timm": name, "options": dict(options)}
        if name is None and not found["timm"]:
            return {}
    try:
        with torch.device("meta"):
            again = build(found)
    except EvoViTError:
        if name is not None:
            raise
        return {}
    different = _differences(host, again)
    if name is not None and different:
        raise EvoViTError(
            f"host is {shown(name)}, which with {shown(dict(options))} builds another host than this "
            f"({different[0]}); give what it was created with."
        )
    return {} if different else found


def build(found: Mapping[str, Any]) -> nn.Module:
    """Build a host as `describe` tells, with fresh weights, in evaluation mode.

    What tells it may be a stranger's: it names a model of timm's registry or a class of transformers' own,
    and nothing is fetched.
    """
    if "timm" in found:
        name, options = found["timm"], found.get("options", {})
        if not isinstance(name, str) or ":" in name or not isinstance(options, Mapping):
            raise EvoViTError(
                f"The host is described as {shown(name)} with {shown(options)}; give a timm name and a table "
                "of its arguments."
            )
        return create_host(name, options, what="host").eval()
    try:
        cls = _class(found["transformers"], "PreTrainedModel")
        config_class = _class(found["config_class"], "PreTrainedConfig")
        config = config_class.from_dict(_harmless(dict(found["config"])))
        attention = found.get("attention")
        config._attn_implementation = attention if attention in ATTENTION else "sdpa"
        options = {name: bool(value) for name, value in found.get("options", {}).items() if name in OPTIONS}
        return as_timm_says(cls(config, **options).eval())
    except EvoViTError:
        raise
    except Exception as error:  # a constructor given a stranger's config raises what it likes
        raise EvoViTError(
            f"The host {shown(found.get('transformers'))} cannot be built ({type(error).__name__}: "
            f"{in_one_line(error)}); give it as load_reduced(folder, model)."
        ) from error


def _class(path: Any, kind: str) -> Any:
    """Return a class of a kind, which transformers itself defines, by its full path."""
    module, _, name = str(path).rpartition(".")
    if not module.startswith(OURS) or ".timm_" in module:  # those name any model of timm
        raise EvoViTError(
            f"{shown(path)} is not a class of transformers; give the host: load_reduced(folder, model)."
        )
    try:
        found, base = getattr(import_module(module), name), getattr(import_module("transformers"), kind)
    except (ImportError, AttributeError) as error:
        raise EvoViTError(
            f"{shown(path)} cannot be imported ({in_one_line(error)}); use pip install 'evovit[hf]'."
        ) from error
    if not isinstance(found, type) or not issubclass(found, base) or found.__module__ != module:
        raise EvoViTError(
            f"{shown(path)} is not a {kind} of transformers; give the host: load_reduced(folder, model)."
        )
    return found


def _harmless(config: Any) -> Any:
    """Return a config without the fields by which transformers would fetch something."""
    if isinstance(config, dict):
        kept = {key for key in config if key not in NAMES and not any(word in str(key) for word in FETCHES)}
        return {key: _harmless(value) for key, value in config.items() if key in kept}
    return [_harmless(each) for each in config] if isinstance(config, list) else config


def _of_transformers(host: Any) -> dict[str, Any]:
    known = signature(type(host).__init__).parameters
    embeddings = getattr(host, "embeddings", None)
    shown_by = (
        getattr(host, "pooler", None),
        getattr(embeddings, "mask_token", None),
    )  # in the order of OPTIONS
    inside = {name: value is not None for name, value in zip(OPTIONS, shown_by, strict=True)}
    config = json.loads(host.config.to_json_string(use_diff=False))
    return {
        "transformers": f"{type(host).__module__}.{type(host).__qualname__}",
        "config_class": f"{type(host.config).__module__}.{type(host.config).__qualname__}",
        "config": config | {"_name_or_path": hub_name(host)},  # a folder's name is nobody else's business
        "attention": host.config._attn_implementation,
        "options": {name: value for name, value in inside.items() if name in known},
    }


def _of_timm(host: Any) -> dict[str, Any]:
    """Return timm's name of a host, with the tag of its weights, and its arguments; the name may be empty."""
    cfg = getattr(host, "pretrained_cfg", None) or {}
    name, tag = cfg.get("architecture") or "", cfg.get("tag") or ""
    name, made_with = f"{name}.{tag}" if name and tag else name, cfg.get("model_args") or {}
    try:
        made_with = json.loads(json.dumps(made_with))
    except (TypeError, ValueError):  # such as a class
        made_with = {}
    return {"timm": name, "options": made_with | (_changes(host, name, made_with) if name else {})}


def _changes(host: Any, name: str, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by which a host of timm differs from the one that its name and others make."""
    try:
        with torch.device("meta"):
            plain: Any = create_host(name, made_with)
    except EvoViTError:
        return {}
    differ = {
        key: getattr(host, key)
        for key in ARGUMENTS
        if hasattr(host, key) and getattr(host, key) != getattr(plain, key, None)
    }
    size, usual = (getattr(getattr(each, "patch_embed", None), "img_size", None) for each in (host, plain))
    return differ | ({"img_size": list(size)} if size and size != usual else {})


def _differences(host: nn.Module, again: nn.Module) -> list[str]:
    """Return what two networks differ in: modules, their plain settings, the shapes of their weights."""
    ours, theirs = _settings(host), _settings(again)
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key, host) != theirs.get(key, host))


def is_hf(module: nn.Module) -> bool:
    """Tell whether a module is a model of transformers: it carries where it came from, and `as_timm_says`."""
    return hasattr(module, "config_class")


def _settings(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        told = {"num_classes", "in_chans", "name_or_path", "_use_kernels"} if is_hf(module) else set()
        found[path] = f"{type(module).__module__}.{type(module).__qualname__}"
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str | tuple) and name not in OF_THE_MOMENT | told:
                found[f"{path}.{name}"] = repr(value)
    shapes = [*model.named_parameters(), *model.named_buffers()]
    return found | {name: tuple(tensor.shape) for name, tensor in shapes}
