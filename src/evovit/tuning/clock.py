"""A clock times models in turn on one engine; a test may bring one that counts instead."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from evovit.bench.row import Measured
from evovit.bench.setting import Setting, Variant, place
from evovit.bench.step import Batch, prepare
from evovit.bench.timing import interleave, threads
from evovit.errors import EvoViTError
from evovit.methods import DENSE

Times = dict[str, list[float]]  # name to milliseconds, one per round


class Clock(Protocol):
    """What `tune` asks for times."""

    def name(self) -> str:
        """Return what the times depend on beside the model, for tables on disk."""
        ...

    def times(self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], rounds: int) -> Times:
        """Return milliseconds per step of each model on its input, all timed in turn."""
        ...


@dataclass(frozen=True)
class EngineClock:
    """Real time on the engine, device, precision and batch of a `Setting`."""

    setting: Setting

    def name(self) -> str:
        setting = self.setting
        return (
            f"{setting.engines[0]} {setting.device} {setting.dtype} batch {setting.batch} "
            f"threads {setting.threads or torch.get_num_threads()}"
        )

    def times(self, models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], rounds: int) -> Times:
        setting, measured = replace(self.setting, rounds=rounds), dict[str, Measured]()
        with threads(setting.threads):
            for i, (name, model) in enumerate(models.items()):
                model = place(setting, copy.deepcopy(model))  # the caller's keeps its type
                x = inputs[name].to(setting.device, next(model.parameters()).dtype)
                batch = Batch(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))
                (step,) = prepare(model, setting.engines, setting.dtype, [batch], False, f"tuned_{i}")
                if step.step is None:
                    raise EvoViTError(f"{name} does not run with engine {step.engine}: {step.skipped}.")
                measured[name] = Measured(Variant(DENSE), step, 0.0)
            interleave(list(measured.values()), setting)
        return {name: one.times_ms for name, one in measured.items()}


def median(times: Sequence[float]) -> float:
    """Return the middle of times in milliseconds."""
    return float(torch.tensor(times, dtype=torch.float64).quantile(0.5))
