"""What a model looks at, computes alike and keeps, block by block: Evo-ViT's figures 2, 4 and 5."""

from evovit.analyse.measures import (
    BlockMeasures,
    Measures,
    Views,
    as_reduced,
    in_mode,
    look,
    measure,
    other_mode,
)
from evovit.analyse.similarity import (
    correlation_with_mean,
    jaccard,
    jaccard_by_chance,
    linear_cka,
)
from evovit.analyse.watch import Seen, watch

__all__ = [
    "BlockMeasures",
    "Measures",
    "Seen",
    "Views",
    "as_reduced",
    "correlation_with_mean",
    "in_mode",
    "jaccard",
    "jaccard_by_chance",
    "linear_cka",
    "look",
    "measure",
    "other_mode",
    "watch",
]
