"""Sharing: the real client of the Hugging Face Hub against a stand-in on loopback, there and back again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from huggingface_hub import constants

import evovit
from evovit.bench.row import AROUND, Row
from evovit.checkpoints.card import rows_of
from evovit.cli import main
from evovit.errors import EvoViTError
from tests.conftest import disturb, pictures
from tests.hub_server import TOKEN, Hub, Repo, serving

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client's own call
HOST = "vit_tiny_patch16_224"
OPTIONS: dict[str, Any] = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
TOLD = {"host": HOST, "host_options": OPTIONS}
NAMES = ["cat", "dog", "cow", "owl", "a|b <i>"]
FILES = ["method.json", "method.safetensors", "model.safetensors"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Let the client talk to a stand-in, logged in, with an empty cache."""
    with serving() as hub:
        reach(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client, before it tries again
        forget = getattr(huggingface_hub, "close_session", lambda: None)
        forget()
        yield hub
        forget()


def reach(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Set what HF_ENDPOINT sets, which the client reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for place in (constants, huggingface_hub.file_download):  # the latter's own one in older versions
        monkeypatch.setattr(place, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


def make_reduced(**options: Any) -> evovit.ReducedViT:
    host = disturb(timm.create_model(HOST, **OPTIONS)).eval()
    host.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "interpolation": "bilinear", "label_names": NAMES}
    return evovit.reduce_tokens(host, "evo_vit", **({"start_block": 1, "stage_length": 1} | options))


def files_of(hub: Hub, name: str = "user/fast", branch: str = "main") -> dict[str, bytes]:
    return hub.repos[name].commits[hub.repos[name].refs[branch]]


def refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(EvoViTError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)


def test_a_model_goes_to_the_hub_and_comes_back_the_same(server: Hub) -> None:
    reduced = make_reduced(keep_ratio=0.6)
    address = reduced.push_to_hub("user/fast", **TOLD)
    assert address == f"{server.url}/user/fast/commit/{server.repos['user/fast'].refs['main']}"
    assert sorted(files_of(server)) == [".gitattributes", "README.md", *FILES]
    server.asked.clear()
    again = evovit.load_reduced("hf:user/fast")
    with torch.no_grad():
        assert torch.equal(again(pictures()), reduced(pictures()))
    assert again.method.current_config() == reduced.method.current_config()
    cfg = timm.data.resolve_data_config(model=again)
    assert (cfg["input_size"], cfg["mean"], cfg["interpolation"]) == (
        (3, 32, 32),
        (0.1, 0.2, 0.3),
        "bilinear",
    )
    assert again.pretrained_cfg["label_names"] == NAMES
    fetched = {path.rpartition("/")[2] for method, path in server.asked if "/resolve/" in path}
    assert fetched == set(FILES)
    server.asked.clear()
    evovit.load_reduced("hf:user/fast")
    assert not [path for method, path in server.asked if method == "GET" and "agent" not in path]  # cached


def test_the_files_are_those_of_a_saved_folder(server: Hub, tmp_path: Path) -> None:
    reduced = make_reduced()
    evovit.save_reduced(reduced, tmp_path / "saved", **TOLD)
    evovit.push_to_hub(tmp_path / "saved", "user/fast")
    for name in FILES:
        assert files_of(server)[name] == (tmp_path / "saved" / name).read_bytes()
    again = evovit.load_reduced(tmp_path / "saved")
    assert again.pretrained_cfg == evovit.load_reduced("hf:user/fast").pretrained_cfg
    evovit.save_reduced(again, tmp_path / "again")  # it remembers what the folder told
    once, twice = (json.loads((tmp_path / name / FILES[0]).read_text()) for name in ("saved", "again"))
    assert once["build"]["timm"] == twice["build"]["timm"].partition(".")[0]
    assert once["build"]["options"] == twice["build"]["options"]
    assert once | {"build": {}} == twice | {"build": {}}


def test_the_card_says_what_it_is_and_its_program_runs(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reduced().push_to_hub("user/fast", **TOLD)
    card = files_of(server)["README.md"].decode()
    _, header, text = card.split("---\n", 2)
    told = yaml.safe_load(header)
    assert told["library_name"] == "evovit" and told["pipeline_tag"] == "image-classification"
    assert told["tags"] == ["evovit", "token-reduction", "evo_vit", "timm"]
    assert not {"license", "base_model", "model-index"} & told.keys()
    assert text.count("Not measured.") == 2 and "a\\|b &lt;i&gt;" in text
    from PIL import Image
    from sklearn.datasets import load_sample_image

    Image.fromarray(load_sample_image("china.jpg")).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "card", "exec"), {})
    lines = printed.getvalue().splitlines()
    assert sorted(line.split("% ")[1] for line in lines) == sorted(NAMES)
    assert sum(float(line.split("%")[0]) for line in lines) == pytest.approx(100, abs=0.5)


def row_of(reduced: evovit.ReducedViT, **changes: Any) -> Row:
    row = Row(
        model=HOST,
        method="evo_vit",
        options={"start_block": 1},
        engine="compiled",
        dtype="fp32",
        types="float32",
        batch=8,
        image_size=32,
        task="inference",
        device="cpu",
        threads=1,
        rounds=5,
        steps_per_round=3,
        gmacs=evovit.gmacs(reduced, (3, 32, 32)),
        mac_ratio=1.3,
        median_ms=12.345,
        images_per_second=648.0,
        verdict="1.27x ± 0.8%",
        notes=("only 5 rounds; a result needs 30 or more",),
    )
    return replace(row, **changes)


def test_the_card_holds_what_was_measured_of_this_model_and_nothing_else(server: Hub) -> None:
    reduced = make_reduced()
    dense = row_of(reduced, method="dense", options={}, median_ms=99.0, gmacs=1.0)
    reduced.push_to_hub(
        "user/fast", measured=[dense, row_of(reduced)], accuracy={"top-1 %, flowers": 93.25}, **TOLD
    )
    card = files_of(server)["README.md"].decode()
    assert "| compiled, fp32 | 8 | cpu, threads: 1 | 12.3 | 648 | 1.27x ± 0.8% |" in card
    assert "| top-1 %, flowers | 93.25 |" in card and "only 5 rounds" in card
    assert "Not measured." not in card and "99" not in card
    wrong = {"gmacs": 1.0}, {"method": "tome"}, {"options": {"start_block": 2}}, {"task": "training"}
    others = [vars(row_of(reduced, **changes)) for changes in wrong]
    own = vars(row_of(reduced))
    assert rows_of(reduced, [*others, own]) == [own]
    for measured, sentence in [
        (others[:1], "give rows of this model"),
        (["1.5x"], "give rows of evovit bench"),
        ([{"median_ms": 1}], "has no method, .* or gmacs; give rows"),
    ]:
        refused(lambda given=measured: reduced.push_to_hub("user/x", measured=given, **TOLD), sentence)
    refused(lambda: reduced.push_to_hub("user/x", accuracy={"top-1": "high"}, **TOLD), "give numbers")
    assert "user/x" not in server.repos


def test_a_card_that_people_changed_keeps_what_they_wrote(server: Hub, tmp_path: Path) -> None:
    make_reduced().push_to_hub("user/fast", **TOLD)
    card = files_of(server)["README.md"].decode()
    mine = card.replace("library_name", "license: mit\nlibrary_name", 1) + "\nTrained on my cats.\n"
    server.tamper("user/fast", "README.md", mine.encode())
    make_reduced(keep_ratio=0.7).push_to_hub("user/fast", **TOLD)
    now = files_of(server)["README.md"].decode()
    assert "license: mit" in now and now.endswith("Trained on my cats.\n") and "keep_ratio = 0.7" in now
    server.tamper("user/fast", "README.md", b"# All mine\n")
    make_reduced().push_to_hub("user/fast", **TOLD)
    assert files_of(server)["README.md"] == b"# All mine\n"
    evovit.save_reduced(make_reduced(), tmp_path, **TOLD)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Of the folder\n")
    evovit.push_to_hub(tmp_path, "user/other")
    assert files_of(server, "user/other")["README.md"].endswith(b"# Of the folder\n")


def test_branches_requests_and_owners(server: Hub) -> None:
    first, second = make_reduced(keep_ratio=0.5), make_reduced(keep_ratio=0.7)
    first.push_to_hub("fast", private=True, **TOLD)  # a name of one's own
    assert server.repos["user/fast"].private
    second.push_to_hub("user/fast", revision="more", **TOLD)
    second.push_to_hub("user/fast", revision="more", commit_message="again", **TOLD)
    assert 'load_reduced("hf:user/fast@more")' in files_of(server, branch="more")["README.md"].decode()
    for name, told in [("hf:user/fast@more", {}), ("hf:user/fast", {"revision": "more"})]:
        assert evovit.load_reduced(name, token=TOKEN, **told).method.current_config().keep_ratio == 0.7
    commit = server.repos["user/fast"].refs["main"]
    assert evovit.load_reduced(f"hf:user/fast@{commit}").method.current_config().keep_ratio == 0.5
    address = second.push_to_hub("user/fast", create_pr=True, **TOLD)
    assert address.endswith("/discussions/1") and server.repos["user/fast"].refs["main"] == commit
    refused(
        lambda: first.push_to_hub("other/fast", **TOLD),
        "for hf:other/fast .status 403: You may not create a model for other.; log in",
    )
    server.repos["user/open"] = Repo(private=False)
    server.repos["user/open"].commit("main", {})
    refused(
        lambda: first.push_to_hub("user/open", private=True, **TOLD),
        "hf:user/open exists and is public",
    )


def test_commands_open_a_shared_model_by_its_name(server: Hub) -> None:
    from evovit.train.tested import open_model

    reduced = make_reduced()
    reduced.push_to_hub("user/fast", **TOLD)
    opened, *_ = open_model("hf:user/fast")
    with torch.no_grad():
        assert torch.equal(opened(pictures()), reduced(pictures()))
    refused(lambda: open_model("hf:user/fast", pretrained=True), "has weights of its own")


def test_what_was_changed_is_refused(server: Hub) -> None:
    make_reduced().push_to_hub("user/fast", **TOLD)
    weights, manifest = files_of(server)["model.safetensors"], files_of(server)["method.json"]
    server.tamper("user/fast", "model.safetensors", weights[:-4] + b"\x00\x00\x80\x3f")
    refused(lambda: evovit.load_reduced("hf:user/fast"), "model.safetensors' is missing, cut off or changed")
    server.tamper("user/fast", "model.safetensors", weights)
    evovit.load_reduced("hf:user/fast")
    content = json.loads(manifest)
    for changed, sentence in [
        ({"files": {}}, "hf:user/fast does not list the checksums"),
        ({"files": {"../../x": "y"}}, "files is missing or wrong"),
        ({"build": {"timm": "hf_hub:other/model", "options": {}}}, "'hf_hub:other/model'"),
        (
            {"build": {"timm": HOST, "options": OPTIONS | {"embed_dim": 480}}},
            "describes a host of .* weights but has",
        ),
        ({"preprocessing": {"mean": [0.0]}}, "preprocessing.input_size is missing"),
        ({"preprocessing": content["preprocessing"] | {"std": [0.0] * 3}}, "preprocessing.std is"),
        ({"preprocessing": []}, "preprocessing is missing or wrong"),
        ({"preprocessing": content["preprocessing"] | {"class_names": ["cat"]}}, "names 1 classes, "),
        ({"method": "evo_vitt"}, "Did you mean 'evo_vit'"),
    ]:
        server.tamper("user/fast", "method.json", json.dumps(content | changed).encode())
        refused(lambda: evovit.load_reduced("hf:user/fast"), sentence)
    server.tamper("user/fast", "method.json", b"\x80\x04not json")
    refused(lambda: evovit.load_reduced("hf:user/fast"), "damaged or not written by evovit")
    server.tamper("user/fast", "method.json", manifest)
    del files_of(server)["model.safetensors"]
    refused(lambda: evovit.load_reduced("hf:user/fast"), "hf:user/fast has no model.safetensors")
    del files_of(server)["method.json"]
    refused(
        lambda: evovit.load_reduced("hf:user/fast"), "has no method.json, so push_to_hub did not write it"
    )


def test_what_the_hub_refuses_is_one_sentence(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced = make_reduced()
    reduced.push_to_hub("user/fast", private=True, **TOLD)
    refused(lambda: evovit.load_reduced("hf:user/none"), "The Hub has no model hf:user/none that you may see")
    refused(lambda: evovit.load_reduced("hf:user/fast@none"), "hf:user/fast has no revision 'none'")
    refused(
        lambda: evovit.load_reduced("hf:user/fast", token=False), "no model hf:user/fast that you may see"
    )
    refused(
        lambda: evovit.load_reduced("hf:user/fast", token=f"{TOKEN}\n"), "token is not text without blanks"
    )
    server.repos["user/gated"] = Repo(private=False, gated=True)
    refused(lambda: evovit.load_reduced("hf:user/gated"), "hf:user/gated is gated: request access")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(
        lambda: reduced.push_to_hub("user/fast", **TOLD), "the Hub does not know who you are; log in with"
    )
    server.broken = 500
    refused(lambda: evovit.load_reduced("hf:user/new"), "The Hub cannot be reached")
    refused(lambda: reduced.push_to_hub("user/fast", **TOLD), "status 500")


def test_without_network_what_was_fetched_before_is_loaded(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced = make_reduced()
    reduced.push_to_hub("user/fast", **TOLD)
    evovit.load_reduced("hf:user/fast")
    reach(monkeypatch, "http://127.0.0.1:9")  # nobody listens there
    with torch.no_grad():
        assert torch.equal(evovit.load_reduced("hf:user/fast")(pictures()), reduced(pictures()))
    refused(lambda: evovit.load_reduced("hf:user/other"), "Hub cannot be reached .*hf:user/other is not in")
    refused(lambda: reduced.push_to_hub("user/fast", **TOLD), "hf:user/fast: .*check network and disk")


def test_names_that_cannot_be(server: Hub) -> None:
    reduced = make_reduced()
    names: list[Any] = ["", "a/b/c", "a b/c", "../x", "user/x.git", "user//x", "x" * 200, "é/x", 3, None]
    for name in names:
        refused(lambda given=name: reduced.push_to_hub(given, **TOLD), "name of .*repository")
        if isinstance(name, str):
            refused(lambda given=name: evovit.load_reduced(f"hf:{given}"), "not the name of a Hub repository")
    assert not [each for each in server.asked if "agent" not in each[1]]


def test_words_that_cannot_be(server: Hub, tmp_path: Path) -> None:
    reduced = make_reduced()
    for options, sentence in [
        ({"revision": ""}, "revision is ''"),
        ({"revision": 3}, "revision is 3"),
        ({"token": 3}, "token is not text"),
        ({"private": "yes"}, "private is 'yes'"),
        ({"commit_message": " "}, "commit_message is empty"),
        ({"create_pr": True, "revision": "x"}, "leave revision out"),
        ({"base_model": "no name"}, "not the name of a Hub repository"),
        ({"host": "vit_tiny_r_s16_p8_224"}, "builds another host"),
        ({"host": None, "host_options": {}}, "does not say how it is built"),
    ]:
        refused(lambda told=options: reduced.push_to_hub("user/fast", **(TOLD | told)), sentence)
    refused(lambda: evovit.load_reduced("hf:user/fast@a", revision="b"), "give one of them")
    refused(lambda: evovit.load_reduced(tmp_path, revision="b"), "are for a model on the Hub")
    refused(lambda: evovit.push_to_hub(tmp_path, "user/fast"), "give a folder written by save_reduced")
    refused(lambda: evovit.push_to_hub(tmp_path, "user/fast", host=HOST), "a folder has its own")
    assert not server.repos


def test_the_command_shares_a_run_with_its_accuracy_and_its_speed(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from evovit.recipe.reading import find_recipe

    reduced, run = make_reduced(), tmp_path / "run"
    evovit.save_reduced(reduced, run / "model", **TOLD)
    recipe = find_recipe("digits/dense").read_text()
    (run / "recipe.toml").write_text(re.sub(r"^epochs = \d+", "epochs = 2", recipe, flags=re.MULTILINE))
    lines = [{"update": epoch, "epoch": epoch, "top1": 90.0 + epoch, "test_images": 50} for epoch in (1, 2)]
    (run / "epochs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "bench").mkdir()
    rows = [row_of(reduced), row_of(reduced, method="tome", options={}, median_ms=77.0)]
    around = dict.fromkeys(AROUND) | {"device_name": "a CPU", "torch": "2.9"}
    text = "".join(json.dumps(vars(row) | around) + "\n" for row in rows)
    (tmp_path / "bench" / "rows.jsonl").write_text(text)
    main(["push", str(run), "user/fast", "--private", "--measured", str(tmp_path / "bench")])
    assert "evovit.load_reduced('hf:user/fast') loads it" in capsys.readouterr().out
    card = files_of(server)["README.md"].decode()
    assert "| top-1 %, 50 test images of digits | 92 |" in card
    assert "a CPU, threads: 1, torch 2.9" in card and "77" not in card
    (tmp_path / "bench" / "rows.jsonl").write_text("{}\n")
    for words, told in [
        ([str(run), "user/fast", "--measured", str(tmp_path / "bench")], "has no row of this model"),
        ([str(tmp_path), "user/fast"], "give a folder written by save_reduced"),
        ([str(run), "no name"], "not the name of a Hub repository"),
    ]:
        with pytest.raises(SystemExit) as left:
            main(["push", *words])
        said = capsys.readouterr().err
        assert left.value.code == 2 and told in said and said.count("\n") == 1


@pytest.mark.slow
def test_a_fresh_process_reads_the_place_of_the_hub_from_its_environment(tmp_path: Path) -> None:
    reduced = make_reduced()
    evovit.save_reduced(reduced, tmp_path / "saved", **TOLD)
    torch.save(pictures(), tmp_path / "pictures.pt")
    program = """
import torch, evovit
from evovit.cli import main
torch.set_num_threads(1)  # as here: sums are then the same to the bit
main(["push", "saved", "user/fast"])
with torch.no_grad():
    torch.save(evovit.load_reduced("hf:user/fast")(torch.load("pictures.pt")), "logits.pt")
"""
    with serving() as hub:
        around = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}
        around |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost"}
        call = [sys.executable, "-c", program]
        subprocess.run(call, cwd=tmp_path, env=os.environ | around, check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), reduced(pictures()))
