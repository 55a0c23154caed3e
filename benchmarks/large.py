"""Where do MoCo and PCL part? All images of CIFAR-10 or Fashion-MNIST, a ResNet-8, 100 epochs, scored every 10.

    python benchmarks/large.py                     train, one process at a time; goes on where it stopped
    python benchmarks/large.py --measure           score the checkpoints so far; training may run meanwhile
    python benchmarks/large.py --measure --probe   the linear probes too, which take longer than all the rest of it
    python benchmarks/large.py --report            table and figures once more, from what is there

The protocol is that of `replicate.py`, MoCo v2 against PCL v2, with these differences. All training images are there to
pre-train on, and their labels serve the scores. Nothing is chosen: the settings are the README's for 50,000 images. A new
E-step comes every 5 epochs, 1,000 steps (published: 5,000). Both methods are the same in warm-up, which is trained once. They
take turns of 10 epochs (`--save-freq`), so that their curves are of one length whenever time ends. The learning rate falls
towards epoch 100: the scores before it are of unfinished runs. The learning rate of the probe is the one chosen for MoCo on
5,000 images of Fashion-MNIST; for the random network and for pixels none was chosen, so that their probes may be too low.

Options that are not this script's own go to main_pcl.py.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from demo import ROOT
from pcl import checkpoint
from pcl.checkpoint import LAST_E_STEP
from pcl.cli import Parser
from pcl.figures import DPI
from pcl.plots import COLORS, MARKERS
from pcl.run.inputs import open_folder
from pcl.run.logs import describe_machine, versions
from pcl.terminal import SIGNALS, handle
from replicate import (
    BASELINES,
    MAIN,
    PROBES,
    Plan,
    Run,
    agreement_of_clusters,
    backbone_of,
    command_of,
    download,
    main_pcl,
    measure,
    probe,
    queue,
)
from replication_report import measures, results_in, spread, table
from resnet8 import RESNET8, register

# bfloat16 is left off: on a CPU without instructions for it, it is ten times slower.
PLAN = Plan("large", None, None, 100, {"lr": 0.03, "r": 4096, "clusters": "1250,2500,5000", "warmup": 10},
            "-b 256 --amp off --save-freq 10 --kmeans-every 5", arch=RESNET8)  # fmt: skip
METHODS = MAIN[0]
PROBE_LR = {"pixels": 0.003, "random": 0.3, "moco-v2": 0.3, "pcl-v2": 0.3}
PURITY_OF_RESNET18 = {"cifar10": 39.0, "fashion": 76.0}  # K = 250, one run each; most results do not hold it


def get_parser() -> Parser:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="images of your own, in train/<class>/ and val/<class>/")
    parser.add_argument("--dataset", choices=["cifar10", "fashion"], default="cifar10", help="what is fetched without --data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="a run of each method for each of these")
    parser.add_argument("--work", type=Path, metavar="DIR", help="images, checkpoints and logs; by default below replication/")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a JSON file for each checkpoint, table and figures; "
                        "by default below benchmarks/replication, with --data WORK/results")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--measure", action="store_true", help="score the checkpoints that are there, and stop")
    what.add_argument("--report", action="store_true", help="write table and figures from the scores, and stop")
    parser.add_argument("--probe", action="store_true", help="with --measure: the linear probes too")
    # fmt: on
    return parser


def main() -> int:
    parser = get_parser()
    args, args.extra = parser.parse_known_args()
    main_pcl.get_parser().parse_args([".", *args.extra])
    register()
    base = ROOT / "replication" / args.dataset
    args.work = (args.work or base / PLAN.folder).resolve()
    kept = args.work / "results" if args.data else ROOT / "benchmarks" / "replication" / args.dataset / PLAN.folder
    args.out = (args.out or kept).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        if not args.data and not (base / args.dataset).is_dir():
            with parser.telling(1):
                download(args.dataset, base / args.dataset)
        args.data = (args.data or base / args.dataset).resolve()
        for split in ("train", "val"):
            open_folder(parser, args.data, split)
        if not args.measure:
            return train_all(args)
        measure_all(args)
    report(args.out)
    return 0


def trained_runs(args: argparse.Namespace) -> list[Run]:
    """MoCo and PCL with each seed."""
    return queue(replace(PLAN, rows=((METHODS, args.seeds),)), {})


def settings_of(run: Run, args: argparse.Namespace) -> argparse.Namespace:
    """Of main_pcl.py."""
    return main_pcl.get_parser().parse_args([str(args.data), *command_of(run, PLAN, args.extra).split()])


def checkpoint_of(run: Run, epochs: int, args: argparse.Namespace) -> Path:
    """The one that is kept after so many epochs."""
    return args.work / "runs" / run.name / f"checkpoint_{epochs - 1:04d}.pth.tar"


def train_all(args: argparse.Namespace) -> int:
    """Both methods in turns, the seeds one after the other."""
    handle(SIGNALS, lambda number, _: sys.exit(128 + number))  # `train` ends what it has started
    runs = trained_runs(args)
    settings = settings_of(runs[-1], args)  # of PCL
    stops = [*range(settings.save_freq, settings.epochs, settings.save_freq), settings.epochs]
    for seed in args.seeds:
        moco, pcl = (run for run in runs if run.seed == seed)
        for epochs in stops:
            train(moco, epochs, args)
            if epochs <= settings.warmup_epoch:
                copy, made = checkpoint_of(pcl, epochs, args), checkpoint_of(moco, epochs, args)
                copy.parent.mkdir(parents=True, exist_ok=True)
                if not copy.exists():
                    shutil.copy(made, copy.with_suffix(".part"))
                    copy.with_suffix(".part").rename(copy)
            else:
                train(pcl, epochs, args)
    return 0


def train(run: Run, epochs: int, args: argparse.Namespace) -> None:
    """Train until the checkpoint of that epoch is there, and stop; the clusters at that time are described beside it."""
    goal, start = checkpoint_of(run, epochs, args), time.monotonic()
    folder = goal.parent
    if not goal.exists():
        command = [sys.executable, str(ROOT / "benchmarks" / "resnet8.py"), "main_pcl.py", str(args.data)]
        command += [*command_of(run, PLAN, args.extra).split(), "--seed", str(run.seed), "--exp-dir", str(folder)]
        last = epochs == settings_of(run, args).epochs
        # A session of its own: Ctrl-C is for this process, which lets it save.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            while process.poll() is None and (last or not goal.exists()):
                time.sleep(0.5)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        if not goal.exists():
            sys.exit(process.returncode or 1)
        print(f"{run.name}  epoch {epochs}  {(time.monotonic() - start) / 60:.1f} min", flush=True)
    described, e_step = folder / f"clusters_{epochs - 1:04d}.json", folder / LAST_E_STEP
    if e_step.exists() and not described.exists() and (epoch := checkpoint.load(e_step)["epoch"]) < epochs:
        described.write_text(json.dumps({"before_epoch": epoch + 1, "clusters": agreement_of_clusters(e_step)}))


def measure_all(args: argparse.Namespace) -> None:
    """Score each checkpoint and the baselines, unless that is done."""
    runs = trained_runs(args) + queue(replace(PLAN, rows=((BASELINES, range(1)),)), {})
    for run in runs:
        if run.method in BASELINES:
            (args.work / "runs" / run.name).mkdir(parents=True, exist_ok=True)
            score(run, 0, backbone_of(run, PLAN, args, {}), args)
            continue
        settings = settings_of(run, args)
        for epochs in range(1, settings.epochs + 1):
            trained = checkpoint_of(run, epochs, args)
            if trained.exists() and not (run.method == METHODS[1] and epochs <= settings.warmup_epoch):  # that one is MoCo's
                network, arch = checkpoint.load_backbone(trained)
                score(run, epochs, (["--pretrained", trained, "-a", arch], network), args)


def score(run: Run, epochs: int, backbone: tuple[list[Any], Any], args: argparse.Namespace) -> None:
    """Write OUT/<run>_e<epochs>.json."""
    name = f"{run.name}_e{epochs:03d}"
    file, folder, start = args.out / f"{name}.json", args.work / "scores" / name, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    result = json.loads(file.read_text()) if file.exists() else {}
    figures = result.get("figures") or measure(backbone[1], args.data, run.seed)
    if args.probe:
        measured = replace(run, data=str(args.data))
        for percent in PROBES:
            figures[f"probe {percent} %"] = probe(backbone[0], percent, PROBE_LR[run.method], measured, args, folder)
    elif result:
        return
    described = checkpoint_of(run, epochs, args).with_name(f"clusters_{epochs - 1:04d}.json")
    result = {"run": name, "method": run.method, "seed": run.seed, "epoch": epochs, "data": "final"}
    result["options"] = command_of(run, PLAN, args.extra)
    result |= json.loads(described.read_text()) if described.exists() else {}
    result |= {"figures": figures, "seconds": time.monotonic() - start, "machine": describe_machine(), "versions": versions()}
    part = args.out / f".{name}.part"
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.rename(file)
    print(f"{name}  kNN {figures['kNN']:.2f} %", flush=True)


Curves = dict[str, dict[int, list[dict[str, Any]]]]  # of each method and epoch the results, one for each seed


def curves_of(out: Path) -> Curves:
    """From the JSON files; PCL begins with MoCo's warm-up."""
    curves: Curves = {}
    for result in sorted(results_in(out).values(), key=lambda result: (result["epoch"], result["seed"])):
        curves.setdefault(result["method"], {}).setdefault(result["epoch"], []).append(result)
    moco, pcl = (curves.get(method, {}) for method in METHODS)
    if moco and pcl:
        curves[METHODS[1]] = {epoch: found for epoch, found in moco.items() if epoch < min(pcl)} | pcl
    return curves


def report(out: Path) -> None:
    """Write table.md, curves.png and, beside the results of 5,000 images, purity.png."""
    curves = curves_of(out)
    names = measures({name: {0: result["figures"]} for name, result in results_in(out).items()})
    rows = []
    for method, curve in curves.items():
        for epoch, found in curve.items():
            means = [np.mean([r["figures"][n] for r in found if n in r["figures"]] or [np.nan]) for n in names]
            clusters = [clustering_of(r) for r in found if "clusters" in r]
            means += [np.mean([c[n] for c in clusters]) if clusters else np.nan for n in ("purity", "ami")]
            rows.append([method, epoch, len(found), *("" if np.isnan(mean) else f"{mean:.1f}" for mean in means)])
    head = ["method", "epochs", "seeds", *names, "purity", "AMI of it"]
    title = (
        "Scores on the test set along the epochs, and agreement of the classes with the clusters of middle size, in percent. "
        "Each is the mean of the seeds that have it."
    )
    (out / "table.md").write_text("\n".join([title, "", *table(head, rows)]) + "\n")
    draw_curves(curves, names).savefig(out / "curves.png", dpi=DPI)
    draw_gains(gains_of(out)).savefig(out / "purity.png", dpi=DPI)
    print((out / "table.md").read_text() + f"\n{out}/table.md, curves.png, purity.png")


def clustering_of(result: dict[str, Any]) -> dict[str, float]:
    """The agreement with the classes of the middle granularity: by the rule of proportion, 20 images in a cluster."""
    found = sorted(result["clusters"].items(), key=lambda item: int(item[0].removeprefix("K = ")))
    return found[len(found) // 2][1]


def draw_curves(curves: Curves, names: list[str]) -> Figure:
    """Each score along the epochs, and the purity of PCL's clusters; a line for each seed."""
    figure = Figure(figsize=(16, 3.6 * -(-(len(names) + 1) // 4)), layout="constrained")
    grid = figure.subplots(-(-(len(names) + 1) // 4), 4, squeeze=False).flat
    for name, axes in zip([*names, "purity of clusters"], grid, strict=False):
        for method, color, marker in zip((METHODS[1], METHODS[0], *BASELINES), COLORS, MARKERS, strict=False):
            lines: dict[int, list[tuple[int, float]]] = {}
            for epoch, found in curves.get(method, {}).items():
                for result in found:
                    scores = result["figures"] if name in names else clustering_of(result) if "clusters" in result else {}
                    if value := scores.get(name.removesuffix(" of clusters")):
                        lines.setdefault(result["seed"], []).append((epoch, value))
            for number, points in enumerate(lines.values()):
                label = "" if number else method
                if method in BASELINES:
                    axes.axhline(points[0][1], color=color, linestyle="--", label=label)
                else:
                    axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
        axes.set(title=name, xlabel="epochs", ylabel="%")
        axes.grid(alpha=0.3)
    for axes in grid:
        axes.remove()
    figure.axes[0].legend(fontsize=8)
    return figure


Gains = dict[str, list[tuple[float, dict[str, list[float]]]]]  # of each series purities, and paired differences of each score


def gains_of(out: Path) -> Gains:
    """PCL minus MoCo and the purity of its clusters: on 5,000 images, with the classes for clusters, and along this run."""
    gains: Gains = {}

    def add(series: str, pcl: list[dict], moco: list[dict], purity: float | None = None) -> None:
        by_seed = {result["seed"]: result["figures"] for result in moco}
        pcl = [result for result in pcl if result["seed"] in by_seed]
        purity = purity or float(np.mean([clustering_of(result)["purity"] for result in pcl]))
        pairs = [(result["figures"], by_seed[result["seed"]]) for result in pcl]
        few = [name for name in pairs[0][0] if name.startswith("k = ")]
        differences = {"kNN": [a["kNN"] - b["kNN"] for a, b in pairs]}
        differences["few labels (mean of k)"] = [float(np.mean([a[n] - b[n] for n in few])) for a, b in pairs]
        gains.setdefault(series, []).append((purity, differences))

    replication = ROOT / "benchmarks" / "replication"
    for name in PURITY_OF_RESNET18:
        for folder, network in ((name, "ResNet-18"), (f"{name}/resnet8", "ResNet-8")):
            found: dict[str, list[dict]] = {}
            for result in results_in(replication / folder).values():
                if result["data"] == "final":
                    found.setdefault(result["method"], []).append(result)
            if not {"pcl-v2", "moco-v2"} <= found.keys():  # `make replicate` is at work on them
                continue
            add(f"{name}, 5,000 images, {network}", found["pcl-v2"], found["moco-v2"],
                PURITY_OF_RESNET18[name] if network == "ResNet-18" else None)  # fmt: skip
            if oracle := found.get("pcl-v2-oracle"):
                add(f"{name}, 5,000 images, {network}, the classes for clusters", oracle, found["moco-v2"], 100.0)
    for folder in dict.fromkeys([*(replication / name / PLAN.folder for name in PURITY_OF_RESNET18), out]):
        moco, pcl = (curves_of(folder).get(method, {}) for method in METHODS)
        for epoch in sorted(moco.keys() & pcl.keys()):
            if "clusters" in pcl[epoch][0]:
                add(f"{folder.parent.name}, all images, ResNet-8, along the epochs", pcl[epoch], moco[epoch])
    return gains


def draw_gains(gains: Gains) -> Figure:
    """What PCL is ahead of MoCo over how pure its clusters are, with 95 % intervals where there are three seeds or more."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    scores = ["kNN", "few labels (mean of k)"]
    for axes, score in zip(figure.subplots(1, 2), scores, strict=True):
        for (series, points), color, marker in zip(gains.items(), COLORS, MARKERS, strict=False):
            purity, spreads = [p for p, _ in points], [spread(differences[score]) for _, differences in points]
            bars = [half if seeds > 2 else 0 for _, _, half, seeds in spreads]
            axes.errorbar(purity, [mean for mean, *_ in spreads], bars, color=color, marker=marker, capsize=3, label=series)
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set(title=score, xlabel="purity of the clusters (%), about 20 images in each", ylabel="PCL minus MoCo (points)")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    sys.exit(main())
