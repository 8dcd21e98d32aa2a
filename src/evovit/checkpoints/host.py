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
from evovit.hosts.hf import as_timm_says

ARGUMENTS = (
    "num_classes",
    "global_pool",
    "dynamic_img_size",
    "dynamic_img_pad",
)  # of timm, kept as attributes
OF_THE_MOMENT = {"training", "grad_checkpointing", "gradient_checkpointing", "_is_hf_initialized"}
OURS = "transformers.models."  # classes of these modules alone are imported by name


def describe(host: nn.Module, name: str | None = None, options: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Return how to build a host again, empty where it does not tell.

    Args:
        name, options: what it was created with, where it does not tell it itself.

    Raises:
        EvoViTError: `name` and `options` build another host.
    """
    if name is None and type(host).__module__.startswith(OURS):
        found = _of_transformers(host)
    else:
        found = {"timm": _name_of(host) if name is None else name, "options": dict(options)}
        if name is None and not found["timm"]:
            return {}
        if name is None:
            found["options"] = _arguments(host, found["timm"])
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
    """Build a host as `describe` tells, with fresh weights, in evaluation mode."""
    if "timm" in found:
        name, options = found["timm"], found.get("options", {})
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise EvoViTError(
                f"The host is told as {shown(name)} with {shown(options)}; give a name of timm and a table "
                "of its arguments."
            )
        return create_host(name, options, what="host").eval()
    try:
        cls, config_class = (_class(found[key]) for key in ("transformers", "config_class"))
        config = config_class.from_dict(dict(found["config"]))
        config._attn_implementation = found.get("attention", "sdpa")
        return as_timm_says(cls(config, **found.get("options", {})).eval())
    except EvoViTError:
        raise
    except Exception as error:  # a constructor given a stranger's config raises what it likes
        raise EvoViTError(
            f"The host {shown(found.get('transformers'))} cannot be built ({type(error).__name__}: "
            f"{in_one_line(error)}); give it as load_reduced(folder, model)."
        ) from error


def _class(path: Any) -> Any:
    """Return a class of transformers' own models by its full path."""
    module, _, name = str(path).rpartition(".")
    if not module.startswith(OURS):
        raise EvoViTError(
            f"{shown(path)} is no class of transformers; give the host: load_reduced(folder, model)."
        )
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise EvoViTError(
            f"{shown(path)} is not to be had here ({in_one_line(error)}); use pip install 'evovit[hf]'."
        ) from error


def _of_transformers(host: Any) -> dict[str, Any]:
    known = signature(type(host).__init__).parameters
    inside = {  # arguments beside the config, as they show in the host
        "add_pooling_layer": getattr(host, "pooler", None) is not None,
        "use_mask_token": getattr(getattr(host, "embeddings", None), "mask_token", None) is not None,
    }
    return {
        "transformers": f"{type(host).__module__}.{type(host).__qualname__}",
        "config_class": f"{type(host.config).__module__}.{type(host.config).__qualname__}",
        "config": json.loads(host.config.to_json_string(use_diff=False)),
        "attention": host.config._attn_implementation,
        "options": {name: value for name, value in inside.items() if name in known},
    }


def _name_of(host: Any) -> str:
    """Return timm's name of a host with the tag of its weights, empty where it has none."""
    cfg = getattr(host, "pretrained_cfg", None) or {}
    name, tag = cfg.get("architecture") or "", cfg.get("tag") or ""
    return f"{name}.{tag}" if name and tag else name


def _arguments(host: Any, name: str) -> dict[str, Any]:
    """Return the arguments by which a host of timm differs from the one that its name alone makes."""
    try:
        with torch.device("meta"):
            plain: Any = create_host(name)
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
