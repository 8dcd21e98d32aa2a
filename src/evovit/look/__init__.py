"""One photograph, dense and reduced: what each block keeps, what both models answer, what both cost."""

from evovit.look.one import (
    Answer,
    BlockLook,
    Cost,
    Guess,
    Look,
    class_name,
    cost_of,
    costs,
    described,
    groups_of,
    look_at,
)
from evovit.look.subject import RANDOM, Subject, default_subject, open_subject, subject_of

__all__ = [
    "RANDOM",
    "Answer",
    "BlockLook",
    "Cost",
    "Guess",
    "Look",
    "Subject",
    "class_name",
    "cost_of",
    "costs",
    "default_subject",
    "described",
    "groups_of",
    "look_at",
    "open_subject",
    "subject_of",
]
