"""Kill a run of two processes with SIGKILL at random moments, resume it each time, and compare what it ends with.

    python benchmarks/faults.py [--kills 100] [--seed 0]

A run trains a small network on images that come with the package and saves after every step; three in ten kills wait for the
next save and hit it. Each kind is done as often as --kills says: all processes are killed at once, or the launcher, one of the
two ranks or a loader's worker alone. The others must then end by themselves within a minute, and leave no name in /dev/shm or
the folder for temporary files. Each time, every file that bears a checkpoint's name must open, and none may be older than
before. Runs that come to their end must have the weights of the undisturbed run to the bit; then a new one is begun.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pcl.checkpoint import NAMES, load
from pcl.errors import PREEMPTED
from pcl.samples import write_image_folder

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "-a shufflenet_v2_x0_5 --image-size 32 -b 80 --pcl-r 160 --low-dim 16 --num-cluster 20,40 --warmup-epoch 1 --epochs 10 "
)
SETTINGS += (
    "--mlp --aug-plus --cos --lr 0.003 --moco-m 0.9 -j 2 --seed 1 --nproc 2 --save-steps 1 --monitor-freq 0 --resume auto"
)
LAST_EPOCH = "checkpoint_0009.pth.tar"
VICTIMS = ("all", "launcher", "rank 0", "rank 1", "worker")


def start(images: Path, exp_dir: Path) -> subprocess.Popen:
    """The run, or the rest of it."""
    command = [sys.executable, str(ROOT / "main_pcl.py"), str(images), *SETTINGS.split(), "--exp-dir", str(exp_dir)]
    temporary = images.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    with exp_dir.with_suffix(".out").open("a") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)


def processes_of(session: int) -> list[int]:
    """Ids of the living processes of a session, in the order in which they were started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, *fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == session and state != "Z":
            found.append((int(fields[18]), int(folder.name)))  # ticks since the machine started
    return [pid for _, pid in sorted(found)]


def children(parent: int, session: int, word: bytes) -> list[int]:
    """Ids of a process's children whose command line has the word, but for Python's own helper."""
    found = []
    for pid in processes_of(session):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            own = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if own == parent and word in line and b"resource_tracker" not in line:
            found.append(pid)
    return found


def ranks_of(launcher: int) -> list[int]:
    """Ids of its two training processes, as far as they have been started."""
    return children(launcher, launcher, b"spawn_main")


def strike(process: subprocess.Popen, victim: str) -> bool:
    """Kill, if the victim is there yet."""
    session = process.pid
    ranks = ranks_of(session)
    workers = [pid for rank in ranks for pid in children(rank, session, b"")]
    victims = {"all": processes_of(session), "launcher": [session], "worker": workers[-1:]}
    victims |= {f"rank {number}": [rank] for number, rank in enumerate(ranks)}
    for pid in victims.get(victim, []):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(victims.get(victim))


def names_left(images: Path) -> list[str]:
    """What lies in shared memory and among the runs' temporary files."""
    return sorted(str(path) for folder in (Path("/dev/shm"), images.parent / "tmp") for path in folder.glob("*"))


def is_saving(exp_dir: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(exp_dir.glob(".checkpoint*.part"))


def wait_for_end(process: subprocess.Popen) -> None:
    """Nothing of the run may be left after a minute."""
    end = time.monotonic() + 60
    while processes_of(process.pid):
        if time.monotonic() > end:
            raise SystemExit(f"processes {processes_of(process.pid)} are left after a minute")
        process.poll()
        time.sleep(0.05)
    process.wait()


def progress_of(exp_dir: Path) -> tuple[int, int]:
    """(epoch, step) of the newest checkpoint; every one of them must open and hold finite weights."""
    newest = (0, 0)
    for path in exp_dir.glob(NAMES):
        state = load(path)
        if not all(bool(value.isfinite().all()) for value in state["state_dict"].values()):
            raise SystemExit(f"{path}: weights that are not finite")
        newest = max(newest, (state["epoch"], state.get("steps", 0)))
    return newest


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="how often to kill each of: " + ", ".join(VICTIMS))
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments and the victims")
    args = parser.parse_args()
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_image_folder(root / "all")
        for path in sorted((root / "all" / "train").glob("*/*.png"))[::10]:  # 400 images
            target = root / "images" / "train" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        begin = time.monotonic()
        undisturbed = start(root / "images", root / "undisturbed")
        if undisturbed.wait() != 0:
            raise SystemExit((root / "undisturbed.out").read_text())
        whole = time.monotonic() - begin
        expected = load(root / "undisturbed" / LAST_EPOCH)
        print(f"undisturbed run: {whole:.1f} s", flush=True)

        killed: Counter[str] = Counter()
        left: set[str] = set()
        finished = inside = number = 0
        before, names = (0, 0), set(names_left(root / "images"))
        to_kill = [victim for victim in VICTIMS for _ in range(args.kills)]
        generator.shuffle(to_kill)
        while to_kill or before > (0, 0):
            exp_dir = root / f"run_{number}"
            for part in exp_dir.glob(".checkpoint*.part"):  # of the last kill; a run would write over it
                part.unlink()
            process = start(root / "images", exp_dir)
            wait = generator.uniform(0, 0.4 * whole) if to_kill else 3600.0
            in_save = generator.random() < 0.3
            try:
                code = process.wait(wait)
            except subprocess.TimeoutExpired:
                end = time.monotonic() + 10
                while in_save and not is_saving(exp_dir) and process.poll() is None and time.monotonic() < end:
                    time.sleep(0.001)
                inside += is_saving(exp_dir)
                while not (struck := strike(process, to_kill[-1])) and process.poll() is None:
                    time.sleep(0.05)
                code = None if struck else process.wait()
                if struck:
                    killed[to_kill.pop()] += 1
            wait_for_end(process)
            left |= set(names_left(root / "images")) - names
            reached = progress_of(exp_dir)
            if reached < before:
                raise SystemExit(f"run {number} fell back from epoch and step {before} to {reached}")
            before = reached
            total = sum(killed.values())
            if code is not None:  # it ended by itself
                if code not in (0, PREEMPTED):
                    raise SystemExit(exp_dir.with_suffix(".out").read_text()[-3000:])
                final = load(exp_dir / LAST_EPOCH)
                if not same(final["state_dict"], expected["state_dict"]):
                    raise SystemExit(f"run {number} ended with other weights than the undisturbed one")
                finished, number, before = finished + 1, number + 1, (0, 0)
                print(f"run {finished} came to its end with the weights of the undisturbed one, to the bit", flush=True)
            elif total % 10 == 0:
                print(f"{total} kills ({dict(killed)}), {inside} inside a save; at epoch and step {reached}", flush=True)
        counts = ", ".join(f"{victim} {count}" for victim, count in sorted(killed.items()))
        print(f"{sum(killed.values())} kills ({counts}), {inside} of them while a checkpoint was being written:")
        print(
            f"no file torn, no step lost that was saved, no process left after a minute; {len(left)} names left", *sorted(left)
        )
        print(f"{finished} runs ended with the undisturbed run's weights to the bit")


if __name__ == "__main__":
    main()
