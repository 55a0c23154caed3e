"""What is checked before a linear probe starts, and which labels it is given."""

import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np

from pcl.cli import Parser
from pcl.errors import RunError
from pcl.images import encoding_of, list_folder, tell_left_out
from pcl.loader import IndexedFolder
from pcl.run import inputs, preflight
from pcl.run.preflight import Plan
from pcl.run.probe import BEST, LAST, RESULTS, check_other_run, open_probe, places_of


def check(parser: Parser, args: Namespace) -> Plan:
    """Stop on what cannot work, before a process is started or a file written; return what a run needs besides its options."""
    plan = preflight.check_launch(parser, args)
    several = len(args.lr) > 1
    own = [RESULTS / args.id, RESULTS / f"{args.id}_tensorboard"]
    own += [folder / name for _, folder, _ in places_of(args) for name in (LAST, BEST)]
    for wrong, message in (
        (args.evaluate and not args.resume, "--evaluate: name the finished probe with --resume"),
        (args.pixels and args.resume, "--resume: a probe of --pixels cannot be resumed; leave it out, and take a new --id"),
        (args.finetune and args.pixels, "--finetune: --pixels has no weights to train; leave one of them out"),
        (args.finetune and several, "--lr: --finetune trains one network; give one learning rate"),
        (args.lr_backbone and not args.finetune, "--lr-backbone is an option of --finetune; leave it out, or give that too"),
        (several and args.resume not in (None, "auto"),
         f"--lr: {args.resume} holds one classifier; give one rate or --resume auto"),
        (args.subset and args.percent < 100, "--percent: --subset has chosen the images; leave one of them out"),
        (args.output and args.output.resolve() in [path.resolve() for path in own],
         f"--output {args.output} is what the run itself writes; name another file"),
        (args.finetune and plan.batch < 2, "--batch-size: BatchNorm needs two images of each process in a step; raise it"),
    ):  # fmt: skip
        if wrong:
            raise RunError(message)
    train, val = inputs.open_labeled(parser, args.data)
    check_images(args, plan, train, val)
    preflight.check_output(parser, args)
    for place in (RESULTS / args.id, RESULTS / f"{args.id}_tensorboard"):
        preflight.check_folder(parser, f"--id {args.id}", place)
    preflight.check_image_size(parser, args, max(len(train), len(val)), len(val) + len(val.classes))
    heads = open_probe(args, train.classes).heads
    plan = replace(plan, epoch=min(head.epoch for head in heads))
    check_other_run(args)
    states = [head.state for head in heads if head.state]
    if args.evaluate and len(states) < len(heads):
        raise RunError("--evaluate: name the finished probe with --resume")
    if states:
        if plan.epoch >= args.epochs and not (args.evaluate or args.resume == "auto"):
            raise RunError(f"--resume: {args.resume} has {plan.epoch} epochs; raise --epochs above that to go on")
        if args.seed is None:
            plan = replace(plan, seed=states[0]["seed"], deterministic=states[0]["deterministic"])
    elif plan.epoch >= args.epochs:
        raise RunError(f"--start-epoch {plan.epoch}: the epochs of --epochs {args.epochs} are 0 to {args.epochs - 1}")
    if args.evaluate or plan.epoch >= args.epochs:  # nothing else is left to do
        _, unreadable = inputs.leave_out_unreadable(parser, args, plan.place, val)
        return replace(plan, unreadable=unreadable)
    (train, val), unreadable = inputs.leave_out_unreadable(parser, args, plan.place, train, val)
    plan = replace(plan, unreadable=unreadable, num_images=len(train))
    labeled = check_images(args, plan, train, val)
    used = labeled if args.subset else train  # --percent and --seed are compared themselves
    return replace(plan, files=inputs.describe_files(used, val))


def check_images(args: Namespace, plan: Plan, train: IndexedFolder, val: IndexedFolder) -> IndexedFolder:
    """RunError if a class has no image, or a process has none (to fine-tune: one, which leaves BatchNorm no spread).

    Returns the training images whose labels are used, drawn with another seed than the run's.
    """
    for images, split in ((train, "train"), (val, "val")):
        count = np.bincount(images.labels, minlength=len(images.classes))
        if count.min() == 0:
            kind = "image that can be read" if plan.unreadable else "image"
            place = args.data / split / images.classes[count.argmin()]
            raise RunError(f"DIR {args.data}: no {kind} in {place}{tell_left_out(list_folder(place).others)}")
    labeled = labeled_images(train, args, complete=not plan.unreadable)
    each = len(labeled) // plan.place.world
    if each < 1 + args.finetune:
        option = f"--subset {args.subset}" if args.subset else f"--percent {args.percent:g}"
        few = "fewer than two images per process, which BatchNorm needs" if args.finetune else "fewer images than processes"
        raise RunError(f"{option}: {few}; choose more, or lower --nproc")
    return labeled


def label_subset(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Indices, in order, of `percent` % of the images of each class, at least one of each, drawn with `seed`."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(np.concatenate([generator.permutation(m)[: max(1, round(len(m) * percent / 100))] for m in members]))


def names_in(path: Path) -> set[str]:
    """The names of images in a file of --subset, one in a line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"--subset {path}: it cannot be read ({error.strerror})") from error
    encoding = encoding_of(content)
    text = content.decode(encoding, "replace" if encoding == "utf-16" else "surrogateescape")
    return {line.strip() for line in text.splitlines()} - {""}


def labeled_images(train: IndexedFolder, args: Namespace, seed: int = 0, complete: bool = False) -> IndexedFolder:
    """The training images whose labels are used: those that --subset names, or --percent of each class.

    RunError if a name is that of several images; if the folder is `complete`, also if it is that of none.
    """
    if not args.subset:
        return train.subset(label_subset(train.labels, args.percent, seed))
    names, found = names_in(args.subset), dict[str, int]()
    for i in range(len(train)):
        path = train.path(i).removeprefix(f"{train.root}/")
        for name in {path, os.path.basename(path)} & names:
            if name in found:
                raise RunError(f"--subset {args.subset}: several images are called {name}; write <class>/{name}")
            found[name] = i
    if complete and (missing := sorted(names - found.keys())):
        told = f"{train.root} has no image {missing[0]} ({len(missing)} such names)"
        raise RunError(f"--subset {args.subset}: {told}; write NAME or <class>/NAME")
    return train.subset(np.unique(np.array([*found.values()], dtype=int)))
