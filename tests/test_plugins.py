"""A method is one file: the example of the docs, pasted into a clone or offered by another package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE, TEST = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "adding_a_method.md").read_text(), re.DOTALL
)
HOST = '''
"""A host of another package and its adapter: timm's VisionTransformer under another name."""
from evovit.backbones import adapter
from evovit.backbones.timm_vit import TimmViT


@adapter("other_host.OtherViT")
class OtherBackbone(TimmViT):
    """View of `OtherViT`."""
'''


def run(folder: Path, *arguments: str, path: str) -> str:
    """Run Python in a folder; return its output."""
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def offer(folder: Path, group: str, module: str) -> None:
    """Write what installing a package writes: the metadata that names its entry point."""
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}\n")


@pytest.mark.slow
def test_the_example_of_the_docs_passes_every_test_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "src", clone / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", clone / "tests", ignore=shutil.ignore_patterns("__pycache__", "golden"))
    shutil.copytree(ROOT / "docs", clone / "docs")
    shutil.copy(ROOT / "pyproject.toml", clone)
    (clone / "src" / "evovit" / "methods" / "key_norm.py").write_text(EXAMPLE)
    (clone / "tests" / "methods" / "test_key_norm.py").write_text(TEST)
    words = ("tests/test_contract.py", "tests/test_map.py", "tests/methods/test_key_norm.py")
    chosen = ("-n", "0", "-k", "key_norm or map", "-m", "not full and not fuzz and not gpu")
    told = run(clone, "-m", "pytest", "-q", *chosen, *words, path=str(clone / "src"))
    assert int(re.findall(r"(\d+) passed", told)[0]) > 50


def test_a_method_of_another_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "key_norm.py").write_text(EXAMPLE)
    offer(tmp_path, "evovit.methods", "key_norm")
    code = (
        "import evovit, timm, torch; assert 'key_norm' in evovit.list_methods();"
        "model = timm.create_model('test_vit').eval();"
        "fast = evovit.reduce_tokens(model, 'key_norm', keep_ratio=0.5, start_block=2);"
        "print(fast.run(torch.zeros(1, 3, 160, 160)).tokens.num_patches)"
    )
    assert run(tmp_path, "-c", code, path=f"{tmp_path}:{ROOT / 'src'}").strip() == "50"
    told = run(tmp_path, "-m", "evovit", "methods", "key_norm", path=f"{tmp_path}:{ROOT / 'src'}")
    assert "start_block = 3" in told


def test_an_adapter_of_another_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "other_host.py").write_text(
        "from timm.models.vision_transformer import VisionTransformer\n\n\n"
        "class OtherViT(VisionTransformer):\n    pass\n"
    )
    (tmp_path / "other_adapter.py").write_text(HOST)
    offer(tmp_path, "evovit.backbones", "other_adapter")
    code = (
        "import evovit, other_host; assert 'other_host.OtherViT' in evovit.list_hosts();"
        "model = other_host.OtherViT(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2);"
        "evovit.reduce_tokens(model, start_block=2);"
        "print(type(evovit.backbones.adapt(model)).__name__)"
    )
    assert run(tmp_path, "-c", code, path=f"{tmp_path}:{ROOT / 'src'}").strip() == "OtherBackbone"


def test_a_broken_package_is_a_warning_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('no')\n")
    offer(tmp_path, "evovit.methods", "broken")
    code = (
        "import warnings\nwith warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n    import evovit\n    evovit.list_methods()\n"
        "print([str(w.message) for w in told])"
    )
    assert "broken of another package" in run(tmp_path, "-c", code, path=f"{tmp_path}:{ROOT / 'src'}")
