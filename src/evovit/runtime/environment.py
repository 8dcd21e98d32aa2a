"""What a number depends on besides its own settings: machine, versions, command, source."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def environment(device: str) -> dict[str, Any]:
    """Return what a measurement or a training on `device`, cpu or cuda, depends on besides its settings."""
    on_cuda = device == "cuda"
    return {
        "device_name": device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if on_cuda
        else None,
        "cuda": torch.version.cuda if on_cuda else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("evovit", "timm")},
        "torch": torch.__version__,  # with its build, such as +cu132
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def source() -> dict[str, Any]:
    """Return the command of this process, and the state of the source if it runs from a checkout."""
    git = ("git", "-C", str(Path(__file__).parent))
    return {
        "command": sys.argv,
        "git_commit": _output(*git, "rev-parse", "HEAD"),
        "git_changes": _output(*git, "status", "--porcelain"),
    }


def device_name(device: str) -> str:
    """Return the name of the processor or of the CUDA device."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
