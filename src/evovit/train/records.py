"""What a training writes down: a JSON line per update and per epoch, a live bar or plain lines, loggers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from evovit.errors import EvoViTError, printable
from evovit.runtime.files import told, write_text

STEPS, EPOCHS = "steps.jsonl", "epochs.jsonl"
Record = dict[str, Any]


class Records:
    """The records of one run; written by the main process alone.

    Args:
        folder: of the run.
        total: updates of the whole training, for the time left.
        log_to: none, tensorboard or wandb.
        console: where progress is shown: a live bar in a terminal, else a line per epoch.
    """

    def __init__(self, folder: Path, total: int, log_to: str, console: Console) -> None:
        self.folder, self.console = folder, console
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
        )
        live = console.is_terminal
        self.bar = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not live
        )
        self.task = self.bar.add_task(printable(folder.name), total=total, state="")
        with told(folder):
            self.send = open_logger(log_to, folder)

    def start(self, update: int) -> None:
        """Go on after `update` updates: lines of later ones, which will come again, go."""
        for name in (STEPS, EPOCHS):
            with told(self.folder):
                kept = [line for line in read_lines(self.folder / name) if line["update"] <= update]
                write_text(self.folder / name, "".join(json.dumps(line) + "\n" for line in kept))
        self.bar.update(self.task, completed=update)
        self.bar.start()

    def step(self, record: Record) -> None:
        """Record an update."""
        self._append(STEPS, record)
        self.bar.update(self.task, completed=record["update"], state=f"loss {record['loss']:.3f}")

    def epoch(self, record: Record, epochs: int) -> None:
        """Record an epoch and say so."""
        self._append(EPOCHS, record)
        tested = f", top-1 {record['top1']:.2f} %" if "top1" in record else ""
        left = record["seconds"] * (epochs - record["epoch"])
        self.log(
            f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}{tested}, "
            f"{record['images_per_second']:.0f} images/s, about {duration(left)} left"
        )

    def log(self, text: str) -> None:
        """Print a line above the bar."""
        say(self.console, text)

    def close(self) -> None:
        """Take the bar away."""
        self.bar.stop()

    def _append(self, name: str, record: Record) -> None:
        with told(self.folder):
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps({key: _as_json(value) for key, value in record.items()}) + "\n")
            self.send(record)


def say(console: Console, text: str) -> None:
    """Print a line whose names strangers chose: no terminal obeys it, no markup is read from it."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def read_lines(path: Path) -> list[Record]:
    """Return the records of a JSON-lines file; what is none, such as a line cut off, is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("update")) is int:
            records.append(record)
    return records


def _as_json(value: Any) -> Any:
    """Return a value that JSON has: what is not finite as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def open_logger(log_to: str, folder: Path) -> Callable[[Record], None]:
    """Return a function that sends a record to TensorBoard or Weights & Biases, or to nothing."""
    if log_to == "none":
        return lambda record: None
    try:
        if log_to == "wandb":
            import wandb  # type: ignore[import-not-found, unused-ignore]

            run = wandb.init(
                project="evovit", name=folder.name, dir=str(folder), resume="allow", id=folder.name
            )
            return lambda record: run.log(record, step=record["update"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EvoViTError(
            f"run.log_to is {log_to!r}, which is not installed ({error}); install it or leave run.log_to out."
        ) from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(record: Record) -> None:
        for name, value in record.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, record["update"])
        writer.flush()

    return send
