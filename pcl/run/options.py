"""Options and checks that the scripts share. A check that fails is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from pcl.distributed import available_cores
from pcl.networks import architectures
from pcl.run.logs import log
from pcl.run.rendezvous import local_processes, total_processes
from pcl.terminal import printable

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
    """Where an evaluation keeps its result (`pcl.run.logs.write_result`)."""
    parser.add_argument("--output", type=path, metavar="FILE.json", help="keep settings and every figure")


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
