"""The training loop: plain PyTorch, one update after another, on one process or on many.

Every random choice follows from (seed, place in the training), never from what was drawn before. So weights,
optimiser, average and counters are all that a checkpoint holds, and a resumed run ends bit for bit as if it
had never stopped.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.utils import adaptive_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from evovit.data.images import Batch, Images
from evovit.errors import EvoViTError, check_count, in_one_line, shown
from evovit.model import ReducedViT
from evovit.recipe.tables import Recipe
from evovit.runtime.files import check_fit
from evovit.runtime.seeds import seed_for
from evovit.runtime.world import World
from evovit.train import state
from evovit.train.build import build_objective
from evovit.train.evaluate import autocast, evaluate
from evovit.train.optimizers import build_optimizers, set_rates
from evovit.train.records import Records
from evovit.train.sandwich import Sandwich, other_budgets


class Trainer:
    """A training of one recipe in one folder, resumed from the newest whole checkpoint there.

    Args:
        recipe: what to do; `images` and `model` are its data and its model.
        folder: of the run; gets checkpoints and records.
        world: this process among all.
        console: where progress is shown.
    """

    def __init__(
        self, recipe: Recipe, images: Images, model: nn.Module, folder: Path, world: World, console: Console
    ) -> None:
        run = recipe.run
        self.recipe, self.images, self.world = recipe, images, world
        self.model = model.to(world.device).train()
        self.accumulate = accumulation(recipe, world)
        self.shares = {"processes": world.size, "forwards": self.accumulate}  # of a batch
        self.per_epoch = images.updates
        self.total = run.epochs * self.per_epoch
        self.objective = build_objective(recipe, self.model, images.num_classes).to(world.device)
        if run.activation_checkpointing:
            self.objective.model.set_grad_checkpointing(True)  # type: ignore[operator]
        self.optimizers = build_optimizers(recipe, self.model)
        self.names = {id(p): name for name, p in self.model.named_parameters()}
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=run.precision == "fp16")
        own = self.model.state_dict() if run.ema_decay else {}
        self.average = {name: value.detach().clone() for name, value in own.items()}
        self.folder = folder / state.FOLDER
        self.records = Records(folder, self.total, run.log_to, console) if world.is_main else None
        self.update = self.skipped = self.skipped_in_row = 0
        self.best = -1.0
        self.reported: set[str] = set()  # paths of unreadable images
        self.totals = {"loss": 0.0, "counted": 0.0, "seconds": 0.0}  # of this epoch so far
        self.resume()
        self.goal: nn.Module = Sandwich(self.objective) if run.budgets else self.objective
        if run.compile:
            self.goal.compile()
        self.forward: nn.Module = self.goal
        if world.size > 1:
            self.forward = DistributedDataParallel(self.goal)

    def fit(self, stop: Sequence[object] = ()) -> bool:
        """Train to the end; False if there was something in `stop` before, as `stop_signal` puts it there."""
        run = self.recipe.run
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # another training may have run in this process
        if self.records:
            self.records.start(self.update)
            for prefix in ("", state.BEST):
                state.drop_older(self.folder, prefix)
        while self.update < self.total:
            epoch, first = divmod(self.update, self.per_epoch)
            self.set_epoch(epoch)
            batches = self.images.train(epoch, first, self.world, self.accumulate)
            for _ in range(first, self.per_epoch):
                asked = self.step(epoch, batches, bool(stop))
                if self.update % self.per_epoch == 0:
                    self.end_epoch(epoch)
                elif asked or (run.checkpoint_every and self.update % run.checkpoint_every == 0):
                    self.save()
                if asked and self.update < self.total:
                    return False
        self.set_epoch(run.epochs - 1)  # also where everything was done before
        return True

    def set_epoch(self, epoch: int) -> None:
        """Tell the method how far the training is: layer to stage, late start, ramp of the keep ratio."""
        run = self.recipe.run
        if not isinstance(self.model, ReducedViT):
            return
        self.model.method.set_progress(epoch / run.epochs)
        if run.reduce_from_epoch or run.reduce_ramp_epochs:
            since = epoch - run.reduce_from_epoch
            share = (since + 1) / (run.reduce_ramp_epochs + 1)
            self.model.method.set_reduction(0.0 if since < 0 else min(1.0, share))

    def step(self, epoch: int, batches: Iterator[Batch], stop: bool) -> bool:
        """Do one update, or skip it where loss or gradient is not finite; return whether to stop."""
        start = time.perf_counter()
        set_rates(self.recipe, self.optimizers, self.update, self.per_epoch)
        terms: dict[str, Tensor] = {}
        budgets = (other_budgets(self.recipe.run, self.update),) if self.recipe.run.budgets else ()
        for forward in range(self.accumulate):
            images, targets = next(batches)
            torch.manual_seed(seed_for(self.recipe.run.seed, self.update, forward, self.world.rank))
            last = forward == self.accumulate - 1
            with nullcontext() if last or self.forward is self.goal else self.forward.no_sync():  # type: ignore[operator]
                with autocast(self.recipe, self.world.device):
                    found = self.forward(self.move(images), self.move(targets), *budgets)
                self.scaler.scale(sum(found.values()) / self.accumulate).backward()
            terms = {name: terms.get(name, 0) + value.detach() for name, value in found.items()}
        parts = self.accumulate * self.world.size
        *means, asked = self.world.sum([*(float(value) / parts for value in terms.values()), float(stop)])
        loss = sum(means)
        norm = self.descend() if math.isfinite(loss) else self.skip()
        self.update += 1
        if math.isfinite(loss):
            self.totals["loss"] += loss
            self.totals["counted"] += 1
        self.totals["seconds"] += (seconds := time.perf_counter() - start)
        record = {"update": self.update, "epoch": epoch + 1, "loss": loss, "grad_norm": norm}
        record |= dict(zip(terms, means, strict=True)) | {"skipped": self.skipped, "seconds": seconds}
        record["rate"] = self.optimizers[-1].param_groups[0]["lr"]
        if self.records:
            self.records.step(record)
        if self.skipped_in_row >= self.recipe.run.max_skipped:
            raise EvoViTError(
                f"The loss or its gradient was not finite {self.skipped_in_row} updates in a row, up to "
                f"update {self.update}; the last good checkpoint is kept: lower learning_rate.base, set "
                "optimizer.clip_norm, or use precision bf16 or fp32."
            )
        return asked > 0

    def move(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to this process's device."""
        return tensor.to(self.world.device, non_blocking=True)

    def descend(self) -> float:
        """Clip, step the optimisers and the average; return the gradient's norm before clipping."""
        table = self.recipe.optimizer
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        norm = float(total)
        if not math.isfinite(norm):
            return self.skip()
        if table.adaptive_clip:
            adaptive_clip_grad(self.parameters, clip_factor=table.adaptive_clip)
        if table.clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, table.clip_norm, total)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        self.skipped_in_row = 0
        if self.recipe.run.ema_decay:
            self.follow(self.recipe.run.ema_decay**self.recipe.scale)
        return norm

    def skip(self) -> float:
        """Leave the weights alone and count it."""
        self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
        return math.nan

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the average towards the weights."""
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - decay)
            else:
                self.average[name].copy_(value)

    def end_epoch(self, epoch: int) -> None:
        """Test, record, save."""
        run, totals = self.recipe.run, self.totals
        record: dict[str, Any] = {"update": self.update, "epoch": epoch + 1}
        record["loss"] = totals["loss"] / max(1, totals["counted"])
        record["train_seconds"] = totals["seconds"]
        record["images_per_second"] = self.per_epoch * self.recipe.data.batch_size / totals["seconds"]
        start = time.perf_counter()
        if (epoch + 1) % run.test_every == 0 or epoch + 1 == run.epochs:
            accuracy = evaluate(self.model, self.images, self.recipe, self.world)
            record |= {"top1": accuracy.top1, "top5": accuracy.top5, "test_images": accuracy.images}
            record |= self.test_budgets()
            if run.ema_decay:
                record["ema_top1"] = self.test_average()
        record["seconds"] = totals["seconds"] + time.perf_counter() - start
        record |= {"skipped": self.skipped, "unreadable": sorted(self.images.unreadable)}
        if self.world.device.type == "cuda":
            record["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        self.totals = dict.fromkeys(totals, 0.0)
        if self.records:
            for path in [path for path in self.images.unreadable if path not in self.reported]:
                self.records.log(f"unreadable: {path} ({self.images.unreadable[path]})")
                self.reported.add(path)
            self.records.epoch(record, run.epochs)
        if record.get("top1", -1.0) > self.best:
            self.best = record["top1"]
            self.save(state.BEST)
        if run.keep_every and (epoch + 1) % run.keep_every == 0:
            self.save(state.COURSE)
        self.save()

    def test_budgets(self) -> dict[str, float]:
        """Return the top-1 at each budget below the largest."""
        model, found = self.model, dict[str, float]()
        if not isinstance(model, ReducedViT):
            return found
        for budget in model.budgets[1:]:
            model.budget = budget
            found[f"top1_at_{budget:g}"] = evaluate(model, self.images, self.recipe, self.world).top1
        if found:
            model.budget = model.budgets[0]
        return found

    def test_average(self) -> float:
        """Return the top-1 of the averaged weights."""
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        accuracy = evaluate(self.model, self.images, self.recipe, self.world)
        self.model.load_state_dict(own)
        return accuracy.top1

    def save(self, prefix: str = "") -> None:
        """Write a checkpoint of everything, or with a prefix of the weights alone."""
        if self.world.is_main:
            tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
            if not prefix:
                tensors |= state.optimizer_tensors(self.optimizers, self.names)
            if not prefix and self.recipe.run.ema_decay:
                tensors |= {f"ema.{name}": value for name, value in self.average.items()}
            plain: dict[str, Any] = {
                "update": self.update,
                "skipped": self.skipped,
                "skipped_in_row": self.skipped_in_row,
            }
            plain |= {"best": self.best, "totals": self.totals, "unreadable": self.images.unreadable}
            plain |= {"scaler": self.scaler.state_dict()} | self.shares
            state.write_numbered(self.folder, self.update, state.Checkpoint(tensors, plain), prefix)
        self.world.wait()

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        checkpoint, complaints = state.read_newest(self.folder)
        for complaint in complaints:
            if self.records:
                self.records.log(complaint)
        if checkpoint is None:
            return
        tensors, plain = checkpoint
        try:
            self.restore(tensors, plain)
        except EvoViTError:
            raise
        except Exception as error:  # of strangers, with right checksums
            raise EvoViTError(
                f"The checkpoint in {shown(self.folder)} does not fit this training ({in_one_line(error)}); "
                "restore it, or move the run away."
            ) from error
        before = {key: plain.get(key, now) for key, now in self.shares.items()}
        if self.records:
            self.records.log(f"going on after update {self.update} of {self.total}")
            if before != self.shares:
                then, now = (f"{x['processes']} x {x['forwards']}" for x in (before, self.shares))
                self.records.log(
                    f"an update was {then} forwards (processes x forwards of each) and is now {now}: the "
                    "weights will differ from those of an undisturbed run"
                )

    def restore(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Take over the state of a checkpoint; raises where it is none of this training."""
        what = f"The checkpoint in {shown(self.folder)}"
        for prefix, wanted in (("model.", True), ("ema.", bool(self.average))):
            if wanted:
                check_fit(self.model, state.part(tensors, prefix), what)
        self.model.load_state_dict(state.part(tensors, "model."))
        for name in self.average:
            self.average[name].copy_(tensors[f"ema.{name}"])
        state.restore_optimizers(self.optimizers, self.names, tensors)
        self.scaler.load_state_dict(plain["scaler"])
        self.update = check_count(f"{what}: update", plain["update"], 0, self.total)
        self.skipped = check_count(f"{what}: skipped", plain["skipped"], 0, self.update)
        self.skipped_in_row = check_count(f"{what}: skipped_in_row", plain["skipped_in_row"], 0, self.skipped)
        self.best = float(plain["best"])
        self.totals = {key: float(plain["totals"][key]) for key in self.totals}
        self.images.unreadable |= {str(path): str(why) for path, why in plain["unreadable"].items()}


def accumulation(recipe: Recipe, world: World) -> int:
    """Return the forwards of each process per update."""
    batch, each = recipe.data.batch_size, recipe.run.batch_per_device
    if each:
        if batch % (each * world.size):
            raise EvoViTError(
                f"data.batch_size is {batch}; with {world.size} processes of run.batch_per_device {each} "
                f"allowed is a multiple of {each * world.size}."
            )
        return batch // (each * world.size)
    if batch % world.size:
        raise EvoViTError(f"data.batch_size is {batch}; allowed is a multiple of the {world.size} processes.")
    return 1


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Collect SIGTERM instead of dying from it."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda kind, frame: received.append(kind))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
