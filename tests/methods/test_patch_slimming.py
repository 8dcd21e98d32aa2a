"""Patch slimming: nested static masks, rows of the unpruned block exactly, and the search that finds them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import evovit
from evovit import cli
from evovit.backbones import adapt
from evovit.calibration import Kept, Search
from evovit.macs import gmacs
from evovit.methods.patch_slimming import PatchSlimming
from evovit.ops.select import keep_rows
from tests.conftest import HOSTS, make_host, pictures
from tests.hf_hosts import make_config, make_hf
from tests.parity import assert_close
from tests.run.processes import train_here
from tests.run.test_every_method import recipe_for

COUNTS = (16, 12, 7, 4)


def slimmed(host: nn.Module, counts: tuple[int, ...] = COUNTS) -> Any:
    reduced = evovit.reduce_tokens(host, "patch_slimming", keep_ratio=[count / 16 for count in counts])
    reduced.method.set_order(torch.randperm(16))
    return reduced


@pytest.mark.parametrize("name", HOSTS)
def test_rows_are_those_of_the_unpruned_block(name: str) -> None:
    """Each block: what stays is what the whole block makes of these rows, its keys all that entered."""
    host, images = make_host(name), pictures()
    reduced, backbone = slimmed(host), adapt(make_host(name))
    with torch.no_grad():
        trace = reduced.run(images, record=True).trace
        entering = backbone.embed(images)
        for block, tokens in zip(backbone.stages()[0].blocks, trace, strict=True):
            whole = block(entering)
            rows = (tokens.index[:, :, None] == entering.index[:, None]).int().argmax(-1)
            assert_close(tokens.x, keep_rows(whole, rows).x)
            assert tokens.num_patches == COUNTS[block.number]
            entering = tokens


@pytest.mark.parametrize(
    "name", ["ViTModel", "DINOv3ViTModel", "BeitModel", "CLIPVisionModel", "Dinov2WithRegistersModel"]
)
def test_rows_are_those_of_the_unpruned_block_on_hosts_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", "5.18")
    cls = getattr(transformers, name)
    host, images = make_hf(cls, make_config(cls.config_class)), pictures()
    reduced, backbone = slimmed(host), adapt(host)
    with torch.no_grad():
        trace = reduced.run(images, record=True).trace
        entering = backbone.embed(images)
        for block, tokens in zip(backbone.stages()[0].blocks, trace, strict=True):
            rows = (tokens.index[:, :, None] == entering.index[:, None]).int().argmax(-1)
            assert_close(tokens.x, keep_rows(block(entering), rows).x)
            entering = tokens


def test_masks_are_nested_and_go_with_the_state_dict(tmp_path: Path) -> None:
    reduced = slimmed(make_host("vit"))
    masks = [set(mask.tolist()) for mask in reduced.method.masks()]
    assert [len(mask) for mask in masks] == list(COUNTS)
    assert all(later <= earlier for earlier, later in pairwise(masks))
    assert {name: value.dtype for name, value in reduced.method.state_dict().items()} == {
        "order": torch.int64
    }
    evovit.save_reduced(reduced, tmp_path)
    loaded: Any = evovit.load_reduced(tmp_path, make_host("vit"))
    assert [set(mask.tolist()) for mask in loaded.method.masks()] == masks
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pictures()), reduced(pictures()))
        for image in reduced.run(pictures(), record=True).trace[2].index:
            assert set(image.tolist()) == masks[2]


def test_the_random_order_is_the_same_for_every_model() -> None:
    one, other = (evovit.reduce_tokens(make_host("vit"), "patch_slimming") for _ in range(2))
    assert torch.equal(one.method.order, other.method.order)


def test_shapes_are_constant_under_export_and_nothing_is_scored() -> None:
    reduced = slimmed(make_host("vit"))
    program = torch.export.export(reduced, (pictures(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    kinds = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(word in kind for kind in kinds for word in ("topk", "sort", "cumsum", "softmax"))
    assert sum("index_select" in str(node.target) for node in program.graph.nodes) == 1  # all slices after it
    with torch.no_grad():
        for count in (1, 5):
            assert_close(program.module()(pictures(count)), reduced(pictures(count)))


def blocks_work(rows: int, counts: tuple[int, ...], width: int) -> int:
    """Multiply-accumulates of the blocks: keys and values of all that enter, all else of those that stay."""
    total = 0
    for count in counts:
        stay = count + 1
        total += 2 * rows * width**2 + 2 * stay * rows * width + (1 + 1 + 8) * stay * width**2
        rows = stay
    return total


def test_multiply_accumulates_follow_from_the_masks() -> None:
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224").eval()
        counts = (196, 196, 180, 170, 150, 130, 110, 90, 70, 50, 30, 10)
        ratios = [count / 196 for count in counts]
        reduced = evovit.reduce_tokens(host, "patch_slimming", keep_ratio=ratios)
        default = evovit.reduce_tokens(host, "patch_slimming")
    shape, width = (3, 224, 224), 384
    rest = 196 * 768 * width + 1000 * width
    expected = rest + blocks_work(197, (*counts[:-1], 0), width)  # the last block: the class token alone
    assert gmacs(reduced, shape) == pytest.approx(expected / 1e9, rel=1e-9)
    reduced.last_block = "all"
    assert gmacs(reduced, shape) == pytest.approx((rest + blocks_work(197, counts, width)) / 1e9, rel=1e-9)
    assert gmacs(default, shape) == pytest.approx(2.6, abs=0.05)  # published for DeiT-S: 2.6


def test_a_ramp_keeps_the_masks_nested() -> None:
    reduced = slimmed(make_host("vit"))
    whole = [set(mask.tolist()) for mask in reduced.method.masks()]
    for share, counts in ((0.0, [16] * 4), (0.5, [16, 14, 12, 10]), (1.0, list(COUNTS))):
        reduced.method.set_reduction(share)
        masks = [set(mask.tolist()) for mask in reduced.method.masks()]
        assert [len(mask) for mask in masks] == counts
        assert all(final <= mask for mask, final in zip(masks, whole, strict=True))


# The search


def naive_score(host: Any, images: Tensor, number: int, kept: list[list[int]]) -> Tensor:
    """Score of each patch that leaves block `number` of a timm ViT, rows walked one block after another.

    Args:
        kept: rows, class included, of each block behind, first to last.
    """
    total = torch.zeros(16, dtype=torch.float64)
    for image in images:
        x = host.norm_pre(host._pos_embed(host.patch_embed(image[None])))
        for block in host.blocks[:number]:
            x = block(x)

        def maps(block: Any, x: Tensor, rows: list[int]) -> Tensor:
            q, k, _ = block.attn.qkv(block.norm1(x)).reshape(1, x.shape[1], 3, 2, -1).permute(2, 0, 3, 1, 4)
            logits = q.double() @ k.double().transpose(-2, -1) * block.attn.scale
            return logits.softmax(-1)[0][:, rows]  # (H, Q, T)

        first = maps(host.blocks[number], x, list(range(17)))
        own = (first @ x[0].double().abs()).square().sum((0, 2))
        x, present = host.blocks[number](x), list(range(17))
        carried = [torch.eye(17, dtype=torch.float64)]
        for block, rows in zip(host.blocks[number + 1 :], kept, strict=True):
            places = [present.index(row) for row in rows]
            each = maps(block, x, places)
            carried = [each[head] @ through for through in carried for head in range(2)]
            x, present = block(x)[:, places], rows
        paths = sum(through.square().sum(0) for through in carried) / len(carried)
        total += (paths * own)[1:]
    return total / len(images)


def test_the_score_is_that_of_every_path_of_heads_through_the_pruned_network() -> None:
    host, images = make_host("vit"), pictures(3)
    search = Search(host, images, batch=2, relative=True, learns=False)
    search.order, search.counts = [5, 2, 9], [0, 0, 3, 0]
    with torch.no_grad():
        score, seen = search.look(1)
        expected = naive_score(host, images, 1, [[0, 6, 3, 10], [0]])
    assert torch.allclose(score, expected, rtol=1e-4)
    assert [each.target.shape for each in seen] == [(2, 4, 32), (1, 4, 32)]


def test_a_block_keeps_as_few_as_the_tolerance_allows() -> None:
    host, images, told = make_host("vit"), pictures(6), list[Kept]()
    reduced: Any = evovit.calibrate(host, images, tolerance=0.05, step=2, batch=4, told=told.append)
    assert [kept.number for kept in told] == [3, 2, 1, 0]
    counts = [len(mask) for mask in reduced.method.masks()]
    assert counts == [max(1, kept.patches) for kept in reversed(told)]
    assert all(kept.error <= 0.05 for kept in told) and min(counts[:3]) < 16
    masks = [set(mask.tolist()) for mask in reduced.method.masks()]
    assert all(later <= earlier for earlier, later in pairwise(masks))
    for kept in told[1:]:  # one step fewer is over the tolerance; none fewer than the block behind keeps
        behind = told[told.index(kept) - 1].patches
        if kept.patches > behind:
            fewer = reduced.method.order[: max(behind, kept.patches - 2)].tolist()
            assert error_of(host, images, kept.number, fewer, behind) > 0.05
            exact = error_of(host, images, kept.number, reduced.method.order[: kept.patches].tolist(), behind)
            assert exact == pytest.approx(kept.error, rel=1e-3)


@torch.no_grad()
def error_of(host: Any, images: Tensor, number: int, kept: list[int], behind: int) -> float:
    """Return the relative error of block `number + 1` on class token and the first `behind` of `kept`."""
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    for block in host.blocks[: number + 1]:
        x = block(x)
    rows = [0, *(cell + 1 for cell in kept)]
    target = host.blocks[number + 1](x)[:, rows[: behind + 1]]
    found = host.blocks[number + 1](x[:, rows])[:, : behind + 1]
    return float((found - target).square().sum() / target.square().sum())


@pytest.mark.parametrize("name", ["vit", "dinov2_reg", "vit_avg", "siglip", "eva02", "beit", "lv_vit"])
def test_no_tolerance_keeps_all_and_is_the_host(name: str) -> None:
    host, images = make_host(name), pictures(2)
    before = {key: value.clone() for key, value in host.state_dict().items()}
    reduced: Any = evovit.calibrate(host, images, tolerance=0.0, step=5)
    reads_patches = adapt(host).head_reads_patches
    assert [len(mask) for mask in reduced.method.masks()] == [16, 16, 16, 16 if reads_patches else 1]
    with torch.no_grad():
        assert_close(reduced(images), host(images))
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "vit_avg", "siglip", "dinov3", "relpos", "parallel_things"])
def test_more_tolerance_costs_less(name: str) -> None:
    host, images = make_host(name), pictures(4)
    work = [
        gmacs(evovit.calibrate(host, images, tolerance=tolerance, step=2), (3, 32, 32))
        for tolerance in (0.0, 0.05, 1e9)
    ]
    assert work[0] >= work[1] >= work[2] and work[0] > work[2]


def test_the_squared_error_is_a_mean() -> None:
    host, images, told = make_host("vit"), pictures(4), list[Kept]()
    evovit.calibrate(host, images, tolerance=1e9, error="squared", told=told.append)
    order = Search(host, images, 4, False, False)
    with torch.no_grad():
        _, (seen,) = order.look(2)
        found = order.pruned(2, seen.after, [])
    assert told[1].error == pytest.approx(float((found - seen.target).square().mean()), rel=1e-5)


def test_training_a_block_lessens_its_error_and_touches_no_other() -> None:
    """The block, not those before it, as their outputs are the originals."""
    host, images = make_host("vit"), pictures(4)
    before = {key: value.clone() for key, value in host.state_dict().items()}
    search = Search(host, images, batch=2, relative=True, learns=True)
    search.order, search.counts = [5, 2, 9], [0, 0, 3, 0]
    with torch.no_grad():
        _, seen = search.look(1)
        kept = [5, 2, 9, 0, 1]
        first = search.error(1, seen, kept, learnt=True)
        search.fit(1, seen, kept, epochs=20, rate=1e-3)
        assert search.error(1, seen, kept, learnt=True) < 0.8 * first
    changed = {key for key, value in host.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("blocks.1.") for key in changed)
    assert all(p.grad is None for p in host.parameters())


def test_calibration_may_train_blocks() -> None:
    host, images = make_host("vit"), pictures(4)
    plain = evovit.calibrate(make_host("vit"), images, tolerance=0.02, step=2)
    tuned = evovit.calibrate(host, images, tolerance=0.02, step=2, epochs=3, rate=1e-3)
    assert gmacs(tuned, (3, 32, 32)) <= gmacs(plain, (3, 32, 32))
    assert not torch.equal(host.blocks[0].attn.proj.weight, make_host("vit").blocks[0].attn.proj.weight)
    assert torch.equal(host.blocks[3].attn.proj.weight, make_host("vit").blocks[3].attn.proj.weight)


# The command


def test_the_command_writes_a_folder_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number in range(4):
        colours = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8)
        Image.fromarray(colours.numpy()).save(f"photos/{number}.png")
    words = "calibrate test_vit --images photos --out slim --tolerance 0.05 --count 3"
    cli.main(words.split(" "))
    said = capsys.readouterr().out
    assert "3 photographs of photos" in said and "random weights" in said
    assert "block 5: keeps 0 of " in said or "block 5: keeps " in said
    loaded: Any = evovit.load_reduced("slim")
    assert isinstance(loaded.method, PatchSlimming)
    dense, reduced = (float(word) for word in said.splitlines()[-2].split() if word[0].isdigit())
    assert dense == pytest.approx(gmacs(loaded.model, (3, 160, 160)), rel=1e-3)
    assert reduced == pytest.approx(gmacs(loaded, (3, 160, 160)), rel=1e-3)


def test_the_command_says_when_images_are_random_and_takes_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(recipe_for(None), tmp_path / "dense")
    cli.main(["calibrate", str(tmp_path / "dense"), "--out", str(tmp_path / "slim"), "--step", "4"])
    assert "32 random images: they say nothing about photographs" in capsys.readouterr().out
    loaded: Any = evovit.load_reduced(tmp_path / "slim")
    assert loaded.num_classes == 10 and loaded(torch.zeros(1, 3, 24, 24)).shape == (1, 10)
    with pytest.raises(SystemExit):
        cli.main(["calibrate", str(tmp_path / "slim"), "--out", str(tmp_path / "again")])
    assert "is reduced already; give a dense model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--tolerance", "-1"), "tolerance is -1.0; allowed is a finite number, 0 or more"),
        (("--error", "l1"), "error is 'l1'; allowed is relative or squared"),
        (("--step", "0"), "step is 0; allowed is 1 to"),
        (("--images", "nowhere"), "There is no folder 'nowhere'"),
        (("--device", "tpu"), "device is 'tpu'; allowed is auto, cpu or cuda"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    words: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "test_vit", "--out", str(tmp_path / "slim"), *words])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_ratio": [0.5, 0.7, 0.5, 0.5]}, "let no value rise"),
        ({"keep_ratio": [0.5, 0.5]}, "keep_ratio has 2 values for 4 blocks"),
        ({"keep_ratio": 0}, "keep_ratio is 0; allowed is a number above 0, at most 1"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(evovit.EvoViTError, match=sentence):
        evovit.reduce_tokens(make_host("vit"), "patch_slimming", **options)


def test_wrong_orders_and_images_are_refused_in_one_sentence() -> None:
    reduced: Any = evovit.reduce_tokens(make_host("vit"), "patch_slimming")
    for order in (range(15), [0] * 16, torch.arange(1, 17)):
        with pytest.raises(evovit.EvoViTError, match="give each raster position from 0 to 15 once"):
            reduced.method.set_order(list(order))
    with pytest.raises(evovit.EvoViTError, match="images is empty"):
        evovit.calibrate(make_host("vit"), torch.zeros(0, 3, 32, 32))
    with pytest.raises(evovit.EvoViTError, match="images is 'photos'; give prepared images"):
        evovit.calibrate(make_host("vit"), "photos")  # type: ignore[arg-type]
    host = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, dynamic_img_size=True)
    with pytest.raises(evovit.EvoViTError, match="grid of 2 x 2 patches, but these images have 4 x 4"):
        evovit.reduce_tokens(host, "patch_slimming", keep_ratio=0.5)(torch.zeros(1, 3, 64, 64))
