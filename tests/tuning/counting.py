"""A clock that counts operations instead of time: the same on every machine and in every process."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import evovit


class CountingClock:
    """A clock on which a million multiply-accumulates take a millisecond, beside a fixed cost per model."""

    def __init__(self, fixed: float = 0.0, penalty: float = 0.0) -> None:
        self.fixed, self.penalty, self.timed = fixed, penalty, 0

    def name(self) -> str:
        return "counted operations"

    def times(
        self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], rounds: int
    ) -> dict[str, list[float]]:
        found = {}
        for name, model in models.items():
            state = {key: value.detach() for key, value in model.eval().state_dict().items()}
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                functional_call(model, state, (inputs[name],))
            reduces = isinstance(model, evovit.ReducedViT) and type(model.method).__name__ != "Dense"
            ms = counter.get_total_flops() / 2e6 + self.fixed + (self.penalty if reduces else 0.0)
            found[name] = [ms] * rounds
            self.timed += 1
        return found
