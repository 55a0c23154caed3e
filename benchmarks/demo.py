"""Pre-train PCL v2 on a small set of real images, and score its backbone against a random one and the bare pixels.

    python benchmarks/demo.py                  the images that come with the package (Fashion-MNIST)
    python benchmarks/demo.py --data DIR       DIR/train/<class>/ and DIR/val/<class>/ of your own

The settings were chosen on other images than the scored ones.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl.builder import extract_features
from pcl.checkpoint import backbone, load_backbone
from pcl.cli import Parser, open_folder
from pcl.clustering import cluster
from pcl.distributed import available_cores, seed_everything
from pcl.loader import IndexedFolder, center_view, make_loader
from pcl.logs import track
from pcl.metrics import cluster_agreement, knn_accuracy, one_shot_accuracy
from pcl.samples import write_image_folder

ROOT = Path(__file__).resolve().parent.parent
ARCH, BATCH, R = "resnet18", 64, 512
EPOCHS, WARMUP = 24, 6


def get_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="images of your own, in train/<class>/ and val/<class>/")
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="images, checkpoints and log")
    parser.add_argument(
        "--image-size", type=int, default=32, metavar="PIXELS", help="side of a view; time grows with its square"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help="epochs of pre-training")
    return parser


def main() -> None:
    parser = get_parser()
    args, options = parser.parse_known_args()  # what is left goes to main_pcl.py, after the demo's own settings
    data = args.data or args.out / "images"
    if not args.data:
        write_image_folder(data)
    num_images, num_classes = len(open_folder(parser, data, "train")), len(open_folder(parser, data, "val").classes)
    start = time.monotonic()
    run = args.out / time.strftime("run_%Y%m%d_%H%M%S")
    pretrain(data, run, num_images, args, options)
    checkpoint = max(run.glob("checkpoint_*.pth.tar"))
    minutes = (time.monotonic() - start) / 60

    seed_everything(0)
    networks = {
        "raw pixels": lambda images: images.flatten(1),
        "random backbone": backbone(ARCH),
        "PCL backbone": load_backbone(checkpoint),
    }
    rows = {name: score(network, data, args.image_size, num_classes) for name, network in networks.items()}
    print(f"\n{'on the images of ' + str(data / 'val'):40s} {'kNN':>8s} {'1 label/class':>14s} {'cluster NMI':>12s}")
    for name, (knn, one_shot, agreement) in rows.items():
        print(f"{name:40s} {100 * knn:6.1f} % {100 * one_shot:12.1f} % {agreement:12.2f}")
    print(f"\nkNN: weighted vote of the 20 nearest of {num_images} labelled images.")
    print("1 label/class: the nearest of one labelled image of each class; mean of 20 draws.")
    print(f"cluster NMI: agreement of {num_classes} k-means clusters with the classes; 1 if they are the same.")
    print(f"\nPre-trained for {args.epochs} epochs in {minutes:.1f} minutes: {checkpoint}; its log is {run / 'log.jsonl'}")


def pretrain(data: Path, run: Path, num_images: int, args: argparse.Namespace, options: list[str]) -> None:
    """main_pcl.py with settings for a few thousand small images."""
    clusters = ",".join(map(str, sorted({max(2, num_images // size) for size in (20, 10, 5)})))
    command = [
        *(sys.executable, str(ROOT / "main_pcl.py"), str(data), "--exp-dir", str(run), "--mlp", "--aug-plus", "--cos"),
        *("--arch", ARCH, "--image-size", str(args.image_size), "--batch-size", str(BATCH), "--pcl-r", str(R)),
        *(
            "--temperature",
            "0.1",
            "--num-cluster",
            clusters,
            "--epochs",
            str(args.epochs),
            "--warmup-epoch",
            str(WARMUP),
            "--lr",
            "0.03",
        ),
        *("--moco-m", "0.99", "--seed", "0", "--save-freq", str(args.epochs), "--nproc", "1", *options),
    ]
    print("$", " ".join(command), flush=True)
    if (code := subprocess.run(command).returncode) != 0:
        sys.exit(code)


def score(network, data: Path, image_size: int, num_classes: int) -> tuple[float, float, float]:
    """kNN accuracy, accuracy with one label of each class, agreement of k-means clusters with the classes."""
    (known, known_label), (query, label) = (features_of(network, data / split, image_size) for split in ("train", "val"))
    clustering = cluster(F.normalize(query, dim=1), num_classes, temperature=0.2)
    return (
        knn_accuracy(known, known_label, query, label),
        one_shot_accuracy(known, known_label, query, label),
        cluster_agreement(clustering.im2cluster, label),
    )


@torch.no_grad()
def features_of(network, folder: Path, image_size: int) -> tuple[Tensor, Tensor]:
    """(N, C) features of the center-cropped images and their (N,) labels, on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(network, torch.nn.Module):
        network = network.to(device)
    images = IndexedFolder(folder, center_view(image_size))
    loader = make_loader(images, range(len(images)), 256, workers=available_cores())
    features = extract_features(network, track(loader, f"features of {folder}", len(loader)), len(images), device)
    return features.cpu(), torch.from_numpy(images.labels)


if __name__ == "__main__":
    main()
