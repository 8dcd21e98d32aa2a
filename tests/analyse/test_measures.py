"""Numbers and maps of an analysis follow from their definitions; hosts that lack something get the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import evovit
from evovit.analyse import in_mode, look, measure, other_mode
from evovit.errors import EvoViTError
from tests.analyse.test_similarity import naive_cka
from tests.analyse.test_watch import make_levit, naive_attention
from tests.conftest import make_host, pictures


def test_cka_of_a_dense_model_is_that_of_the_definition() -> None:
    """Figure 4a by loops: eq. 4 over eq. 3, the better half, mean tokens, CKA with the final class token."""
    host, images = make_host("vit"), pictures(34)
    found = measure(host, images, batch=20)
    with torch.no_grad():
        trace = evovit.reduce_tokens(host, "dense").run(images, record=True).trace
        final, score = trace[-1].x[:, 0], torch.zeros(34, 16)
        for number in range(3):
            attention = naive_attention(host, images, number)[:, :, 0, 1:].mean(1)
            score = attention if number == 0 else 0.5 * score + 0.5 * attention
            means: list[list[Tensor]] = [[], [], []]
            for image in range(34):
                best = {*score[image].topk(8).indices.tolist()}
                x = trace[number].patches[image]
                for place, cells in enumerate((range(16), best, {*range(16)} - best)):
                    means[place].append(sum((x[i] for i in cells), torch.zeros(32)) / len(cells))
                assert {*found.informative[image, number].nonzero().flatten().tolist()} == best
            block = found.blocks[number]
            for value, rows in zip(
                (block.cka, block.cka_informative, block.cka_placeholder), means, strict=True
            ):
                assert value == pytest.approx(naive_cka(torch.stack(rows), final), abs=1e-4)
            assert block.kept == 1 and block.cka_by_chance is not None


def test_informative_tokens_of_evo_vit_are_those_it_keeps_and_placeholders_the_others() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=1, stage_length=2)
    images = pictures(33)
    found = measure(reduced, images)
    with torch.no_grad():
        outputs = reduced.run(images, record=True)
    whole = reduced.method.finish(outputs.trace[1]).patches
    awake, waiting = [], []
    for image in range(33):
        kept = [i for i in outputs.trace[1].index[image].tolist() if i >= 0]
        assert {*found.informative[image, 1].nonzero().flatten().tolist()} == {*kept}
        awake.append(whole[image, kept].mean(0))
        waiting.append(whole[image, [i for i in range(16) if i not in kept]].mean(0))
    final, block = outputs.tokens.x[:, 0], found.blocks[1]
    assert block.kept == 0.5
    assert block.cka_informative == pytest.approx(naive_cka(torch.stack(awake), final), abs=1e-4)
    assert block.cka_placeholder == pytest.approx(naive_cka(torch.stack(waiting), final), abs=1e-4)
    assert found.jaccard[1, 2] == 1 and torch.equal(found.jaccard, found.jaccard.T)


def test_the_batch_changes_nothing() -> None:
    reduced, images = evovit.reduce_tokens(make_host("vit"), "evit", blocks=(1,)), pictures(33)
    one, two = measure(reduced, images, batch=33), measure(reduced, images, batch=8)
    for a, b in zip(one.blocks, two.blocks, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert torch.equal(one.informative, two.informative)


def test_few_images_have_no_cka_but_all_else() -> None:
    found = measure(make_host("vit"), pictures(2))
    assert all(block.cka is None and block.cka_informative is None for block in found.blocks)
    assert all(0 <= block.variance < 1 and -1 <= block.correlation <= 1 for block in found.blocks)


def test_without_class_token_there_is_no_cka_but_all_else() -> None:
    host = make_host("siglip")
    found, views = measure(host, pictures(33)), look(host, pictures(2))
    assert all(block.cka is None and block.cka_by_chance is None for block in found.blocks)
    assert found.informative.sum(2).unique().tolist() == [8]
    assert views.attention[3].shape == (2, 4, 4) and not views.scores


def test_slots_without_places_have_the_cka_of_all_alone() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "sit", blocks=(1,))
    found = measure(reduced, pictures(33))
    assert [block.kept for block in found.blocks] == [1, 0, 0, 0]
    assert found.blocks[0].cka_informative is not None
    assert all(b.cka is not None and b.cka_informative is None for b in found.blocks[1:])


def test_stages_are_laid_on_the_first_grid() -> None:
    reduced = evovit.reduce_tokens(make_levit(), "evo_levit", start_block=1)
    found, views = measure(reduced, pictures(33, 64)), look(reduced, pictures(2, 64))
    assert found.informative.shape == (33, 6, 16) and views.kept.shape == (2, 6, 4, 4)
    assert [block.kept for block in found.blocks[1:4]] == [0.5] * 3
    assert [tuple(m.shape[1:]) for m in views.attention] == [(4, 4)] * 2 + [(2, 2)] * 2 + [(1, 1)] * 2
    assert all(block.cka is not None for block in found.blocks)


def test_a_training_model_is_evaluated_and_trains_on_afterwards() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "dynamic_vit", blocks=(1, 3))
    expected = look(reduced, pictures()).kept
    assert torch.equal(look(reduced.train(), pictures()).kept, expected) and reduced.training


def test_the_other_mode_is_lent() -> None:
    reduced = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=1, stage_length=3)
    assert other_mode(reduced) == "layer"
    with pytest.raises(ZeroDivisionError), in_mode(reduced, "layer"):
        assert other_mode(reduced) == "stage"
        assert list(look(reduced, pictures()).scores) == [1, 2, 3]
        _ = 1 / 0
    assert reduced.method.mode == "stage" and list(look(reduced, pictures()).scores) == [1]
    assert other_mode(reduced.model) is None
    assert other_mode(evovit.reduce_tokens(make_host("vit"), "tome", r=3)) is None


@pytest.mark.parametrize("images", [None, torch.zeros(0, 3, 32, 32), torch.zeros(3, 32, 32)])
def test_wrong_images_are_one_sentence(images: Tensor) -> None:
    for call in (measure, look):
        with pytest.raises(EvoViTError, match=r"^images is .*; give a tensor"):
            call(make_host("vit"), images)
