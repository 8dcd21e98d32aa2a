"""The fast paths give the official numbers too: compiled code against the reference logits; bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import evovit
from tests.conftest import Golden
from tests.methods import test_evit, test_evo_vit, test_idle_vit, test_tome
from tests.parity import assert_close

Load = Callable[[dict[str, Any]], evovit.ReducedViT]
TOME = Golden("tome")
CASES: list[tuple[Golden, Load, str]] = [
    (test_evo_vit.OFFICIAL, test_evo_vit.load_case, "eval_stage_keep0.5"),
    (test_evo_vit.OFFICIAL, test_evo_vit.load_case, "eval_layer_keep0.7_tradeoff0.3"),
    (test_evit.OFFICIAL, test_evit.load_case, "eval_keep0.7_fuse"),
    (test_idle_vit.OFFICIAL, partial(test_idle_vit.load_case, test_idle_vit.OFFICIAL), "eval_keep0.7"),
    (TOME, partial(test_tome.load_case, TOME), "eval_r8"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("golden", "load", "name"), CASES, ids=[name for _, _, name in CASES])
def test_compiled_code_equals_the_official_logits(golden: Golden, load: Load, name: str) -> None:
    torch.compiler.reset()
    case = golden.case(name)
    with torch.no_grad():
        logits = torch.compile(load(case).eval(), fullgraph=True)(golden.images(case))
    assert_close(logits, golden.out(case, "logits"))


@pytest.mark.parametrize(
    ("golden", "load", "name"),
    [
        pytest.param(
            *case, id=case[2], marks=pytest.mark.slow if case in (CASES[0], CASES[-1]) else pytest.mark.full
        )
        for case in CASES
    ],
)
def test_compiled_bfloat16_is_as_near_to_the_official_logits_as_plain(
    golden: Golden, load: Load, name: str
) -> None:
    """Rounding turns near ties, so that both stray; plain code by up to 8e-2 of the largest logit here."""
    torch.compiler.reset()
    case = golden.case(name)
    model, images = load(case).eval().bfloat16(), golden.images(case).bfloat16()
    expected = golden.out(case, "logits")
    with torch.no_grad():
        plain, compiled = model(images).float(), torch.compile(model, fullgraph=True)(images).float()
    strayed, own = ((x - expected).abs().max() / expected.abs().max() for x in (compiled, plain))
    assert strayed <= max(1e-2, 1.5 * float(own))
