"""Does prototype contrast help on small data? MoCo against PCL, v1 and v2, on 5,000 photographs of CIFAR-10.

    make replicate                                     all of the next three: hours; goes on where it stopped
    python benchmarks/replicate.py                     CIFAR-10
    python benchmarks/replicate.py --dataset fashion   the second set, Fashion-MNIST, v2 alone, with the settings of CIFAR-10
    python benchmarks/replicate.py --resnet8           a network of 0.08 instead of 11 million weights, v2 alone, on either set
    python benchmarks/replicate.py --data DIR          on DIR/train/<class>/ and DIR/val/<class>/ of your own
    python benchmarks/replicate.py --quick             one seed, v2 alone, nothing chosen, on 500 images: minutes
    python benchmarks/replicate.py --gpu-run           all 50,000 images, 200 epochs, small stem: for a GPU
    python benchmarks/replicate.py --report            table and figure once more, from what is there

The protocol, fixed before PCL was first scored on the test set:

- Data: of each class of DIR/train, drawn once, 500 images to pre-train on and 500 others as the validation split, on which
  settings are chosen. DIR/val is the test set: it is for the final scores alone.
- Methods: MoCo, which is the warm-up for the whole run, and PCL, all else equal: same seeds, same order of images. PCL's
  loss has a second term and so a larger gradient: by the ratio of the mean gradient norms of PCL's loss and of InfoNCE alone
  (at the end of the run that chose the warm-up), the learning rate of MoCo is raised in its runs "-lr", that of PCL lowered.
- Choosing, by kNN, one seed: for MoCo v2 the learning rate, then r; PCL keeps them. For PCL v2 the granularities, then the
  warm-up. v1 takes the same. The first value of a grid within one standard error of the best, 0.7 points or less, is taken; a
  grid was extended where its best value stood at an end and had beaten the values before it by more. The learning rate of the
  probe: for pixels, random network and MoCo; PCL takes MoCo's.
- Comparison: five seeds of each method. Ablations of PCL v2: three seeds, paired with those of PCL v2. Fashion-MNIST: MoCo
  and PCL v2 with the settings of CIFAR-10, and PCL v2 with coarser clusters, since its classes are easier to tell apart.
- Three rows came in after PCL had been found no better than MoCo: "pcl-v2-coarse", "moco-v2-stem", and "pcl-v2-oracle", which
  takes the classes for clusters and so shows what the prototype term can do at its best (`oracle.py`).
- The ResNet-8 came in last, since a pilot outside this project had seen a gain on Fashion-MNIST with a tiny network. It goes
  through the same choices on each set's validation split. For it the learning rates go on to 0.12; no choice fell on that.
- Measures, on the frozen backbone: kNN (k = 200, temperature 0.1, whole images) and low-shot linear SVMs (mean average
  precision, k = 1, 2, 4, 8, 16) are primary. Linear probe with 1 %, 10 % and all labels; agreement (NMI, AMI) of ten k-means
  clusters of the test images with their classes. The labels that serve are those of the images to pre-train on. Of PCL also
  the agreement of the clusters of the last E-step with the classes (in runs since the ResNet-8).
- Everything that was run is reported: mean and standard deviation over seeds, paired differences with 95 % intervals.

A run is a process of its own, as many at once as there are cores. It writes OUT/<run>.json when it is finished; what it prints
is in WORK/logs. Options that are not this script's own go to main_pcl.py.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision import transforms

from demo import ROOT
from pcl import checkpoint, networks
from pcl.augment import Augmentation
from pcl.checkpoint import LAST_E_STEP
from pcl.cli import Parser, positive
from pcl.clustering import Clustering, cluster
from pcl.distributed import available_cores, seed_everything
from pcl.features import extract_features
from pcl.loader import EpochSampler, IndexedFolder, make_loader
from pcl.losses import instance_logits, prototype_loss
from pcl.metrics import cluster_agreement, knn_accuracy
from pcl.run import kept
from pcl.run.inputs import open_folder
from pcl.run.logs import describe_machine, versions
from pcl.samples import write_image_folder
from replication_report import report, results_in
from resnet8 import RESNET8, register

sys.path.insert(0, str(ROOT))  # the scripts

import eval_svm_voc
import main_pcl

ARCH = "resnet18"
SIZE = 32
IMAGES = 500  # of each class to pre-train on, and as many others to choose settings on
CHOICE_SEED = 100  # no seed of the comparison
SEEDS, ABLATION_SEEDS = range(5), range(3)

# What is chosen, one after the other: by which method, and from what. The others stand at START meanwhile.
GRIDS: dict[str, tuple[str, list[Any]]] = {
    "lr": ("moco-v2", [0.03, 0.06, 0.015, 0.0075, 0.00375, 0.12]),
    "r": ("moco-v2", [512, 2048, 256]),
    "clusters": ("pcl-v2", ["125,250,500", "50,100,200", "250,500,1000", "500,1000,2000"]),
    "warmup": ("pcl-v2", [5, 2, 10]),
}
# By the choices of CIFAR-10 (benchmarks/replication/cifar10/choices.json), for the second set.
CHOSEN: dict[str, Any] = {"lr": 0.0075, "r": 512, "clusters": "250,500,1000", "warmup": 5}
CHOSEN |= {"probe-pixels": 0.0003, "probe-random": 0.3, "probe-moco": 0.003}
START: dict[str, Any] = {"lr": 0.03, "r": 512, "clusters": "125,250,500", "warmup": 5, "ratio": 1.0}
PROBE_GRID = [0.0003, 0.003, 0.03, 0.3, 3.0]
PROBE_START = {"probe-pixels": 0.003, "probe-random": 0.03, "probe-moco": 0.03}

EPOCHS = 20
BASE = f"--image-size {SIZE} -b 64 -j 0 --nproc 1 --moco-m 0.99 --augment-on device --amp bf16 --channels-last"
BASE += " --monitor-freq 0 --resume auto"
VERSIONS = {"v1": "--schedule 12 16", "v2": "--mlp --aug-plus --cos"}
VARIANTS = {
    "": "",
    "lr": "",  # the other step is given as --lr
    "bn8": "--bn-splits 8",
    "mask": "--mask-duplicates",
    "every5": "--kmeans-every 5",
    "half": "--proto-weight 0.5",
    "coarse": "--num-cluster 50,100,200",  # given after the chosen ones
    "oracle": "--num-cluster 10 --mask-duplicates",  # by oracle.py, which takes the classes for clusters
    "stem": "--small-stem",
}
BASELINES = ["pixels", "random"]
MAIN = [["moco-v2", "pcl-v2"], ["moco-v1", "pcl-v1"], ["moco-v2-lr", "pcl-v2-lr"], ["moco-v1-lr"]]
ABLATIONS = ["pcl-v2-bn8", "moco-v2-bn8", "pcl-v2-mask", "pcl-v2-every5", "pcl-v2-half", "pcl-v2-coarse", "pcl-v2-oracle"]
STEM = ["moco-v2-stem", "pcl-v2-stem"]  # five times the work: one seed, last
PAIRS = [(f"pcl-{v}{a}", f"moco-{v}{b}") for v in VERSIONS for a, b in (("", ""), ("-lr", ""), ("", "-lr"))]
STEPS = [name for methods in MAIN for name in methods if name.endswith("-lr")]
PAIRS += [(name, name.rpartition("-")[0]) for name in STEPS + ABLATIONS + STEM]
PAIRS += [("pcl-v2-bn8", "moco-v2-bn8"), ("pcl-v2-stem", "moco-v2-stem"), ("pcl-v2-coarse", "moco-v2")]
PAIRS += [("pcl-v2-oracle", "moco-v2")]

PROBES = {1: "--epochs 200 --schedule 120 160", 10: "--epochs 40 --schedule 24 32", 100: "--epochs 10 --schedule 6 8"}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
STOPPED = threading.Event()


@dataclass(frozen=True)
class Run:
    """One row of the log: a method trained and measured with one seed."""

    name: str
    method: str  # such as "moco-v2-lr", "pixels", or "probe-pixels", which chooses a learning rate of the probe
    seed: int
    options: str = ""  # of main_pcl.py, besides those of the plan
    probe_lr: float = 0.0  # 0: not probed
    ready: bool = True  # whether all that it needs is chosen
    data: str = "final"  # or "choose", which holds the validation split in place of the test set
    backbone: str = ""  # the run whose backbone it takes


@dataclass(frozen=True)
class Plan:
    """What is run on how much."""

    folder: str  # below those of the data set
    images: int | None  # of each class to pre-train on; None: all
    test_images: int | None
    epochs: int
    start: dict[str, Any] | None = None  # settings, where none are chosen
    options: str = ""  # of main_pcl.py
    probe: bool = True
    rows: Sequence[tuple[Sequence[str], Sequence[int]]] = (((*BASELINES, *MAIN[0]), range(1)),)  # methods, their seeds
    arch: str = ARCH


FULL = Plan("", IMAGES, None, EPOCHS,
            rows=[*((part, SEEDS) for part in (BASELINES, *MAIN)), (ABLATIONS, ABLATION_SEEDS), (STEM, range(1))])  # fmt: skip
QUICK = Plan("quick", 50, 50, 3, {"lr": 0.03, "r": 128, "clusters": "12,25,50", "warmup": 1})
GPU = Plan("gpu", None, None, 200, {"lr": 0.06, "r": 4096, "clusters": "1250,2500,5000", "warmup": 20},
           "-b 128 --small-stem -j 8 --monitor-freq 10")  # fmt: skip
SECOND = Plan("", IMAGES, None, EPOCHS, CHOSEN, rows=(((*BASELINES, *MAIN[0], "pcl-v2-coarse"), SEEDS),))
TINY = Plan("resnet8", IMAGES, None, EPOCHS, arch=RESNET8,
            rows=[(part, SEEDS) for part in (BASELINES, *MAIN) if "v1" not in part[0]])  # fmt: skip


def get_parser() -> Parser:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="images of your own, in train/<class>/ and val/<class>/")
    parser.add_argument("--dataset", choices=["cifar10", "fashion"], default="cifar10", help="what is fetched without --data")
    parser.add_argument("--work", type=Path, metavar="DIR", help="images, weights and logs; by default below replication/")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a JSON file for each run, the table and the figure; "
                        "by default below benchmarks/replication, with --data or --quick WORK/results")
    parser.add_argument("--jobs", type=positive, metavar="N", help="runs at once; by default one a core, with --gpu-run one")
    parser.add_argument("--no-probe", action="store_true", help="leave the linear probe, a third of the time, for another call")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="minutes instead of hours")
    size.add_argument("--gpu-run", action="store_true", help="one seed of MoCo v2 and PCL v2 on all images, for a GPU")
    size.add_argument("--resnet8", action="store_true", help="MoCo v2 and PCL v2 with a ResNet-8 (benchmarks/resnet8.py)")
    parser.add_argument("--report", action="store_true", help="write table and figure from the finished runs, and stop")
    parser.add_argument("--run", metavar="NAME", help=SUPPRESS)  # what each of the processes is given
    # fmt: on
    return parser


def main() -> int:
    parser = get_parser()
    args, args.extra = parser.parse_known_args()
    main_pcl.get_parser().parse_args([".", *args.extra])
    plan = SECOND if args.dataset == "fashion" and not args.data else FULL
    plan = QUICK if args.quick else GPU if args.gpu_run else TINY if args.resnet8 else plan
    plan = replace(plan, probe=not args.no_probe)
    if args.resnet8:
        register()
    name = args.data.resolve().name if args.data else "samples" if args.quick else args.dataset
    fetched = (args.work or ROOT / "replication" / name) / name  # one for all plans
    args.work = (args.work or ROOT / "replication" / name / plan.folder).resolve()
    kept = ROOT / "benchmarks" / "replication" / name / plan.folder
    args.out = (args.out or (args.work / "results" if args.data or args.quick else kept)).resolve()
    args.jobs = args.jobs or (1 if args.gpu_run else available_cores())
    args.out.mkdir(parents=True, exist_ok=True)
    if args.run:
        (run,) = (run for run in queue(plan, results_in(args.out)) if run.name == args.run)
        os.chdir(args.work)
        # All processes of a run are told to stop at once. The script that is running saves and ends, and this one after it.
        signal.signal(signal.SIGTERM, lambda *_: STOPPED.set())
        carry_out(run, plan, args)
        return 0
    failed: list[str] = []
    if not args.report:
        prepare(parser, plan, args, fetched.resolve())
        failed, waiting = work_off(plan, args, lambda run: [sys.executable, __file__, "--run", run.name, *sys.argv[1:]])
    results = results_in(args.out)
    settings, chosen = decide(results)
    order = [run.method for run in queue(FULL, {}) if run.data == "final"]
    report(args.out, results, {name: settings[name] for name in settings if name in chosen}, order, PAIRS)
    if failed:
        print(f"failed, see {args.work}/logs: {', '.join(failed)}; {len(waiting)} others need them", file=sys.stderr)
    return int(bool(failed))


def prepare(parser: Parser, plan: Plan, args: Namespace, fetched: Path) -> None:
    """Make WORK/choose and WORK/final, folders of links to the images, unless they are there.

    The images are those of --data, or else are fetched into `fetched` first. Results that OUT holds already, such as those that
    come with the code, are moved to WORK/earlier: they are not of this work folder and are made again.
    """
    source = args.work / "source.txt"
    if not args.data:
        args.data = fetched
        if not args.data.is_dir():
            with parser.telling(1):
                write_image_folder(args.data) if args.quick else download(args.dataset, args.data)
    folders = [open_folder(parser, args.data, split) for split in ("train", "val")]
    if any(f.classes != folders[0].classes or len(np.unique(f.labels)) < max(5, len(f.classes)) for f in folders):
        parser.error(f"--data {args.data}: train/ and val/ need the same class folders, five at least, with images in each")
    wanted = f"{args.data.resolve()}, {plan.images or 'all'} images of each class"
    wanted += "" if plan.arch == ARCH else f", {plan.arch}"
    if source.exists():
        if source.read_text() != wanted:
            parser.error(f"--work {args.work} holds {source.read_text()}; name another folder")
        return
    generator = np.random.default_rng(0)
    names = {Path(folder.path(i)): name for folder in folders for i, name in enumerate(folder.names())}
    for label, name in enumerate(folders[0].classes):
        train, test = ([Path(folder.path(i)) for i in np.flatnonzero(folder.labels == label)] for folder in folders)
        drawn, test = generator.permutation(train), test[: plan.test_images]
        count = len(drawn) if plan.images is None else min(plan.images, len(drawn) // 2)
        parts = {"final/train": drawn[:count], "choose/val": drawn[count : 2 * count], "final/val": test}
        for part, files in (parts | {"choose/train": drawn[:count]}).items():
            folder = args.work / part / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for file in files:
                (folder / names[file].partition("/")[2].replace("/", "_")).symlink_to(file.resolve())
    earlier = args.work / "earlier"
    for result in results_in(args.out).values():
        earlier.mkdir(exist_ok=True)
        shutil.move(args.out / f"{result['run']}.json", earlier)
    if earlier.exists():
        print(f"results of other runs were moved from {args.out} to {earlier}", flush=True)
    source.write_text(wanted)


def download(dataset: str, folder: Path) -> None:
    """Fetch CIFAR-10 or Fashion-MNIST and write it as an image folder of PNG files.

    Fashion-MNIST is taken from Debian's package dataset-fashion-mnist where that is installed.
    """
    if dataset == "fashion" and DEBIAN.is_dir():
        raw = folder.with_name("downloads") / "FashionMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for file in DEBIAN.glob("*.gz"):
            (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    kind = {"cifar10": torchvision.datasets.CIFAR10, "fashion": torchvision.datasets.FashionMNIST}[dataset]
    part = folder.with_name(f"{folder.name}.part")
    for split, train in (("train", True), ("val", False)):
        images = kind(folder.with_name("downloads"), train=train, download=True)
        for name in images.classes:
            (part / split / name.replace("/", " or ")).mkdir(parents=True, exist_ok=True)
        for number, (image, label) in enumerate(images):
            image.save(part / split / images.classes[label].replace("/", " or ") / f"{number:05d}.png")
    part.rename(folder)


def decide(results: dict[str, dict]) -> tuple[dict[str, Any], set[str]]:
    """The settings that the finished runs speak for, and which of them stand: others keep their start."""
    settings = START | PROBE_START
    chosen: set[str] = set()
    for field, (method, grid) in GRIDS.items():
        score = {value: results.get(choosing_name(method, settings | {field: value})) for value in grid}
        if not all(score.values()):
            break
        settings[field] = first_of_the_best({value: score[value]["figures"]["kNN"] for value in grid})
        chosen.add(field)
    if "warmup" in chosen:
        settings["ratio"] = results[choosing_name("pcl-v2", settings)]["gradient_ratio"]
        chosen.add("ratio")
    for name in PROBE_START:
        if name in results:
            accuracy = results[name]["accuracy"]
            settings[name] = max(PROBE_GRID, key=lambda lr: accuracy[f"{lr:g}"])
            chosen.add(name)
    return settings, chosen


def first_of_the_best(scores: dict[Any, float], images: int = 10 * IMAGES) -> Any:
    """The first value whose accuracy in percent is within one standard error of the best one's, over so many images."""
    best = max(scores.values())
    error = (best * (100 - best) / images) ** 0.5
    return next(value for value, score in scores.items() if score >= best - error)


def choosing_name(method: str, settings: dict[str, Any]) -> str:
    """Of the run that stands for these settings."""
    name = f"choose_{method}_lr{settings['lr']:g}_r{settings['r']}"
    return f"{name}_k{settings['clusters'].replace(',', '-')}_w{settings['warmup']}" if method.startswith("pcl") else name


def queue(plan: Plan, results: dict[str, dict]) -> list[Run]:
    """All runs in their order. Those that need something that is not chosen yet are not ready."""
    settings, chosen = decide(results)
    if not plan.probe:
        settings, chosen = settings | dict.fromkeys(PROBE_START, 0.0), chosen | {*PROBE_START}
    if plan.start:
        settings, chosen = settings | plan.start, {*settings}
    runs = []
    for number, (field, (method, grid)) in enumerate(() if plan.start else GRIDS.items()):
        ready = chosen.issuperset(list(GRIDS)[:number])
        tried = dict(settings) if ready else START  # a name that stands for a run to come
        for value in grid:
            tried = tried | {field: value} | {later: START[later] for later in list(GRIDS)[number + 1 :]}
            options = options_of(method, tried)
            runs.append(Run(choosing_name(method, tried), method, CHOICE_SEED, options, ready=ready, data="choose"))
    for name in PROBE_START if plan.probe and not plan.start else ():
        source = choosing_name("moco-v2", settings) if name == "probe-moco" else ""
        runs.append(Run(name, name, CHOICE_SEED, ready=not source or "r" in chosen, data="choose", backbone=source))
    for methods, seeds in plan.rows:
        runs += [final_run(method, seed, settings, chosen) for seed in seeds for method in methods]
    unique: dict[str, Run] = {}
    for run in runs:
        unique.setdefault(run.name, run)  # two grids have the run in common that one has chosen and the other begins with
    return list(unique.values())


def final_run(method: str, seed: int, settings: dict[str, Any], chosen: set[str]) -> Run:
    """One that is measured on the test set."""
    kind = "moco" if method[:4] in ("moco", "pcl-") else method
    needs = {f"probe-{kind}"}
    if kind == "moco":
        needs |= {"lr", "r"} | ({"clusters", "warmup"} if method.startswith("pcl") else set())
        needs |= {"ratio"} if method.endswith("-lr") else set()
    options = options_of(method, settings) if kind == "moco" else ""
    return Run(f"{method}_seed{seed}", method, seed, options, settings[f"probe-{kind}"], needs <= chosen)


def options_of(method: str, settings: dict[str, Any]) -> str:
    """Of main_pcl.py for this method."""
    contrast, version, *variant = method.split("-")
    factor = settings["ratio"] if contrast == "moco" else 1 / settings["ratio"]
    lr = settings["lr"] * (factor if variant == ["lr"] else 1)
    parts = [VERSIONS[version], f"--lr {lr:.4g} --pcl-r {settings['r']}"]
    parts.append("--num-cluster {clusters} --warmup-epoch {warmup}".format(**settings) if contrast == "pcl" else "")
    parts.append(VARIANTS["".join(variant)])
    return " ".join(filter(None, parts))


def command_of(run: Run, plan: Plan, extra: list[str]) -> str:
    """All options of main_pcl.py but for its folders and the seed; none where nothing is trained."""
    if not run.options:
        return ""
    warm_up = f"--warmup-epoch {plan.epochs}" if run.method.startswith("moco") else ""
    epochs = f"--epochs {plan.epochs} --save-freq {plan.epochs}"
    parts = [f"-a {plan.arch}", BASE, epochs, plan.options, warm_up, run.options, *extra]
    command = " ".join(parts).split()
    if warm_up and extra:  # whatever they say of --epochs and --warmup-epoch, MoCo is warm-up to the end
        command += ["--warmup-epoch", str(main_pcl.get_parser().parse_args(["DIR", *command]).epochs)]
    return " ".join(command)


def is_done(run: Run, result: dict[str, Any] | None, plan: Plan, extra: list[str]) -> bool:
    """Whether nothing is left to do of it.

    Args:
        run: the run.
        result: what it has left, perhaps of other options; with --no-probe the probes may still be to do.
        plan, extra: say with `command_of` how it is to be trained.
    """
    if result is None or result.get("options", "") != command_of(run, plan, extra):
        return False
    if not run.probe_lr:
        return True
    return result.get("probe_lr") == run.probe_lr and all(f"probe {percent} %" in result["figures"] for percent in PROBES)


def work_off(plan: Plan, args: Namespace, command: Callable[[Run], list[str]]) -> tuple[list[str], list[str]]:
    """Do all runs that are not done, several at once; the names of those that failed, and of those that needed one of them."""
    (args.work / "logs").mkdir(parents=True, exist_ok=True)
    threads = max(1, available_cores() // args.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    failed: list[str] = []
    minutes: list[float] = []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    for number, handler in before.items():
        signal.signal(number, interrupt if handler is not signal.SIG_IGN else handler)  # nohup ignores one
    try:
        while True:
            results = results_in(args.out)
            run_of = {run.name: run for run in queue(plan, results) if run.name not in failed}
            left = [run for run in run_of.values() if not is_done(run, results.get(run.name), plan, args.extra)]
            ready = [run for run in left if run.ready and run.name not in running]
            for run in ready[: args.jobs - len(running)]:
                with (args.work / "logs" / f"{run.name}.log").open("a") as log:
                    # A session of its own, so that all that it starts can be ended with it.
                    process = subprocess.Popen(command(run), stdout=log, stderr=log, env=environment, start_new_session=True)
                running[run.name] = (process, time.monotonic())
            if not running:
                return failed, [run.name for run in left]
            while all(process.poll() is None for process, _ in running.values()):
                time.sleep(0.2)
            for name, (process, start) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    minutes.append((time.monotonic() - start) / 60)
                    left = [run for run in left if run.name != name]
                    result = results_in(args.out).get(name)
                    if process.returncode or not is_done(run_of[name], result, plan, args.extra):
                        failed.append(name)
                    rest = f"{len(left)} left, about {np.mean(minutes) * len(left) / args.jobs / 60:.1f} h"
                    print(f"{name}  {minutes[-1]:.1f} min  {outcome(process.returncode, result)}  {rest}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {', '.join(running)}", flush=True)
        raise SystemExit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process, _ in running.values():
            os.killpg(process.pid, signal.SIGTERM)  # main_pcl.py saves what it has
        for process, _ in running.values():
            process.wait()


def outcome(code: int, result: dict[str, Any] | None) -> str:
    """In a few words."""
    if code or not result:
        return f"failed with exit code {code}"
    return f"kNN {result['figures']['kNN']:.2f} %" if "figures" in result else f"accuracy {result['accuracy']}"


def carry_out(run: Run, plan: Plan, args: Namespace) -> None:
    """Train and measure, and write the result."""
    folder, file, start = args.work / "runs" / run.name, args.out / f"{run.name}.json", time.monotonic()
    trained = command_of(run, plan, args.extra)
    result = json.loads(file.read_text()) if file.exists() else {}
    used = folder / "options.txt"
    if result.get("options", trained) != trained or (used.exists() and used.read_text() != trained):
        shutil.rmtree(folder, ignore_errors=True)  # what was begun was begun with other settings
        result = {}
    result = result or {"run": run.name, "method": run.method, "seed": run.seed, "options": trained}
    folder.mkdir(parents=True, exist_ok=True)
    used.write_text(trained)
    clock = folder / "seconds.txt"
    before = float(clock.read_text()) if clock.exists() else 0.0
    try:
        weights, network = backbone_of(run, plan, args, result)
        if run.method.startswith("probe-"):
            result["accuracy"] = {f"{lr:g}": probe(weights, 100, lr, run, args, folder) for lr in PROBE_GRID}
        else:
            if "figures" not in result:
                result["figures"] = measure(network, args.work / run.data, run.seed, knn_only=run.data == "choose")
            if run.probe_lr:
                result["probe_lr"] = run.probe_lr
                for percent in PROBES:
                    result["figures"][f"probe {percent} %"] = probe(weights, percent, run.probe_lr, run, args, folder)
    finally:
        clock.write_text(str(before + time.monotonic() - start))
    result |= {"data": run.data, "seconds": float(clock.read_text())}
    result |= {"machine": describe_machine(), "versions": versions()}
    part = args.out / f".{run.name}.part"
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.rename(file)
    for path in folder.glob("*.pth.tar"):  # 10 GB over all runs; the backbone stays
        path.unlink()


def backbone_of(run: Run, plan: Plan, args: Namespace, result: dict[str, Any]) -> tuple[list[Any], nn.Module]:
    """The frozen network of a run, trained first if it must be, and the options that name it to the scripts."""
    kind = run.method.removeprefix("probe-")
    folder = args.work / "runs" / (run.backbone or run.name)
    file = folder / "backbone.pth"
    if kind == "pixels":
        return ["--pixels"], nn.Flatten()
    if kind == "random":
        seed_everything(run.seed)
        checkpoint.save(file, networks.backbone(plan.arch, "--small-stem" in plan.options).state_dict())
    elif not run.backbone and "figures" not in result:
        command = [str(args.work / run.data), "--exp-dir", str(folder), *result["options"].split(), "--seed", str(run.seed)]
        run_script("benchmarks/oracle.py" if kind.endswith("oracle") else "main_pcl.py", *command)
        trained = kept.newest(folder)
        checkpoint.save(file, checkpoint.load_backbone(trained)[0].state_dict())
        if kind.startswith("pcl") and run.data == "choose":
            result["gradient_ratio"] = gradient_ratio(command, trained)
        if kind.startswith("pcl") and (last := trained.with_name(LAST_E_STEP)).exists():
            result["clusters"] = agreement_of_clusters(last)
    return ["--pretrained", file, "-a", plan.arch], checkpoint.load_backbone(file, plan.arch)[0]


def run_script(name: str, *arguments: Any) -> None:
    """Run one of the project's scripts, unless this run is to stop."""
    if STOPPED.is_set():
        sys.exit(128 + signal.SIGTERM)
    script(*(["benchmarks/resnet8.py"] if RESNET8 in arguments else []), name, *arguments)


def script(name: str, *arguments: Any) -> None:
    """Run a script of this project, shown as a command line; end with its exit code if it fails."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    print("\n$ python", name, *command[2:], flush=True)
    if (code := subprocess.run(command).returncode) != 0:
        sys.exit(code)


def agreement_of_clusters(e_step: Path) -> dict[str, dict[str, float]]:
    """How far the clusters of the last E-step are the classes of the images that it clustered.

    Returns:
        of "K = 250" and so on "nmi", "ami" and "purity" (pcl/metrics.py), in percent.
    """
    state = checkpoint.load(e_step)
    found = {len(g["prototypes"]): cluster_agreement(g["im2cluster"], state["labels"]) for g in state["granularities"]}
    return {f"K = {k}": {name: 100 * value for name, value in agreement.items()} for k, agreement in found.items()}


def gradient_ratio(command: list[str], trained: Path, batches: int = 20) -> float:
    """Mean norm of the gradient of InfoNCE and the prototype term together, over that of InfoNCE alone.

    Args:
        command: the options of main_pcl.py by which the model was trained.
        trained: its checkpoint, beside which its last E-step lies.
        batches: to take the mean over.
    """
    args = main_pcl.get_parser().parse_args(command)
    seed_everything(args.seed)
    views = Augmentation(args.image_size, args.aug_plus, on_device=True)
    images = IndexedFolder(args.data / "train", views.two_views, args.seed, views.read)
    loader = make_loader(images, EpochSampler(images, args.seed), args.batch_size, workers=0, drop_last=True)
    model, device = main_pcl.make_model(args), torch.device("cpu")
    weights = checkpoint.load(trained)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    granularities = checkpoint.load(trained.with_name(LAST_E_STEP))["granularities"]
    clusterings = [Clustering(g["im2cluster"], g["prototypes"], g["concentration"]) for g in granularities]
    parameters = list(model.encoder_q.parameters())

    def norm(loss: Tensor) -> float:
        slopes = torch.autograd.grad(loss, parameters, retain_graph=True)
        return float(torch.stack([slope.norm() for slope in slopes]).norm())

    norms = []
    for pair, index in islice(loader, batches):
        q, k, queue = model(*(views.apply(view, device) for view in pair))
        instance = F.cross_entropy(*instance_logits(q, k, queue, args.temperature))
        prototype, _ = prototype_loss(q, index, clusterings, args.pcl_r, args.mask_duplicates)
        norms.append([norm(instance + args.proto_weight * prototype), norm(instance)])
    both, alone = np.mean(norms, axis=0)
    return float(both / alone)


def probe(weights: list[Any], percent: int, lr: float, run: Run, args: Namespace, folder: Path) -> float:
    """Accuracy of the linear probe after its last epoch, in percent."""
    output = folder / f"probe_{percent}_{lr:g}.json"
    if not output.exists():
        options = f"--image-size {SIZE} -b 64 -j 0 --nproc 1 -p 999 --lr {lr} --percent {percent} {PROBES[percent]}"
        # It writes two checkpoints an epoch, which nobody needs here: 20 GB over a run's probes.
        scratch = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        os.chdir(scratch)
        try:
            data = args.work / run.data
            run_script("eval_cls_imagenet.py", *weights, *options.split(), "--seed", run.seed, "--output", output, data)
        finally:
            os.chdir(args.work)
            shutil.rmtree(scratch)
    return json.loads(output.read_text())["last"]["test_acc"]


def measure(network: nn.Module, data: Path, seed: int, knn_only: bool = False) -> dict[str, float]:
    """kNN accuracy, low-shot mAP and agreement of clusters and classes, in percent."""
    (x, y), (q, truth) = features_of(network, data / "train"), features_of(network, data / "val")
    figures = {"kNN": 100 * knn_accuracy(x, y, q, truth)}
    if knn_only:
        return figures
    classes = [str(label) for label in range(int(y.max()) + 1)]
    parts = []
    for features, label in ((x, y), (q, truth)):
        parts += [(features / (features.norm(dim=1, keepdim=True) + 1e-5)).numpy()]  # as eval_svm_voc.features_of
        parts += [2 * F.one_hot(label, len(classes)).numpy() - 1]
    # Another run has the other core.
    options = Namespace(seed=seed, cost=[0.5], folder=False, ignore_difficult=False, num_workers=0)
    low_shot = eval_svm_voc.low_shot(eval_svm_voc.Features(*parts, classes), options)
    figures |= {f"k = {k}": 100 * result["mean"] for k, result in low_shot.items()}
    clustering = cluster(F.normalize(q, dim=1), len(classes), temperature=0.2, seed=seed)
    agreement = cluster_agreement(clustering.im2cluster, truth)
    return figures | {"NMI": 100 * agreement["nmi"], "AMI": 100 * agreement["ami"]}


@torch.no_grad()
def features_of(network: nn.Module, root: Path) -> tuple[Tensor, Tensor]:
    """(N, C) features of the whole images and their (N,) labels, on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = transforms.Compose([transforms.Resize((SIZE, SIZE)), transforms.PILToTensor()])
    images = IndexedFolder(root, whole)
    loader = make_loader(images, range(len(images)), 256, workers=0)
    return extract_features(network.to(device), loader, len(images), device).cpu(), torch.from_numpy(images.labels)


if __name__ == "__main__":
    sys.exit(main())
