"""Creates a host by its name, or raises one sentence that says why it cannot."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from evovit import models  # registers the named models in timm
from evovit.errors import EvoViTError, in_one_line, nearest, shown
from evovit.hosts.hf import create_hf, is_hf
from evovit.models.named import checked_arguments, refusal

__all__ = ["check_name", "create_host", "models"]

ELSEWHERE = {"pretrained": "pretrained", "checkpoint_path": "weights"}  # arguments of timm's: what to set
# Arguments of timm's create_model that say nothing about a host.
TIMMS_OWN = ("features_only", "out_indices", "scriptable", "exportable", "no_jit", "cache_dir")


def check_name(name: str, what: str = "model") -> str:
    """Return a name that timm knows, or one with a colon: `hf:` for transformers, or a hub of timm's.

    Raises `EvoViTError` for any other.
    """
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise EvoViTError(
            f"{what} is {shown(name)}, which timm does not know.{nearest(name, timm.list_models())}"
        )
    bare, _, tag = name.partition(".")
    if tag and bare in models.list_models():
        raise EvoViTError(f"{what} is {shown(name)}, but {bare} has no weights to choose; leave .{tag} out.")
    return name


def checked_options(options: Mapping[str, Any], what: str = "model.options") -> dict[str, Any]:
    """Return arguments of a host with plain values.

    Raises:
        EvoViTError: one that says where weights come from, that makes no host, or of a wrong kind.
    """
    for key in options:
        if key in ELSEWHERE:
            raise EvoViTError(f"{what} has {key}, which is set elsewhere: use {ELSEWHERE[key]}.")
        if key in TIMMS_OWN:
            raise EvoViTError(f"{what} has {key}, which says nothing about a host; leave it out.")
    return checked_arguments(options)


def create_host(
    name: str,
    options: Mapping[str, Any] = {},
    *,
    pretrained: bool = False,
    what: str = "model",
    seed: int | None = None,
) -> nn.Module:
    """Create a model of timm, or with `hf:` of transformers, on the current default device.

    A host of timm remembers what it was made with in its `pretrained_cfg`, as "model_args".

    Args:
        options: further arguments of `timm.create_model`, or fields of transformers' config.
        what: what the name is, for sentences, such as `model.name`.
        seed: for a model that draws its own weights from a seed.

    Raises:
        EvoViTError: an unknown name, arguments the model does not take, weights that cannot be had.
    """
    check_name(name, what)
    options = checked_options(options, f"{what.removesuffix('.name')}.options")
    if is_hf(name):
        return create_hf(name, options, pretrained, what)
    if seed is not None and ":" not in name:
        entry = timm.model_entrypoint(name)
        options |= {"seed": seed} if "seed" in inspect.signature(entry).parameters else {}
    make = partial(timm.create_model, name, pretrained=pretrained, **options)
    try:
        try:
            return _remembering(make(), name, options)
        except (
            NotImplementedError
        ):  # timm below 1.0.30 reads numbers to build a RegNet: the meta device has none
            with torch.device("cpu"):
                return _remembering(make(), name, options)
    except EvoViTError:
        raise
    except Exception as error:  # a constructor given a stranger's options raises what it likes
        if pretrained and isinstance(error, OSError | RuntimeError):
            told = f"{type(error).__name__}: {in_one_line(error)}"
            raise EvoViTError(f"{what}: the weights of {name} cannot be loaded ({told}).") from error
        raise refusal(f"timm cannot make {name}", options, error) from error


def _remembering(host: Any, name: str, options: Mapping[str, Any]) -> nn.Module:
    """Return a host that tells its name and arguments, which timm's hosts do in part."""
    own = {} if ":" in name else {"architecture": name.partition(".")[0]}
    host.pretrained_cfg = own | (getattr(host, "pretrained_cfg", None) or {}) | {"model_args": dict(options)}
    if hasattr(host, "default_cfg"):  # timm's older name
        host.default_cfg = host.pretrained_cfg
    return host  # type: ignore[no-any-return]
