"""The command lines: a parser, types of numbers and paths, the groups of options that scripts share, the learning rate."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from pcl.distributed import available_cores
from pcl.networks import architectures
from pcl.terminal import printable

LARGEST_BATCH = 2**20
LARGEST_SIDE = 2**13  # pixels
MOST_PROCESSES = 2**10  # on one machine


class Parser(argparse.ArgumentParser):
    """Prints defaults in the help, and an error as one line without the usage."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if match := re.fullmatch("(--[^=]+=|-[a-z]=?)--", word):  # argparse before Python 3.13 takes that for no value
                self.error(f"argument {match[1].rstrip('=')}: '--' is no value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.fail(2, message)

    def fail(self, code: int, message: str) -> NoReturn:
        """End with one line."""
        self.exit(code, f"{self.prog}: error: {printable(message)}\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


def _number(kind: type, fits: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        with suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an integer from `least` to `most`."""
    return _number(int, lambda value: least <= value <= most, f"an integer from {least} to {most}")


natural, positive = integer(0), integer(1)
seed = integer(0, 2**32 - 1)  # the range that all libraries take
# 1e30 is far within float32.
positive_float = _number(float, lambda value: 0 < value <= 1e30, "a number above 0, at most 1e+30")
nonnegative_float = _number(float, lambda value: 0 <= value <= 1e30, "a number from 0 to 1e+30")
percentage = _number(float, lambda value: 0 < value <= 100, "a number above 0, at most 100")
fraction = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
seconds = _number(float, lambda value: 1 <= value <= 2592000, "a number of seconds from 1 to 2592000")


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of a list such as "3,4", in which nothing stands twice."""

    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if len(set(values)) < len(values):
            raise ArgumentTypeError(f"{text}: a number stands there twice")
        return values

    return parse


integers = several(positive)


def path(text: str) -> Path:
    """A path under which something is, or could be made."""
    return Path(reachable(text))


def reachable(text: str) -> str:
    """`path` as it was written: not an empty one, which an unset variable of a shell gives, nor one below a file."""
    try:
        os.stat(text)
    except FileNotFoundError:
        if not text:
            raise ArgumentTypeError("the path is empty") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or what no file's name can hold
        reason = getattr(error, "strerror", None) or error
        raise ArgumentTypeError(f"{text!r} cannot be a path: {reason}") from None
    return text


# fmt: off
def add_training(
    parser: Parser, *, epochs: int, batch_size: int, lr: Any, schedule: Sequence[int], wd: float, print_freq: int,
    lr_type: Callable[[str], Any] = positive_float, lr_help: str = "first learning rate",
) -> None:
    """The options of any run of SGD, with this script's defaults."""
    group = parser.add_argument_group("training")
    group.add_argument("-j", "--workers", type=integer(0, MOST_PROCESSES), default=available_cores(), metavar="N",
                       help="loader processes, a total over this node's training processes; 0 loads in those themselves")
    group.add_argument("--epochs", type=positive, default=epochs, metavar="N", help="epochs to train")
    group.add_argument("--start-epoch", type=natural, default=0, metavar="N", help="first epoch; --resume sets it")
    group.add_argument("-b", "--batch-size", type=integer(1, LARGEST_BATCH), default=batch_size, metavar="N",
                       help="images in a step, a total over this node's training processes")
    group.add_argument("--lr", type=lr_type, default=lr, metavar="LR", help=lr_help)
    group.add_argument("--schedule", type=natural, nargs="*", default=list(schedule), metavar="EPOCH",
                       help="epochs at which the learning rate falls to a tenth")
    group.add_argument("--momentum", type=fraction, default=0.9, metavar="M", help="of SGD")
    group.add_argument("--wd", "--weight-decay", dest="wd", type=nonnegative_float, default=wd, metavar="WD",
                       help="weight decay")
    group.add_argument("-p", "--print-freq", type=positive, default=print_freq, metavar="N", help="steps between two lines")
    group.add_argument("--resume", type=reachable, metavar="PATH",
                       help="go on from this checkpoint; auto: from the newest of this run, or start if there is none")
    group.add_argument("--skip-unreadable", action="store_true",
                       help="read every image first; list those that cannot be read, and leave them out")


def add_launch(parser: Parser) -> None:
    """The options that say which processes, on which machines, train together."""
    group = parser.add_argument_group("processes")
    group.add_argument("--nproc", type=integer(1, MOST_PROCESSES), metavar="N",
                       help="training processes on this machine; by default one for each GPU, or one on the CPU")
    group.add_argument("--gpu", type=natural, metavar="N", help="train on this GPU alone")
    group.add_argument("--world-size", type=integer(1, 2**16), default=1, metavar="N", help="number of nodes (machines)")
    group.add_argument("--rank", type=natural, default=0, metavar="N", help="number of this node, from 0")
    group.add_argument("--dist-url", metavar="URL",
                       help="tcp://HOST:PORT of node 0, the same on every node; one node needs none")
    group.add_argument("--dist-backend", default="nccl", choices=["nccl", "gloo"], help="without a GPU always gloo")
    group.add_argument("--dist-timeout", type=seconds, default=1800.0, metavar="SECONDS",
                       help="how long processes wait for each other before a run is given up")
    group.add_argument("--multiprocessing-distributed", action="store_true", help="always on; accepted for old command lines")
    # torch.distributed.launch adds it; it sets LOCAL_RANK too.
    group.add_argument("--local-rank", "--local_rank", type=natural, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    group.add_argument("--seed", type=seed, metavar="N",
                       help="base of the random seeds, drawn if not given: process r takes seed + r")


def add_speed(parser: Parser) -> None:
    """The options of pre-training that make it faster."""
    group = parser.add_argument_group("speed")
    group.add_argument("--augment-on", choices=["workers", "device"], default="workers",
                       help="device: loader workers only decode and crop; colors and blur follow on whole batches")
    group.add_argument("--amp", choices=["off", "bf16"], default="off", help="features in bfloat16: faster on new GPUs")
    group.add_argument("--channels-last", action="store_true", help="another layout of images and weights: faster with --amp")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile for the encoders: fewer kernels to launch, after minutes of compiling")
    group.add_argument("--kmeans", choices=["faiss", "super", "sharded"], default="faiss",
                       help="super prunes the search, on the CPU, faster if few directions hold the features' variance; "
                       "sharded leaves features on their rank, for very many images")
    group.add_argument("--kmeans-tf32", action="store_true", help="sharded k-means on a GPU searches in TF32")


def add_small_data(parser: Parser) -> None:
    """The options of pre-training that change the mathematics."""
    group = parser.add_argument_group("small data", "not in the published algorithm; docs/settings.md says when they help")
    group.add_argument("--fit", type=integer(40), metavar="N",
                       help="for N images, set what is not given of --num-cluster, --pcl-r, -b, --lr, --moco-m, --warmup-epoch")
    group.add_argument("--small-stem", action="store_true",
                       help="begin with a 3x3 convolution and no max-pool, for images of at most 64 pixels; slower")
    group.add_argument("--bn-splits", type=positive, default=1, metavar="S",
                       help="BatchNorm statistics over each of S groups of a process's batch, as over S GPUs")
    group.add_argument("--mask-duplicates", action="store_true",
                       help="an image's own prototype is no negative of it where it is another image's of the batch too")
    group.add_argument("--kmeans-every", type=positive, default=1, metavar="E",
                       help="an E-step at every E-th epoch after warm-up; the clusters are kept in between")
    group.add_argument("--fixed-phi", action="store_true",
                       help="give every prototype --temperature as its concentration, as in the paper's ablation")
    group.add_argument("--proto-weight", type=nonnegative_float, default=1.0, metavar="W",
                       help="weight of the prototype term beside InfoNCE")


FITTED = ("num_cluster", "pcl_r", "batch_size", "lr", "moco_m", "warmup_epoch")


def fitted(num_images: int, epochs: int, batch: int | None = None) -> dict[str, Any]:
    """The options of pre-training in `FITTED` for a number of images, by the README's rules; published ones are the limits."""
    batch = batch or min(256, max(8, 2 ** round(math.log2(num_images / 80))))
    clusters = [min(most, max(2, num_images // size)) for most, size in ((25000, 40), (50000, 20), (100000, 10))]
    negatives = min(16384, max(batch, 2 ** round(math.log2(num_images / 10))))
    momentum = 0.99 if num_images / batch <= 1000 else 0.999
    warmup = max(1, epochs // (10 if epochs >= 40 else 3))
    return dict(zip(FITTED, (clusters, negatives, batch, 0.03 * batch / 256, momentum, warmup), strict=True))


def parse_fitted(parser: Parser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line of pre-training; with --fit, what is not given of `FITTED` is set."""
    args = parser.parse_args(words)
    if args.fit:
        parser.set_defaults(**dict.fromkeys(FITTED))
        parser.set_defaults(**fitted(args.fit, args.epochs, parser.parse_args(words).batch_size))
        args = parser.parse_args(words)
    return args


def add_files(parser: Parser) -> None:
    """The options that say what pre-training writes, and when."""
    group = parser.add_argument_group("files")
    group.add_argument("--exp-dir", type=path, default=Path("experiment_pcl"), metavar="DIR",
                       help="checkpoints, log.jsonl, TensorBoard's files and figures")
    group.add_argument("--save-freq", type=positive, default=5, metavar="N",
                       help="epochs between two checkpoints that are kept; the last epoch is always kept")
    group.add_argument("--save-steps", type=natural, default=1000, metavar="N",
                       help="steps between two saves into checkpoint_last.pth.tar, also rewritten after each epoch; 0 none")
    group.add_argument("--keep", type=natural, default=0, metavar="N",
                       help="remove kept checkpoints except the newest N; 0 keeps all")
    group.add_argument("--keep-every", type=natural, default=0, metavar="N",
                       help="with --keep, spare those of every N-th epoch")
    group.add_argument("--monitor-freq", type=natural, default=10, metavar="N",
                       help="measure whether it learns after each E-step and every N epochs of warm-up; 0: never, no pictures")


def add_backbone(parser: Parser) -> None:
    """The options that name the frozen network that a script evaluates."""
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


def add_output(parser: Parser) -> None:
    """Where an evaluation keeps its result (`pcl.run.logs.write_result`)."""
    parser.add_argument("--output", type=path, metavar="FILE.json", help="write settings and all results")
# fmt: on


def set_learning_rate(optimizer: torch.optim.Optimizer, args: argparse.Namespace, epoch: int, *first: float) -> float:
    """Give each group of the optimizer the epoch's learning rate, return the last; `first`: each group's at epoch 0."""
    for group, lr in zip(optimizer.param_groups, first or [args.lr], strict=True):
        group["lr"] = lr * learning_rate_factor(args, epoch)
    return lr * learning_rate_factor(args, epoch)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Of a whole epoch (from 0): `lr` times the epoch's factor."""
    return args.lr * learning_rate_factor(args, epoch)


def learning_rate_factor(args: argparse.Namespace, epoch: int) -> float:
    """A cosine from 1 to 0 with `cos`, else `gamma` (a tenth) to the number of epochs in `schedule` that have come."""
    if getattr(args, "cos", False):
        return 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return getattr(args, "gamma", 0.1) ** sum(epoch >= milestone for milestone in args.schedule)
