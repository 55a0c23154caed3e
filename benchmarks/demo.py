"""Pre-train PCL v2 on a small set of real images, and score its backbone against a random one and the bare pixels.

    python benchmarks/demo.py                  the images that come with the package (Fashion-MNIST)
    python benchmarks/demo.py --data DIR       DIR/train/<class>/ and DIR/val/<class>/ of your own

Options that are not the demo's own go to main_pcl.py. The settings were chosen on other images than the scored ones.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pcl and the scripts

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import main_pcl
from pcl.augment import center_view
from pcl.checkpoint import LAST_E_STEP, load, load_backbone
from pcl.cli import Parser, positive
from pcl.clustering import cluster
from pcl.distributed import available_cores, seed_everything
from pcl.features import extract_features
from pcl.figures import DPI, draw, nearest_images
from pcl.loader import IndexedFolder, make_loader
from pcl.metrics import cluster_agreement, knn_accuracy, one_shot_accuracy
from pcl.networks import backbone
from pcl.run.inputs import open_labeled
from pcl.run.logs import track
from pcl.samples import write_image_folder, write_voc
from pcl.terminal import SIGNALS, handle, leave_on_signals
from resnet8 import RESNET8, register

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = f"--arch {RESNET8} --mlp --aug-plus --cos --lr 0.12 --pcl-r 512 --moco-m 0.99 --temperature 0.2 --warmup-epoch 6"
SETTINGS += " --augment-on device --channels-last --monitor-freq 3 --seed 0 --nproc 1"


def get_parser() -> Parser:
    """The command line."""
    # fmt: off
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="images of your own, in train/<class>/ and val/<class>/")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="images, checkpoints, logs and results")
    parser.add_argument("--image-size", type=positive, default=28, metavar="PIXELS",
                        help="side of a view; time grows with its square")
    parser.add_argument("--epochs", type=positive, default=20, metavar="N", help="epochs of pre-training")
    # fmt: on
    return parser


def main() -> None:
    register()
    parser = get_parser()
    args, options = parser.parse_known_args()
    data, size = args.data or args.out / "images", args.image_size
    chosen = main_pcl.get_parser().parse_args([".", *SETTINGS.split(), *options])
    if chosen.arch != RESNET8 or chosen.small_stem:
        parser.error("--arch, --small-stem: the demo compares ResNet-8s; train other networks with main_pcl.py")
    if not args.data:
        write_image_folder(data)
    known, query = open_labeled(parser, data)
    if any(len(np.unique(images.labels)) < len(images.classes) for images in (known, query)):
        parser.error(f"--data {data}: a class folder holds no image; remove it from train/ and val/")

    run = args.out / time.strftime("run_%Y%m%d_%H%M%S")
    start = time.monotonic()
    clusters = sorted({max(2, len(known) // images) for images in (40, 20, 10)})
    shape = f"--image-size {size} --batch-size {min(64, len(known))} --num-cluster {','.join(map(str, clusters))}"
    lengths = f"--epochs {args.epochs} --save-freq {args.epochs}"
    pretrain(run, known, data, *SETTINGS.split(), *shape.split(), *lengths.split(), *options)
    minutes = (time.monotonic() - start) / 60
    checkpoint = max(run.glob("checkpoint_*.pth.tar"))

    write_voc(data, run / "voc", cell=size)
    weights = {
        "raw pixels": ["--pixels"],
        "random backbone": ["--random-init", "--arch", RESNET8],
        "PCL backbone": ["--pretrained", checkpoint],
    }
    rows = {name: evaluate(name.split()[0], options, data, run, size) for name, options in weights.items()}

    seed_everything(0)
    networks = {"raw pixels": nn.Flatten(), "random backbone": backbone(RESNET8), "PCL backbone": load_backbone(checkpoint)[0]}
    rows = {name: score(network, known, query, size) | rows[name] for name, network in networks.items()}
    print_table(rows)
    print(f"kNN: the weighted vote of the 200 nearest of {len(known)} labeled images, for {len(query)} others.")
    print("1 label: the nearest of one labeled image of each class; mean of 20 draws.")
    print(f"NMI: agreement of {len(query.classes)} k-means clusters with the classes, 100 if they are the same.")
    print("probe: accuracy of a linear classifier trained with all labels.")
    print("SVM, k: mean average precision on collages, with all labels and with k of each class (5 draws).")
    print(f"\nPre-trained for {args.epochs} epochs in {minutes:.1f} minutes: {checkpoint}")
    draw(run)
    print(f"Its log: {run / 'log.jsonl'}; every number: {run}/*.json; pictures: {run / 'figures'}")
    print(f"Its curves: {Path(os.path.relpath(sys.executable)).with_name('tensorboard')} --logdir {run / 'tensorboard'}")


def shown(script: str, *arguments: Any) -> list[str]:
    """The command that runs one of the project's scripts with the ResNet-8; prints it."""
    command = [sys.executable, str(ROOT / "benchmarks/resnet8.py"), script, *map(str, arguments)]
    print("\n$ python benchmarks/resnet8.py", *command[2:], flush=True)
    return command


def pretrain(run: Path, images: IndexedFolder, *arguments: Any) -> None:
    """Run main_pcl.py, and draw the prototypes as soon as there are any; end with its exit code if it fails."""
    picture = run / "figures/first_prototypes.png"
    process = subprocess.Popen(shown("main_pcl.py", *arguments, "--exp-dir", run))
    try:
        while process.poll() is None:
            if not picture.exists() and (run / LAST_E_STEP).exists():
                last = load(run / LAST_E_STEP)
                for granularity in last["granularities"][:1]:
                    picture.parent.mkdir(exist_ok=True)
                    nearest_images(granularity, last, images.with_transform(lambda image: image)).savefig(picture, dpi=DPI)
                    print(f"\nimages nearest to the first prototypes: {picture}", flush=True)
            time.sleep(1)
    finally:
        process.terminate()  # unless it has ended
        process.wait()
    if process.returncode != 0:
        sys.exit(process.returncode)


def evaluate(name: str, weights: list[Any], data: Path, run: Path, size: int) -> dict[str, float]:
    """Accuracy of the linear probe and mean average precision of the SVMs, in percent."""

    def run_here(script: str, *arguments: Any) -> None:  # spares the imports
        sys.argv = shown(script, *arguments)[2:]
        importlib.import_module(Path(script).stem).main()

    lr = 0.003 if name == "raw" else 0.3
    options = f"--image-size {size} --lr {lr} -b 64 --epochs 5 --schedule 3 4 --seed 0 --nproc 1 -p 999".split()
    output = run / f"probe_{name}.json"
    run_here("eval_cls_imagenet.py", *weights, *options, "--id", f"{run.name}_{name}", "--output", output, data)
    figures = {"probe": json.loads(output.read_text())["last"]["test_acc"]}
    common = ["--image-size", 2 * size, "--num-workers", available_cores(), run / "voc"]
    run_here("eval_svm_voc.py", *weights, *common, "--output", run / f"svm_{name}.json")
    run_here("eval_svm_voc.py", *weights, *common, "--output", run / f"low_shot_{name}.json", "--low-shot")
    figures["SVM"] = 100 * json.loads((run / f"svm_{name}.json").read_text())["full"]["map"]
    low_shot = json.loads((run / f"low_shot_{name}.json").read_text())["low_shot"]
    return figures | {f"k = {k}": 100 * result["mean"] for k, result in low_shot.items()}


def score(network: nn.Module, known: IndexedFolder, query: IndexedFolder, size: int) -> dict[str, float]:
    """kNN accuracy, accuracy with one label of each class, agreement of clusters and classes, in percent."""
    (x, y), (q, truth) = features_of(network, known, size), features_of(network, query, size)
    clustering = cluster(F.normalize(q, dim=1), len(query.classes), temperature=0.2)
    return {
        "kNN": 100 * knn_accuracy(x, y, q, truth),
        "1 label": 100 * one_shot_accuracy(x, y, q, truth),
        "NMI": 100 * cluster_agreement(clustering.im2cluster, truth)["nmi"],
    }


@torch.no_grad()
def features_of(network: nn.Module, images: IndexedFolder, size: int) -> tuple[Tensor, Tensor]:
    """(N, C) features of the center-cropped images and their (N,) labels, on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images.transform = center_view(size)
    loader = make_loader(images, range(len(images)), 256, workers=available_cores())
    features = extract_features(network.to(device), track(loader, "features"), len(images), device)
    return features.cpu(), torch.from_numpy(images.labels)


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """A column for each figure, empty where a row has none."""
    names = list(rows["PCL backbone"])
    print("\n" + " " * 16 + "".join(f"{name:>9s}" for name in names))
    for label, figures in rows.items():
        print(f"{label:16s}" + "".join(f"{figures[name]:9.1f}" if name in figures else " " * 9 for name in names))
    print()


if __name__ == "__main__":
    with leave_on_signals():
        handle(SIGNALS, signal.default_int_handler)  # as Ctrl-C, so that what was started is ended too
        with get_parser().telling(1):
            main()
