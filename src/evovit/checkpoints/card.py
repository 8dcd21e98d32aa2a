"""The model card of a shared model: what it is, how it is used, what was counted, and what was measured.

Nothing is measured here: without numbers of the user's the card says so. What people add to a card on the Hub
outside of the part between the two marks stays, the header with the licence too.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from evovit.checkpoints.hub import PREFIX
from evovit.errors import EvoViTError, listed, printable, shown
from evovit.hosts.hf import hub_name
from evovit.macs import gmacs
from evovit.methods import DENSE, name_of
from evovit.model import ReducedViT, backbone_of

BEGIN = "<!-- evovit writes from here -->"
END = "<!-- to here, and again at the next push; what stands elsewhere is kept -->"
WORDS = ("method", "engine", "dtype", "device", "verdict")  # of a row of a benchmark
NUMBERS = ("batch", "threads", "median_ms", "images_per_second", "gmacs")
SHOWN_CLASSES = 8
Record = Mapping[str, Any]


def write_card(
    reduced: ReducedViT,
    name: str,
    manifest: Record,
    *,
    measured: Sequence[Any] = (),
    accuracy: Mapping[str, float] = {},
    base_model: str | None = None,
) -> str:
    """Return the card of a model in Markdown.

    Args:
        name: as `load_reduced` takes it.
        manifest: the content of its method.json.
        measured: rows of `evovit bench` or records of its rows.jsonl, of this model; dense ones are left out.
        accuracy: what was tested, such as "top-1 %, ImageNet validation", and the number.
        base_model: the Hub's name of the model it was made from; default: what a host of transformers tells.

    Raises:
        EvoViTError: a row of another model, an accuracy that is no number.
    """
    title = name.removeprefix(PREFIX).partition("@")[0].rpartition("/")[2]
    parts = [
        _about(reduced, manifest),
        "## Use",
        f"```python\n{snippet(reduced, name, manifest['preprocessing'])}\n```",
        "## What it is",
        _table(["", ""], [[what, each] for what, each in _facts(reduced, manifest).items()]),
        "## Speed",
        _speed(reduced, measured),
        "## Accuracy",
        _accuracy(accuracy),
    ]
    header = _header(reduced, base_model or hub_name(reduced.model))
    return f"{header}\n# {title}\n\n{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}\n"


def renewed(old: str, new: str) -> str:
    """Return an older card with the part between the marks from a new one; without marks it stays."""
    first, last = old.find(BEGIN), old.find(END)
    if first < 0 or last < first:
        return old
    return old[:first] + new[new.index(BEGIN) : new.index(END)] + old[last:]


def snippet(reduced: ReducedViT, name: str, prepared: Record) -> str:
    """Return a program that loads a model and runs it, on a photograph where it tells how to prepare one."""
    lines = ["import evovit", "import torch", f"\nmodel = evovit.load_reduced({json.dumps(name)})"]
    if prepared:
        lines[1:2] = ["import timm", "import torch", "from PIL import Image"]
        lines += [
            "prepare = timm.data.create_transform(**timm.data.resolve_data_config(model=model))",
            'images = prepare(Image.open("photo.jpg").convert("RGB"))[None]',
        ]
    else:
        shape = ", ".join(map(str, backbone_of(reduced).image_shape))
        lines += [f"images = torch.randn(1, {shape})  # the preprocessing is not known"]
    if not reduced.num_classes:
        return "\n".join(
            [*lines, "with torch.inference_mode():", "    print(model.forward_features(images).shape)"]
        )
    of_hf = hasattr(reduced.model, "config_class")
    word = "model.pretrained_cfg['label_names'][number]" if prepared.get("class_names") else "int(number)"
    return "\n".join(
        [
            *lines,
            "with torch.inference_mode():",
            f"    scores = model(images){'.logits' if of_hf else ''}[0].softmax(-1)",
            f"for score, number in zip(*scores.topk({min(5, reduced.num_classes)})):",
            f'    print(f"{{score:.1%}} {{{word}}}")',
        ]
    )


def _header(reduced: ReducedViT, base_model: str) -> str:
    library = "transformers" if hasattr(reduced.model, "config_class") else "timm"
    task = "image-classification" if reduced.num_classes else "image-feature-extraction"
    tags = ["evovit", "token-reduction", name_of(reduced.method), library]
    base = [f"base_model: {json.dumps(base_model)}"] if base_model else []
    return "\n".join(
        [
            "---",
            "library_name: evovit",
            f"pipeline_tag: {task}",
            *base,
            "tags:",
            *(f"- {json.dumps(tag)}" for tag in tags),
            "---",
            "",
        ]
    )


def _about(reduced: ReducedViT, manifest: Record) -> str:
    method = (type(reduced.method).__doc__ or "").strip().splitlines()[0]
    return (
        f"The vision transformer {_host(manifest)} with token reduction: `{name_of(reduced.method)}`. "
        f"{_text(method)}\nSaved by evovit {_text(manifest['evovit'])}; `method.json` has the checksums of "
        "the other files."
    )


def _host(manifest: Record) -> str:
    build = manifest["build"]
    if "timm" in build:
        return f"`{_text(build['timm'].partition('.')[0])}` of timm"
    return f"`{_text(build['transformers'].rpartition('.')[2])}` of transformers"


def _facts(reduced: ReducedViT, manifest: Record) -> dict[str, str]:
    """Return what a model is; GMACs are counted, not measured."""
    shape, options = backbone_of(reduced).image_shape, manifest["build"].get("options") or {}
    ours, dense = gmacs(reduced, shape), gmacs(reduced.model, shape)
    weights = sum(value.numel() for value in reduced.parameters())
    prepared = manifest["preprocessing"]
    facts = {
        "host": _host(manifest) + _options(options.items()),
        "method": f"`{name_of(reduced.method)}`" + _options(manifest["options"].items()),
        "parameters": f"{weights / 1e6:.4g} million",
        "work": f"{ours:.4g} GMACs per image, counted; dense {dense:.4g}, {dense / ours:.2f} times as many",
        "images": " x ".join(map(str, shape)),
    }
    if reduced.budgets:
        facts["budgets"] = f"{', '.join(f'{each:g}' for each in reduced.budgets)}; set `model.budget`"
    if prepared:
        resize = f"{prepared['interpolation']}, {prepared['crop_mode']}, crop {prepared['crop_pct']:.4g}"
        colours = "; ".join(
            f"{key} {', '.join(f'{v:.4g}' for v in prepared[key])}" for key in ("mean", "std")
        )
        facts["images"] += f"; {resize}; {colours}"
    if reduced.num_classes:
        facts["classes"] = str(reduced.num_classes)
        names = prepared.get("class_names") or ()
        more = "; ..." if len(names) > SHOWN_CLASSES else ""
        facts["classes"] += f": {_text('; '.join(names[:SHOWN_CLASSES]))}{more}" if names else ""
    return facts


def _options(pairs: Any) -> str:
    """Return options as a sentence goes on with them."""
    told = ", ".join(f"{name} = {value}" for name, value in pairs)
    return f", {_text(told)}" if told else ""


def _speed(reduced: ReducedViT, measured: Sequence[Any]) -> str:
    rows = [row for row in map(_record, measured) if row["method"] != DENSE]
    if not rows:
        return "Not measured."
    own = rows_of(reduced, rows)
    for row in rows:
        if row not in own:
            raise EvoViTError(
                f"A row of measured is for {shown(row['method'])} with {shown(row['options'])} and "
                f"{row['gmacs']:.4g} GMACs, which is not this model; give rows of this model."
            )
    cells = [
        [
            f"{row['engine']}, {row['dtype']}",
            str(row["batch"]),
            ", ".join(
                [
                    str(row.get("device_name") or row["device"]),
                    *([f"threads: {row['threads']}"] if row["device"] == "cpu" else []),
                    *([f"torch {row['torch']}"] if row.get("torch") else []),
                ]
            ),
            f"{row['median_ms']:.3g}",
            f"{row['images_per_second']:.4g}",
            row["verdict"],
        ]
        for row in rows
    ]
    notes = sorted({note for row in rows for note in row.get("notes", ())})
    columns = ["engine", "batch", "machine", "ms", "images/s", "over dense, same engine"]
    told = "\n".join(f"- {_text(note)}" for note in notes)
    return (
        _table(columns, cells)
        + "\n\nMeasured by `evovit bench`, dense and reduced in turn."
        + (f"\n\n{told}" if told else "")
    )


def rows_of(reduced: ReducedViT, rows: Sequence[Record]) -> list[Record]:
    """Return those rows of a benchmark that are of a model: of its method, options and work."""
    config, shape = reduced.method.current_config(), backbone_of(reduced).image_shape
    own = json.loads(json.dumps({f.name: getattr(config, f.name) for f in fields(config)}))
    work = gmacs(reduced, shape)
    return [
        row
        for row in rows
        if row["method"] == name_of(reduced.method)
        and row.get("task", "inference") == "inference"
        and math.isclose(row["gmacs"], work, rel_tol=1e-6)
        and json.loads(json.dumps(row["options"])).items() <= own.items()
    ]


def _record(row: Any) -> Record:
    record = asdict(row) if is_dataclass(row) and not isinstance(row, type) else row
    if not isinstance(record, Mapping):
        raise EvoViTError(f"measured has {shown(row)}; give rows of evovit bench.")
    lacking = [key for key in WORDS if not isinstance(record.get(key), str)]
    lacking += [key for key in NUMBERS if not isinstance(record.get(key), int | float)]
    if lacking or not isinstance(record.get("options"), Mapping):
        what = listed(lacking or ["options"])
        raise EvoViTError(f"A row of measured has no {what}; give rows of evovit bench that were measured.")
    return record


def _accuracy(accuracy: Mapping[str, float]) -> str:
    if not accuracy:
        return "Not measured."
    for what, value in accuracy.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise EvoViTError(f"accuracy has {shown(value)} for {shown(what)}; give numbers.")
    return _table(["tested", ""], [[str(what), f"{value:.4g}"] for what, value in accuracy.items()])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def _text(text: Any) -> str:
    """Return text of a stranger that no page obeys."""
    return html.escape(printable(text), quote=False)
