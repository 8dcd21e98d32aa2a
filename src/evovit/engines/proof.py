"""The proof that a written file computes what the model does in eager mode: one check for all engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evovit.engines.base import Run, WithIndices
from evovit.errors import EvoViTError
from evovit.model import ReducedViT
from evovit.tokens import logits_of

LARGEST_ERROR = 1e-5  # in fp32: of a logit, over the largest logit
# Below fp32: length of the difference over that of the logits, over all images. A model of random weights,
# whose logits say little, strays most.
RELATIVE_ERROR = {"fp16": 0.05, "int8": 0.35}
NUDGE = 1e-6  # relative change of pixels under which a selection that is decided does not change
SIZES = (1, 3, 5)  # images of a call, where any number may come; 2 were traced


@torch.inference_mode()
def prove(
    model: nn.Module,
    run: Run,
    run_indices: Run | None,
    images: Tensor,
    precision: str,
    batch: int | None,
    what: str,
) -> dict[str, Any]:
    """Compare a file with eager float32; return what was found.

    Args:
        model: what was written, in evaluation mode on the CPU.
        run: the file.
        run_indices: a file of the same model that also tells which patch tokens are left; None for a host.
        images: (N, channels, height, width) to compare on.
        batch: images of a call, if the file has a fixed number.
        what: the file in words.

    Raises:
        EvoViTError: the file is off by more than the precision may be; the sentence says by how much.
    """
    parts = _parts(images, SIZES if batch is None else (batch,))
    expected, given = [logits_of(model(part)) for part in parts], [run(part)[0] for part in parts]
    if any(a.shape != b.shape or not b.isfinite().all() for a, b in zip(expected, given, strict=True)):
        raise EvoViTError(f"{what} gives other shapes or numbers that are not finite; no file is kept.")
    truth, found = torch.cat(expected), torch.cat(given)
    proof: dict[str, Any] = {
        "images": len(truth),
        "batch_sizes": sorted({len(part) for part in parts}),
        "largest_error": ((found - truth).abs().max() / truth.abs().max()).item(),
        "relative_error": ((found - truth).norm() / truth.norm()).item(),
        "top1_agreement": (found.argmax(-1) == truth.argmax(-1)).float().mean().item(),
    }
    _judge(proof, precision, what)
    if run_indices is not None and isinstance(model, ReducedViT):
        proof |= _compare_kept(model, run_indices, parts)
        if precision == "fp32" and proof["same_kept"] < 1:
            other = 1 - proof["same_kept"]
            raise EvoViTError(
                f"{what} keeps different tokens than the model on {other:.0%} of the images; no file is kept."
            )
    return proof


def _judge(proof: dict[str, Any], precision: str, what: str) -> None:
    """Raise `EvoViTError` where the file is off by more than its precision may be."""
    if precision == "fp32":
        size, bound, name = proof["largest_error"], LARGEST_ERROR, "largest error over the largest logit"
    else:
        size, bound, name = proof["relative_error"], RELATIVE_ERROR[precision], "relative error of the logits"
    if not size <= bound:
        raise EvoViTError(
            f"{what} differs from the model: {name} {size:.1e}, allowed is {bound:.0e}; no file is kept."
        )


def _parts(images: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return images in batches of these sizes, in turn; those left over go."""
    parts: list[Tensor] = []
    start = 0
    while start + sizes[len(parts) % len(sizes)] <= len(images):
        size = sizes[len(parts) % len(sizes)]
        parts.append(images[start : start + size])
        start += size
    return parts


def _compare_kept(model: ReducedViT, run: Run, parts: Sequence[Tensor]) -> dict[str, Any]:
    """Return how the tokens kept agree, over the images whose selection is not decided by rounding alone."""
    telling = WithIndices(model)
    same, overlaps, decided = 0, list[float](), 0
    for part in parts:
        truth = telling(part)[1:]
        found = run(part)[1:]
        nudged = [telling(part * (1 + sign * NUDGE))[1:] for sign in (1, -1)]
        for i in range(len(part)):
            if not all(
                torch.equal(a[i], b[i]) for other in nudged for a, b in zip(truth, other, strict=True)
            ):
                continue
            decided += 1
            same += all(torch.equal(a[i], b[i].long()) for a, b in zip(truth, found, strict=True))
            overlaps += [_overlap(a[i], b[i].long()) for a, b in zip(truth, found, strict=True)]
    return {
        "images_decided_by_rounding": sum(map(len, parts)) - decided,
        "same_kept": same / decided if decided else 1.0,
        "kept_overlap": sum(overlaps) / len(overlaps) if overlaps else 1.0,
    }


def _overlap(one: Tensor, other: Tensor) -> float:
    """Return the share of one's indices (N,) that the other has too."""
    return torch.isin(one, other).float().mean().item()
