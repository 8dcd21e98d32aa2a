"""What a method is: a module that decides how a block runs. One verb, `run_block`, and four hooks with defaults."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from evovit.backbones.base import BackboneSpec, Block, Stage
from evovit.errors import EvoViTError
from evovit.tokens import Tokens


class Method(nn.Module, ABC):
    """A token-reduction method for one host; holds its own parameters, never the host's.

    Args:
        config: the method's options.
        spec: what the host is; a method refuses here, in a sentence, what it cannot do.
    """

    keeps_grid: ClassVar[bool] = False  # every patch token reaches `finish`, in raster order
    needs_class_token: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Plain values only."""

    def __init__(self, config: Any, spec: BackboneSpec) -> None:
        super().__init__()
        if self.needs_class_token and not spec.has_class_token:
            raise EvoViTError(f"{type(self).__name__} scores by the class token, and this host has none.")
        self.config, self.spec = config, spec

    @abstractmethod
    def run_block(self, block: Block, tokens: Tokens) -> Tokens:
        """Run one block, reducing as the method does. THE method."""

    def begin(self, tokens: Tokens, stages: Sequence[Stage]) -> Tokens:
        """Prepare the embedded tokens; default: unchanged."""
        return tokens

    def enter_stage(self, stage: Stage, tokens: Tokens) -> Tokens:
        """Enter a stage; default: the host's own down-sampling, if any."""
        return stage.enter(tokens) if stage.enter else tokens

    def finish(self, tokens: Tokens) -> Tokens:
        """Bring back what waits before a head that reads patch tokens; default: unchanged."""
        return tokens

    def extra_logits(self, tokens: Tokens) -> dict[str, Tensor]:
        """Return logits of the method's own heads, (B, classes) each, for the training loss; default: none."""
        return {}

    def reset_classifier(self, num_classes: int) -> None:
        """Give the method's own heads another number of classes; default: it has none."""

    def set_progress(self, fraction: float) -> None:
        """Follow the training, `fraction` of the epochs done, 0 to 1; default: nothing changes."""
