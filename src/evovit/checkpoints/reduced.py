"""A reduced model on disk: method.json (what it is), method.safetensors, model.safetensors (the host).

The host's weights keep the host's names, so the file loads into the plain host too. method.json tells how to
build the host, where it is known (`checkpoints.host`), how its images are prepared and what its classes are
called. It holds the checksum of every file and is written after them: a save that was cut off leaves the
older one whole. The same files make a model on the Hub (`checkpoints.sharing`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evovit.checkpoints import hub
from evovit.checkpoints.host import build, describe
from evovit.errors import EvoViTError, check_kind, shown
from evovit.hosts.preprocessing import checked_preprocessing, read_preprocessing, tell_preprocessing
from evovit.methods import build_config, find_method, name_of
from evovit.model import ReducedViT, backbone_of, reduce_tokens
from evovit.runtime.files import (
    as_path,
    check_fit,
    hash_file,
    read_json,
    read_state_dict,
    told,
    write_atomically,
    write_text,
)

MANIFEST, METHOD, MODEL = "method.json", "method.safetensors", "model.safetensors"
OF_BUDGETS = "statistics."  # begins the name of a tensor of batch norms at a budget
NEW = "new."  # begins the name of a file that takes its place once the manifest tells its checksum


def save_reduced(
    reduced: ReducedViT,
    folder: str | Path,
    *,
    include_model: bool = True,
    host: str | None = None,
    host_options: Mapping[str, Any] = {},
) -> None:
    """Write a reduced model into a folder; a save that is cut off leaves an older one as it was.

    Preprocessing and class names are saved too if the host has them: a timm host in `pretrained_cfg`, a
    transformers host in its config and image processor.

    Args:
        include_model: also write the host's weights; False writes the method alone.
        host: timm's name of the host and `host_options` its arguments, if the host does not know them itself;
            with them `load_reduced(folder)` can build it.

    Raises:
        EvoViTError: the folder cannot be written, or `host` is not this one.
    """
    folder = as_path(folder, "folder")
    check_kind("reduced", reduced, ReducedViT, "what reduce_tokens returns")
    if host is not None:
        check_kind("host", host, str, "timm's name of the host, or None")
    check_kind("host_options", host_options, Mapping, "a table of timm's arguments")  # type: ignore[type-abstract]
    described = describe(reduced.model, host, host_options)
    config = reduced.method.current_config()
    prepared = read_preprocessing(reduced.model, backbone_of(reduced).image_shape)
    if prepared and len(prepared["class_names"]) != reduced.num_classes:
        prepared["class_names"] = []
    if folder.exists() and not folder.is_dir():
        raise EvoViTError(f"{shown(folder)} is a file; give a folder to save into.")
    with largest_budget(reduced):
        states = {METHOD: _clones(reduced.method, "") | _clones(reduced.statistics, OF_BUDGETS)}
        if include_model:
            states[MODEL] = _clones(reduced.model, "")
    with told(folder):
        _complete(folder)
        for name, state in states.items():
            write_atomically(folder / f"{NEW}{name}", partial(save_file, state))
        content = {
            "evovit": version("evovit"),
            "host": f"{type(reduced.model).__module__}.{type(reduced.model).__qualname__}",
            "method": name_of(reduced.method),
            "options": {name: getattr(config, name) for name in config.__dataclass_fields__},
            "last_block": reduced.last_block,
            "budgets": reduced.budgets,
            "budget": reduced.budget,
            "build": described,
            "preprocessing": prepared,
            "includes_model": include_model,
            "files": {name: hash_file(folder / f"{NEW}{name}") for name in states},
        }
        write_text(folder / MANIFEST, json.dumps(content, indent=2, sort_keys=True))
        for name in states:
            (folder / f"{NEW}{name}").replace(folder / name)
        if not include_model:
            (folder / MODEL).unlink(missing_ok=True)  # of an older save


def load_reduced(
    folder: str | Path,
    model: nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ReducedViT:
    """Load a reduced model that `save_reduced` or `push_to_hub` wrote.

    Args:
        folder: with the files, or a model on the Hugging Face Hub, `hf:user/name` or `hf:user/name@revision`.
        model: a host of the same class and size; None builds it as the folder says, in evaluation mode and in
            the dtype of its weights.
        revision: for the Hub: a branch, a tag or a commit; None: the main branch.
        token: for the Hub; None: as you are logged in.

    Raises:
        EvoViTError: a folder that is damaged, does not fit (the host is then left as it was), or does not say
        how to build the host; a model that the Hub does not have.
    """
    if model is not None:
        check_kind("model", model, nn.Module, "the host: a model as the saved one was")
    if isinstance(folder, str) and folder.startswith(hub.PREFIX):
        place = _fetched(hub.find(folder, revision, token))
    elif revision is not None or token is not None:
        raise EvoViTError(f"revision and token are for a model on the Hub, and {shown(folder)} is a folder.")
    else:
        place = as_path(folder, "folder")
    content = read_manifest(place / MANIFEST)
    own = _read_state(place, METHOD, content)
    saved = _read_state(place, MODEL, content) if content["includes_model"] else None
    if model is None:
        if saved is None or not content["build"]:
            missing = "its weights" if saved is None else "how to build it"
            raise EvoViTError(
                f"{shown(folder)} holds a method for {shown(content.get('host'))} without {missing}; "
                "give the host, load_reduced(folder, model), or save with the weights and host='NAME'."
            )
        model = _built(content["build"], saved, shown(folder))
    if saved is not None:
        check_fit(model, saved, f"The saved host in {shown(folder)}", f"this {type(model).__name__}")
    config = build_config(find_method(content["method"]), content["options"])
    reduced = reduce_tokens(model, config, last_block=content["last_block"], budgets=content["budgets"])
    what = f"The saved method in {shown(folder)}"
    parts: list[tuple[nn.Module, dict[str, Tensor]]] = [
        (reduced.method, {k: v for k, v in own.items() if not k.startswith(OF_BUDGETS)})
    ]
    if reduced.statistics is not None:
        kept = {k.removeprefix(OF_BUDGETS): v for k, v in own.items() if k.startswith(OF_BUDGETS)}
        parts.append((reduced.statistics, kept))
    for module, state in parts:
        check_fit(module, state, what, content["method"])
    prepared = content["preprocessing"]
    prepared = prepared and checked_preprocessing(prepared, backbone_of(reduced).image_shape)
    names = len(prepared.get("class_names", ()))
    if names not in (0, reduced.num_classes):
        raise EvoViTError(f"{what} names {names} classes, the model {reduced.num_classes}; save it again.")
    for module, state in parts:
        module.load_state_dict(state)
    if saved is not None:
        model.load_state_dict(saved)
        if prepared:
            tell_preprocessing(model, prepared)
    reduced.budget = content["budget"]
    return reduced


def is_saved(name: str) -> bool:
    """Tell whether a name is of a folder that `save_reduced` wrote, or of such a model on the Hub."""
    if not name.startswith(hub.PREFIX):
        return as_path(Path(name) / MANIFEST, "the folder").is_file()
    try:
        return hub.find(name).fetch(MANIFEST) is not None
    except EvoViTError:  # a folder of transformers, or a Hub that is not reached: who opens it says so
        return False


def _fetched(repository: hub.Repository) -> Path:
    """Return the folder in the Hub's cache that holds a shared model; its files alone are fetched."""
    manifest = repository.fetch(MANIFEST)
    if manifest is None:
        raise EvoViTError(
            f"{repository.name} has no {MANIFEST}, so push_to_hub did not write it; create a model of "
            "timm or transformers with its own library and give it to reduce_tokens."
        )
    files = read_manifest(manifest)["files"]
    if not files:
        raise EvoViTError(
            f"{repository.name} does not list the checksums of its files; save and push it again."
        )
    at_commit = repository.at_commit_of(manifest)
    for name in files:  # of the names that read_manifest allows
        if at_commit.fetch(name) is None:
            raise EvoViTError(f"{repository.name} has no {name}, which its {MANIFEST} lists; push it again.")
    return manifest.parent


def _built(found: Mapping[str, Any], saved: Mapping[str, Tensor], what: str) -> nn.Module:
    """Build the host that a folder tells, in the type of its weights; a giant is refused beforehand."""
    with torch.device("meta"):
        needed = sum(value.numel() for value in build(found).state_dict().values())
    there = sum(value.numel() for value in saved.values())
    if needed > 2 * there:
        raise EvoViTError(
            f"{what} describes a host of {needed} weights but has {there}; save the model again."
        )
    model = build(found)
    kinds = {value.dtype for value in saved.values() if value.is_floating_point()}
    return model.to(kinds.pop()) if len(kinds) == 1 else model


@contextmanager
def largest_budget(reduced: ReducedViT) -> Iterator[None]:
    """Let the largest budget, if there are several, be in force; the host then holds its statistics."""
    before = reduced.budget
    if reduced.budgets:
        reduced.budget = reduced.budgets[0]
    try:
        yield
    finally:
        if reduced.budgets:
            reduced.budget = before


def _clones(module: nn.Module | None, prefix: str) -> dict[str, Tensor]:
    """Return a module's state as tensors of their own; None has none."""
    state = {} if module is None else module.state_dict()
    return {f"{prefix}{key}": value.detach().clone().contiguous() for key, value in state.items()}


def _complete(folder: Path) -> None:
    """Put the files of a save that was cut off after its manifest in their place."""
    try:
        files = read_manifest(folder / MANIFEST)["files"]
    except EvoViTError:  # there is none, or it is damaged
        return
    for name in (METHOD, MODEL):
        new = folder / f"{NEW}{name}"
        if new.is_file() and hash_file(new) == files.get(name):
            new.replace(folder / name)


def read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EvoViTError(f"There is no {shown(path)}; give a folder written by save_reduced.")
    older: dict[str, Any] = {"files": {}, "build": {}, "last_block": "prefix", "budgets": [], "budget": None}
    content = older | {"preprocessing": {}} | read_json(path, "evovit")
    kinds = {"method": str, "options": dict, "includes_model": bool, "files": dict, "build": dict}
    kinds["preprocessing"] = dict
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if not wrong and content["files"]:  # there are none where an older version wrote it
        needed = {METHOD, MODEL} if content["includes_model"] else {METHOD}
        whole = needed == content["files"].keys() and all(
            isinstance(v, str) for v in content["files"].values()
        )
        wrong = [] if whole else ["files"]
    if wrong:
        raise EvoViTError(
            f"{shown(path)} is damaged or not written by evovit: {wrong[0]} is missing or wrong."
        )
    return content


def _read_state(folder: Path, name: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the file whose checksum the manifest tells, in its place or still new."""
    told = content["files"].get(name)
    places = [folder / f"{NEW}{name}", folder / name]
    found = [path for path in places if path.is_file() and told and hash_file(path) == told]
    if told and not found:
        raise EvoViTError(
            f"{shown(folder / name)} is missing, cut off or changed: {MANIFEST} has another checksum. Save "
            "the model again; a file of the Hub's cache is fetched again once it is removed."
        )
    return read_state_dict(found[0] if found else folder / name)
