"""The fast paths give the official numbers too: compiled code against the reference logits; bfloat16."""

from __future__ import annotations

from collections.abc import Callable
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
    (test_idle_vit.OFFICIAL, test_idle_vit.load_case, "eval_keep0.7"),
    (TOME, lambda case: test_tome.load_case(TOME, case), "eval_r8"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("golden", "load", "name"), CASES, ids=[name for _, _, name in CASES])
def test_compiled_code_equals_the_official_logits(golden: Golden, load: Load, name: str) -> None:
    torch.compiler.reset()
    case = golden.case(name)
    with torch.no_grad():
        logits = torch.compile(load(case).eval(), fullgraph=True)(golden.images(case))
    assert_close(logits, golden.out(case, "logits"))


@pytest.mark.slow
@pytest.mark.parametrize(("golden", "load", "name"), CASES, ids=[name for _, _, name in CASES])
def test_compiled_bfloat16_equals_plain_bfloat16(golden: Golden, load: Load, name: str) -> None:
    torch.compiler.reset()
    case = golden.case(name)
    model, images = load(case).eval().bfloat16(), golden.images(case).bfloat16()
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(images).float(), model(images).float(), 1e-2)
