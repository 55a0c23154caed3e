"""The groups of options that scripts share, and what options describe: the learning rate, the model, the views."""

import math
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pcl import checkpoint, cli
from pcl.augment import Augmentation
from pcl.builder import MoCo, split_batch_norm
from pcl.cli import Parser, integer, natural, path, positive, positive_float
from pcl.networks import architectures, new_network
from pcl.run.logs import log
from pcl.run.preflight import Plan


# fmt: off
def add_training(
    parser: Parser, *, epochs: int, batch_size: int, lr: Any, schedule: Sequence[int], wd: float, print_freq: int,
    lr_type: Callable[[str], Any] = positive_float, lr_help: str = "initial learning rate",
) -> None:
    """The options of any run of SGD, with this script's defaults."""
    group = parser.add_argument_group("training")
    group.add_argument("-j", "--workers", type=cli.processes, metavar="N",
                       help="loader processes of this node in total, by default one per core; 0: the training process loads")
    group.add_argument("--epochs", type=positive, default=epochs, metavar="N", help="epochs to train")
    group.add_argument("--start-epoch", type=natural, default=0, metavar="N", help="first epoch, from 0; --resume sets it")
    group.add_argument("-b", "--batch-size", type=cli.batch, default=batch_size, metavar="N",
                       help="images in a step, a total over this node's training processes")
    group.add_argument("--lr", type=lr_type, default=lr, metavar="LR", help=lr_help)
    group.add_argument("--schedule", type=natural, nargs="*", default=list(schedule), metavar="EPOCH",
                       help="epochs at which the learning rate falls to a tenth")
    group.add_argument("--momentum", type=cli.fraction, default=0.9, metavar="M", help="momentum of SGD")
    group.add_argument("--wd", "--weight-decay", dest="wd", type=cli.nonnegative_float, default=wd, metavar="WD",
                       help="weight decay")
    group.add_argument("-p", "--print-freq", type=positive, default=print_freq, metavar="N",
                       help="steps between two lines of the log")
    group.add_argument("--resume", type=cli.reachable, metavar="PATH",
                       help="go on from this checkpoint; auto: from the newest of this run, or start if there is none")
    group.add_argument("--skip-unreadable", action="store_true",
                       help="read every image first; list those that cannot be read, and leave them out")


def add_launch(parser: Parser) -> None:
    """The options that say which processes, on which machines, train together."""
    group = parser.add_argument_group("processes")
    group.add_argument("--nproc", type=integer(1, 2**10), metavar="N",
                       help="training processes on this machine; by default one for each GPU, or one on the CPU")
    group.add_argument("--gpu", type=natural, metavar="N", help="train on this GPU alone")
    group.add_argument("--world-size", type=integer(1, 2**16), default=1, metavar="N", help="number of nodes (machines)")
    group.add_argument("--rank", type=natural, default=0, metavar="N", help="number of this node, from 0")
    group.add_argument("--dist-url", metavar="URL",
                       help="tcp://HOST:PORT of node 0, the same on every node; one node needs none")
    group.add_argument("--dist-backend", default="nccl", choices=["nccl", "gloo"],
                       help="how GPUs communicate; without a GPU always gloo")
    group.add_argument("--dist-timeout", type=cli.seconds, default=1800.0, metavar="SECONDS",
                       help="how long processes wait for each other before a run is given up")
    group.add_argument("--multiprocessing-distributed", action="store_true", help="always on; accepted for old command lines")
    # torch.distributed.launch adds it; it sets LOCAL_RANK too.
    group.add_argument("--local-rank", "--local_rank", type=natural, default=SUPPRESS, help=SUPPRESS)
    group.add_argument("--seed", type=cli.seed, metavar="N",
                       help="base of the random seeds, by default drawn at random; process i takes N + i")


def add_pretraining(parser: Parser) -> None:
    """The options of pre-training that are not the paper's: speed, small data (which change the mathematics), files."""
    group = parser.add_argument_group("speed")
    group.add_argument("--augment-on", choices=["workers", "device"], default="workers",
                       help="device: loader workers only decode and crop; colors and blur follow on whole batches")
    group.add_argument("--amp", choices=["off", "bf16"], default="off", help="features in bfloat16: faster on new GPUs")
    group.add_argument("--channels-last", action="store_true", help="channels-last memory format: faster with --amp")
    group.add_argument("--compile", action="store_true",
                       help="torch.compile for the encoders: fewer kernels to launch, after minutes of compiling")
    group.add_argument("--kmeans", choices=["faiss", "super", "sharded"], default="faiss",
                       help="super: prunes the search, on the CPU; faster if few directions hold the features' variance; "
                       "sharded: features stay on their process, for very many images")
    group.add_argument("--kmeans-tf32", action="store_true", help="let sharded k-means compute in TF32 on a GPU")
    group = parser.add_argument_group("small data", "not in the published algorithm; docs/settings.md says when they help")
    group.add_argument("--fit", type=integer(60), metavar="N",
                       help="set --num-cluster, --pcl-r, -b, --lr, --moco-m and --warmup-epoch, unless given, for N images")
    group.add_argument("--small-stem", action="store_true",
                       help="begin with a 3x3 convolution and no max-pool, for images of at most 64 pixels; slower")
    group.add_argument("--bn-splits", type=positive, default=1, metavar="S",
                       help="BatchNorm statistics over each of S groups of a process's batch, as over S GPUs")
    group.add_argument("--mask-duplicates", action="store_true",
                       help="do not use an image's own prototype as its negative where other images of the batch share it")
    group.add_argument("--kmeans-every", type=positive, default=1, metavar="E",
                       help="an E-step at every E-th epoch after warm-up; the clusters are kept in between")
    group.add_argument("--fixed-phi", action="store_true",
                       help="give every prototype --temperature as its concentration, as in the paper's ablation")
    group.add_argument("--proto-weight", type=cli.nonnegative_float, default=1.0, metavar="W",
                       help="weight of the prototype term beside InfoNCE")
    group = parser.add_argument_group("files")
    group.add_argument("--exp-dir", type=path, default=Path("experiment_pcl"), metavar="DIR",
                       help="checkpoints, log.jsonl, TensorBoard's files and figures")
    group.add_argument("--save-freq", type=positive, default=5, metavar="N",
                       help="epochs between two checkpoints that are kept; the last epoch is always kept")
    group.add_argument("--save-steps", type=natural, default=1000, metavar="N",
                       help="steps between two saves of checkpoint_last.pth.tar; 0: save only after an epoch and when stopped")
    group.add_argument("--keep", type=natural, default=0, metavar="N",
                       help="keep only the newest N numbered checkpoints; 0 keeps all")
    group.add_argument("--keep-every", type=natural, default=0, metavar="N",
                       help="with --keep, also keep those of every N-th epoch")
    group.add_argument("--monitor-freq", type=natural, default=10, metavar="N",
                       help="measure whether it learns after each E-step and every N epochs of warm-up; 0: never, no pictures")


def add_backbone(parser: Parser) -> None:
    """The options that name the frozen network that a script evaluates, and the file of its results (`logs.write_result`)."""
    parser.add_argument("--output", type=path, metavar="FILE.json", help="write settings and all results to this file")
    group = parser.add_argument_group("backbone")
    group.add_argument("--pretrained", type=cli.reachable, metavar="FILE",
                       help="a checkpoint of main_pcl.py or of released PCL, or a torchvision state dict")
    group.add_argument("--random-init", action="store_true", help="evaluate random weights instead, as a baseline")
    group.add_argument("--pixels", action="store_true", help="evaluate the pixels of the center crop instead, as a baseline")
    group.add_argument("-a", "--arch", metavar="NAME", choices=architectures(),
                       help="architecture, by default the checkpoint's; resnet50 with --random-init")
    group.add_argument("--small-stem", action="store_true",
                       help="with --random-init, the stem of main_pcl.py --small-stem; a checkpoint's own is recognized")
    group.add_argument("--image-size", type=cli.side, default=224, metavar="PIXELS",
                       help="side of the center crop, from images scaled to 8/7 of it; a checkpoint may name another default")
# fmt: on


FITTED = ("num_cluster", "pcl_r", "batch_size", "lr", "moco_m", "warmup_epoch")


def fitted(num_images: int, epochs: int, batch: int | None = None) -> dict[str, Any]:
    """The options of pre-training in `FITTED` for a number of images, by the README's rules; published ones are the limits."""
    batch = batch or min(256, max(8, 2 ** round(math.log2(num_images / 80))))
    clusters = [min(most, max(2, num_images // size)) for most, size in ((25000, 40), (50000, 20), (100000, 10))]
    negatives = min(16384, max(batch, 2 ** round(math.log2(num_images / 10))))
    momentum = 0.99 if num_images / batch <= 1000 else 0.999
    warmup = max(1, epochs // (10 if epochs >= 40 else 3))
    return dict(zip(FITTED, (clusters, negatives, batch, 0.03 * batch / 256, momentum, warmup), strict=True))


def parse_fitted(parser: Parser, words: Sequence[str] | None = None) -> Namespace:
    """Parse a command line of pre-training; with --fit, what is not given of `FITTED` is set."""
    args = parser.parse_args(words)
    if args.fit:
        parser.set_defaults(**dict.fromkeys(FITTED))
        parser.set_defaults(**fitted(args.fit, args.epochs, parser.parse_args(words).batch_size))
        args = parser.parse_args(words)
    return args


def parse_evaluation(parser: Parser, resumed: Callable[[Namespace], Sequence[str]] = lambda args: ()) -> Namespace:
    """Parse a command line with `add_backbone`'s options; unless --image-size is given, a checkpoint's own size is taken.

    `resumed` names the files of an evaluation that is resumed, which count more than --pretrained.
    """
    args = parser.parse_args()
    for file in filter(None, (*resumed(args), args.pretrained)):
        with suppress(checkpoint.CheckpointError):  # told where it is opened
            if size := checkpoint.trained_at(file):
                parser.set_defaults(image_size=size)
                break
    return parser.parse_args()


def set_learning_rate(optimizer: torch.optim.Optimizer, args: Namespace, epoch: int, *first: float) -> float:
    """Give each group of the optimizer the rate of the whole epoch, as published; return the last. `first`: each at epoch 0."""
    factor = learning_rate_factor(args, epoch)
    for group, lr in zip(optimizer.param_groups, first or [args.lr], strict=True):
        group["lr"] = lr * factor
    return lr * factor


def learning_rate_factor(args: Namespace, epoch: int) -> float:
    """With `cos`, a cosine from 1 to 0; else `gamma` (a tenth) to the power of the number of milestones passed."""
    if getattr(args, "cos", False):
        return 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    return getattr(args, "gamma", 0.1) ** sum(epoch >= milestone for milestone in args.schedule)


def make_model(args: Namespace) -> MoCo:
    """The model that the options describe, with random weights."""
    encoder = partial(new_network, args.arch, args.small_stem)
    model = MoCo(encoder, args.low_dim, args.pcl_r, args.moco_m, args.mlp)
    if args.bn_splits > 1:
        split_batch_norm(model, args.bn_splits)
    return model


def start_model(args: Namespace, plan: Plan) -> MoCo:
    """`make_model`, for a new run with the weights of --init; its encoders are compiled if --compile asks for it."""
    model = make_model(args)
    if args.init and not plan.resume and not checkpoint.load_init(args.init, model, args.arch):
        log(f"note: --init {args.init}: its head does not fit --low-dim and --mlp; the head begins with random weights")
    for encoder in (model.encoder_q, model.encoder_k) if args.compile else ():
        # In place: no name changes. Not dynamic: the E-step's batch would make sizes symbolic, and training's kernels slow.
        encoder.compile(fullgraph=True, dynamic=False)
    return model


def augmentation_of(args: Namespace) -> Augmentation:
    """The views that the options describe."""
    return Augmentation(args.image_size, args.aug_plus, on_device=args.augment_on == "device")


def autocast(args: Namespace, device: torch.device) -> torch.autocast:
    """Inside, the encoders give features in bfloat16 if --amp asks for it; weights and all that follows stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")
