"""Kill a run of two processes with SIGKILL at random moments, resume it each time, and compare what it ends with.

    python benchmarks/faults.py [--kills 100] [--seed 0]

A run trains a small network on images that come with the package and saves after every step. Three in ten kills come while its
processes start, four while it trains, and three wait for the next save and hit it. Each kind is done as often as --kills says:
all processes are killed at once, or the launcher, one of the two ranks or a loader's worker alone. The others must then end by
themselves within a minute, and leave no name in /dev/shm or the folder for temporary files. Each time, every file that bears a
checkpoint's name must open, and none may be older than before. Runs that come to their end must have the weights of the
undisturbed run to the bit; then a new one is begun. A launcher is forked from this process, which spares it the imports.
"""

import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it: a process with threads must not be forked

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pcl and the scripts

import torch
from torch import Tensor

import main_pcl  # noqa: F401 - for the runs that are forked from here
from pcl.checkpoint import NAMES, load
from pcl.cli import Parser, natural, positive
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
TRAINS = "epochs: "  # what a run prints before its first epoch
VICTIMS = ("all", "launcher", "rank 0", "rank 1", "worker")


def start(images: Path, exp_dir: Path) -> Any:
    """The process of the run, or of the rest of it; what it prints goes into a file beside its folder."""
    (images.parent / "tmp").mkdir(exist_ok=True)
    exp_dir.with_suffix(".out").touch()
    process = multiprocessing.get_context("fork").Process(target=run, args=(images, exp_dir))
    process.start()
    return process


def run(images: Path, exp_dir: Path) -> None:
    """`python main_pcl.py`, with temporary files of its own."""
    os.environ["TMPDIR"] = str(images.parent / "tmp")
    command = [str(ROOT / "main_pcl.py"), str(images), *SETTINGS.split(), "--exp-dir", str(exp_dir)]
    lead(command, exp_dir.with_suffix(".out"))


def lead(command: list[str], out: Path) -> None:
    """Run a script in this process, as leader of those that it starts; what they print goes into a file."""
    os.setsid()
    with out.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would the run
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


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


def strike(process: Any, victim: str) -> bool:
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


def wait_until(process: Any, condition: Callable[[], bool], seconds: float) -> None:
    """Until the condition holds, the process has ended or time is up."""
    end = time.monotonic() + seconds
    while process.is_alive() and not condition() and time.monotonic() < end:
        process.join(0.002)


def wait_for_end(process: Any) -> None:
    """Nothing of the run may be left after a minute."""
    end = time.monotonic() + 60
    while processes_of(process.pid):
        if time.monotonic() > end:
            raise SystemExit(f"processes {processes_of(process.pid)} are left after a minute")
        process.join(0.05)
    process.join()


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
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU must not be forked
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=positive, default=100, metavar="N", help=f"kills of each: {', '.join(VICTIMS)}")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the moments and the victims")
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
        undisturbed, out = start(root / "images", root / "undisturbed"), root / "undisturbed.out"
        wait_until(undisturbed, lambda: TRAINS in out.read_text(), 3600)
        starting = time.monotonic() - begin
        undisturbed.join()
        if undisturbed.exitcode != 0:
            raise SystemExit(out.read_text())
        training = time.monotonic() - begin - starting
        expected = load(root / "undisturbed" / LAST_EPOCH)
        print(f"undisturbed run: {starting:.1f} s until it trains, then {training:.1f} s", flush=True)

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
            out = exp_dir.with_suffix(".out")
            out.write_text("")
            process, struck = start(root / "images", exp_dir), False
            if to_kill:
                moment = generator.choices(["starting", "training", "saving"], [3, 4, 3])[0]
                if moment == "starting":
                    process.join(generator.uniform(0, starting))
                else:
                    wait_until(process, lambda: TRAINS in out.read_text(), 600)  # noqa: B023
                    process.join(generator.uniform(0, 0.3 * training))
                if moment == "saving":
                    wait_until(process, lambda: is_saving(exp_dir), 10)  # noqa: B023
                inside += is_saving(exp_dir)
                while process.is_alive() and not (struck := strike(process, to_kill[-1])):
                    process.join(0.05)
            if struck:
                killed[to_kill.pop()] += 1
            else:
                process.join()
            wait_for_end(process)
            left |= set(names_left(root / "images")) - names
            reached = progress_of(exp_dir)
            if reached < before:
                raise SystemExit(f"run {number} fell back from epoch and step {before} to {reached}")
            before = reached
            total = sum(killed.values())
            if not struck:  # it ended by itself
                if process.exitcode not in (0, PREEMPTED):
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
