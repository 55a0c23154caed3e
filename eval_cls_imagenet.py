"""Linear probe: train a linear classifier on the frozen backbone, on DIR/train/<class>/, and score it on DIR/val/<class>/.

    python eval_cls_imagenet.py --pretrained pcl_v2/checkpoint_0199.pth.tar --id pcl_v2 DIR
    python eval_cls_imagenet.py --resume Linear_eval/pcl_v2/model_best.pth.tar --evaluate DIR

The cheapest run, a minute on two CPU cores, on the images that come with the package:

    python -m pcl.samples samples
    python eval_cls_imagenet.py --random-init -a resnet18 --image-size 32 --epochs 3 --lr 0.03 --schedule 2 --id first samples
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pcl import checkpoint
from pcl.augment import center_view, crop_view, normalize
from pcl.distributed import get_rank, is_main, seed_everything, wait_for_all
from pcl.errors import RunError
from pcl.features import extract_features
from pcl.images import list_folder, tell_left_out
from pcl.loader import EpochSampler, IndexedFolder, indices_of_rank, make_loader
from pcl.metrics import topk_accuracy
from pcl.run import inputs, launch, options, preflight
from pcl.run.logs import EpochLog, Meters, RunLog, TensorBoard, describe_machine, log, track, write_result
from pcl.run.preflight import Plan, note_changes
from pcl.terminal import leave_on_signals

RESULTS = Path("Linear_eval")  # as published
LAST = "checkpoint.pth.tar"


def get_parser() -> options.Parser:
    """The command line."""
    # fmt: off
    parser = options.Parser(__doc__)
    parser.add_argument("data", type=options.path, metavar="DIR", help="the folder that holds train/<class>/ and val/<class>/")
    options.add_backbone(parser)
    options.add_training(parser, epochs=100, batch_size=256, lr=5.0, schedule=[60, 80], wd=0.0, print_freq=10)
    options.add_launch(parser)
    probe = parser.add_argument_group("probe")
    probe.add_argument("-e", "--evaluate", action="store_true", help="score the finished probe of --resume and stop")
    probe.add_argument("--percent", type=options.percentage, default=100.0, metavar="P",
                       help="train on P %% of the images of each class (at least one), drawn with --seed")
    probe.add_argument("--id", type=folder_name, default="linear", metavar="NAME",
                       help=f"checkpoints and log go to {RESULTS}/NAME, TensorBoard's files to {RESULTS}/NAME_tensorboard")
    options.add_output(parser)
    # fmt: on
    return parser


def folder_name(text: str) -> str:
    """A name below `RESULTS`, in which it stays."""
    options.reachable(text and str(RESULTS / f"{text}_tensorboard"))
    if Path(text).is_absolute() or not Path(text).parts or ".." in Path(text).parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder in {RESULTS}")
    return text


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    launch.launch_or_exit(parser, probe, args, check(parser, args))


def check(parser: options.Parser, args: argparse.Namespace) -> Plan:
    """Stop on what cannot work, before any process is started or file written; what a run must know besides its options."""
    plan = preflight.check_launch(parser, args)
    train, val = (inputs.open_folder(parser, args.data, split) for split in ("train", "val"))
    if train.classes != val.classes:
        name = min(set(train.classes) ^ set(val.classes))
        parser.error(f"DIR {args.data}: train/ and val/ must hold the same class folders; {name} is in one of them alone")
    if len(train.classes) < 2:
        parser.error(
            f"DIR {args.data}: {len(train.classes)} classes; the probe needs folders of two or more in train/ and val/"
        )
    check_numbers(parser, args, plan, train, val)
    preflight.check_output(parser, args)
    for place in (RESULTS / args.id, RESULTS / f"{args.id}_tensorboard"):
        preflight.check_folder(parser, f"--id {args.id}", place)
    preflight.check_image_size(parser, args, max(len(train), len(val)), len(val) + len(val.classes))
    try:
        state = open_probe(args, train.classes).state
        plan = replace(plan, epoch=state["epoch"] if state else args.start_epoch)
        check_other_run(args, plan)
    except RunError as error:
        parser.error(str(error))
    if args.evaluate and not state:
        parser.error("--evaluate: name the finished probe with --resume")
    if state:
        if plan.epoch >= args.epochs and not (args.evaluate or args.resume == "auto"):
            parser.error(f"--resume: {args.resume} has all of its {plan.epoch} epochs; raise --epochs to go on")
        if args.seed is None:
            plan = replace(plan, seed=state["seed"], deterministic=state["deterministic"])
    elif plan.epoch >= args.epochs:
        parser.error(f"--start-epoch {plan.epoch}: the epochs of --epochs {args.epochs} are 0 to {args.epochs - 1}")
    if args.evaluate or plan.epoch >= args.epochs:  # nothing else is left to do
        _, unreadable = inputs.leave_out_unreadable(parser, args, plan.place, val)
        return replace(plan, unreadable=unreadable)
    (train, val), unreadable = inputs.leave_out_unreadable(parser, args, plan.place, train, val)
    plan = replace(plan, unreadable=unreadable, num_images=len(train), files=inputs.describe_files(train, val))
    check_numbers(parser, args, plan, train, val)
    return plan


def check_other_run(args: argparse.Namespace, plan: Plan) -> None:
    """Asked before anything is written, and again once no other run can write.

    Raises:
        RunError: the folder holds a run that is not to be resumed.
    """
    folder = RESULTS / args.id
    goes_on = args.resume and (args.resume == "auto" or Path(args.resume).resolve() == (folder / LAST).resolve())
    if not (goes_on or args.evaluate) and folder.is_dir() and {path.name for path in folder.iterdir()} - {".lock"}:
        raise RunError(f"--id {args.id}: {folder} holds another run; name another, or go on with it (--resume auto)")


def check_numbers(
    parser: options.Parser, args: argparse.Namespace, plan: Plan, train: IndexedFolder, val: IndexedFolder
) -> None:
    """Stop if a class has no image, or a process has none."""
    for images, split in ((train, "train"), (val, "val")):
        count = np.bincount(images.labels, minlength=len(images.classes))
        if count.min() == 0:
            kind = "image that can be read" if plan.unreadable else "image"
            place = args.data / split / images.classes[count.argmin()]
            parser.error(f"DIR {args.data}: no {kind} in {place}{tell_left_out(list_folder(place).others)}")
    if len(label_subset(train.labels, args.percent, 0)) < plan.place.world:
        parser.error(f"--percent {args.percent:g}: fewer images than processes; raise it, or lower --nproc")


@dataclass
class Probe:
    """The frozen network and its head."""

    backbone: nn.Module  # (B, 3, H, W) -> (B, C), in eval mode
    head: nn.Linear  # (B, C) -> (B, classes)
    source: dict[str, str]  # where the backbone comes from
    state: dict[str, Any] | None = None  # the checkpoint to go on from


def open_probe(args: argparse.Namespace, classes: list[str]) -> Probe:
    """What the options name: a new head on a backbone, or the probe of --resume.

    Raises:
        CheckpointError: a file that does not fit the options or the classes.
    """
    resume = args.resume
    if resume == "auto":
        last = RESULTS / args.id / LAST
        resume = str(last) if last.exists() else None
    if not resume:
        backbone, source = inputs.open_backbone(args)
        with torch.no_grad():  # of a copy without numbers, which takes no time however large the images are
            size = (
                copy.deepcopy(backbone).to("meta")(torch.zeros(1, 3, args.image_size, args.image_size, device="meta")).shape[1]
            )
        head = nn.Linear(size, len(classes))
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return Probe(backbone, head, source)
    try:
        network, state = checkpoint.load_probe(resume)
    except checkpoint.CheckpointError as error:
        raise checkpoint.CheckpointError(f"--resume: {error}") from error
    head, network.fc = network.fc, nn.Identity()
    if args.arch not in (None, state["arch"]):
        raise checkpoint.CheckpointError(f"--resume: {resume} holds a {state['arch']}, not a {args.arch}")
    if state["classes"] != classes:
        raise checkpoint.CheckpointError(f"--resume: {resume} was trained on other classes than those of {args.data}")
    if args.pretrained:
        given, _ = inputs.open_backbone(args)
        if changed := first_difference(network, given.state_dict()):
            raise checkpoint.CheckpointError(f"--resume: {resume} has another backbone than --pretrained, {changed}")
    return Probe(network, head, state["source"], state)


def probe(device: torch.device, args: argparse.Namespace, plan: Plan) -> None:
    """Train and score, in each process of the group."""
    evaluate = args.evaluate or plan.epoch >= args.epochs
    if not evaluate:
        record = RunLog(RESULTS / args.id, {**vars(args), **vars(plan)}, check=partial(check_other_run, args, plan))
        wait_for_all()  # now no other run writes there
    seed_everything(plan.seed)  # random weights are to be the same on every rank
    train_root, val_root = ((args.data / split).resolve() for split in ("train", "val"))
    train_set = IndexedFolder(train_root, crop_view(args.image_size), plan.seed, skip=plan.unreadable)
    val_set = IndexedFolder(val_root, center_view(args.image_size), skip=plan.unreadable)
    model = open_probe(args, train_set.classes)
    model.backbone.to(device).requires_grad_(False)
    model.head.to(device)
    if model.state:
        now = {"image_size": str(args.image_size)} if evaluate else plan.settings(args)
        note_changes(model.state, now)
    log(f"machine: {describe_machine()}")
    inputs.note_image_size(args)
    log(f"data: {len(train_set)} training and {len(val_set)} validation images, {len(val_set.classes)} classes")
    for images in (train_set, val_set):
        inputs.check_same_images(images)
        for line in images.layout_notes() if is_main() else []:
            log(line)

    # Center crops through a frozen network: the features of the validation images are the same at every epoch.
    start = time.monotonic()
    val_loader = make_loader(val_set, indices_of_rank(len(val_set)), plan.batch, plan.workers)
    val_features = extract_features(model.backbone, track(val_loader, "features"), len(val_set), device)
    val_labels = torch.from_numpy(val_set.labels).to(device)
    log(f"features: {val_features.shape[1]} of each validation image, {time.monotonic() - start:.1f} s")
    if evaluate:
        report(model, [validate(model.head, val_features, val_labels)], args, val_set.classes)
        return

    train_set = train_set.subset(label_subset(train_set.labels, args.percent, plan.seed))
    labels = torch.from_numpy(train_set.labels).to(device)
    sampler = EpochSampler(train_set, plan.seed)
    loader = make_loader(train_set, sampler, plan.batch, plan.workers)
    head = launch.parallel(model.head, device)
    optimizer = torch.optim.SGD(head.parameters(), args.lr, momentum=args.momentum, weight_decay=args.wd)
    history: list[dict[str, float]] = []
    if model.state:
        checkpoint.load_optimizer(optimizer, model.state["optimizer"])
        history = model.state["history"]
    inputs.keep_unreadable(RESULTS / args.id, plan.unreadable)
    board = TensorBoard(RESULTS / f"{args.id}_tensorboard")
    untouched = {name: value.clone() for name, value in model.backbone.state_dict().items()}

    for epoch in range(model.state["epoch"] if model.state else plan.epoch, args.epochs):
        seed_everything(plan.seed + get_rank(), epoch)  # an epoch's randomness is its own: a resumed run repeats it
        sampler.set_epoch(epoch)
        figures = train_head(model.backbone, head, loader, labels, optimizer, epoch, args, plan, record)
        if not (math.isfinite(figures["train_loss"]) and all(value.isfinite().all() for value in head.parameters())):
            raise RunError(
                f"the loss of epoch {epoch + 1} is not a finite number, at learning rate {figures['lr']:g}; lower --lr"
            )
        if changed := first_difference(model.backbone, untouched):
            raise RuntimeError(f"the frozen backbone has changed: {changed}")
        figures |= validate(model.head, val_features, val_labels)
        shown = "  ".join(f"{name} {value:.2f} %" for name, value in figures.items() if name.startswith("test"))
        log(f"epoch {epoch + 1}/{args.epochs}  {shown}")
        record.write(epoch=epoch, **figures)
        board.write(epoch, **figures)
        history.append({"epoch": epoch, **figures})
        save(model, optimizer, history, train_set.classes, args, plan)
    report(model, history, args, val_set.classes)


def label_subset(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Indices, in order, of `percent` % of the images of each class, at least one of each, drawn with `seed`."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(np.concatenate([generator.permutation(m)[: max(1, round(len(m) * percent / 100))] for m in members]))


def train_head(
    backbone: nn.Module,
    head: nn.Module,
    loader: DataLoader,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    args: argparse.Namespace,
    plan: Plan,
    record: RunLog,
) -> dict[str, float]:
    """One epoch of SGD on the head; the figures that TensorBoard shows."""
    lr = options.set_learning_rate(optimizer, args, epoch)
    meters = Meters()
    label = f"epoch {epoch + 1}/{args.epochs}"
    progress = EpochLog(label, len(loader), plan.global_batch, args.print_freq, record, epoch)
    for step, (images, index) in progress.batches(loader):
        target = labels[index.to(labels.device, non_blocking=True)]
        with torch.no_grad():
            features = backbone(normalize(images.to(labels.device, non_blocking=True)))
        logits = head(features)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        meters.add(loss=loss, acc=topk_accuracy(logits, target))
        progress.step(step, meters)
    means = progress.close(meters, lr=lr)
    return {"train_loss": means["loss"], "train_acc": 100 * means["acc"], "lr": lr}


@torch.no_grad()
def validate(head: nn.Linear, features: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and, of five or more classes, top-5 accuracy in percent over all validation images, the same on every rank."""
    logits = head(features)  # (N, classes)
    ks = {"test_acc": 1, "test_acc5": 5}
    return {name: 100 * float(topk_accuracy(logits, labels, k)) for name, k in ks.items() if k <= logits.shape[1]}


def first_difference(network: nn.Module, expected: dict[str, Tensor]) -> str | None:
    """The first weight or BatchNorm statistic that is not equal to the bit, named."""
    for name, value in network.state_dict().items():
        if not torch.equal(value, expected[name]):
            return f"{name} differs"
    return None


def save(
    model: Probe,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
    classes: list[str],
    args: argparse.Namespace,
    plan: Plan,
) -> None:
    """Write the last checkpoint, and model_best.pth.tar if this epoch is the best so far: a whole torchvision classifier."""
    if not is_main():
        return
    network = model.backbone.state_dict() | {f"fc.{name}": value for name, value in model.head.state_dict().items()}
    state = {
        "epoch": history[-1]["epoch"] + 1,
        "arch": model.source["arch"],
        "state_dict": {f"module.{name}": value for name, value in network.items()},
        "best_acc1": max(figures["test_acc"] for figures in history),
        "optimizer": optimizer.state_dict(),
        "classes": classes,
        "source": model.source,
        "history": history,
        "seed": plan.seed,
        "deterministic": plan.deterministic,
        "args": plan.settings(args),
    }
    if history[-1]["test_acc"] == state["best_acc1"]:  # first, so that a run stopped in between repeats the epoch
        checkpoint.save(RESULTS / args.id / "model_best.pth.tar", state)
    checkpoint.save(RESULTS / args.id / LAST, state)


def report(model: Probe, history: list[dict[str, float]], args: argparse.Namespace, classes: list[str]) -> None:
    """Print the last and the best accuracies; write --output."""
    last, best = history[-1], max(history, key=lambda figures: figures["test_acc"])
    top5 = f", top-5 {last['test_acc5']:.2f} %" if "test_acc5" in last else ""
    log(f"top-1 {last['test_acc']:.2f} %{top5}; best top-1 {best['test_acc']:.2f} %")
    write_result(args.output, vars(args), checkpoint=model.source, classes=classes, last=last, best=best, epochs=history)


if __name__ == "__main__":
    with leave_on_signals():
        main()
