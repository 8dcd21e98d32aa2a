"""Exports a model to a folder that runs without evovit: files, proof, preprocessing and a short program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evovit.backbones.base import expect_module
from evovit.engines.aoti import Aoti
from evovit.engines.base import Engine, LogitsAlone, Plan, WithIndices, on_cpu, trace
from evovit.engines.onnx import Onnx
from evovit.engines.openvino import OpenVino
from evovit.engines.proof import prove
from evovit.engines.pt2 import Pt2
from evovit.errors import EvoViTError, check_choice, check_count, in_one_line, shown
from evovit.hosts.names import class_names as names_of
from evovit.hosts.preprocessing import RESIZE, checked_preprocessing, read_preprocessing
from evovit.macs import gmacs
from evovit.methods import DENSE, name_of
from evovit.model import ReducedViT, backbone_of
from evovit.options import MOST
from evovit.runtime.files import as_path, make_folder, new_folder, read_json, told, write_text

TARGETS: Mapping[str, Engine] = {"onnx": Onnx(), "openvino": OpenVino(), "pt2": Pt2(), "aoti": Aoti()}
ANY = "dynamic"
RECORD, PREPROCESSING, PROGRAM = "export.json", "preprocessing.json", "run.py"
RANDOM_IMAGES = 18  # two rounds of the proof's batch sizes
PACKAGES = ("evovit", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")


def export(
    model: nn.Module,
    folder: str | Path,
    to: str = "onnx",
    precision: str = "fp32",
    *,
    batch: int | str = ANY,
    calibration: Tensor | None = None,
    images: Tensor | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Export a reduced or dense model for an engine; the file is kept only if it agrees with eager PyTorch.

    The folder gets the file (`model.onnx`, `openvino/model.xml`, `model.pt2` or `model.aoti.pt2`) and
    `export.json`, `preprocessing.json`, and `run.py`, which runs the file on a photograph without evovit.

    Args:
        model: a host or what `reduce_tokens` returns; it is copied, and written as it evaluates.
        to: onnx, openvino, pt2 (torch.export) or aoti (AOTInductor).
        precision: fp32, fp16, or int8 (onnx and openvino).
        batch: images per call, or "dynamic" for any number.
        calibration: (N, channels, height, width) prepared images for int8; openvino needs some.
        images: (N, channels, height, width) prepared images to compare on, besides random ones.
        preprocessing: how images are prepared; default: `preprocessing_of(model)`.

    Returns:
        The entry of this file in `export.json`: versions, options, proof, size.

    Raises:
        EvoViTError: a missing package, a model the engine does not take, a file that differs from the model
            by more than its precision allows; an older file in the folder is then left as it was.
    """
    check_choice("to", to, TARGETS)
    engine, place = TARGETS[to], as_path(folder, "folder")
    expect_module(model, "model")
    engine.expect_ready(precision)
    count = None if batch == ANY else check_count("batch", batch, 1, MOST, f"or {ANY!r}")
    host = backbone_of(model)
    for name, given in (("calibration", calibration), ("images", images)):
        if given is not None:
            _expect_prepared(name, given, host.image_shape)
    plan = Plan(precision=precision, batch=count, calibration=calibration)
    if preprocessing is None:
        prepared = preprocessing_of(model)
    else:
        prepared = checked_preprocessing(preprocessing, host.image_shape)
    make_folder(place)
    _expect_same(place, prepared)
    ready = on_cpu(model)
    what = f"The {engine.name} file in {precision}"
    with told(place), new_folder(place, to) as new:
        runs = [
            _written(engine, each, host.image_shape, plan, new / name)
            for name, each in _graphs(ready).items()
        ]
        proof = prove(
            ready,
            runs[0],
            runs[1] if len(runs) > 1 else None,
            _proof_images(host.image_shape, images, count),
            precision,
            count,
            what,
        )
        entry = _entry(ready, engine, plan, proof, new / "model" / engine.file)
        _keep(new / "model" / engine.file, place / engine.file)
        _record(place, to, entry, prepared)
    return entry


def preprocessing_of(model: nn.Module, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """Return how a photograph becomes the model's input, as timm's evaluation does it.

    Args:
        class_names: of the model's classes; default: those that the host or its data set tells.
    """
    from timm.data import resolve_data_config

    host = model.model if isinstance(model, ReducedViT) else model
    shape = backbone_of(model).image_shape
    cfg = read_preprocessing(host, shape) or resolve_data_config({"input_size": shape}, model=host)
    kept = {key: cfg[key] for key in ("input_size", "mean", "std", *RESIZE)}
    return kept | {"class_names": list(class_names) or names_of(host)}


def _expect_prepared(name: str, images: Any, shape: Sequence[int]) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or tuple(images.shape[1:]) != tuple(shape):
        given = f"a tensor {tuple(images.shape)}" if isinstance(images, Tensor) else shown(images)
        raise EvoViTError(
            f"{name} is {given}; give prepared images, a tensor (N, {', '.join(map(str, shape))})."
        )
    if not images.is_floating_point() or len(images) == 0:
        raise EvoViTError(f"{name} has {len(images)} images of {images.dtype}; give floating-point images.")
    if images.is_meta or not images.isfinite().all():
        raise EvoViTError(f"{name} has no values, or some that are not finite; give prepared images.")


def _expect_same(folder: Path, prepared: Mapping[str, Any]) -> None:
    """Raise `EvoViTError` where the folder holds an export that takes other images."""
    path = folder / PREPROCESSING
    if path.exists() and read_json(path, "evovit") != json.loads(json.dumps(prepared)):
        raise EvoViTError(
            f"{shown(folder)} has an export with another preprocessing of images; give another folder."
        )


def _graphs(model: nn.Module) -> dict[str, nn.Module]:
    """Return what is written: the model, and for the proof alone one that tells the tokens kept."""
    if isinstance(model, ReducedViT) and name_of(model.method) != DENSE:
        return {"model": LogitsAlone(model), "telling": WithIndices(model)}
    return {"model": LogitsAlone(model)}


def _written(engine: Engine, model: nn.Module, shape: Sequence[int], plan: Plan, folder: Path) -> Any:
    """Write one graph with an engine and return what runs it."""
    path = folder / engine.file
    path.parent.mkdir(parents=True)
    try:
        program = trace(model, shape, plan, half=plan.precision == "fp16" and engine.computes_half)
        engine.write(program, path, plan)
        return engine.load(path)
    except (EvoViTError, OSError):
        raise
    except Exception as error:  # exporters raise what they like
        raise EvoViTError(
            f"{engine.name} does not take this model in {plan.precision} ({type(error).__name__}: "
            f"{in_one_line(error)}); nothing is kept."
        ) from error


def _proof_images(shape: Sequence[int], images: Tensor | None, batch: int | None) -> Tensor:
    """Return random images, and the given ones."""
    count = -(-RANDOM_IMAGES // (batch or 1)) * (batch or 1)
    random = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    return random if images is None else torch.cat((random, images.float().cpu()))


def _entry(
    model: nn.Module, engine: Engine, plan: Plan, proof: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Return what the record tells of a file."""
    method = model.method if isinstance(model, ReducedViT) else None
    config = method.current_config() if method else None
    host = model.model if isinstance(model, ReducedViT) else model
    return {
        "engine": engine.name,
        "file": engine.file,
        "bytes": sum(each.stat().st_size for each in path.parent.iterdir() if each.is_file()),
        "host": f"{type(host).__module__}.{type(host).__qualname__}",
        "method": name_of(method) if method else DENSE,
        "options": {name: getattr(config, name) for name in config.__dataclass_fields__} if config else {},
        "gmacs": gmacs(model, backbone_of(model).image_shape),
        "precision": plan.precision,
        "batch": plan.batch or ANY,
        "calibration_images": 0 if plan.calibration is None else len(plan.calibration),
        "proof": dict(proof),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _keep(new: Path, path: Path) -> None:
    """Put a file, with what lies beside it, in its place."""
    path.parent.mkdir(exist_ok=True)
    for each in sorted(new.parent.iterdir(), key=lambda each: each == new):  # the file itself last
        if each.is_file():
            each.replace(path.parent / each.name)


def _record(folder: Path, to: str, entry: Mapping[str, Any], prepared: Mapping[str, Any]) -> None:
    """Write what lies beside the file."""
    path = folder / RECORD
    files = read_json(path, "evovit") if path.exists() else {}
    write_text(path, json.dumps(files | {to: entry}, indent=2))
    write_text(folder / PREPROCESSING, json.dumps(prepared, indent=2))
    write_text(folder / PROGRAM, Path(__file__).with_name("run.template").read_text(encoding="utf-8"))
