"""`evovit show`: from photographs to one page; what cannot be trusted is said on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image

import evovit
from evovit import cli
from evovit.checkpoints.reduced import save_reduced
from evovit.data.photographs import prepared, sample
from evovit.errors import EvoViTError
from evovit.look import RANDOM, Subject, look_at, open_subject
from evovit.report.show import file_names, labels, points, sentence
from tests.conftest import make_host

QUICK = ("--rounds", "0", "--device", "cpu")


def tell(*words: object) -> None:
    cli.main(["show", *map(str, words), *QUICK])


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one photograph and two methods."""
    out = tmp_path_factory.mktemp("show")
    Image.effect_noise((90, 60), 90).save(out / "<b>cat & dog.png")
    methods = ("evit:blocks=[1],keep_ratio=0.5", "tome:r=30", "sit:blocks=[1]")
    tell(
        out / "<b>cat & dog.png", "--model", "test_vit", "--method", *methods, "--gif", "--out", out / "page"
    )
    return out / "page"


def test_a_page_is_one_file_that_fetches_nothing(shown: Path) -> None:
    html = (shown / "show.html").read_text()
    bare = re.sub('base64,[^"]*', "", html)
    assert "http" not in bare and "<script" not in bare and "<link" not in bare and "<b>" not in bare
    assert html.count("src=") == html.count('src="data:image/') == bare.count('alt="') > 10
    assert "&lt;b&gt;cat &amp; dog.png" in html


def test_a_page_says_what_each_method_does_and_what_to_doubt(shown: Path) -> None:
    html = (shown / "show.html").read_text()
    assert RANDOM in html and "sit blocks=(1,) has parameters of its own, which are untrained" in html
    assert "Token merging: the most similar patch tokens of each block become one." in html
    cells = timm.create_model("test_vit").patch_embed.num_patches
    kept = -(-cells // 2)
    assert f"{kept} of {cells} patches" in html and f"{cells} patches in {cells - 30} tokens" in html
    assert "From block 1 on, tokens are mixtures of all patches and have no places" in html
    assert "90 x 60 pixels; the model sees what is inside the frame" in html


def test_pictures_are_written_beside_the_page(shown: Path) -> None:
    names = {path.name for path in shown.iterdir()}
    stems = {f"b_cat_dog_{name}" for name in ("0_evit", "1_tome", "2_sit")}
    assert names == {"show.html", *(f"{stem}{kind}" for stem in stems for kind in (".png", ".gif"))}
    with Image.open(shown / "b_cat_dog_1_tome.gif") as film:
        assert film.n_frames == 1 + 6  # type: ignore[attr-defined]  # the image, and six blocks that all merge


def test_a_saved_model_is_shown_as_it_is_with_its_own_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = timm.create_model("test_vit", num_classes=3)
    save_reduced(evovit.reduce_tokens(host, "evo_vit", start_block=1), tmp_path / "saved")
    tell("samples", "--model", tmp_path / "saved", "--out", tmp_path / "out")
    said, html = capsys.readouterr().out, (tmp_path / "out" / "show.html").read_text()
    assert "Here, dense means the reduced model&#39;s weights with nothing reduced." in html
    assert re.search(r"china: evo_vit start_block=1: .*class \d", said) and "flower: " in said
    assert RANDOM not in html


def test_keep_ratios_and_budgets_are_laid_side_by_side(tmp_path: Path) -> None:
    tell("samples", "--model", "test_vit", "--keep-ratio", 0.3, 0.7, "--out", tmp_path / "ratios")
    assert "evo_vit keep_ratio=0.3" in (tmp_path / "ratios" / "show.html").read_text()
    tell(
        "samples", "--model", "test_vit", "--method", "tome", "--budgets", 0.5, "--out", tmp_path / "budgets"
    )
    assert "tome budget=0.5" in (tmp_path / "budgets" / "show.html").read_text()


def test_the_python_call_shows_a_model_in_hand_and_appears_in_a_notebook(tmp_path: Path) -> None:
    model = evovit.reduce_tokens(make_host("vit"), "evo_vit", start_block=1, stage_length=3)
    image = Image.new("RGB", (40, 30), "red")
    shown = evovit.show(model, image, out=tmp_path, rounds=2)
    ((look,),) = shown.looks
    assert look.method == "evo_vit start_block=1 stage_length=3" and look.cost.ms is not None
    assert shown._repr_html_().startswith("<iframe srcdoc=") and "only 2 rounds" in shown.page.read_text()
    host = evovit.show(model.model, [image], ["tome:r=3", "evo_vit:start_block=1"], out=tmp_path, rounds=0)
    assert [look.method.split()[0] for look in host.looks[0]] == ["tome", "evo_vit"]


@pytest.mark.parametrize("answers", [True, False])
def test_a_model_nobody_named_is_the_published_one_and_without_network_this_is_said(
    answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, bool]] = []

    def opened(model: str, variants: Any, weights: str = "", pretrained: bool = False) -> Subject:
        asked.append((model, pretrained))
        if pretrained:
            raise EvoViTError("model: the weights of it cannot be loaded (no network).")
        return open_subject("test_vit", variants)

    monkeypatch.setattr("evovit.look.subject.open_subject", opened)
    monkeypatch.setattr("evovit.look.subject._within_reach", lambda name: answers)
    monkeypatch.setattr("evovit.look.subject.QUICKSTART", tmp_path / "none")
    tell("--out", tmp_path / "out")
    tried = [("deit_small_patch16_224", True)] * answers  # nothing is tried where the Hub does not answer
    assert asked == [*tried, ("deit_small_patch16_224", False)]
    html = (tmp_path / "out" / "show.html").read_text()
    assert RANDOM in html and "could not be downloaded" in html
    assert "Continuing with random weights." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tell("digits", "--out", tmp_path / "digits")
    assert "run evovit quickstart first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("no.jpg", "--model", "test_vit"), "There is no file 'no.jpg'"),
        (("samples", "--model", "test_vitt"), "which timm does not know"),
        (("samples", "--model", "test_vit", "--method", "evo_vitt"), "There is no method 'evo_vitt'"),
        (("samples", "--model", "test_vit", "--method", "evit:keep=2"), "keep"),
        (("samples", "--model", "test_vit", "--count", "0"), "count is 0"),
        (("samples", "--model", "test_vit", "--pretrained", "--weights", "w.pth"), "Give either"),
        (("samples", "--model", "resnet18"), "is not a supported host"),
    ],
)
def test_wrong_words_are_one_sentence(
    words: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        tell(*words, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and told in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_words_about_answers_follow_the_numbers() -> None:
    assert [points(share) for share in (0.0312, -0.2, -0.0001)] == ["+3.1", "-20.0", "0.0"]
    assert file_names(["a b.jpg", "a/b.png", "...", "x" * 99]) == ["a_b", "a_b_1", "image", "x" * 60]
    model = evovit.reduce_tokens(make_host("vit"), "dense")
    photograph = prepared(sample("china"), PREPARE)
    same = look_at(model.model, model, photograph, ["ant", "bee", "cat", "dog", "eel"])
    assert re.fullmatch(
        r"dense: both say \w+, dense with ([\d.]+%), reduced with \1 \(0.0 points\)\.", sentence(same)
    )
    assert labels([same]) == ["dense"] and labels([same, same]) == ["dense", "dense"]


PREPARE: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
