"""One model trained for several keep ratios: the sandwich rule (Yu & Huang, ICCV 2019; SuperViT, IJCV 2023).

Each update runs the largest budget with its losses, and the smallest and a random one towards the largest's
logits, detached: KL divergence, temperature 1. "alternate" runs one of the two in turn.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evovit.errors import EvoViTError
from evovit.model import ReducedViT
from evovit.recipe.tables import RunTable
from evovit.runtime.seeds import seed_for
from evovit.tokens import Taught
from evovit.train.objective import Objective


class Sandwich(nn.Module):
    """An objective over several budgets of its model.

    Args:
        objective: of a `ReducedViT` with `budgets`.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        model = objective.model
        if not isinstance(model, ReducedViT) or not model.budgets:
            raise EvoViTError("Several budgets need a reduced model; set method.name.")
        self.objective, self.model = objective, model
        self.look = objective.look

    def forward(self, images: Tensor, targets: Tensor, others: Sequence[float] = ()) -> dict[str, Tensor]:
        """Return loss terms by name: those of the largest budget, then those of `others`.

        Args:
            images, targets: as `Objective` takes them.
            others: budgets below the largest.
        """
        whole = self.look(images, targets)
        terms, towards = dict(whole.terms), {name: head.detach() for name, head in whole.heads.items()}
        for budget in others:
            self.model.budget = budget
            for name, value in self.follow(images, towards, whole.taught).items():
                terms[f"{name}_at_{budget:g}"] = terms.get(f"{name}_at_{budget:g}", 0) + value
        self.model.budget = self.model.budgets[0]
        return terms

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what runs once per budget; switching between them stays outside."""
        self.look, self.follow = torch.compile(self.look), torch.compile(self.follow)  # type: ignore[method-assign]

    def follow(
        self, images: Tensor, towards: Mapping[str, Tensor], taught: Taught | None
    ) -> dict[str, Tensor]:
        """Return the divergence of each head from the largest budget's, and the method's own terms.

        Args:
            towards: the largest budget's (B, classes) by head, detached.
            taught: what the method's losses compare with.
        """
        outputs = self.model.run(images)
        heads = {"class": outputs.logits, **outputs.extra_logits}
        terms = {
            name: F.kl_div(
                head.float().log_softmax(1),
                towards[name].float().log_softmax(1),
                reduction="batchmean",
                log_target=True,
            )
            for name, head in heads.items()
        }
        return terms | self.model.method.losses(outputs, taught)


def other_budgets(run: RunTable, update: int) -> tuple[float, ...]:
    """Return the budgets below the largest that an update runs; they follow from seed and update."""
    _, *rest = sorted(run.budgets, reverse=True)
    if not rest:
        return ()
    draw = random.Random(seed_for(run.seed, "budget", update))
    between = rest[:-1] or rest
    drawn = draw.choice(between)
    if run.sandwich == "alternate":
        return (rest[-1] if update % 2 == 0 else drawn,)
    return (rest[-1],) if drawn == rest[-1] else (rest[-1], drawn)
