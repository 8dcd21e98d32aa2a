"""What stands behind the page of `evovit app`: models, looks, times, files, and what is said of wrong."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import evovit
from evovit import EvoViTError, cli
from evovit.app.known import NAMES, look_around
from evovit.app.picked import Picked, samples, thumbnail, uploaded
from evovit.app.serve import is_loopback
from evovit.app.shown import (
    KEPT,
    RANKED,
    VIEWS,
    WHOLE,
    answer_parts,
    comparison_parts,
    condition_parts,
    cost_parts,
    note_parts,
    picture_parts,
)
from evovit.app.workbench import LEAST, OWN, Wish, Workbench
from evovit.checkpoints.reduced import save_reduced
from evovit.engines.exporting import preprocessing_of
from evovit.engines.opening import read_exports
from evovit.engines.pt2 import Pt2
from evovit.look import RANDOM, open_named
from evovit.report.page import fragment

CHINA, FLOWER, DIGIT = samples()[:3]
WISH = Wish(model="small_vit", methods=("evo_vit:start_block=2,stage_length=3",))


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench()


def text_of(html: str) -> str:
    return re.sub("<[^>]*>", " ", re.sub(r'"data:image[^"]*"', "", html))


def test_what_is_seen_is_what_the_models_do(bench: Workbench) -> None:
    seen = bench.look(WISH, FLOWER)
    held = bench.open("small_vit")
    look = seen.looks[0]
    reduced = evovit.reduce_tokens(held.host, "evo_vit", start_block=2, stage_length=3, keep_ratio=0.5)
    images = look.photograph.image[None]
    with torch.no_grad():
        assert torch.equal(look.reduced.vector, reduced(images)[0])
        assert torch.equal(look.dense.vector, held.host(images)[0])
    assert (
        look.method == "evo_vit start_block=2 stage_length=3 budget=0.5"
        and len(look.blocks) == seen.depth == held.depth
    )
    assert RANDOM in seen.notes and "random weights" in seen.name
    less = bench.look(Wish(model="small_vit", methods=WISH.methods, keep_ratio=0.2), FLOWER)
    assert less.cost.gmacs < seen.cost.gmacs < seen.cost.dense_gmacs == less.cost.dense_gmacs
    assert less.looks[0].blocks[-1].kept.sum() < look.blocks[-1].kept.sum()


def test_random_weights_and_parameters_are_the_same_for_all_visitors() -> None:
    wish = Wish(model="small_vit", methods=("dynamic_vit:blocks=[2],keep_ratio=0.5",))
    one, other = (Workbench().look(wish, DIGIT) for _ in range(2))
    assert torch.equal(one.looks[0].reduced.vector, other.looks[0].reduced.vector)
    assert any("has parameters of its own, which are untrained" in note for note in one.notes)
    assert one.looks[0].photograph.title == "digit 2"


def test_a_model_is_opened_once_and_few_stay_open(bench: Workbench) -> None:
    assert bench.open("small_vit") is bench.open("small_vit")
    small = Workbench()
    first = small.open("small_vit")
    for name in ("test_vit", "test_vit2", "test_vit3"):
        small.open(name)
    assert small.open("small_vit") is not first


def test_methods_on_offer_run_on_the_model(bench: Workbench) -> None:
    held = bench.open("small_vit")
    assert OWN not in held.methods and "dense" not in held.methods and {"evit", "keep"} <= held.sliding
    assert {"evo_vit", "tome", "evit"} <= held.sliding < {*held.methods} and "ats" not in held.sliding
    seen = bench.look(Wish(model="small_vit", methods=("ats",)), CHINA)
    assert any("ats has no keep ratio" in hint for hint in seen.hints)
    given = bench.look(Wish(model="small_vit", methods=("evit:keep_ratio=0.9,blocks=[3]",)), CHINA)
    assert given.looks[0].method == "evit keep_ratio=0.9 blocks=(3,)" and "options set" in given.hints[0]


def test_a_saved_model_has_a_method_of_its_own(tmp_path: Path) -> None:
    host = open_named("small_vit").model
    model = evovit.reduce_tokens(host, "evo_vit", start_block=1, budgets=(1.0, 0.5, 0.25))
    save_reduced(model, tmp_path, host="small_vit")
    bench = Workbench()
    held = bench.open(str(tmp_path))
    assert held.methods[0] == OWN and OWN in held.sliding
    for ratio, budget in ((0.9, 1.0), (0.6, 0.5), (0.1, 0.25)):
        seen = bench.look(Wish(model=str(tmp_path), methods=(OWN,), keep_ratio=ratio), CHINA)
        assert seen.looks[0].method.endswith(f"budget={budget}")
    both = bench.look(Wish(model=str(tmp_path), methods=(OWN, "tome")), CHINA)
    assert [look.method.split()[0] for look in both.looks] == ["evo_vit", "tome"]
    with pytest.raises(EvoViTError, match="is for a model that is reduced already"):
        bench.look(Wish(model="small_vit", methods=(OWN,)), CHINA)


def test_times_are_taken_in_turn_and_said_to_be_disturbed(bench: Workbench) -> None:
    seen = bench.look(Wish(model="small_vit", methods=("evo_vit", "tome:r=8")), CHINA)
    assert all(look.cost.ms is None for look in seen.looks) and "Timing ..." in fragment(
        condition_parts(seen)
    )
    timed = bench.timed(seen, seconds=0.0)
    for look in timed.looks:
        assert look.cost.ms and look.cost.dense_ms and f"{LEAST} rounds in turn" in look.cost.conditions
    assert timed.looks[0].cost.dense_ms == timed.looks[1].cost.dense_ms
    text = text_of(fragment([*cost_parts(timed), *condition_parts(timed)]))
    assert "other visitors and other programs on this machine disturb it" in text and "tome" in text
    alone = text_of(fragment(cost_parts(bench.timed(bench.look(WISH, CHINA), seconds=0.0))))
    assert "GMACs" in alone and "milliseconds" in alone and "speed-up" in alone


def test_two_visitors_at_once_see_their_own(bench: Workbench) -> None:
    asked = [
        (Wish(model="small_vit", methods=(method,), keep_ratio=ratio), picked)
        for method, ratio in (("evo_vit", 0.3), ("evit", 0.7))
        for picked in (CHINA, FLOWER)
    ]
    alone = [bench.look(*each) for each in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: bench.look(*each), asked))
    for one, other, (wish, picked) in zip(alone, together, asked, strict=True):
        assert other.wish is wish and other.picked is picked
        assert other.looks[0].photograph.title == picked.title
        assert torch.equal(one.looks[0].reduced.vector, other.looks[0].reduced.vector)


def test_an_exported_file_runs_beside_the_model_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is written by hand, as an export takes long; tests/app/test_browser.py has a real one."""
    bench = Workbench()
    host = bench.open("small_vit").host
    reduced = evovit.reduce_tokens(host, "evo_vit", start_block=3, stage_length=2)
    entry = {"precision": "fp32", "method": "evo_vit", "options": {}, "gmacs": 0.5, "batch": 1}
    (tmp_path / "export.json").write_text(json.dumps({"pt2": entry}))
    (tmp_path / "preprocessing.json").write_text(json.dumps(preprocessing_of(host)))
    (tmp_path / "model.pt2").write_bytes(b"no graph")
    with pytest.raises(EvoViTError, match="torch.export cannot read"):
        read_exports(tmp_path)["pt2"].load()
    monkeypatch.setattr(Pt2, "load", lambda *given: lambda images: [reduced(images).detach()])
    wish = Wish(model="small_vit", exported=str(tmp_path), target="pt2")
    seen = bench.look(wish, CHINA)
    ours, theirs = seen.looks
    assert theirs.method == "evo_vit, torch.export fp32" and theirs.cost.gmacs == 0.5
    assert torch.allclose(ours.reduced.vector, theirs.reduced.vector, atol=1e-5)
    assert bench.timed(seen, 0.0).looks[1].cost.ms
    assert "torch.export fp32" in text_of(fragment([*answer_parts(seen), *cost_parts(seen)]))
    assert "torch.export" not in text_of(fragment(picture_parts(seen, 1, KEPT)))
    for other, told in (
        (Wish(model="test_vit", exported=str(tmp_path), target="pt2"), "was exported from another model"),
        (Wish(model="small_vit", exported=str(tmp_path), target="onnx"), "has no file for 'onnx'"),
        (Wish(model="small_vit", exported="nowhere", target="onnx"), "There is no 'nowhere/export.json'"),
    ):
        with pytest.raises(EvoViTError, match=re.escape(told)):
            bench.look(other, CHINA)
    for wrong, told in (({"precision": "fp7"}, "is damaged"), ({"batch": 0}, "has a batch of 0")):
        (tmp_path / "export.json").write_text(json.dumps({"pt2": entry | wrong}))
        with pytest.raises(EvoViTError, match=told):
            read_exports(tmp_path)
    (tmp_path / "export.json").write_text(json.dumps({"pt2": entry | {"batch": 8}}))
    with pytest.raises(EvoViTError, match="takes 8 images at once"):
        bench.look(wish, CHINA)


def test_wrong_wishes_are_one_sentence(bench: Workbench) -> None:
    for wish, told in (
        (Wish(model=""), "the model is empty"),
        (Wish(model="no_such_vit"), "timm does not know"),
        (Wish(model="a\0b"), "which is not a path"),
        (Wish(model="small_vit", methods=()), "No method is chosen"),
        (Wish(model="small_vit", methods=("evo_wit",)), "Did you mean 'evo_vit'"),
        (Wish(model="small_vit", methods=("evo_vit:start=2",)), "has no option 'start'"),
        (Wish(model="small_vit", methods=("evo_vit:start",)), "is not of the form name=value"),
        (Wish(model="small_vit", methods=("evit:blocks=[9]",)), "blocks is 9; allowed is 0 to 7"),
        (Wish(model="small_vit", keep_ratio=0.0), "the keep ratio is 0.0"),
    ):
        with pytest.raises(EvoViTError, match=re.escape(told)):
            bench.look(wish, CHINA)
    listed = Workbench(only=["small_vit"])
    assert listed.look(WISH, CHINA).looks
    for other in (Wish(model="test_vit"), Wish(model="small_vit", exported="exports", target="onnx")):
        with pytest.raises(EvoViTError, match="which is not in the list"):
            listed.look(other, CHINA)


def test_photographs_and_what_is_none(tmp_path: Path) -> None:
    assert [each.title for each in samples()] == [
        "china",
        "flower",
        "digit 2",
        "digit 3",
        "digit 5",
        "digit 4",
    ]
    assert {thumbnail(each).size for each in samples()} == {(192, 128), (192, 192)}
    Image.new("RGB", (50, 30), "red").save(tmp_path / "f.png")
    picked = uploaded(tmp_path / "f.png", "my\nphoto.png")
    assert picked.title == "my photo.png" and picked.picture is not None and picked.picture.size == (50, 30)
    (tmp_path / "f.png").write_bytes((tmp_path / "f.png").read_bytes()[:60])
    with pytest.raises(EvoViTError, match=r"^'holiday\.png' "):
        uploaded(tmp_path / "f.png", "holiday.png")


def test_every_view_of_a_block_is_a_picture_with_words(bench: Workbench) -> None:
    picked = Picked("<b>mine</b>", Image.new("RGB", (80, 40), "teal"))
    seen = bench.look(Wish(model="small_vit", methods=("evo_vit", "tome:r=8", "sit:blocks=[1]")), picked)
    html = {view: fragment(picture_parts(seen, 99, view)) for view in VIEWS}
    assert len({*html.values()}) == 3 and all(each.count("<img") == 1 for each in html.values())
    assert "block 7" in html[KEPT] and "Bright patches are kept" in html[KEPT]
    assert "ranks nothing here" in html[RANKED] and "80 x 40 pixels" in html[WHOLE]
    assert "&lt;b&gt;mine" in html[KEPT] and "<b>mine" not in "".join(html.values())
    tiles = fragment(comparison_parts(seen, 3, KEPT))
    assert tiles.count("<img") == 3 and "tokens without places" in tiles
    notes = text_of(fragment(note_parts(seen)))
    assert RANDOM in notes and "Token merging" in notes and "small_vit, random weights" in notes


def test_what_lies_around_is_offered(tmp_path: Path) -> None:
    assert look_around(tmp_path).models == NAMES
    run = tmp_path / "runs" / "quickstart" / "evo_vit"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "begun").mkdir()
    for path, name in (
        (run, "recipe.toml"),
        (tmp_path / "runs" / "begun", "recipe.toml"),
        (tmp_path / "saved" / "mine", "method.json"),
        (tmp_path / "exports" / "a", "export.json"),
        (tmp_path / "tuned" / "a", "tuned.json"),
    ):
        path.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("")
    known = look_around(tmp_path)
    assert known.models == ("runs/quickstart/evo_vit", *NAMES, "saved/mine")
    assert (known.exports, known.searches) == (("exports/a",), ("tuned/a",))
    assert look_around(tmp_path, "small_vit").models[0] == "small_vit"


def test_only_this_machine_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.1.2.3")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org", "")))


def test_the_command_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("evovit.app.serve.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["app"])
    assert ended.value.code == 2 and "pip install 'evovit[app]'" in capsys.readouterr().err
