"""A reduced model on disk: method.json (what it is), method.safetensors, model.safetensors (the host).

The host's weights keep the host's names, so the file loads into the plain host too.
"""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from evovit.errors import EvoViTError
from evovit.methods import build_config, find_method, name_of
from evovit.model import ReducedViT, reduce_tokens
from evovit.runtime.files import read_state_dict, write_atomically, write_text


def save_reduced(reduced: ReducedViT, folder: str | Path, *, include_model: bool = True) -> None:
    """Write a reduced model into a folder, each file whole or not at all.

    Args:
        include_model: also write the host's weights; False writes the method alone.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise EvoViTError(f"{str(folder)!r} is a file; give a folder to save into.")
    config = reduced.method.current_config()
    content = {
        "evovit": version("evovit"),
        "host": f"{type(reduced.model).__module__}.{type(reduced.model).__qualname__}",
        "method": name_of(reduced.method),
        "options": {name: getattr(config, name) for name in config.__dataclass_fields__},
        "includes_model": include_model,
    }
    states = {"method.safetensors": reduced.method.state_dict()}
    if include_model:
        states["model.safetensors"] = reduced.model.state_dict()
    for name, state in states.items():
        tensors = {key: value.detach().clone().contiguous() for key, value in state.items()}
        write_atomically(folder / name, partial(save_file, tensors))
    text = json.dumps(content, indent=2, sort_keys=True)
    write_text(folder / "method.json", text)


def load_reduced(folder: str | Path, model: nn.Module) -> ReducedViT:
    """Read what `save_reduced` wrote onto a host of the same class and size; saved weights are loaded."""
    folder = Path(folder)
    path = folder / "method.json"
    if not path.is_file():
        raise EvoViTError(f"There is no {str(path)!r}; give a folder written by save_reduced.")
    try:
        content = json.loads(path.read_text())
        name, options, includes_model = content["method"], content["options"], content["includes_model"]
    except (ValueError, KeyError, TypeError) as error:
        raise EvoViTError(f"{str(path)!r} is damaged or not written by evovit: {error}") from error
    if includes_model:
        _load(model, read_state_dict(folder / "model.safetensors"), f"the host {type(model).__name__}")
    reduced = reduce_tokens(model, build_config(find_method(name), options))
    _load(reduced.method, read_state_dict(folder / "method.safetensors"), f"the method {name}")
    return reduced


def _load(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise EvoViTError(
            f"The saved weights do not fit {what}; create it as it was saved: {error}"
        ) from error
