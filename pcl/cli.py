"""Options and checks that the scripts share. A check that fails is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import nn

from pcl.checkpoint import CheckpointError, architectures, backbone, load_backbone, takes_small_stem, trained_at
from pcl.distributed import (
    FORESEEN,
    RunError,
    available_cores,
    is_main,
    launch,
    launched_outside,
    local_processes,
    own_processes,
    reason_of,
    same_on_all,
    total_processes,
)
from pcl.images import holds_images, list_folder, tell_left_out, why_unreadable
from pcl.loader import IndexedFolder
from pcl.logs import log, track
from pcl.terminal import printable
from pcl.watch import INTERRUPTED

UNREADABLE = "unreadable.txt"
LISTED = 20  # unreadable images that are shown; the file has all

# Options that change neither what a run learns nor how; all others are compared when it is resumed.
INDIFFERENT = {
    "data", "images", "num_images", "unreadable", "skip_unreadable", "workers", "print_freq", "resume", "automatic",
    "start_epoch", "start_step", "deterministic", "arch", "small_stem", "pretrained", "random_init", "pixels", "nproc", "gpu",
    "world_size", "rank", "local_rank", "dist_url", "dist_backend", "dist_timeout", "multiprocessing_distributed", "exp_dir",
    "save_freq", "save_steps", "keep", "keep_every", "monitor_freq", "evaluate", "id", "output",
}  # fmt: skip

LARGEST = 2**31 - 1  # what every library below takes as an integer
LARGEST_NUMBER = 1e30  # far within float32
LARGEST_BATCH = 2**20
LARGEST_SIDE = 2**13  # pixels
MOST_PROCESSES = 2**10  # on one machine
MOST_NODES = 2**16


class Parser(argparse.ArgumentParser):
    """Prints defaults in the help, and an error as one line without the usage."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if match := re.fullmatch("(--[^=]+=|-[a-z]=?)--", word):  # which argparse before Python 3.13 takes for no value
                self.error(f"argument {match[1].rstrip('=')}: '--' is no value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.fail(2, message)

    def fail(self, code: int, message: str) -> NoReturn:
        """End with one line."""
        self.exit(code, f"{self.prog}: error: {printable(message)}\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


def add_training_arguments(
    parser: Parser, *, epochs: int, batch_size: int, lr: float, schedule: Sequence[int], wd: float, print_freq: int
) -> None:
    """The options of any run of SGD, with this script's defaults."""
    # fmt: off
    group = parser.add_argument_group("training")
    group.add_argument("-j", "--workers", type=integer(0, MOST_PROCESSES), default=available_cores(), metavar="N",
                       help="loader processes, a total over this node's processes; 0 loads in those themselves")
    group.add_argument("--epochs", type=positive, default=epochs, metavar="N", help="epochs to train")
    group.add_argument("--start-epoch", type=natural, default=0, metavar="N", help="first epoch; --resume sets it")
    group.add_argument("-b", "--batch-size", type=integer(1, LARGEST_BATCH), default=batch_size, metavar="N",
                       help="images in a step, a total over this node's training processes")
    group.add_argument("--lr", type=positive_float, default=lr, metavar="LR", help="first learning rate")
    group.add_argument("--schedule", type=natural, nargs="*", default=list(schedule), metavar="EPOCH",
                       help="epochs at which the learning rate falls to a tenth")
    group.add_argument("--momentum", type=fraction, default=0.9, metavar="M", help="of SGD")
    group.add_argument(
        "--wd", "--weight-decay", dest="wd", type=nonnegative_float, default=wd, metavar="WD", help="weight decay"
    )
    group.add_argument("-p", "--print-freq", type=positive, default=print_freq, metavar="N", help="steps between two lines")
    group.add_argument("--resume", type=reachable, metavar="PATH",
                       help="go on from this checkpoint; auto: from the newest of this run, or start if there is none")
    group.add_argument("--skip-unreadable", action="store_true",
                       help="read every image first; list those that cannot be read, and leave them out")
    # fmt: on
    parser.set_defaults(unreadable={})  # what --skip-unreadable leaves out, path and reason


def add_launch_arguments(parser: Parser) -> None:
    """The options that say which processes, on which machines, train together."""
    # fmt: off
    group = parser.add_argument_group("processes")
    group.add_argument("--nproc", type=integer(1, MOST_PROCESSES), metavar="N",
                       help="training processes on this machine; by default one for each GPU, or one on the CPU")
    group.add_argument("--gpu", type=natural, metavar="N", help="train on this GPU alone")
    group.add_argument("--world-size", type=integer(1, MOST_NODES), default=1, metavar="N", help="number of nodes (machines)")
    group.add_argument("--rank", type=natural, default=0, metavar="N", help="number of this node, from 0")
    group.add_argument("--dist-url", metavar="URL",
                       help="tcp://HOST:PORT of node 0, the same on every node; one node needs none")
    group.add_argument("--dist-backend", default="nccl", choices=["nccl", "gloo"], help="without a GPU always gloo")
    group.add_argument("--dist-timeout", type=seconds, default=1800.0, metavar="SECONDS",
                       help="how long processes wait for each other before a run is given up")
    group.add_argument("--multiprocessing-distributed", action="store_true", help="always on; accepted for old command lines")
    # What torch.distributed.launch adds; it sets LOCAL_RANK too.
    group.add_argument("--local-rank", "--local_rank", type=natural, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    group.add_argument("--seed", type=seed, metavar="N",
                       help="base of the random seeds, drawn if not given: process r takes seed + r")
    # fmt: on


def add_backbone_arguments(parser: Parser) -> None:
    """The options that name the frozen network that a script evaluates."""
    # fmt: off
    group = parser.add_argument_group("backbone")
    group.add_argument("--pretrained", type=reachable, metavar="FILE",
                       help="a checkpoint of main_pcl.py, a released one of PCL, or a torchvision state dict")
    group.add_argument("--random-init", action="store_true", help="evaluate random weights instead, as a baseline")
    group.add_argument("--pixels", action="store_true", help="evaluate the pixels of the center crop instead, as a baseline")
    group.add_argument("-a", "--arch", metavar="NAME", choices=architectures(),
                       help="by default the one that the file names; resnet50 for random weights")
    group.add_argument("--small-stem", action="store_true",
                       help="random weights with the stem of main_pcl.py --small-stem; a file tells by itself")
    group.add_argument("--image-size", type=integer(1, LARGEST_SIDE), default=224, metavar="PIXELS",
                       help="side of the center crop, which comes from 8/7 of it")
    # fmt: on


def open_backbone(args: argparse.Namespace) -> tuple[nn.Module, dict[str, str]]:
    """The network that the options name, without its head, in eval mode; and what it is, for the results.

    Raises:
        CheckpointError: not one of a file, --random-init and --pixels, or a file that does not fit; names the option.
    """
    if [bool(args.pretrained), args.random_init, args.pixels].count(True) != 1:
        raise CheckpointError("--pretrained: name a checkpoint, or else give --random-init or --pixels for a baseline")
    if args.small_stem and not args.random_init:
        raise CheckpointError("--small-stem is an option of --random-init, since a file tells by itself; leave it out")
    if args.pixels:
        if args.arch:
            raise CheckpointError(f"--arch {args.arch}: --pixels needs no network; leave one of them out")
        return nn.Flatten().eval(), {"arch": "pixels", "weights": "none"}
    if args.random_init:
        arch = args.arch or "resnet50"
        if args.small_stem and not takes_small_stem(arch):
            raise CheckpointError(no_small_stem(arch))
        return backbone(arch, args.small_stem), {"arch": arch, "weights": "random"}
    try:
        network, arch = load_backbone(args.pretrained, args.arch)
    except CheckpointError as error:
        raise CheckpointError(f"--pretrained: {error}") from error
    digest = hashlib.sha256(Path(args.pretrained).read_bytes()).hexdigest()
    return network, {"arch": arch, "weights": args.pretrained, "sha256": digest}


def no_small_stem(arch: str) -> str:
    """What is wrong with --small-stem and this architecture."""
    return f"--small-stem: {arch} does not begin with a convolution and a max-pool; take a resnet, resnext or wide_resnet"


def note_image_size(args: argparse.Namespace) -> None:
    """Say so if the backbone is evaluated at another size than it was trained at."""
    trained = trained_at(args.pretrained) if args.pretrained else None
    if trained not in (None, args.image_size):
        log(f"note: the backbone was trained at {trained} pixels and sees {args.image_size}; --image-size sets that")


def settings(args: argparse.Namespace) -> dict[str, str]:
    """The options that change what is learnt, as a checkpoint keeps them in its field "args"."""
    return {name: str(value) for name, value in vars(args).items() if name not in INDIFFERENT}


def note_changes(state: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Say which of the settings are not those of the run that wrote a checkpoint."""
    before = state.get("args")
    if not isinstance(before, dict):  # the published program keeps none
        return
    for name, value in now.items():
        if name in before and before[name] != value:
            option = name if name in ("files", "processes") else f"--{name.replace('_', '-')}"
            log(f"note: {option} {value}, before {before[name]}")


def add_output_argument(parser: Parser) -> None:
    """Where an evaluation keeps its result (`pcl.logs.write_result`)."""
    parser.add_argument("--output", type=path, metavar="FILE.json", help="keep settings and every figure")


def check_output(parser: Parser, args: argparse.Namespace) -> None:
    """Stop if the result could not be written after all the work."""
    if args.output and args.output.is_dir():
        parser.error(f"--output {args.output} is a folder; name a file")
    if args.output:
        check_folder(parser, "--output", args.output.parent)


def check_folder(parser: Parser, option: str, folder: Path) -> None:
    """Stop if nothing could be written into a folder, which a run makes if need be."""
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        parser.error(f"{option}: {place} is a file; name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        parser.error(f"{option}: no right to write into {place}; name another folder")


def check_memory(parser: Parser, option: str, numbers: int, what: str) -> None:
    """Stop if so many float32 numbers are more than this machine could ever hold."""
    need, have = 4 * numbers, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        parser.error(f"{option}: {what} would take {need / 1e9:.0f} GB, this machine has {have / 1e9:.0f}; lower it")


def check_image_size(parser: Parser, args: argparse.Namespace, images: int, rows: int) -> None:
    """Stop if no memory could hold a step's images (of `images` in all), or with --pixels this many rows of features."""
    size, pixels = f"--image-size {args.image_size}", 3 * args.image_size**2
    batch = min(args.batch_size, images)
    check_memory(parser, size, batch * pixels, f"{batch} images in a step (--batch-size)")
    if args.pixels:
        check_memory(parser, size, rows * pixels, "--pixels")


def check_launch(parser: Parser, args: argparse.Namespace) -> None:
    """Stop on options that name processes or machines that cannot be; note whether a seed asks for a run that repeats."""
    args.deterministic = args.seed is not None
    wrong_address = f"--dist-url {args.dist_url}: give tcp://HOST:PORT, the address of node 0"
    if args.dist_url and args.dist_url != "env://" and not is_address(args.dist_url):  # env:// is a launcher's address
        parser.error(wrong_address)
    try:
        outside = launched_outside(args)
    except RunError as error:
        parser.error(str(error))
    gpus, nproc = torch.cuda.device_count(), own_processes(args)
    if outside and outside.is_task and outside.local_world == 1 and nproc > 1:
        # srun has started one task on each node, and the task starts the node's processes.
        args.rank, args.world_size, args.dist_url = outside.rank, outside.world, f"tcp://{outside.host}:{outside.port}"
        outside = None
    if args.gpu is not None and args.gpu >= gpus:
        parser.error(f"--gpu {args.gpu}: this machine shows {gpus} GPUs; leave the option out to use what there is")
    if args.gpu is not None and (args.nproc or 1) > 1:
        parser.error(f"--gpu trains on one GPU: leave it out with --nproc {args.nproc}")
    if outside:
        if args.nproc is not None or args.gpu is not None:
            parser.error("--nproc and --gpu: the launcher that started this process decides that; leave them out")
        return
    if getattr(args, "local_rank", 0):
        parser.error(
            f"--local-rank {args.local_rank}: a launcher sets LOCAL_RANK, RANK and WORLD_SIZE too; start with torchrun"
        )
    if gpus and nproc > gpus and args.dist_backend == "nccl":
        remedy = "start fewer, give --dist-backend gloo, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to use the CPU"
        parser.error(f"--nproc: {nproc} processes for {gpus} GPUs; {remedy}")
    if args.rank >= args.world_size:
        parser.error(f"--rank {args.rank}: the nodes of --world-size {args.world_size} are 0 to {args.world_size - 1}")
    if args.world_size > 1 and not args.dist_url:
        parser.error("--world-size: several nodes need --dist-url tcp://HOST:PORT, the address of node 0")
    if args.dist_url == "env://":
        parser.error(wrong_address)


def is_address(url: str) -> bool:
    """Whether it is tcp://HOST:PORT."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # as a connection does; UnicodeError is a ValueError
        return parts.scheme == "tcp" and bool(host) and bool(parts.port) and url.isprintable() and " " not in url
    except ValueError:
        return False


def check_batch(parser: Parser, args: argparse.Namespace) -> None:
    """Stop unless this node's processes divide its batch evenly."""
    nproc = local_processes(args)
    if args.batch_size % nproc:
        lower = max(args.batch_size - args.batch_size % nproc, nproc)
        parser.error(f"--batch-size {args.batch_size}: the {nproc} processes of this node do not divide it; try {lower}")


def open_folder(parser: Parser, data: Path, split: str, labelled: bool = True) -> IndexedFolder:
    """The images of data/split/<class>/, without a transform; stops if there are none.

    Without `labelled`, they may also lie in data/split, and where there is no such folder, in data/<class>/ or in data itself.
    """
    if not data.is_dir():
        parser.error(f"DIR {data}: no such folder")
    try:
        root = data / split
        if not root.is_dir():
            root = data
            if (labelled or not list_folder(data).images) and (remedy := _remedy_for(data, split, labelled)):
                parser.error(f"DIR {data}: it has no folder {split}/{remedy}")
        images = IndexedFolder(root.resolve(), lambda image: image)
    except FileNotFoundError as error:
        parser.error(f"DIR {data}: {error}")
    except OSError as error:
        parser.error(f"DIR {data}: {error.filename} cannot be listed: {error.strerror}; make it readable, or move it away")
    if labelled and not images.classes:
        remedy = f"put them into {root}/<class>/, which names their label"
        if Path(images.path(0)).name.startswith("ILSVRC2012_"):
            archives = f"ILSVRC2012_img_{split}.tar and ILSVRC2012_devkit_t12.tar.gz"
            remedy += (
                f"; torchvision.datasets.ImageNet({str(data)!r}, {split!r}) does so from {archives} in it, without {split}/"
            )
        parser.error(f"DIR {data}: images lie in {root} itself; {remedy}")
    return images


def _remedy_for(data: Path, split: str, labelled: bool) -> str:
    """What to do about a folder without data/split; empty if its own folders will do as classes."""
    folders, _, others = list_folder(data)
    around = data.resolve().parent
    other = around if labelled and (around / split).is_dir() else _nearest_with(split, folders)
    if other:
        return f", but {other} has; give that one"
    if labelled or not folders or str(data / "val") in folders:
        straight = "" if labelled else f", or straight into {data} if they have no labels"
        return f"; put the images into {data / split}/<class>/{straight}{tell_left_out(others)}"
    return ""


def _nearest_with(split: str, folders: list[str]) -> str | None:
    """Of the folders and those below, the nearest in which `split` holds images; not of very many.

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


def leave_out_unreadable(parser: Parser, args: argparse.Namespace, *folders: IndexedFolder) -> list[IndexedFolder]:
    """What is left of each folder without the images that cannot be read, if --skip-unreadable asks for that.

    Lists them, and keeps paths and reasons in `args.unreadable`; stops if nothing is left.
    """
    if not args.skip_unreadable:
        return list(folders)
    paths = [images.path(i) for images in folders for i in range(len(images))]
    # Under an outside launcher each process of a node is here.
    outside = launched_outside(args)
    threads = max(1, available_cores() // (outside.local_world if outside else 1))
    reading = Parallel(threads, prefer="threads", return_as="generator")(delayed(why_unreadable)(path) for path in paths)
    tells = (outside or args).rank == 0  # there is no group yet to know the main process
    reasons = track(reading, "reading every image", len(paths)) if tells else reading
    try:
        args.unreadable = {path: reason for path, reason in zip(paths, reasons, strict=True) if reason}
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, "\nstopped before anything was written; without --skip-unreadable images are not read first\n")
    if tells:
        log(f"unreadable and left out: {len(args.unreadable)} of {len(paths)} images")
        for path, reason in list(args.unreadable.items())[:LISTED]:
            log(f"  {path}: {reason}")
        if len(args.unreadable) > LISTED:
            log(f"  and {len(args.unreadable) - LISTED} more; {UNREADABLE} beside the checkpoints will name all")
    kept = [
        images.subset(np.array([i for i in range(len(images)) if images.path(i) not in args.unreadable], dtype=int))
        for images in folders
    ]
    for images, before in zip(kept, folders, strict=True):
        if not len(images):
            parser.error(f"DIR {args.data}: none of the {len(before)} images of {before.root} can be read")
    return kept


def describe_files(*folders: IndexedFolder) -> str:
    """Number and fingerprint of the images, by which a resumed run knows them again."""
    return " and ".join(f"{len(images)} images ({images.digest():08x})" for images in folders)


def keep_unreadable(folder: Path, args: argparse.Namespace) -> None:
    """Write the list of images that are left out into the experiment's folder, a path and the reason in each line."""
    if is_main() and args.unreadable:
        lines = [f"{path}\t{reason}\n" for path, reason in args.unreadable.items()]
        (folder / UNREADABLE).write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def check_same_images(images: IndexedFolder) -> None:
    """Stop unless all processes, on all nodes, have found the same images; every rank must call it.

    Raises:
        RunError: they have not.
    """
    if not same_on_all(images.digest()):
        raise RunError(
            f"the processes found different images in {images.root}; give every node the same files, and start again"
        )


def global_batch(args: argparse.Namespace) -> int:
    """Images in a step over all ranks."""
    return args.batch_size // local_processes(args) * total_processes(args)


def batch_and_workers(args: argparse.Namespace) -> tuple[int, int]:
    """What one process has of its node's batch and loader processes."""
    nproc = local_processes(args)
    return args.batch_size // nproc, -(-args.workers // nproc)


def set_learning_rate(optimizer: torch.optim.Optimizer, args: argparse.Namespace, epoch: int) -> float:
    """Give the optimizer the epoch's learning rate, and return it."""
    lr = learning_rate(args, epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Of a whole epoch (from 0): a cosine from `lr` to 0 with `cos`, else `lr` with a tenth at each of `schedule`."""
    if getattr(args, "cos", False):
        return args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.schedule)


def launch_or_exit(
    parser: Parser, worker: Callable[[torch.device, argparse.Namespace], None], args: argparse.Namespace
) -> None:
    """`pcl.distributed.launch`; what ends the run is one line and exit code 1."""
    try:
        launch(worker, args)
    except FORESEEN as error:
        parser.fail(1, reason_of(error))


def integers(text: str) -> list[int]:
    """ "3,4" -> [3, 4], each positive and given once."""
    return _several(text, positive)


def costs(text: str) -> list[float]:
    """ "0.5,1" -> [0.5, 1.0], each positive and given once."""
    return _several(text, positive_float)


def integer(least: int, most: int = LARGEST) -> Callable[[str], int]:
    """The type of an integer from `least` to `most`."""
    return lambda text: _number(text, int, lambda value: least <= value <= most, f"an integer from {least} to {most}")


def positive(text: str) -> int:
    """An integer of at least 1."""
    return integer(1)(text)


def natural(text: str) -> int:
    """An integer of at least 0."""
    return integer(0)(text)


def seed(text: str) -> int:
    """An integer from 0 to 2**32 - 1, the range that all libraries take."""
    return integer(0, 2**32 - 1)(text)


def positive_float(text: str) -> float:
    """A number above 0."""
    return _number(text, float, lambda value: 0 < value <= LARGEST_NUMBER, f"a number above 0, at most {LARGEST_NUMBER:g}")


def nonnegative_float(text: str) -> float:
    """A number of at least 0."""
    return _number(text, float, lambda value: 0 <= value <= LARGEST_NUMBER, f"a number from 0 to {LARGEST_NUMBER:g}")


def percentage(text: str) -> float:
    """A number above 0, at most 100."""
    return _number(text, float, lambda value: 0 < value <= 100, "a number above 0, at most 100")


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def seconds(text: str) -> float:
    """A time of a second to 30 days."""
    return _number(text, float, lambda value: 1 <= value <= 2592000, "a number of seconds from 1 to 2592000")


def path(text: str) -> Path:
    """A path under which something is, or could be made."""
    return Path(reachable(text))


def reachable(text: str) -> str:
    """The same, as it was written: not an empty one, which an unset variable of a shell gives, nor one below a file."""
    try:
        os.stat(text)
    except FileNotFoundError:
        if not text:
            raise argparse.ArgumentTypeError("the path is empty") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or what no file's name can hold
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a path: {reason}") from None
    return text


def _several(text: str, kind: Callable[[str], Any]) -> list[Any]:
    values = [kind(part) for part in text.split(",")]
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text}: a number stands there twice")
    return values


def _number(text: str, kind: type, holds: Callable[[Any], bool], wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value
