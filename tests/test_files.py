"""Files are whole or absent, readable as others are, and leave nothing behind."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evovit.runtime.files import remove_leftovers, write_atomically, write_text


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_weights_and_text_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.json", "{}")
        write_atomically(tmp_path / "a.safetensors", lambda path: save_file({"x": torch.zeros(2)}, path))
    finally:
        os.umask(before)
    assert mode(tmp_path / "a.json") == mode(tmp_path / "a.safetensors") == 0o640


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_that_waits_under_a_name_is_not_followed(tmp_path: Path) -> None:
    """Temporary names cannot be guessed, and what is there already is never opened."""
    names = []
    for _ in range(2):
        write_atomically(tmp_path / "a", lambda path: names.append(path.name) or path.write_text(""))
    assert names[0] != names[1] and all(len(name) > 20 for name in names)


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from evovit.runtime.files import write_atomically;"
        "write_atomically(Path(sys.argv[1]), lambda path: os.kill(os.getpid(), 9))"
    )
    for name in ("a[1].txt", "b.txt"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    write_text(tmp_path / "a[1].txt", "new")
    assert sorted(p.name[:5] for p in tmp_path.iterdir()) == [".b.tx", "a[1]."]
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a[1].txt"]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    living = tmp_path / f".a.txt.{os.getppid()}.0123.tmp"
    living.write_text("")
    remove_leftovers(tmp_path)
    assert living.exists()
