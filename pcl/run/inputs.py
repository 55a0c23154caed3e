"""What a run is given: folders of images, the backbone to evaluate."""

import hashlib
import os
import zlib
from argparse import Namespace
from collections.abc import Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pcl.checkpoint import CheckpointError, load_backbone, write_whole
from pcl.cli import Parser
from pcl.distributed import available_cores, equal_on_all_ranks, is_main
from pcl.errors import INTERRUPTED, RunError
from pcl.images import holds_images, list_folder, tell_left_out, why_unreadable
from pcl.loader import IndexedFolder
from pcl.networks import NO_SMALL_STEM, backbone, takes_small_stem
from pcl.run.logs import log, track
from pcl.run.rendezvous import Place

UNREADABLE = "unreadable.txt"
LISTED = 20  # unreadable images that are shown; the file has all


def open_folder(parser: Parser, data: Path, split: str, labeled: bool = True) -> IndexedFolder:
    """The images of data/split/<class>/, without a transform; stops if there are none.

    Without `labeled`, they may also lie in data/split, and where there is no such folder, in data/<class>/ or in data itself.
    """
    if not data.is_dir():
        parser.error(f"DIR {data}: no such folder")
    try:
        root = data / split
        if not root.is_dir():
            root = data
            if (labeled or not list_folder(data).images) and (remedy := _remedy_for(data, split, labeled)):
                parser.error(f"DIR {data}: it has no folder {split}/{remedy}")
        images = IndexedFolder(root.resolve(), lambda image: image)
    except FileNotFoundError as error:
        parser.error(f"DIR {data}: {error}")
    except OSError as error:
        parser.error(f"DIR {data}: {error.filename} cannot be listed: {error.strerror}; make it readable, or move it away")
    if labeled and not images.classes:
        remedy = f"put them into {root}/<class>/, which names their label"
        if Path(images.path(0)).name.startswith("ILSVRC2012_"):
            archives = f"ILSVRC2012_img_{split}.tar and ILSVRC2012_devkit_t12.tar.gz"
            call = f"torchvision.datasets.ImageNet({str(data)!r}, {split!r})"
            remedy += f"; or move {split}/ away, put {archives} into {data}, and call {call}"
        parser.error(f"DIR {data}: images lie in {root} itself; {remedy}")
    return images


def open_labeled(parser: Parser, data: Path) -> tuple[IndexedFolder, IndexedFolder]:
    """The images of data/train/<class>/ and data/val/<class>/, without a transform; stops unless both have the same classes."""
    train, val = (open_folder(parser, data, split) for split in ("train", "val"))
    if train.classes != val.classes:
        name = min(set(train.classes) ^ set(val.classes))
        parser.error(f"DIR {data}: train/ and val/ must hold the same class folders; only one of them has {name}")
    if len(train.classes) < 2:
        parser.error(f"DIR {data}: train/ and val/ hold one class; folders of two or more are needed")
    return train, val


def _remedy_for(data: Path, split: str, labeled: bool) -> str:
    """What to do about a folder without data/split; empty if its own folders will do as classes."""
    folders, _, others = list_folder(data)
    around = data.resolve().parent
    other = around if labeled and (around / split).is_dir() else _nearest_with(split, folders)
    if other:
        return f", but {other} has; give that one"
    if labeled or not folders or str(data / "val") in folders:
        straight = "" if labeled else f", or straight into {data} if they have no labels"
        return f"; put the images into {data / split}/<class>/{straight}{tell_left_out(others)}"
    return ""


def _nearest_with(split: str, folders: list[str]) -> str | None:
    """The nearest of the folders and those below in which `split` holds images; not among very many.

    Deeper ones (ImageNet lies in ILSVRC/Data/CLS-LOC) need val beside it, lest it be a class of that name.
    """
    for depth in range(4):
        needed = [split, "val"] if depth else [split]
        for folder in folders:
            if all(os.path.isdir(os.path.join(folder, name)) for name in needed) and holds_images(os.path.join(folder, split)):
                return folder
        if len(folders) > 16:
            break
        folders = [path for folder in folders for path in list_folder(folder).folders]
    return None


def leave_out_unreadable(
    parser: Parser, args: Namespace, place: Place, *folders: IndexedFolder
) -> tuple[list[IndexedFolder], dict[str, str]]:
    """The folders without the images that cannot be read, and those with reasons, if --skip-unreadable asks for that."""
    if not args.skip_unreadable:
        return list(folders), {}
    paths = [images.path(i) for images in folders for i in range(len(images))]
    # Under a launcher each process of a node is here; there is no group yet to know the main process.
    threads = available_cores() if place.spawns else place.cores
    try:
        with ThreadPool(threads) as pool:
            reading = pool.imap(why_unreadable, paths, chunksize=16)
            reasons = track(reading, "reading every image", len(paths)) if place.rank == 0 else reading
            unreadable = {path: reason for path, reason in zip(paths, reasons, strict=True) if reason}
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, "\nstopped before anything was written; without --skip-unreadable images are not read first\n")
    if place.rank == 0:
        log(f"unreadable and left out: {len(unreadable)} of {len(paths)} images")
        for path, reason in list(unreadable.items())[:LISTED]:
            log(f"  {path}: {reason}")
        if len(unreadable) > LISTED:
            log(f"  and {len(unreadable) - LISTED} more; {UNREADABLE} beside the checkpoints will name all")
    kept = []
    for images in folders:
        readable = [i for i in range(len(images)) if images.path(i) not in unreadable]
        if not readable:
            parser.error(f"DIR {args.data}: none of the {len(images)} images of {images.root} can be read")
        kept.append(images.subset(np.array(readable)))
    return kept, unreadable


def describe_files(*folders: IndexedFolder) -> str:
    """Number and fingerprint of the images, by which a resumed run knows them again."""
    return " and ".join(f"{len(images)} images ({images.fingerprint():08x})" for images in folders)


def keep_unreadable(folder: Path, unreadable: Mapping[str, str]) -> None:
    """Write the list of images that are left out, if any, into the experiment's folder, a path and the reason in each line."""
    lines = "".join(f"{path}\t{reason}\n" for path, reason in unreadable.items()).encode("utf-8", "surrogateescape")
    if is_main() and lines:
        write_whole(folder / UNREADABLE, lambda file: file.write(lines))
    elif is_main():
        (folder / UNREADABLE).unlink(missing_ok=True)


def check_same_images(folder: Path, images: IndexedFolder | None) -> None:
    """RunError unless all processes, on all nodes, found the same images in a folder, or none; every rank must call it."""
    if not equal_on_all_ranks(images.fingerprint() if images else 0):
        raise RunError(f"the processes found different images in {folder}; give every node the same files, and start again")


def check_same_start(folder: str | Path, *start: Any) -> None:
    """RunError unless all processes begin with the same plain values, such as epochs; every rank must call it."""
    if not equal_on_all_ranks(zlib.crc32(repr(start).encode())):
        raise RunError(f"the processes go on from different checkpoints; {folder} must be one folder for all nodes")


def open_backbone(args: Namespace) -> tuple[nn.Module, dict[str, str]]:
    """The network that the options name, without its head, in eval mode, and what it is, for the results.

    CheckpointError, which names the option, unless it is one of a file that fits, --random-init and --pixels.
    """
    if [bool(args.pretrained), args.random_init, args.pixels].count(True) != 1:
        raise CheckpointError("--pretrained: give exactly one of --pretrained FILE, --random-init and --pixels")
    if args.small_stem and not args.random_init:
        raise CheckpointError("--small-stem is an option of --random-init; a checkpoint's own is recognized; leave it out")
    if args.pixels:
        if args.arch:
            raise CheckpointError(f"--arch {args.arch}: --pixels needs no network; leave one of them out")
        return nn.Flatten().eval(), {"arch": "pixels", "weights": "none"}
    if args.random_init:
        arch = args.arch or "resnet50"
        if args.small_stem and not takes_small_stem(arch):
            raise CheckpointError(NO_SMALL_STEM.format(arch))
        return backbone(arch, args.small_stem), {"arch": arch, "weights": "random"}
    try:
        network, arch = load_backbone(args.pretrained, args.arch)
    except CheckpointError as error:
        raise CheckpointError(f"--pretrained: {error}") from error
    digest = hashlib.sha256(Path(args.pretrained).read_bytes()).hexdigest()
    return network, {"arch": arch, "weights": args.pretrained, "sha256": digest}
