"""What a run tells: meters, a progress bar or lines, and log.jsonl with a JSON line for each record."""

import errno
import fcntl
import json
import math
import os
import platform
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pcl import checkpoint, clustering
from pcl.distributed import available_cores, get_world_size, is_main, mean_over_ranks
from pcl.errors import RunError
from pcl.terminal import tell

PATIENCE = 15.0  # seconds to wait for a run that is about to leave an experiment's folder


def log(message: str) -> None:
    """Print a line from the main process only, beside a progress bar if there is one."""
    if is_main():
        tell(message)


class Meters:
    """Running means. Values stay on their device until a mean is asked for, so that no step waits for a GPU."""

    def __init__(self) -> None:
        self.steps = self._finite = self._weight = 0
        self._sums: dict[str, float] = {}
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []  # of the last steps

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Meters":
        """Restore meters from `state_over_ranks`."""
        meters = cls()
        meters.steps = meters._finite = meters._weight = state["steps"]
        meters._sums = {name: 0.0 + total for name, total in state["sums"].items()}
        if type(meters.steps) is not int or meters.steps < 1:
            raise ValueError("meters of no step")
        return meters

    def add(self, weight: int = 1, **values: Tensor) -> None:
        """Add a scalar for each name, the same names at each step; it counts `weight` times."""
        self._waiting.append((weight, {name: value.detach() for name, value in values.items()}))
        self.steps += 1
        if len(self._waiting) == 1000:  # enough memory for scalars
            self._add_up()

    def _add_up(self) -> None:
        if self._waiting:
            values = torch.stack([value for _, step in self._waiting for value in step.values()])
            for (weight, step), row in zip(self._waiting, values.view(len(self._waiting), -1).tolist(), strict=True):
                for name, value in zip(step, row, strict=True):
                    self._sums[name] = self._sums.get(name, 0.0) + weight * value
                self._finite += all(map(math.isfinite, row))
                self._weight += weight
            self._waiting = []

    @property
    def finite_steps(self) -> int:
        """Steps in which all values were finite numbers (waits for the device)."""
        self._add_up()
        return self._finite

    def means(self) -> dict[str, float]:
        """The mean of each value since the start (waits for the device)."""
        self._add_up()
        return {name: total / self._weight for name, total in self._sums.items()}

    def means_over_ranks(self) -> dict[str, float]:
        """`means` over all ranks; every rank must call it."""
        means = self.means()
        return dict(zip(means, mean_over_ranks(list(means.values())), strict=True))

    def state_over_ranks(self) -> dict[str, Any]:
        """Plain numbers for `from_state`; every rank must call it."""
        sums = {name: mean * self.steps for name, mean in self.means_over_ranks().items()}
        return {"steps": self.steps, "sums": sums}


def claim(folder: Path) -> Any:
    """Keep other runs out of an experiment's folder for as long as the returned file is open and this process lives.

    RunError if another run has it, and does not end within `PATIENCE`.
    """
    file, end = (folder / ".lock").open("a"), time.monotonic() + PATIENCE
    while True:
        try:
            # A lock of the process alone: the forked workers of a loader, which may outlive it by seconds, have no part in it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file  # a file system without locks
            if time.monotonic() > end:
                raise RunError(f"another run is writing into {folder}; wait for its end, or name another folder") from None
            time.sleep(0.2)


class RunLog:
    """Appends records to `folder/log.jsonl` from the main process; the first holds command, machine and the run's `args`.

    It locks the folder against other runs. `check` is called under the lock, before anything is written, since another run may
    have come first. TensorBoard's files in `board` also show what `metrics` is given.
    """

    def __init__(
        self, folder: Path, args: dict[str, Any], board: Path | None = None, check: Callable[[], None] = lambda: None
    ) -> None:
        self.path = folder / "log.jsonl"
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = claim(folder)
            check()
            if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):  # a killed process left half a line
                with self.path.open("a") as file:
                    file.write("\n")
        self.board = TensorBoard(board) if board else None
        self.write(command=[sys.executable, *sys.argv], args=args, machine=describe_machine(), versions=versions())

    def write(self, **record: Any) -> None:
        """Append one record, with the time (seconds since 1970)."""
        if is_main():
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"time": round(time.time(), 3), **record}, default=str) + "\n")
            except OSError as error:  # a lost line must not fail a run
                log(f"warning: {self.path} cannot be written ({error.strerror}); the run goes on")

    def metrics(self, epoch: int, **values: float) -> None:
        """Append an epoch's values (from 0), and show them in TensorBoard."""
        self.write(epoch=epoch, **values)
        if self.board:
            self.board.write(epoch, **values)


class TensorBoard:
    """Scalars and histograms by epoch for TensorBoard, in `folder`, from the main process."""

    def __init__(self, folder: Path) -> None:
        self._logger, self._folder = None, folder
        if is_main():
            # Its messages were generated for an old protobuf, which the newer one's Python version still takes.
            os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
            from tensorboard_logger import Logger  # slow to import

            Logger.__del__ = lambda _: None  # its file closes by itself, on a full disk without a traceback
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # The package names its file by the second, which two runs may share: it is made apart, then moved in.
                with tempfile.TemporaryDirectory(dir=folder) as apart:
                    self._logger = Logger(apart)
                    (made,) = Path(apart).iterdir()
                    made.rename(folder / f"{made.name}.{uuid.uuid4().hex[:8]}")
            except OSError as error:
                raise RunError(f"{folder} cannot be written: {error.strerror}") from error

    def write(self, epoch: int, **values: float) -> None:
        """Add a point to the curve of each value."""
        self._log("log_value", epoch, values)

    def histogram(self, epoch: int, **values: np.ndarray) -> None:
        """Add a histogram of each array, of at least one number."""
        self._log("log_histogram", epoch, values)

    def _log(self, method: str, epoch: int, values: dict[str, Any]) -> None:
        try:
            for name, value in values.items() if self._logger else ():
                getattr(self._logger, method)(name, value, epoch)
        except OSError as error:  # a lost point must not fail a run
            log(f"warning: {self._folder} cannot be written ({error.strerror}); the run goes on")


def track(items: Any, label: str, total: int | None = None) -> Iterator:
    """The items, behind a bar on the main process's terminal; without a terminal a line a minute. `total`: by default len."""
    total = len(items) if total is None else total
    bar = tqdm(items, label, total, leave=False, disable=None if is_main() else True)
    told = time.monotonic()
    for done, item in enumerate(bar, start=1):
        yield item
        if bar.disable and time.monotonic() - told > 60:
            told = time.monotonic()
            log(f"{label}  {done}/{total}")


@dataclass
class EpochLog:
    """Progress over the steps of an epoch: a bar on a terminal, elsewhere a line every `print_freq` steps."""

    label: str  # in front of each line, such as "epoch 3/200"
    steps: int  # in the epoch
    images: int  # in a step, over all ranks
    print_freq: int  # steps between two lines, and between two records
    record: RunLog
    epoch: int  # from 0, for the records
    first: int = 0  # steps that were done before, in a run that has been resumed
    waited: float = 0.0  # seconds for the loader

    def __post_init__(self) -> None:
        self.bar = tqdm(total=self.steps, initial=self.first, desc=self.label, leave=False, disable=None if is_main() else True)
        self.start = self.shown = time.monotonic()

    def batches(self, loader: Iterable) -> Iterator[tuple[int, Any]]:
        """(1, first batch), (2, second batch) and so on, without those done before; notes the time that the loader needs."""
        asked = time.monotonic()
        for number, batch in enumerate(loader, start=self.first + 1):
            self.waited += time.monotonic() - asked
            yield number, batch
            asked = time.monotonic()

    def step(self, done: int, meters: Meters) -> None:
        """Show and record the means after `done` steps, if that is due."""
        self.bar.update()
        now, due = time.monotonic(), done % self.print_freq == 0
        if not is_main() or (not due and (self.bar.disable or now - self.shown < 1)):
            return
        self.shown, means, seconds = now, meters.means(), now - self.start
        rate = (done - self.first) * self.images / seconds
        self.bar.set_postfix_str(f"{show(means)}, {rate:.0f} images/s")
        if due:
            times = {"data_seconds": self.waited, "compute_seconds": seconds - self.waited}
            self.record.write(epoch=self.epoch, step=done, images_per_second=rate, **times, **means)
        if due and self.bar.disable:
            speed = f"{rate:.0f} images/s ({self.waited / seconds:.0%} waiting for data)"
            left = (self.steps - done) * self.images / rate
            log(f"{self.label}  step {done}/{self.steps}  {show(means)}  {speed}  {left:.0f} s left")

    def close(self, meters: Meters, **more: float) -> dict[str, float]:
        """End the epoch: print and record its means over all ranks, with `more`. Every rank must call it."""
        self.bar.close()
        seconds = time.monotonic() - self.start
        means = meters.means_over_ranks()
        rate = (self.steps - self.first) * self.images / seconds
        times = {"data_seconds": self.waited, "compute_seconds": seconds - self.waited, "seconds": seconds}
        record = {**means, **more, "images_per_second": rate, **times}
        self.record.metrics(self.epoch, **record)
        log(f"{self.label}  {show(means)}  {rate:.0f} images/s  {seconds:.0f} s")
        return record


def write_result(path: Path | None, args: dict[str, Any], **results: Any) -> None:
    """Write an evaluation's settings, versions and results as JSON, from the main process; nothing without a path."""
    if path and is_main():
        settings = {name: str(value) for name, value in args.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"settings": settings, "versions": versions(), **results}, indent=1) + "\n"
        if path.exists() and not path.is_file():  # /dev/stdout
            path.write_text(content)
        else:
            checkpoint.write_whole(path.resolve(), lambda file: file.write(content.encode()))


def show(means: dict[str, float]) -> str:
    """Such as "loss 11.303  instance 6.880 (0.3 %)  prototype 4.423 (1.2 %)": losses, accuracies in percent."""
    parts = []
    for name, value in means.items():
        if name.startswith("loss"):
            accuracy = means.get("acc" + name.removeprefix("loss"))
            behind = "" if accuracy is None else f" ({100 * accuracy:.1f} %)"
            parts.append(f"{name.removeprefix('loss_')} {value:.3f}{behind}")
    return "  ".join(parts)


def versions() -> dict[str, str]:
    """Of Python and the packages that the results depend on."""
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy")}
    return {"python": platform.python_version(), **packages, "faiss": clustering.faiss.__version__}


def describe_machine() -> str:
    """Processor, accelerators and the number of processes, in one line."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() * torch.cuda.is_available())]
    names = ", ".join(f"{gpus.count(g)} x {g}" for g in dict.fromkeys(gpus)) or "no GPU"
    where = f"{platform.system()} {platform.machine()}, {available_cores()} of {os.cpu_count()} CPU cores, {names}"
    return f"{where}; {get_world_size()} process{'es' * (get_world_size() > 1)}"
