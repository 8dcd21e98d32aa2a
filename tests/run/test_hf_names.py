"""`hf:` names on the run road: bench, train, eval, methods --host take models of transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import evovit
from evovit.cli import main
from evovit.data.digits import MEAN
from evovit.errors import EvoViTError
from evovit.hosts import create_host
from tests.hf_hosts import make_config, make_hf, worst

SMALL = {"image_size": 36, "patch_size": 6, "num_hidden_layers": 4}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a folder with a tiny classifier of digits, as `save_pretrained` writes it."""
    transformers = pytest.importorskip("transformers", "5.18")
    model = make_hf(transformers.ViTForImageClassification, make_config(transformers.ViTConfig, **SMALL))
    model.save_pretrained(tmp_path / "host")
    told = {
        "image_processor_type": "ViTImageProcessor",
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4] * 3,
    }
    (tmp_path / "host" / "preprocessor_config.json").write_text(json.dumps(told))
    return tmp_path / "host"


def test_a_host_from_a_folder(saved: Path) -> None:
    import transformers

    name = f"hf:{saved}"
    host: Any = create_host(name, pretrained=True).eval()
    own = transformers.ViTForImageClassification.from_pretrained(saved).eval()
    images = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        assert worst(own(images), host(images)) == 0
    assert (host.num_classes, host.in_chans, host.pretrained_cfg["input_size"]) == (5, 3, (3, 36, 36))
    assert host.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    other: Any = create_host(name, {"num_classes": 3, "img_size": 24}, seed=0)
    assert other.classifier.out_features == 3
    assert other.config.image_size == 24
    again: Any = create_host(name, {"num_classes": 3}, pretrained=True)
    assert torch.equal(again.vit.layernorm.weight, own.vit.layernorm.weight)
    evovit.save_reduced(evovit.reduce_tokens(host, "evo_vit", start_block=1), saved.parent / "reduced")
    assert evovit.load_reduced(saved.parent / "reduced").num_classes == 5


def test_wrong_names_are_one_sentence(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved.parent / "empty").mkdir()
    for name, options, sentence in [
        (f"hf:{saved.parent / 'empty'}", {}, "its config cannot be loaded"),
        (f"hf:{saved}", {"imgsize": 3}, "its config has no 'imgsize'"),
        (f"hf:{saved}", {"num_attention_heads": 0}, "cannot be made with"),
    ]:
        with pytest.raises(EvoViTError, match=sentence):
            create_host(name, options)
    with pytest.raises(EvoViTError, match="do not fit its config"):
        create_host(f"hf:{saved}", {"img_size": 48}, pretrained=True)


def test_without_transformers_the_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EvoViTError, match=r"a model of transformers .*; use pip install 'evovit\[hf\]'"):
        create_host("hf:google/vit-base-patch16-224")


def test_methods_of_a_host(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods", "--host", f"hf:{saved}"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["tome"] == "runs"
    assert "start_block is 4" in lines["evo_vit"]


def test_bench(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", f"hf:{saved}", "--method", "evo_vit:start_block=1", "tome:r=3", "--batch", "2"]
    main([*arguments, "--device", "cpu", "--dtype", "fp32", "--engine", "eager", "--rounds", "2"])
    told = capsys.readouterr().out
    assert "evo_vit" in told and "tome" in told and "dense" in told


def test_train_and_eval(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
[model]
name = "hf:{saved}"
options = {{ image_size = 48 }}
[method]
name = "evo_vit"
start_block = 1
[data]
source = "digits"
scenes = 32
test_scenes = 16
batch_size = 16
[optimizer]
name = "muon"
[learning_rate]
base = 1e-3
muon = 0.02
warm_up_epochs = 0
[run]
epochs = 1
device = "cpu"
"""
    )
    out = tmp_path / "run"
    main(["train", str(recipe), "--out", str(out)])
    again = evovit.load_reduced(next(out.rglob("method.json")).parent)
    assert again.num_classes == 10
    assert again.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert again.pretrained_cfg["mean"] == (MEAN,) * 3  # of the digits, not of the host
    main(["eval", str(next(out.rglob("recipe.toml")).parent)])
    assert "top-1" in capsys.readouterr().out
