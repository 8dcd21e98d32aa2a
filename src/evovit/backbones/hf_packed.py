"""transformers' packed vision towers, Qwen2-VL, Qwen2.5-VL, Qwen3-VL: images of any size in one row.

A merge block of m x m patches becomes one token of the language side, so it is one token here too: methods
select, set aside and restore whole blocks, and what the merger joins is always a block of the image. A
block's query and key, by which it is scored, are the means of its patches'; attention is between all patches.
What the views call images are raw patches as maps, (B, patches of a block * numbers of a patch, rows,
columns): the frames of one size are a batch, each with its own decisions.

Checked with transformers 5.18 to 5.24.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.backbones import adapter
from evovit.backbones.base import (
    Backbone,
    BackboneSpec,
    Block,
    Mix,
    Road,
    expect_class,
    expect_parts,
    mixed_values,
    raster_tokens,
)
from evovit.backbones.hf_blocks import full
from evovit.backbones.hf_trunk import HFTrunk, asked_for, check_version
from evovit.backbones.timm_rope_blocks import rotate, rotation_table
from evovit.errors import EvoViTError
from evovit.ops.select import keep_leading
from evovit.tokens import QKV, Tokens

SIDE = 8  # merge blocks of an image's side where there is none: for checks, and the most an option may say


class PackedBlock(Block):
    """A block of a packed tower, on tokens that are merge blocks of `unit` patches, (B, N, unit * C).

    Args:
        table: (N + 1, unit, 2 * D) sines and cosines of each patch; the last turns nothing, for index -1.
        windows: (N + 1,) int64, the window of each merge block, where attention stays within; the last is
            of index -1, which attends to itself alone.
    """

    parts = ("norm1", "norm2", "attn", "mlp")
    attentions = full(
        *("qwen2_vl.VisionAttention", "qwen2_5_vl.Qwen2_5_VLVisionAttention"),
        *("qwen3_vl.Qwen3VLVisionAttention", "qwen3_vl_moe.Qwen3VLMoeVisionAttention"),
    )

    def __init__(self, block: Any, number: int, table: Tensor, windows: Tensor | None) -> None:
        self.block, self.number, self.table, self.windows = block, number, table, windows
        self.unit = table.shape[1]

    def check(self) -> None:
        """Raise `EvoViTError` where the block holds what this view does not know."""
        what = f"The attention of block {self.number}"
        expect_parts(self.block, self.parts, f"Block {self.number}")
        expect_class(self.block.attn, self.attentions, what)
        expect_parts(self.block.attn, ("qkv", "proj"), what)

    def bypassed(self) -> Iterator[nn.Module]:
        """Return the modules whose forward is never called."""
        yield from (self.block, self.block.attn)

    def patches(self, x: Tensor) -> Tensor:
        """Return tokens (B, N, unit * C) as patches (B, N * unit, C)."""
        return x.reshape(x.shape[0], x.shape[1] * self.unit, -1)

    def attention_input(self, tokens: Tokens) -> Tensor:
        return self.block.norm1(self.patches(tokens.x)).reshape(tokens.x.shape)  # type: ignore[no-any-return]

    def qkv(self, tokens: Tokens) -> QKV:
        attn, (batch, count) = self.block.attn, tokens.index.shape
        y = attn.qkv(self.block.norm1(self.patches(tokens.x)))
        q, k, v = y.reshape(batch, count * self.unit, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        rotation = self.table[tokens.index].flatten(1, 2).unsqueeze(1)  # (B, 1, N * unit, 2 * D)
        q, k = rotate(q, rotation, 0, half=True), rotate(k, rotation, 0, half=True)
        every = torch.stack((q, k, v)).reshape(3, *q.shape[:2], count, self.unit, -1)  # (3, B, H, N, unit, D)
        q, k, v = every.mean(4).unbind(0)  # of each merge block, to score it by
        bias, extra = self.hidden(tokens, q.dtype), every.permute(1, 3, 0, 2, 4, 5).flatten(2)
        length = every[1].float().norm(dim=-1).mean(-1)  # (B, H, N); the mean of keys that differ is short
        return QKV(q, k, v, attn.scaling, bias, extra, length)

    def hidden(self, tokens: Tokens, dtype: torch.dtype) -> Tensor | None:
        """Return what keeps attention within windows, (B, 1, N, N) of 0 and -inf; None: nothing does."""
        if self.windows is None:
            return None
        own = self.windows[tokens.index]  # index -1 reads the last
        apart = own[:, :, None] != own[:, None, :]
        return torch.zeros(apart.shape, dtype=dtype, device=own.device).masked_fill(apart, -torch.inf)[
            :, None
        ]

    def attend(
        self, tokens: Tokens, bias: Tensor | None = None, asking: int | None = None
    ) -> tuple[Tokens, QKV]:
        after, qkv = super().attend(tokens, bias)  # `extra` holds the queries of all
        return (after if asking is None else keep_leading(after, asking)), qkv

    def attention(
        self, tokens: Tokens, qkv: QKV, bias: Tensor | None = None, mix: Mix | None = None
    ) -> Tokens:
        if mix is not None:
            raise EvoViTError("The method computes attention itself, which packed towers do not allow.")
        attn, count = self.block.attn, qkv.q.shape[2]
        every: Any = qkv.extra
        q, k, v = every.reshape(every.shape[0], count, 3, attn.num_heads, self.unit, -1).permute(
            2, 0, 3, 1, 4, 5
        )
        if qkv.bias is not None:
            bias = qkv.bias if bias is None else qkv.bias + bias.to(qkv.bias.dtype)
        if bias is not None:  # of merge blocks: the same for all patches of one
            bias = bias.repeat_interleave(self.unit, -1)
            bias = bias.repeat_interleave(self.unit, -2) if bias.shape[-2] > 1 else bias
        whole = QKV(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), qkv.scale)
        x = attn.proj(mixed_values(whole, bias, None, 0.0).transpose(1, 2).flatten(2))
        return tokens.with_x(tokens.x + x.reshape(tokens.x.shape))

    def ffn(self, tokens: Tokens) -> Tokens:
        x = self.block.mlp(self.block.norm2(self.patches(tokens.x)))
        return tokens.with_x(tokens.x + x.reshape(tokens.x.shape))


BLOCKS = full(
    *("qwen2_vl.Qwen2VLVisionBlock", "qwen2_5_vl.Qwen2_5_VLVisionBlock"),
    *("qwen3_vl.Qwen3VLVisionBlock", "qwen3_vl_moe.Qwen3VLMoeVisionBlock"),
)


@adapter(*full("qwen2_vl.Qwen2VisionTransformerPretrainedModel"))
class HFPacked(HFTrunk):
    """View of Qwen2-VL's tower; its kin add windows, positions or taps."""

    parts: ClassVar[tuple[str, ...]] = ("patch_embed", "rotary_pos_emb", "blocks", "merger")
    stack, norm_name, num_prefix = "blocks", None, 0
    refused: ClassVar[tuple[str, ...]] = (  # what a caller may compute beforehand
        *("cu_seqlens", "max_seqlen", "position_ids", "window_index", "cu_window_seqlens"),
        *("interp_indices", "interp_weights"),
    )

    def __init__(self, model: nn.Module) -> None:
        self.model = host = model  # type: Any
        if not torch.compiler.is_compiling():
            check_version(host)
        self.config = config = host.config
        for number, block in enumerate(host.blocks):
            expect_class(block, BLOCKS, f"Block {number}")
        self.merge: int = config.spatial_merge_size
        self.unit = self.merge**2
        self.numbers = config.in_channels * config.temporal_patch_size * config.patch_size**2  # of a patch
        self.image_shape = (self.unit * self.numbers, SIDE, SIDE)
        self.dim: int = host.blocks[0].attn.proj.out_features
        self.spec = BackboneSpec(
            depths=(len(host.blocks),),
            dims=(self.unit * self.dim,),
            num_heads=(host.blocks[0].attn.num_heads,),
            grid=(SIDE, SIDE),
            num_prefix=0,
            has_class_token=False,
            num_classes=0,
        )
        self.table: Tensor | None = None  # of the frames embedded last
        self.windows: Tensor | None = None

    def vision(self, name: str) -> Any:
        """Return one of transformers' own functions on grids."""
        return getattr(import_module("transformers.vision_utils"), name)

    def takes(self, height: int, width: int) -> bool:
        return True

    def grid_thw(self, grid: tuple[int, int], count: int, device: torch.device) -> Tensor:
        """Return `count` frames of (rows, columns) merge blocks as the host's argument, (count, 3)."""
        sizes = [[1, grid[0] * self.merge, grid[1] * self.merge]] * count
        return torch.tensor(sizes, device=device)

    def positions(self, one: Tensor) -> Tensor | None:
        """Return learnt positions of the patches of one frame, (N * unit, C); default: there are none."""
        return None

    def windows_of(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """Return the window of each merge block, then that of index -1; default: there are none."""
        return None

    def embed(self, images: Tensor) -> Tokens:
        batch, _, rows, columns = images.shape
        one = self.grid_thw((rows, columns), 1, images.device)
        flat = images.flatten(2).transpose(1, 2)  # (B, N, unit * numbers)
        x = self.model.patch_embed(flat.reshape(-1, self.numbers)).reshape(batch, -1, self.dim)
        places = self.positions(one)
        x = x if places is None else x + places.to(x.dtype)
        angles = self.model.rotary_pos_emb(x[0], self.vision("get_vision_position_ids")(one, self.merge))
        turns = torch.cat(angles[::-1], dim=-1).float()  # cosines come first there, sines here
        turns = turns.reshape(rows * columns, self.unit, -1).transpose(0, 1)
        self.table = rotation_table(turns).transpose(0, 1)
        self.windows = self.windows_of((rows, columns), images.device)
        return raster_tokens(x.reshape(batch, rows * columns, -1), 0, (rows, columns))

    def blocks(self) -> list[Any]:
        if self.table is None:  # before the first image: for names and classes alone
            return [
                PackedBlock(block, i, torch.zeros(1, self.unit, 2), None)
                for i, block in enumerate(self.layers)
            ]
        reach = range(len(self.layers)) if self.windows is None else self.model.fullatt_block_indexes
        return [
            PackedBlock(block, i, self.table, None if i in reach else self.windows)
            for i, block in enumerate(self.layers)
        ]

    def pooled(self, features: Tensor) -> Tensor:
        """Return what the merger makes of each merge block, (B, N, out)."""
        y: Tensor = self.model.merger(features.reshape(-1, self.dim))
        return y.reshape(*features.shape[:2], -1)

    def head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return self.pooled(features).mean(1)

    def inputs(self, images: Tensor) -> dict[str, Any]:
        batch, _, rows, columns = images.shape
        flat = images.flatten(2).transpose(1, 2).reshape(-1, self.numbers)
        return {"hidden_states": flat, "grid_thw": self.grid_thw((rows, columns), batch, flat.device)}

    def host_features(self, images: Tensor) -> Tensor:
        x: Tensor = self.host_answer(images).last_hidden_state
        order = self.order(self.inputs(images)["grid_thw"])
        x = x.reshape(-1, self.unit * self.dim)
        x = x if order is None else x[order.argsort()]
        return x.reshape(images.shape[0], -1, self.unit * self.dim)

    def order(self, grid_thw: Tensor) -> Tensor | None:
        """Return in which order the host leaves the merge blocks of `last_hidden_state`; None: theirs."""
        return None

    def suited(self, images: Tensor) -> Tensor:
        return images.to(self.model.blocks[0].attn.proj.weight.dtype)

    def taps(self) -> list[int]:
        """Return after which blocks the language side reads too; default: none."""
        return []

    def answer_within(self, whole: Backbone, road: Road, images: Tensor, **arguments: Any) -> Any:
        if images.ndim == 4:
            return self.answer_within(whole, road, **(_renamed(self.inputs(images)) | arguments))
        self.refuse(arguments)
        if asked_for(arguments, self.config, "output_hidden_states"):
            raise EvoViTError(
                "output_hidden_states: a reduced packed tower gives only its taps and its last output."
            )
        frames = self.frames(arguments["grid_thw"])
        flat = self.suited(images).reshape(-1, self.unit * self.numbers)  # (merge blocks, ...)
        steps = [*self.taps(), None]
        parts: list[list[Tensor]] = [[] for _ in steps]
        places = []
        for (rows, columns), starts in frames.items():
            place = torch.tensor(starts, device=flat.device)[:, None]
            place = (place + torch.arange(rows * columns, device=flat.device)).flatten()
            maps = flat[place].reshape(len(starts), rows, columns, -1).permute(0, 3, 1, 2)
            tokens, trace = road.blocks(whole, maps, record=len(steps) > 1)
            places.append(place)
            for part, step in zip(parts, steps, strict=True):
                after = road.method.finish(tokens if step is None else trace[step])
                part.append(self.all_of(after, rows * columns))
        back = torch.cat(places).argsort()
        found = [torch.cat(part)[back] for part in parts]
        answer = self.answered(found, self.order(arguments["grid_thw"]))
        return answer if asked_for(arguments, self.config, "return_dict", True) else answer.to_tuple()

    def frames(self, grid_thw: Tensor) -> dict[tuple[int, int], list[int]]:
        """Return, by (rows, columns) of merge blocks, where the frames of this size begin."""
        found: dict[tuple[int, int], list[int]] = {}
        start = 0
        for count, height, width in grid_thw.tolist():
            rows, columns = height // self.merge, width // self.merge
            for _ in range(count):
                found.setdefault((rows, columns), []).append(start)
                start += rows * columns
        return found

    def all_of(self, tokens: Tokens, count: int) -> Tensor:
        """Return all `count` merge blocks of each frame, one after another; raises where some are gone."""
        if tokens.num_patches != count:
            raise EvoViTError(
                f"The method leaves {tokens.num_patches} of {count} merge blocks, but a packed "
                "tower needs each in its place; choose one that brings all back: evo_vit, idle_vit or tome."
            )
        return tokens.x.flatten(0, 1)

    def answered(self, found: list[Tensor], order: Tensor | None) -> Any:
        """Return the host's output object.

        Args:
            found: (merge blocks, unit * C) after each tap, and at the end.
            order: of `last_hidden_state`.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        end = found[-1] if order is None else found[-1][order]
        return BaseModelOutputWithPooling(
            last_hidden_state=end.reshape(-1, self.dim),
            pooler_output=self.model.merger(found[-1].reshape(-1, self.dim)),
        )


@adapter(*full("qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel"))
class HFWindowed(HFPacked):
    """View of Qwen2.5-VL's tower: most blocks attend within windows, some to the whole frame."""

    @property
    def side(self) -> int:
        """Merge blocks of a window's side."""
        return self.config.window_size // self.merge // self.config.patch_size  # type: ignore[no-any-return]

    def windows_of(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        rows, columns = (torch.arange(length, device=device) // self.side for length in grid)
        return F.pad((rows[:, None] * grid[1] + columns).flatten(), (0, 1), value=-1)

    def order(self, grid_thw: Tensor) -> Tensor:
        sizes = (self.merge, self.config.window_size, self.config.patch_size)
        found: Tensor = self.vision("get_vision_window_index")(grid_thw, *sizes)[0]
        return found.to(grid_thw.device)


@adapter(*full("qwen3_vl.Qwen3VLVisionModel", "qwen3_vl_moe.Qwen3VLMoeVisionModel"))
class HFDeepstack(HFPacked):
    """View of Qwen3-VL's tower: learnt positions too, and taps for the first layers of the language side."""

    parts = (*HFPacked.parts, "pos_embed", "deepstack_merger_list")

    def positions(self, one: Tensor) -> Tensor:
        host = self.model
        rows, weights = self.vision("get_vision_interpolation_indices_and_weights")(
            one,
            num_grid_per_side=host.num_grid_per_side,
            mode=host.interpolation_mode,
            align_corners=host.interpolation_align_corners,
            spatial_merge_size=self.merge,
        )
        return (host.pos_embed(rows) * weights[:, :, None]).sum(1)  # type: ignore[no-any-return]

    def taps(self) -> list[int]:
        return list(self.model.deepstack_visual_indexes)

    def answered(self, found: list[Tensor], order: Tensor | None) -> Any:
        module = import_module(type(self.model).__module__)
        end = found[-1].reshape(-1, self.dim)
        mergers = zip(self.model.deepstack_merger_list, found, strict=False)
        return module.BaseModelOutputWithDeepstackFeatures(
            last_hidden_state=end,
            pooler_output=self.model.merger(end),
            deepstack_features=[merger(x.reshape(-1, self.dim)) for merger, x in mergers],
        )


def _renamed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the host's arguments with the first as `answer_within` calls it."""
    return {"images": inputs["hidden_states"], "grid_thw": inputs["grid_thw"]}
