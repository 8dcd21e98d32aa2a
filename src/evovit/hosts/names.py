"""What a host's classes are called, if the host or its data set says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PLACEHOLDER = "LABEL_"  # begins transformers' names of classes that nobody has named


def class_names(host: Any) -> list[str]:
    """Return the names of a host's classes, in their order; empty where they are not known.

    Of transformers' hosts those of the config; of timm's those of `pretrained_cfg`, or of the part of
    ImageNet that has as many classes.
    """
    config = getattr(host, "config", None)
    count = getattr(host, "num_classes", 0) or getattr(config, "num_labels", 0) or 0
    named = getattr(config, "id2label", None)
    if isinstance(named, Mapping) and count:
        names = [str(named.get(number, "")) for number in range(count)]
        if any(name and not name.startswith(PLACEHOLDER) for name in names):
            return names
        return []
    told: Any = getattr(host, "pretrained_cfg", None) or {}
    listed = told.get("label_names") or ()
    described = told.get("label_descriptions") or {}
    if isinstance(listed, Sequence) and len(listed) == count > 0:
        return [
            str(described.get(name, name)) if isinstance(described, Mapping) else str(name) for name in listed
        ]
    from timm.data import ImageNetInfo, infer_imagenet_subset

    part = infer_imagenet_subset(host)
    if part is None:
        return []
    info = ImageNetInfo(part)
    return [info.index_to_description(number) for number in range(count)]
