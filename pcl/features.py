"""Compute the features of a data set with a frozen network, and evaluate them: kNN, clusters, logistic regression.

    python -m pcl.features CHECKPOINT DIR                                   features of the backbone, kNN
    python -m pcl.features CHECKPOINT DIR --momentum --num-cluster 25000    momentum features, kNN and AMI as in the paper
    python -m pcl.features CHECKPOINT DIR --logistic --out my_features      logistic regression, scored on DIR/val/<class>/

The folder of --out then holds the features, the names of their images, a table of each clustering, and results.json.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pcl import cli
from pcl.augment import center_view, normalize
from pcl.checkpoint import CheckpointError, check_finite, load, load_backbone, trained_at, weights_of
from pcl.distributed import available_cores, gather_interleaved, get_rank, get_world_size
from pcl.errors import RunError
from pcl.evaluation import check, claim, evaluate
from pcl.loader import IndexedFolder, make_loader
from pcl.networks import architectures
from pcl.terminal import leave_on_signals, tell

# Letters: N images, n of them on this rank, B batch, C features.


def extract_features(
    network: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]], num_images: int, device: torch.device
) -> Tensor:
    """Features of a whole data set, each image passed through the network once, the ranks sharing the work.

    Args:
        network: (B, 3, H, W) -> (B, C), in eval mode.
        loader: batches of this rank's images (`pcl.loader.indices_of_rank`), uint8, and their indices, in increasing order.
        num_images: N, on all ranks together.
        device: where the network is.

    Returns:
        (N, C) float32 on `device`, in the order of the data set, the same on every rank.

    Raises:
        RunError: features that are not finite numbers, or fewer images than ranks.
    """
    if num_images < get_world_size():
        raise RunError(f"{num_images} images for {get_world_size()} processes; start fewer (--nproc)")
    own = len(range(get_rank(), num_images, get_world_size()))
    features = gather_interleaved(extract_own(network, loader, own, device), num_images)
    if not features.sum(dim=1).isfinite().all():
        raise RunError(
            "features of images are not finite numbers: the weights are damaged, or of a run that has failed; "
            "name another checkpoint, or lower the --lr of this run"
        )
    return features


@torch.no_grad()
def extract_own(
    network: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]], num_images: int, device: torch.device
) -> Tensor:
    """`extract_features` of this rank's images alone, of which there are `num_images`: (n, C) float32."""
    features, done = torch.empty(0), 0
    for images, _ in loader:
        batch = network(normalize(images.to(device, non_blocking=True)))  # (B, C)
        if done == 0:
            features = batch.new_empty(num_images, batch.shape[1], dtype=torch.float32)
        place = features[done : done + len(batch)]
        place.copy_(batch[: len(place)])  # of too many images the count tells, below
        done += len(batch)
    if done != num_images:
        raise ValueError(f"num_images: the loader has {done} images for this process, not {num_images}")
    return features


def load_momentum_encoder(path: str | Path, arch: str | None = None) -> tuple[nn.Module, str]:
    """The key encoder of a pre-training checkpoint with its head, in eval mode, and its architecture.

    Its outputs, put to unit length, are the features of the E-step and of the paper's kNN.

    Raises:
        CheckpointError: as for `pcl.checkpoint.load_backbone`; also if the file has no key encoder.
    """
    network, arch = load_backbone(path, arch)
    named = weights_of(path, load(path))
    weights = {name.removeprefix("encoder_k."): v for name, v in named.items() if name.startswith("encoder_k.")}
    if not weights:
        raise CheckpointError(f"{path} has no momentum encoder, as pre-training saves it; leave out --momentum")
    try:
        layers = [nn.Linear(*weights[n].shape[::-1]) for n in ("fc.weight", "fc.0.weight", "fc.2.weight") if n in weights]
        network.fc = layers[0] if len(layers) == 1 else nn.Sequential(layers[0], nn.ReLU(), layers[1])
        network.load_state_dict(weights)
    except Exception as error:  # of many kinds
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path}: its momentum encoder does not fit {arch} ({reason}); leave out --momentum") from error
    check_finite(path, weights)
    return network.eval(), arch


def open_splits(data: Path, view: Callable[[Any], Tensor]) -> dict[str, IndexedFolder]:
    """The images of DIR/train, else of DIR itself, as "train"; those of DIR/val, if there is one, as "val".

    Raises:
        RunError: no images; other classes in DIR/val than in DIR/train; a file's name with a line break.
    """
    train, val = data / "train", data / "val"
    if val.is_dir() and not train.is_dir():
        raise RunError(f"DIR {data}: it has val/ and no train/; name {val} for its images alone")
    try:
        splits = {"train": IndexedFolder(train if train.is_dir() else data, view)}
        if val.is_dir():
            splits["val"] = IndexedFolder(val, view)
    except FileNotFoundError as error:
        raise RunError(f"DIR {data}: {error if data.is_dir() else 'no such folder'}") from error
    except OSError as error:
        raise RunError(f"DIR {data}: {error.filename} cannot be listed: {error.strerror}; make it readable") from error
    for images in splits.values():
        if broken := [name for name in images.names(data) if "\n" in name]:
            raise RunError(f"DIR {data}: the name of {broken[0]} contains a line break; rename it")
    if splits["train"].classes and "val" in splits and splits["val"].classes not in ([], splits["train"].classes):
        raise RunError(f"DIR {data}: train/ and val/ must hold the same class folders")
    return splits


def get_parser() -> cli.Parser:
    """The command line."""
    # fmt: off
    parser = cli.Parser(__doc__, "python -m pcl.features")
    parser.add_argument("checkpoint", type=cli.path, metavar="CHECKPOINT",
                        help="a checkpoint of main_pcl.py or of released PCL, or a torchvision state dict")
    parser.add_argument("data", type=cli.path, metavar="DIR",
                        help="the folder that holds train/<class>/ (and val/<class>/), or <class>/, or images alone")
    parser.add_argument("-a", "--arch", choices=architectures(), metavar="NAME",
                        help="architecture, by default the one that the checkpoint names")
    parser.add_argument("--out", type=cli.path, default=Path("features"), metavar="FOLDER", help="folder of the results")
    parser.add_argument("--momentum", action="store_true",
                        help="use the momentum encoder with its head, not the backbone; features of unit length")
    parser.add_argument("--num-cluster", type=cli.integers, default=[], metavar="K,K,...",
                        help="cluster the training images by k-means, as in the E-step")
    parser.add_argument("--logistic", action="store_true",
                        help="fit logistic regression to the training images and score it on val/")
    parser.add_argument("--image-size", type=cli.side, metavar="PIXELS",
                        help="side of the center crop; by default the checkpoint's, else 224")
    parser.add_argument("-b", "--batch-size", type=cli.batch, default=128, metavar="N", help="images in a batch")
    parser.add_argument("-j", "--workers", type=cli.processes, default=8, metavar="N",
                        help="loader processes, at most one a core")
    # fmt: on
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    with parser.telling(2):
        network, arch = (load_momentum_encoder if args.momentum else load_backbone)(args.checkpoint, args.arch)
        size = args.image_size or trained_at(args.checkpoint) or 224
        if 12 * args.batch_size * size**2 > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise RunError(f"--image-size {size}: no memory holds {args.batch_size} such images; lower it, or --batch-size")
        splits = open_splits(args.data, center_view(size))
        for images in splits.values():
            if images.classes and args.out.resolve().parent == images.root.resolve():
                raise RunError(f"--out {args.out} lies among the classes of {images.root} and would be one; name another")
        check(splits, args.num_cluster, args.logistic)
        for images in splits.values():
            for line in images.layout_notes():
                tell(line)
        with claim(args.out), parser.telling(1):
            features = {}
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            for name, images in splits.items():
                loader = make_loader(images, range(len(images)), args.batch_size, min(args.workers, available_cores()))
                batches = tqdm(loader, name, leave=False, disable=None)
                features[name] = extract_features(network.to(device), batches, len(images), device)
            if args.momentum:
                features = {name: F.normalize(rows, dim=1) for name, rows in features.items()}
            kind = "momentum" if args.momentum else "backbone"
            made: dict[str, str | int] = {"checkpoint": str(args.checkpoint), "arch": arch, "features": kind}
            made |= {"image_size": size, "data": str(args.data)}
            evaluate(args.out, made, features, splits, args.data, args.num_cluster, args.logistic)


if __name__ == "__main__":
    with leave_on_signals():
        main()
