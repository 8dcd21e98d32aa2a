"""One model at several keep ratios: the statistics that batch norms keep of each.

A batch norm sees other tokens at another keep ratio, so its running statistics are kept per budget (as in
slimmable networks, Yu et al., ICLR 2019); all weights are shared.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evovit.errors import EvoViTError, check_ratio, shown

MOST_BUDGETS = 8  # Dynamo compiles one function for at most as many


def check_budgets(budgets: Sequence[float]) -> tuple[float, ...]:
    """Return budgets, the largest first; raises `EvoViTError` for any outside (0, 1] or given twice."""
    if isinstance(budgets, str) or not isinstance(budgets, Sequence):
        raise EvoViTError(
            f"budgets is {shown(budgets)}; give a list of keep ratios, such as (1.0, 0.7, 0.5)."
        )
    found = tuple(sorted((check_ratio("budgets", budget) for budget in budgets), reverse=True))
    if len(set(found)) != len(found) or len(found) > MOST_BUDGETS:
        raise EvoViTError(f"budgets is {found!r}; give each keep ratio once, {MOST_BUDGETS} at most.")
    return found


class Statistics(nn.Module):
    """Running statistics of a host's batch norms, one set per budget; the host holds the set in force."""

    def __init__(self, host: nn.Module, sets: int) -> None:
        super().__init__()
        for number in range(sets):
            for place, value in enumerate(running(host)):
                self.register_buffer(f"set{number}_{place}", value.detach().clone())

    def switch(self, host: nn.Module, old: int, new: int) -> None:
        """Keep what the host holds as set `old`, and give it set `new`."""
        for place, live in enumerate(running(host)):
            self.get_buffer(f"set{old}_{place}").data.copy_(live.data)
            live.data.copy_(self.get_buffer(f"set{new}_{place}").data)


def running(host: nn.Module) -> Sequence[Tensor]:
    """Return the running statistics of all batch norms of a host, empty where it has none."""
    norms = (part for part in host.modules() if isinstance(part, _BatchNorm) and part.track_running_stats)
    return [value for norm in norms for value in norm.buffers(recurse=False)]
