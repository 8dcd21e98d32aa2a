"""SigLIP and SigLIP 2 of transformers: padding is hidden as in the host; the probe of the pooling head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evovit
from evovit.errors import EvoViTError
from tests.conftest import pictures
from tests.hf_hosts import make_config, make_hf, worst

transformers: Any = pytest.importorskip("transformers", "5.18")

EXACT = 1e-5
WIDTH = 3 * 8 * 8  # numbers of a patch
KEEPS = {"selection": "column_mean", "start_block": 1, "keep_ratio": 1.0}
GRIDS = {  # name: rows and columns of each image, in batches of 16 patches
    "padded": ((2, 5), (4, 4), (3, 3)),
    "all padded alike": ((3, 4), (3, 4)),
    "different grids, none padded": ((2, 8), (4, 4), (16, 1)),
}


def make(name: str, **options: Any) -> nn.Module:
    cls = getattr(transformers, name)
    return make_hf(cls, make_config(cls.config_class, **options))


def naflex(grids: tuple[tuple[int, int], ...], seed: int = 0) -> dict[str, Tensor]:
    """Return a batch as the processor of SigLIP 2 makes it."""
    patches = torch.randn(len(grids), 16, WIDTH, generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([torch.arange(16) < rows * columns for rows, columns in grids]).int()
    return {
        "pixel_values": patches * mask[..., None],
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor(grids),
    }


@pytest.mark.parametrize("own", ["eager", "sdpa"])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", ["Siglip2VisionModel", "Siglip2ForImageClassification"])
def test_padding_is_hidden_as_the_host_hides_it(name: str, grids: Any, own: str) -> None:
    model, given = make(name), naflex(grids) | {"output_hidden_states": True}
    model.set_attn_implementation(own)
    with torch.no_grad():
        expected = model(**given)
        for method, options in (("evo_vit", KEEPS), ("tome", {"r": 0}), ("dense", {})):
            assert worst(expected, evovit.reduce_tokens(model, method, **options)(**given)) <= EXACT
        reduced = evovit.reduce_tokens(model, "evo_vit", **KEEPS | {"keep_ratio": 0.5})
        answer = reduced(**given)
    assert [t.shape for t in answer.hidden_states] == [t.shape for t in expected.hidden_states]
    assert worst(expected, answer) > 1e-3


@pytest.mark.parametrize("selection", ["column_mean", "key_norm", "probe"])
def test_what_stands_in_the_padding_reaches_no_token(selection: str) -> None:
    model, given = make("Siglip2VisionModel"), naflex(GRIDS["padded"])
    options = {"start_block": 1, "stage_length": 2, "keep_ratio": 0.25, "selection": selection}
    loud = given | {
        "pixel_values": given["pixel_values"] + 50.0 * (1 - given["pixel_attention_mask"])[..., None]
    }
    for method, more in (("evo_vit", {}), ("evo_vit", {"mode": "layer"}), ("idle_vit", None)):
        chosen = {"start_block": 1, "keep_ratio": 0.25, "selection": selection, "compared": "active"}
        reduced = evovit.reduce_tokens(model, method, **(chosen if more is None else options | more))
        with torch.no_grad():
            quiet, noisy = (reduced(**each).pooler_output for each in (given, loud))
            alone = reduced(**{name: value[2:] for name, value in given.items()}).pooler_output
        assert (quiet - noisy).abs().max() <= EXACT * quiet.abs().max()
        assert (quiet[2:] - alone).abs().max() <= EXACT * quiet.abs().max()


def test_a_tower_of_two_takes_padding_too() -> None:
    model = make_hf(transformers.Siglip2Model, make_config(transformers.Siglip2Config))
    given = naflex(GRIDS["padded"]) | {"input_ids": torch.tensor([[3, 4, 2]])}
    with torch.no_grad():
        expected = model(**given)
        evovit.reduce_tower(model, "evo_vit", **KEEPS)
        assert worst(expected, model(**given)) <= EXACT
        evovit.restore_tower(model)
        evovit.reduce_tower(model, "evo_vit", **KEEPS | {"keep_ratio": 0.5, "selection": "probe"})
        assert model(**given).logits_per_image.shape == expected.logits_per_image.shape


def test_padding_that_would_mix_is_refused() -> None:
    padded, full = (naflex(GRIDS[name]) for name in ("padded", "different grids, none padded"))
    for name in ("Siglip2VisionModel", "Siglip2ForImageClassification"):
        model = make(name)
        drops = evovit.reduce_tokens(
            model, "evit", blocks=(1,), selection="probe" if "Vision" in name else "key_norm"
        )
        with torch.no_grad():
            with pytest.raises(
                EvoViTError, match="has padding, and EViT as configured drops or merges tokens"
            ):
                drops(**padded)
            with pytest.raises(EvoViTError, match="has padding, and ToMe as configured drops or merges"):
                evovit.reduce_tokens(model, "tome", r=2)(**padded)
            assert evovit.reduce_tokens(model, "tome", r=2)(**full)[0].isfinite().all()
            drops(pictures())
            if "Vision" in name:
                assert drops(**full).last_hidden_state.shape[1] < 16
            else:
                with pytest.raises(EvoViTError, match="reads pixel_attention_mask beside a token for each"):
                    drops(**full)
                assert drops(**full | {"pixel_attention_mask": None}).logits.shape == (3, 5)
    with pytest.raises(EvoViTError, match="stride is 2, but the grid of these images is 1 x 16"):
        evovit.reduce_tokens(make("Siglip2VisionModel"), "subsample", block=1)(**padded)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"spatial_shapes": None}, "spatial_shapes is None; allowed is a tensor"),
        ({"spatial_shapes": torch.tensor([[4, 4]])}, "spatial_shapes is tensor"),
        ({"spatial_shapes": torch.tensor([[4, 5], [4, 4], [3, 3]])}, "an image has 1 to 16 patches"),
        ({"spatial_shapes": torch.tensor([[0, 5], [4, 4], [3, 3]])}, "an image has 1 to 16 patches"),
        ({"pixel_attention_mask": torch.ones(3, 4)}, "pixel_attention_mask is tensor"),
        ({"pixel_attention_mask": "all"}, "pixel_attention_mask is 'all'"),
        (
            {"pixel_values": torch.zeros(3, 16, 7)},
            r"pixel_values is a tensor \(3, 16, 7\); allowed is \(B, N, 192\)",
        ),
        ({"pixel_values": torch.zeros(3, WIDTH)}, "pixel_values is a tensor"),
        ({"pixel_values": None}, "images is None"),
    ],
)
def test_what_no_processor_makes_is_one_sentence(wrong: dict[str, Any], sentence: str) -> None:
    reduced = evovit.reduce_tokens(make("Siglip2VisionModel"), "evo_vit", **KEEPS)
    with pytest.raises(EvoViTError, match=sentence):
        reduced(**naflex(GRIDS["padded"]) | wrong)


@pytest.mark.parametrize("name", ["SiglipVisionModel", "Siglip2VisionModel"])
def test_the_tokens_that_the_probe_would_read_stay(name: str) -> None:
    model: Any = make(name)
    reduced = evovit.reduce_tokens(model, "keep", blocks=(2,), keep_ratio=0.5, selection="probe")
    with torch.no_grad():
        trace = reduced.run(pictures(), record=True).trace
        x = model.post_layernorm(trace[1].x)
        weights = model.head.attention(model.head.probe.expand(2, -1, -1), x, x)[1][:, 0]  # mean over heads
    assert torch.equal(trace[2].index, weights.topk(8).indices.sort().values)


def test_a_tower_without_its_head_has_no_probe() -> None:
    model = make("SiglipVisionModel", vision_use_head=False)
    with pytest.raises(EvoViTError, match="selection='probe' needs a head"):
        evovit.reduce_tokens(model, "evo_vit", start_block=1, selection="probe")
    assert evovit.reduce_tokens(model, "evo_vit", start_block=1, selection="key_norm")(pictures())


def test_a_probe_that_something_else_replaced_is_no_probe() -> None:
    model = make("SiglipVisionModel")

    class Other(nn.MultiheadAttention):
        pass

    model.head.attention = Other(32, 2, batch_first=True)
    with pytest.raises(EvoViTError, match="selection='probe' needs a head"):
        evovit.reduce_tokens(model, "evo_vit", start_block=1, selection="probe")


def test_saved_and_copied_with_its_selection(tmp_path: Any) -> None:
    model = make("SiglipForImageClassification")
    reduced = evovit.reduce_tokens(model, "evo_vit", start_block=1, stage_length=2, selection="probe")
    evovit.save_reduced(reduced, tmp_path / "saved")
    again = evovit.load_reduced(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(reduced(pictures()).logits, again(pictures()).logits)
        assert torch.equal(copy.deepcopy(reduced)(pictures()).logits, again(pictures()).logits)


@pytest.mark.parametrize("name", ["Siglip2VisionModel", "Siglip2ForImageClassification"])
def test_its_work_is_counted(name: str) -> None:
    model = make(name)
    whole = evovit.gmacs(evovit.reduce_tokens(model, "dense"), (3, 32, 32))
    assert (
        0
        < evovit.gmacs(evovit.reduce_tokens(model, "evo_vit", **KEEPS | {"keep_ratio": 0.5}), (3, 32, 32))
        < whole
    )
