"""Tokens after chosen blocks as feature maps, with timm's interface; cells without a token are restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evovit.backbones.base import Backbone, BackboneSpec
from evovit.errors import EvoViTError, check_choice, check_count, shown
from evovit.methods.base import Method
from evovit.ops.restore import fill, interpolate
from evovit.tokens import Tokens

RESTORES = ("auto", "hold", "unmerge", "interpolate")
FORMATS = ("NCHW", "NLC")

Indices = int | Sequence[int] | None
Run = Callable[..., tuple[Tokens, list[Tokens]]]


class Sparse(NamedTuple):
    """Patch tokens as a reduced block leaves them, where nothing is restored."""

    x: Tensor  # (B, N, C)
    index: Tensor  # type: ignore[assignment]  # (B, N) int64, raster position; -1 without a place of its own
    valid: Tensor  # (B, N) bool, whether it has one and takes part


class Lost(NamedTuple):
    """Cells that lost their token in one block."""

    before: Tensor  # (B, cells, C), what all cells had
    cells: Tensor  # (B, cells) bool


def taken(spec: BackboneSpec, indices: Indices) -> list[int]:
    """Return the numbers of the chosen blocks, rising, as timm reads `indices`.

    Args:
        indices: a number means the last so many, None all; they count blocks from 0, or the stages of a host
            that has several, at whose ends features are taken.
    """
    several = len(spec.depths) > 1
    ends = [end - 1 for end in accumulate(spec.depths)] if several else list(range(spec.depth))
    if indices is None:
        return ends
    if isinstance(indices, Sequence) and not isinstance(indices, str):
        if not indices:
            raise EvoViTError("indices is empty; give one or more, or None for all.")
        chosen = [check_count("indices", i, -len(ends), len(ends) - 1, "counted from 0") for i in indices]
        return sorted({ends[i] for i in chosen})
    return ends[-check_count("indices", indices, 1, len(ends), "the last so many, or a list") :]


def check_restore(method: Method, restore: str | None, output_fmt: str) -> str | None:
    """Return how missing cells are restored, "auto" resolved, or raise `EvoViTError` where it cannot be."""
    check_choice("output_fmt", output_fmt, FORMATS)
    if restore is None:
        if output_fmt == "NCHW":
            raise EvoViTError(
                "restore is None, which leaves tokens as they are, and no image can be made of them; set "
                "output_fmt='NLC', or restore to 'hold', 'unmerge' or 'interpolate'."
            )
        return None
    check_choice("restore", restore, RESTORES)
    name = type(method).__name__
    if method.keeps_grid or method.merges:
        return "unmerge" if restore == "auto" else restore
    if not method.keeps_places:
        raise EvoViTError(
            f"restore is {restore!r}, and {name} as configured leaves tokens that have no place on the grid; "
            "set restore=None and output_fmt='NLC', or choose a method whose tokens have one."
        )
    if restore == "unmerge":
        raise EvoViTError(
            f"restore is 'unmerge', and {name} as configured drops tokens without merging them; set "
            "restore to 'hold' or 'interpolate'."
        )
    return "hold" if restore == "auto" else restore


def whole_tokens(
    method: Method, embedded: Tokens, trace: Sequence[Tokens], numbers: Sequence[int], restore: str
) -> list[Tokens]:
    """Return the tokens after the chosen blocks with a token for every cell, in raster order.

    A method that parks tokens brings them back itself, up to date. Otherwise a cell has the value of the
    token it is part of, and without one the value it had last, or an interpolated one.

    Args:
        embedded: what entered the first block.
        trace: tokens after each block, from the first.
    """
    if method.keeps_grid:
        ends = [method.finish(trace[number]) for number in numbers]
        if len(method.spec.depths) > 1 or all(end.grid == embedded.grid for end in ends):
            return ends
    losses: list[Lost] = []
    found, previous = [], embedded
    held, rows = embedded.patches, method.row_of_cell(embedded, embedded.grid)
    for number, tokens in enumerate(trace):
        now = rows
        if tokens.index is not previous.index or tokens.mask is not previous.mask:
            now = present_rows(method, tokens, embedded.grid)
            if restore == "interpolate":
                losses.append(Lost(held, (rows >= 0) & (now < 0)))
        held, rows, previous = fill(held, tokens.patches, now), now, tokens
        if number in numbers:
            patches = interpolated(held, rows, losses) if losses else held
            x = torch.cat((tokens.prefix, patches), dim=1)
            found.append(Tokens(x, embedded.index, tokens.num_prefix, embedded.grid))
    return found


def present_rows(method: Method, tokens: Tokens, grid: tuple[int, int]) -> Tensor:
    """Return the row of each cell's token, (B, cells) int64; -1 where it has none that takes part."""
    rows = method.row_of_cell(tokens, grid)
    if tokens.mask is None:
        return rows
    part = tokens.mask.gather(1, rows.clamp_min(0)) > 0.5
    return rows.where(part, -1)


def interpolated(held: Tensor, rows: Tensor, losses: Sequence[Lost]) -> Tensor:
    """Return the cells' values, (B, cells, C), those without a token interpolated between those with one."""
    filled, present = held, rows >= 0
    for lost in losses:
        missing = lost.cells & ~present
        filled = torch.where(missing.unsqueeze(-1), interpolate(held, lost.before, present), filled)
    return filled


def forward_intermediates(
    run: Run,
    backbone: Backbone,
    method: Method,
    indices: Indices,
    return_prefix_tokens: bool,
    norm: bool,
    stop_early: bool,
    output_fmt: str,
    intermediates_only: bool,
    output_dict: bool,
    restore: str | None,
) -> Any:
    """Run a reduced model and answer as timm's `forward_intermediates`; see `ReducedViT`.

    Args:
        run: runs embedding and blocks; `prepare` sees the embedded tokens, `last` is the last block or None.
    """
    restore = check_restore(method, restore, output_fmt)
    numbers = taken(backbone.spec, indices)
    noted: list[Tokens] = []
    several, last = len(backbone.spec.depths) > 1, backbone.spec.depth - 1

    def note(tokens: Tokens) -> Tokens:
        noted.append(tokens)
        return tokens

    tokens, trace = run(prepare=note, last=numbers[-1] if stop_early else None)
    if restore is None:
        ends = [trace[number] for number in numbers]
    else:
        ends = whole_tokens(method, noted[0], trace, numbers, restore)
    if norm:  # the norm is as wide as the last stage
        pairs = zip(numbers, ends, strict=True)
        ends = [end.with_x(backbone.norm(end.x)) if n == last or not several else end for n, end in pairs]
    prefixes = [end.prefix for end in ends] if return_prefix_tokens and backbone.spec.num_prefix else None
    final = None if intermediates_only else backbone.norm(method.finish(tokens).x)
    maps = [as_answer(end, output_fmt, restore is None) for end in ends]
    if output_dict:
        return as_dictionary(maps, prefixes, final)
    answers: list[Any] = maps if prefixes is None else list(zip(maps, prefixes, strict=True))
    return answers if final is None else (final, answers)


def as_answer(tokens: Tokens, output_fmt: str, sparse: bool) -> Tensor | Sparse:
    """Return patch tokens as a map (B, C, rows, columns) or (B, N, C), or as `Sparse`."""
    if sparse:
        return Sparse(tokens.patches, tokens.index, (tokens.index >= 0) & (tokens.taking_part > 0.5))
    if output_fmt == "NLC":
        return tokens.patches
    batch, _, channels = tokens.patches.shape
    return tokens.patches.transpose(1, 2).reshape(batch, channels, *tokens.grid).contiguous()


def as_dictionary(
    maps: list[Tensor | Sparse], prefixes: list[Tensor] | None, final: Tensor | None
) -> dict[str, Any]:
    """Return the answers under timm's names; of sparse ones also index and valid, beside the values."""
    sparse = [each for each in maps if isinstance(each, Sparse)]
    found: dict[str, Any] = {"image_intermediates": [each.x for each in sparse] or maps}
    if sparse:
        found["image_intermediates_index"] = [each.index for each in sparse]
        found["image_intermediates_valid"] = [each.valid for each in sparse]
    if prefixes is not None:
        found["image_intermediates_prefix"] = prefixes
    return found if final is None else found | {"image_features": final}


def refuse_masks(attn_mask: object, is_causal: object) -> None:
    """Raise `EvoViTError` where attention is to be masked from outside."""
    if attn_mask is not None or is_causal:
        what = "is_causal is True" if attn_mask is None else "attn_mask is given"
        raise EvoViTError(
            f"{what}, but the tokens of a reduced model change from block to block, so a mask from outside "
            "does not fit them; leave it out."
        )


def feature_info(model: Any, backbone: Backbone) -> list[dict[str, Any]]:
    """Return timm's facts about each block's features (or each stage's), with the host's names prefixed.

    Raises:
        EvoViTError: a host of several stages that does not describe them.
    """
    told = getattr(model, "feature_info", None)
    if isinstance(told, list):
        return [each | {"module": f"model.{each['module']}"} for each in told]
    spec = backbone.spec
    if len(spec.depths) > 1:
        raise EvoViTError(
            f"{type(model).__name__} has {len(spec.depths)} stages and no feature_info that describes them; "
            "call forward_intermediates itself."
        )
    stride = backbone.image_shape[1] // spec.grid[0]
    one = {"num_chs": spec.dims[0], "reduction": stride}
    return [one | {"module": f"model.blocks.{number}"} for number in range(spec.depth)]


def prune(host: Any, spec: BackboneSpec, indices: Indices, norm: bool, head: bool) -> list[int]:
    """Take the blocks after the last chosen one out of a timm host, for good; return what timm returns."""
    taken(spec, indices)  # a sentence where they are wrong
    if not hasattr(host, "prune_intermediate_layers"):
        raise EvoViTError(
            f"{type(host).__name__} cannot take out its later blocks (it has no prune_intermediate_layers); "
            f"call forward_intermediates with stop_early=True, which does not run them (indices "
            f"{shown(indices)})."
        )
    return host.prune_intermediate_layers(indices, norm, head)  # type: ignore[no-any-return]
