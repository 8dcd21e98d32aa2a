"""Token labels and MixToken: equal to naive loops, and to un-mixing the logits as officially done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

import evovit
from evovit.data.dense_labels import crop_label_map, read_label_map
from evovit.data.pictures import open_images
from evovit.errors import EvoViTError
from evovit.recipe.reading import parse_recipe
from evovit.recipe.tables import ObjectiveTable
from evovit.runtime.world import World
from evovit.tokens import Tokens
from evovit.train.build import check_recipe
from evovit.train.objective import Objective
from evovit.train.token_labels import Labels, draw_box, mix_labels, mix_tokens, soft_labels, token_loss
from tests.conftest import make_host, pictures
from tests.parity import assert_close
from tests.run.processes import small
from tests.run.test_trainer import make

LABELS = torch.tensor([1, 3])
CPU = torch.device("cpu")


def test_a_box_is_a_rectangle_with_the_drawn_side_and_centre() -> None:
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        box = draw_box((6, 9), CPU).view(6, 9)
        torch.manual_seed(seed)
        side = torch.rand(()).sqrt().item()
        expected = torch.ones(6, 9, dtype=torch.bool)
        for axis, cells in enumerate((6, 9)):
            centre, half = int(torch.randint(cells, ())), int(side * cells) // 2
            for cell in range(cells):
                if not max(0, centre - half) <= cell < min(cells, centre + half):
                    expected.select(axis, cell).fill_(False)
        assert torch.equal(box, expected)
        shares.append(box.float().mean().item())
    assert min(shares) == 0 and 0.5 < max(shares) < 1 and len(set(shares)) > 10


def test_mixing_after_the_positions_equals_mixing_before_them() -> None:
    host: Any = make_host("lv_vit")
    model, images = evovit.reduce_tokens(host, "evit", blocks=(1,)), pictures(3)
    box = torch.zeros(4, 4, dtype=torch.bool)
    box[1:3, :2] = True
    seen: list[Tokens] = []

    def prepare(tokens: Tokens) -> Tokens:
        seen.append(mix_tokens(tokens, box.flatten()))
        return seen[0]

    with torch.no_grad():
        model.run(images, prepare=prepare)
        patches = host.patch_embed(images)
        for image in range(3):
            for row in range(4):
                for column in range(4):
                    source = 2 - image if 1 <= row < 3 and column < 2 else image
                    expected = patches[source, 4 * row + column] + host.pos_embed[0, 1 + 4 * row + column]
                    assert_close(seen[0].patches[image, 4 * row + column], expected)
        assert_close(seen[0].prefix, (host.cls_token + host.pos_embed[:, :1]).expand(3, -1, -1))


def test_labels_follow_the_patches() -> None:
    labels = Labels(torch.rand(3, 5), torch.rand(3, 16, 5))
    box = torch.rand(16) < 0.3
    mixed, count = mix_labels(labels, box), int(box.sum())
    for image in range(3):
        own, other = labels.image[image], labels.image[2 - image]
        assert_close(mixed.image[image], (16 - count) / 16 * own + count / 16 * other)
        for cell in range(16):
            assert torch.equal(
                mixed.tokens[image, cell], labels.tokens[2 - image if box[cell] else image, cell]
            )


def test_every_patch_has_its_label_or_the_images() -> None:
    soft = soft_labels(LABELS, 5, (2, 3), 0.1)
    assert_close(soft.image, F.one_hot(LABELS, 5) * 0.9 + 0.02)
    assert soft.tokens.shape == (2, 6, 5) and torch.equal(soft.tokens[:, 4], soft.image)
    assert torch.equal(soft_labels(soft.image, 5, (2, 3), 0.1).image, soft.image)
    dense = torch.rand(2, 7, 5)
    found = soft_labels(dense, 5, (2, 3), 0.1)
    assert torch.equal(found.image, dense[:, 0]) and torch.equal(found.tokens, dense[:, 1:])


def test_the_loss_is_a_mean_over_tokens_that_have_a_place() -> None:
    logits, labels = torch.randn(2, 4, 5), torch.rand(2, 6, 5)
    index, total = torch.tensor([[0, 5, 2, -1], [3, 1, -1, -1]]), torch.zeros(())
    for image, token in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        place = int(index[image, token])
        total = total - (labels[image, place] * logits[image, token].log_softmax(0)).sum()
    assert_close(token_loss(logits, index, labels), total / 5)


@pytest.mark.parametrize("method", [None, "idle_vit"])
@pytest.mark.parametrize("dense", [False, True])
def test_training_equals_unmixing_the_logits(method: str | None, dense: bool) -> None:
    """Officially the box's token logits go back to their image; here its labels come along: the same sum."""
    host: Any = make_host("lv_vit")
    targets = torch.rand(4, 17, 5).softmax(-1) if dense else torch.tensor([1, 3, 0, 2])
    model = host if method is None else evovit.reduce_tokens(host, method, start_block=3, cut_weight=0.0)
    goal = ObjectiveTable(token_label_weight=0.7, mix_token=True, label_smoothing=0.1)
    objective, images = Objective(model, goal).train(), pictures(4)
    host.patch_embed.eval()
    torch.manual_seed(5)
    terms = objective(images, targets)
    torch.manual_seed(5)
    box = draw_box((4, 4), CPU)
    assert 0 < box.sum() < 16
    tokens = host.patch_embed(images)
    tokens = torch.where(box[:, None], tokens.flip(0), tokens)
    x = torch.cat((host.cls_token.expand(4, -1, -1), tokens), 1) + host.pos_embed
    if method is None:
        features = host.norm(host.blocks(x))
        logits, each = host.head(features[:, 0]), host.aux_head(features[:, 1:])
        each = torch.where(box[:, None], each.flip(0), each)
        smooth = F.one_hot(targets, 5) * 0.9 + 0.02 if not dense else targets[:, 0]
        own = targets[:, 1:] if dense else smooth[:, None]
        share = box.float().mean()
        mixed = (1 - share) * smooth + share * smooth.flip(0)
        assert_close(terms["class"], -(mixed * logits.log_softmax(1)).sum(1).mean())
        assert_close(terms["token_labels"], 0.7 * -(own * each.log_softmax(2)).sum(2).mean())
    assert set(terms) == {"class", "token_labels"}
    torch.stack(list(terms.values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_training_compiles_in_one_graph() -> None:
    goal = ObjectiveTable(token_label_weight=1.0, mix_token=True, label_smoothing=0.1)
    objective = Objective(make_host("lv_vit"), goal).train()
    torch.compiler.reset()
    found = []
    for forward in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        terms = forward(pictures(), LABELS)
        torch.stack(list(terms.values())).sum().backward()
        found.append(list(terms.values()))
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(*found, strict=True))


def test_mixtoken_alone_needs_no_second_head_and_rests_in_evaluation() -> None:
    model = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=1, stage_length=2)
    objective, images = Objective(model, ObjectiveTable(mix_token=True)), pictures()
    plain = Objective(model, ObjectiveTable())
    with torch.no_grad():
        torch.manual_seed(1)
        mixed = objective.train()(images, LABELS)["class"]
        assert not torch.allclose(mixed, plain(images, LABELS)["class"])
        assert_close(objective.eval()(images, LABELS)["class"], plain.eval()(images, LABELS)["class"])


def test_what_cannot_be_is_refused_in_one_sentence(tmp_path: Path) -> None:
    goal, mixed = ObjectiveTable(token_label_weight=1.0), ObjectiveTable(mix_token=True, teacher="given")
    with pytest.raises(EvoViTError, match="VisionTransformer does not; choose an LV-ViT"):
        Objective(make_host("vit"), goal)
    with pytest.raises(
        EvoViTError, match="SiT leaves no patch token at its place on the grid, where its label"
    ):
        Objective(evovit.reduce_tokens(make_host("lv_vit"), "sit", blocks=(1,), token_weight=0), goal)
    with pytest.raises(EvoViTError, match="mix_token mixes embedded patches, which the teacher does not see"):
        Objective(make_host("vit"), mixed, make_host("vit"))
    with pytest.raises(EvoViTError, match="takes the place of data.mixup and data.cutmix"):
        small(tmp_path, "objective.mix_token=true")


@pytest.mark.parametrize("method", ["none", "evit"])
def test_a_training_goes_on_and_keeps_the_hosts_names(tmp_path: Path, method: str) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    recipe = parse_recipe(
        {
            "model": {"name": "lv_vit_tiny", "options": options},
            "method": {"name": method} | ({"blocks": [1]} if method != "none" else {}),
            "data": {"source": "digits", "batch_size": 8, "scenes": 32, "test_scenes": 8},
            "objective": {"token_label_weight": 1.0, "mix_token": True},
            "learning_rate": {"base": 1e-3, "reference_batch": 8, "warm_up_epochs": 1},
            "run": {"epochs": 2, "device": "cpu", "ema_decay": 0.9, "activation_checkpointing": True},
        }
    )
    trainer = make(recipe, tmp_path / "run")
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    assert trainer.fit()
    assert not [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    last = max((tmp_path / "run" / "checkpoints").glob("*.safetensors"))
    saved = {key.removeprefix("model.") for key in load_file(last) if key.startswith("model.")}
    assert saved == set(trainer.model.state_dict())


def test_a_label_map_is_cropped_as_roialign_defines_it() -> None:
    """Bilinear samples of a ramp are the ramp: each cell has the mean position of its part of the crop."""
    rows, columns = 12, 18
    ramp = torch.stack(
        (torch.arange(columns).expand(rows, -1) + 0.5, torch.arange(rows)[:, None].expand(-1, columns) + 0.5)
    )
    left, top, right, bottom = box = (0.25, 0.125, 0.75, 0.875)
    for flipped in (False, True):
        found = crop_label_map(ramp.float(), box, 3, flipped)
        middle = torch.tensor([(left + right) / 2 * columns, (top + bottom) / 2 * rows])
        assert_close(found[0], middle)
        for row in range(3):
            for column in range(3):
                across = left + (right - left) * ((2 - column if flipped else column) + 0.5) / 3
                down = top + (bottom - top) * (row + 0.5) / 3
                assert_close(found[1 + 3 * row + column], torch.tensor([across * columns, down * rows]))


def write_label_map(path: Path, image: Image.Image, ids: tuple[int, int]) -> None:
    """Store a map whose second class grows with the redness of the image, and three classes of score 0."""
    red = pil_to_tensor(image.resize((8, 8), Image.Resampling.BOX))[0].float()
    scores = torch.stack((1 - red / 255, red / 255, *(torch.zeros(8, 8),) * 3)) * 8
    classes = torch.tensor([*ids, 2, 3, 4])[:, None, None].expand(5, 8, 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.stack((scores, classes)).half(), path)


def test_dense_labels_show_what_the_augmented_image_shows(tmp_path: Path) -> None:
    """Left dark, right red: wherever crop and flip fall, a patch's label tells its own redness."""
    ramp = torch.linspace(0, 255, 64).round().byte().expand(48, 64)
    image = Image.fromarray(torch.stack((ramp, ramp * 0, ramp * 0), 2).numpy())
    for split in ("train", "val"):
        for kind in ("a", "b", "c", "d", "e"):
            (tmp_path / split / kind).mkdir(parents=True)
            image.save(tmp_path / split / kind / "one.png")
    write_label_map(tmp_path / "labels" / "a" / "one.pt", image, (0, 1))
    tables: dict[str, Any] = {
        "model": {"name": "lv_vit_tiny", "options": {"img_size": 32, "patch_size": 8}},
        "data": {"source": str(tmp_path), "batch_size": 5, "workers": 0, "token_label_grid": 4},
        "objective": {"token_label_weight": 1.0},
        "learning_rate": {"base": 1e-3},
        "run": {"epochs": 6},
    }
    tables["data"]["token_labels"] = str(tmp_path / "labels")
    nowhere = tables | {"data": tables["data"] | {"token_labels": str(tmp_path / "nowhere")}}
    with pytest.raises(EvoViTError, match=r"where no image has its labels, such as .*nowhere/a/one\.pt"):
        open_images(parse_recipe(nowhere), 32, ((0.0,) * 3, (1.0,) * 3))
    other = tables | {"data": tables["data"] | {"token_label_grid": 7}}
    with pytest.raises(EvoViTError, match="token_label_grid is 7, but the model has 4 x 4 patches"):
        check_recipe(parse_recipe(other))
    data = open_images(parse_recipe(tables), 32, ((0.0,) * 3, (1.0,) * 3))
    flips = set()
    for epoch in range(8):
        images, labels = next(data.train(epoch, 0, World(0, 1, CPU), 1))
        assert labels.shape == (5, 17, 5) and labels.dtype == torch.float16
        assert_close(labels.float().sum(2), torch.ones(5, 17), 2e-3)
        (first,) = (labels != labels[:, :1]).any(2).any(1).nonzero()[:, 0].tolist()  # the image with a file
        red = F.avg_pool2d(images[first, :1], 8).flatten()
        told = labels[first, 1:].float()
        odds = (told[:, 1] / told[:, 0]).log() / 16 + 0.5  # scores 8 * red and 8 * (1 - red)
        assert (odds - red).abs().max() < 0.08
        flips.add(bool(red[3] > red[0]))
        others = torch.cat((labels[:first, 0], labels[first + 1 :, 0]))
        assert sorted(others.argmax(1).tolist()) == [1, 2, 3, 4] and others.amax() == 1
    assert flips == {True, False}


def test_broken_label_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "one.pt"
    path.write_bytes(b"no tensor")
    with pytest.raises(EvoViTError, match="cannot be read"):
        read_label_map(path, 5)
    torch.save(torch.zeros(3, 5, 4, 4), path)
    with pytest.raises(EvoViTError, match=r"holds no scores and class ids, \(2, best, rows, columns\)"):
        read_label_map(path, 5)
    torch.save(torch.full((2, 5, 4, 4), 7.0), path)
    with pytest.raises(EvoViTError, match="names class 7, but the data has 5 classes"):
        read_label_map(path, 5)
    with pytest.raises(EvoViTError, match="16 cells and the model 14 x 14 patches; set data.token_"):
        soft_labels(torch.zeros(1, 17, 5), 5, (14, 14), 0.0)
    with pytest.raises(EvoViTError, match="data.token_labels is given, but has no effect on digits"):
        small(tmp_path, "data.token_labels=labels")
