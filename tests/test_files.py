"""Files are whole or absent, readable as others are, and leave nothing behind."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from evovit.errors import EvoViTError
from evovit.runtime.files import hold_folder, remove_leftovers, told, write_atomically, write_text


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


def test_what_a_writer_makes_beside_its_file_goes_too(tmp_path: Path) -> None:
    """Such as the file of its own that safetensors renames at the end."""
    code = (
        "import os, sys; from pathlib import Path; from evovit.runtime.files import write_atomically;"
        "beside = lambda path: (path.with_name('.tmpA1b2C3').write_text('half'), os.kill(os.getpid(), 9));"
        "write_atomically(Path(sys.argv[1]), beside)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    write_text(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_held_folder_holds_no_other_and_a_fork_of_its_holder_does_not_hold_it(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "run"):
        with pytest.raises(EvoViTError, match="another process"), hold_folder(tmp_path / "run"):
            pass
        (ready, say_ready), (end, say_end) = os.pipe(), os.pipe()
        if (child := os.fork()) == 0:  # such as a process that reads images
            os.close(say_end)
            os.write(say_ready, b"x")
            os.read(end, 1)
            os._exit(0)
        os.read(ready, 1)
    try:
        with hold_folder(tmp_path / "run"):
            pass
    finally:
        os.close(say_end)
        os.waitpid(child, 0)
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_is_waited_for(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with hold_folder(tmp_path, wait=True):
            order.append("second")

    with hold_folder(tmp_path):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.1)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), SafetensorError("disk\nfull")])
def test_what_the_system_says_of_a_folder_is_one_sentence(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(EvoViTError, match=r"cannot be written \((Read-only file system|disk full)\)"),
        told(tmp_path),
    ):
        raise error
