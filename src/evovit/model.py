"""ReducedViT: the unchanged host, a method, and the loop that runs the blocks by it; `reduce_tokens`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evovit.backbones import Backbone, adapt, check_adapter, read_host
from evovit.backbones.base import Stage, is_hooked
from evovit.backbones.prefix import with_prefix_block
from evovit.budgets import Statistics, check_budgets, running
from evovit.errors import EvoViTError, check_choice, check_count, check_kind, check_ratio, listed, shown
from evovit.intermediates import feature_info, forward_intermediates, prune, refuse_masks
from evovit.methods import build_config, find_method, find_method_of
from evovit.methods.base import Method
from evovit.ops.select import take
from evovit.options import MOST
from evovit.tokens import Outputs, Tokens

Prepare = Callable[[Tokens], Tokens]
LastBlock = Literal["prefix", "all"]


class ReducedViT(nn.Module):
    """A host whose blocks are run by a method.

    The host is `.model`, untouched: its state-dict keys, checkpoints and own forward stay as they are.

    Args:
        last_block: "prefix" leaves out what cannot reach the logits: in evaluation, where the head reads
            prefix tokens only, the last block computes only their rows. Logits are the same up to rounding.
            Training, `run`, features and heads that read patch tokens are as with "all".
        budgets: keep ratios between which `budget` switches; batch norms then keep statistics for each.
    """

    model: nn.Module
    method: Method
    base_model_prefix = "model"  # what transformers calls the attribute of the model inside

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        last_block: LastBlock = "prefix",
        budgets: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.model, self.method, self.last_block = model, method, last_block
        self._budget: float | None = None
        self.budgets = check_budgets(budgets)
        for budget in self.budgets:
            method.config_at(budget)  # refuses a method that has none
        separate = bool(self.budgets) and bool(running(model))
        self.statistics = Statistics(model, len(self.budgets)) if separate else None
        if self.budgets:
            self.budget = self.budgets[0]
        self.training = model.training  # each module of the host keeps its own mode
        method.train(model.training)
        asked = (getattr(part, "gradient_checkpointing", False) for part in model.modules())  # transformers
        self.grad_checkpointing = bool(getattr(model, "grad_checkpointing", False)) or any(asked)

    def forward(
        self,
        images: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **arguments: Any,
    ) -> Any:
        """Return what the host returns for images (B, channels, height, width); timm: logits (B, classes).

        Args:
            pixel_values: another name of images, that of transformers.
            labels, arguments: of the host's own forward, if it has them.
        """
        if labels is not None:
            arguments["labels"] = labels
        given: Any = pixel_values if images is None else images
        return adapt(self.model).answer(self, given, **arguments)

    def run(
        self,
        images: Tensor,
        record: bool = False,
        prepare: Prepare | None = None,
        backbone: Backbone | None = None,
    ) -> Outputs:
        """Return logits and tokens; with `record` also the tokens after each block.

        `prepare` changes the embedded tokens before the method sees them. `backbone` is the view of the host,
        where it is at hand.
        """
        return self._outputs(backbone or adapt(self.model), images, record, prepare)

    def logits(self, images: Tensor, backbone: Backbone) -> Tensor:
        """Return logits (B, classes); in evaluation nothing is computed that they do not depend on."""
        return self._outputs(backbone, images, prefix_only=self.narrows(backbone)).logits

    def narrows(self, backbone: Backbone) -> bool:
        """Tell whether the last block leaves out what no head reads."""
        training = self.training or self.method.training
        return self.last_block == "prefix" and not training and not backbone.head_reads_patches

    def _outputs(
        self,
        backbone: Backbone,
        images: Tensor,
        record: bool = False,
        prepare: Prepare | None = None,
        prefix_only: bool = False,
    ) -> Outputs:
        """Run the model; `prefix_only` leaves patch tokens out of the last block, as no head reads them."""
        tokens, trace = self.blocks(backbone, images, record, prepare, prefix_only)
        whole = self.method.finish(tokens) if backbone.head_reads_patches else tokens
        features = backbone.norm(whole.x)
        mask = whole.mask
        logits = backbone.head(features) if mask is None else backbone.masked_head(features, mask)
        each = backbone.token_logits(features) if self.training else None
        alone = None if each is None else backbone.class_logits(features)
        extra = backbone.extra_logits(features) if self.training else {}
        extra |= self.method.extra_logits(tokens)
        return Outputs(logits, tokens, extra, trace, features, each, alone)

    def blocks(
        self,
        backbone: Backbone,
        images: Tensor,
        record: bool = False,
        prepare: Prepare | None = None,
        prefix_only: bool = False,
        last: int | None = None,
    ) -> tuple[Tokens, list[Tokens]]:
        """Run the embedding and all blocks, or those up to number `last`."""
        if not torch.compiler.is_compiling():
            backbone.expect_unsharded()
            backbone.expect_images(images)
        tokens, trace = backbone.embed(images), []
        tokens, stages = tokens if prepare is None else prepare(tokens), backbone.stages()
        stages = with_prefix_block(stages) if prefix_only else stages
        tokens = self.method.begin(tokens, stages)
        for stage in stages if last is None else first_blocks(stages, last):
            tokens = self.method.enter_stage(stage, tokens)
            for block in stage.blocks:
                if self.grad_checkpointing and self.training:
                    tokens = checkpoint(self.method.run_block, block, tokens, use_reentrant=False)
                else:
                    tokens = self.method.run_block(block, tokens)
                if record:
                    trace.append(tokens)
        return tokens, trace

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Put this model on the Hugging Face Hub, as `evovit.push_to_hub` does; return the commit's address.

        Args:
            repo_id: user/name; `evovit.load_reduced("hf:user/name")` loads it again.
            options: private, token, revision, commit_message, create_pr; for the card measured, accuracy,
                base_model; if the host does not say how it was made: host, host_options.
        """
        import evovit

        address: str = evovit.push_to_hub(self, repo_id, **options)
        return address

    # timm's conveniences

    def forward_features(self, images: Tensor) -> Tensor:
        """Return normed tokens (B, P + N, C); a method that keeps the grid gives all N in raster order."""
        backbone = adapt(self.model)
        return backbone.norm(self.method.finish(self.blocks(backbone, images)[0]).x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or what enters the classifier, from `forward_features`."""
        return adapt(self.model).head(x, pre_logits)

    def feature_map(self, images: Tensor, stage: int = -1) -> Tensor:
        """Return patch features (B, C, rows, columns), raster order, if the method keeps the grid.

        Args:
            stage: of a host of several, at whose end; only the last stage's features are normed.
        """
        backbone = adapt(self.model)
        depths = backbone.spec.depths
        stage = check_count("stage", stage, -len(depths), len(depths) - 1, "stages count from 0") % len(
            depths
        )
        last = stage == len(depths) - 1
        tokens, trace = self.blocks(backbone, images, record=not last)
        tokens = self.method.finish(tokens if last else trace[sum(depths[: stage + 1]) - 1])
        rows, columns = tokens.grid
        what = f"{type(self.method).__name__} as configured leaves"
        instead = "a feature map needs a method that keeps the grid (evo_vit with preserve, rejoin_last)."
        if tokens.num_patches != rows * columns:
            raise EvoViTError(f"{what} {tokens.num_patches} of {rows * columns} patches; {instead}")
        patches = (backbone.norm(tokens.x) if last else tokens.x)[:, tokens.num_prefix :]
        if not self.method.keeps_grid:  # one that does has them in raster order; compiled, it is one graph
            place, order = tokens.index.sort(1)
            if (place[:, :1] < 0).any() or (place[:, 1:] == place[:, :-1]).any():
                raise EvoViTError(f"{what} cells of the {rows} x {columns} grid without a token; {instead}")
            patches = take(patches, order)
        return patches.transpose(1, 2).reshape(*patches.shape[::2], rows, columns)

    @property
    def last_block(self) -> LastBlock:
        """How much the last block computes; may be set at any time."""
        return self._last_block

    @last_block.setter
    def last_block(self, value: LastBlock) -> None:
        check_choice("last_block", value, get_args(LastBlock))
        self._last_block = value

    @property
    def budget(self) -> float | None:
        """The keep ratio in force instead of the method's own; None: the method's own.

        May be set at any time, to one of `budgets` where there are such: nothing is built again.
        """
        return self._budget

    @budget.setter
    def budget(self, value: float | None) -> None:
        if value is not None:
            value = check_ratio("budget", value)
        if self.budgets and value not in self.budgets:
            raise EvoViTError(f"budget is {shown(value)}; allowed is {listed(self.budgets)}.")
        self.method.set_budget(value)
        if self.statistics is not None and None not in (old := self._budget, value):
            self.statistics.switch(self.model, self.budgets.index(old), self.budgets.index(value))
        self._budget = value

    def warm_budgets(self, images: Tensor | None = None, run: Callable[[Tensor], Any] | None = None) -> None:
        """Run each of `budgets` once, so that compiled code is there before it is needed.

        Call it as the model will be called: under `torch.inference_mode()`, for example, if that is so.

        Args:
            images: of the size and number to come; default: one blank image.
            run: the model from `torch.compile(reduced)`; default: this one, after `reduced.compile()`.
        """
        if images is None:
            with torch.inference_mode(False):  # compiled code tells such tensors from others
                shape = adapt(self.model).image_shape
                images = torch.zeros(1, *shape, device=self.device, dtype=self.dtype)
        before = self.budget
        for budget in self.budgets:
            self.budget = budget
            (self if run is None else run)(images)
        self.budget = before

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        restore: str | None = "auto",
    ) -> Any:
        """Return features after chosen blocks, as timm's hosts do (docs/feature_maps.md).

        Args:
            x: images (B, channels, height, width).
            indices: blocks from 0, negative from the end; a number n: the last n; None: all. They count
                stages on a host of several.
            return_prefix_tokens: pair each map with its prefix tokens (B, P, C), if the host has such.
            norm: apply the host's last norm to each map.
            stop_early: do not run the blocks after the last chosen one.
            output_fmt: "NCHW" (B, C, rows, columns), or "NLC" (B, N, C).
            intermediates_only: leave out the final features, which `forward_head` takes.
            output_dict: answer with timm's dictionary.
            attn_mask, is_causal: not supported; raise an error if given.
            restore: the value of a cell without a token: "hold" what it had last, "unmerge" the token it was
                merged into, "interpolate" a mean of similar ones; None: nothing, each answer is a `Sparse`
                (x, index, valid); "auto": "unmerge" where possible, else "hold".
        """
        refuse_masks(attn_mask, is_causal)
        backbone = adapt(self.model)
        return forward_intermediates(
            partial(self.blocks, backbone, x, True),
            backbone,
            self.method,
            indices=indices,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            output_dict=output_dict,
            restore=restore,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take blocks after the last chosen one out of the host, for good; what runs before stays the same.

        Returns:
            The chosen indices, counted from 0.
        """
        return prune(self.model, adapt(self.model).spec, indices, prune_norm, prune_head)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, stride and name of the features after each block, or each stage, in timm's form."""
        return feature_info(self.model, adapt(self.model))

    def get_classifier(self) -> Any:
        """Return the host's classifier."""
        return adapt(self.model).classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give host and method a fresh head for `num_classes`."""
        check_count("num_classes", num_classes, 0, MOST)
        adapt(self.model).reset_classifier(num_classes, global_pool)
        self.method.reset_classifier(num_classes)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, as this module names them."""
        own: set[str] = getattr(self.host, "no_weight_decay", set)()  # of transformers' hosts there is none
        return {f"model.{name}" for name in own}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's layer groups with names as this module has them."""

        def prefixed(pattern: Any) -> Any:
            if isinstance(pattern, str):
                return "|".join(f"^model\\.{part.removeprefix('^')}" for part in pattern.split("|"))
            return [(prefixed(part), order) for part, order in pattern]

        if not hasattr(self.host, "group_matcher"):
            raise EvoViTError(
                f"{type(self.model).__name__} has no group_matcher, as timm's hosts have; group its "
                "named_parameters by their names."
            )
        return {group: prefixed(pattern) for group, pattern in self.host.group_matcher(coarse).items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    @property
    def host(self) -> Any:
        """The host, for attributes `nn.Module` does not declare."""
        return self.model

    # what pipelines and trainers of transformers read from a model

    @property
    def config(self) -> Any:
        """The host's config; of timm's hosts there is none."""
        return self.host.config

    @property
    def device(self) -> torch.device:
        """Where the host's weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the host's first floating-point weight."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def activation_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Recompute each block in the backward pass; transformers' name of `set_grad_checkpointing`."""
        self.set_grad_checkpointing()

    def activation_checkpointing_disable(self) -> None:
        """Store the activations of each block."""
        self.set_grad_checkpointing(False)

    gradient_checkpointing_enable = activation_checkpointing_enable  # older names
    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def num_classes(self) -> int:
        """Classes of the host's head."""
        return adapt(self.model).spec.num_classes

    @property
    def num_features(self) -> int:
        """Width of the features."""
        return getattr(self.host, "num_features", 0) or adapt(self.model).spec.dims[-1]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The host's `pretrained_cfg` (input size, mean, std), empty if it has none."""
        return getattr(self.model, "pretrained_cfg", None) or {}

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's older name of `pretrained_cfg`."""
        return self.pretrained_cfg


def backbone_of(model: nn.Module) -> Backbone:
    """Return the view of a host, or of a reduced model's host."""
    return adapt(model.model if isinstance(model, ReducedViT) else model)


def first_blocks(stages: Sequence[Stage], last: int) -> list[Stage]:
    """Return the stages with their blocks up to number `last`, without those that have none."""
    cut = [Stage(enter, [block for block in blocks if block.number <= last]) for enter, blocks in stages]
    return [stage for stage in cut if stage.blocks]


def refuse_hooks(backbone: Backbone, model: nn.Module) -> None:
    """Raise `EvoViTError` where a hook, or a forward of a module's own, would never run."""
    for module in backbone.bypassed():
        if is_hooked(module):
            name = next(name for name, other in model.named_modules() if other is module)
            raise EvoViTError(
                f"{name or 'The host itself'} has a hook or a forward of its own, which would never run: "
                "evovit calls the modules inside it; put it on those, such as norm1, qkv or mlp, or read the "
                "tokens after each block from reduced.run(images, record=True).trace."
            )


def reduce_tokens(
    model: nn.Module,
    method: str | Method.Config = "evo_vit",
    *,
    verify: bool = True,
    last_block: LastBlock = "prefix",
    budgets: Sequence[float] = (),
    **options: Any,
) -> ReducedViT:
    """Wrap a vision transformer (the host) so that a token-reduction method runs its blocks.

    Args:
        model: a supported host (see `evovit.list_hosts`), pretrained or not; it is used as it is, not copied.
        method: a name from `list_methods`, with `options`, or a method's `Config`.
        verify: first check that evovit reproduces this host exactly (two forwards of two random images).
        last_block: "prefix" does not compute patch tokens in the last block where no head reads them (see
            `ReducedViT`); "all" computes them.
        budgets: keep ratios between which `reduced.budget` switches; the largest is in force.

    Raises:
        EvoViTError: an unsupported host, an unknown method or option, a value out of range, a hook that would
        never run, or a host that is not reproduced exactly.
    """
    if isinstance(model, ReducedViT):
        raise EvoViTError("model is reduced already; wrap its host, model.model.")
    if isinstance(method, str):
        cls = find_method(method)
        config = build_config(cls, options)
    elif isinstance(method, Method.Config):
        if options:
            raise EvoViTError(
                f"Options {', '.join(options)} are given beside a Config; put them into the Config."
            )
        cls, config = find_method_of(method), method
    else:
        raise EvoViTError(f"method is {shown(method)}; give a method's name or its Config.")
    check_kind("verify", verify, bool, "True or False")
    backbone = read_host(model)
    backbone.expect_unsharded()
    refuse_hooks(backbone, model)
    if verify:
        check_adapter(model)
    like = next(p for p in model.parameters() if p.is_floating_point())
    return ReducedViT(model, cls(config, backbone.spec).to(like.device, like.dtype), last_block, budgets)
