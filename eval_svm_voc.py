"""Linear SVMs on frozen features: mean average precision on VOC2007, with all training images or k of each class.

    python eval_svm_voc.py --pretrained pcl_v2/checkpoint_0199.pth.tar DIR             (--download fetches VOC2007 into DIR)
    python eval_svm_voc.py --pretrained pcl_v2/checkpoint_0199.pth.tar --low-shot DIR

Accuracy on single-label images in DIR/train/<class>/ and DIR/val/<class>/, such as Places205:

    python eval_svm_voc.py --pretrained pcl_v2/checkpoint_0199.pth.tar --low-shot --folder DIR

The cheapest run, half a minute on two CPU cores, on collages of the images that come with the package:

    python -m pcl.samples samples
    python eval_svm_voc.py --random-init --arch resnet18 --image-size 64 samples
"""

import time
from argparse import Namespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from pcl import cli, svm, voc
from pcl.augment import center_view
from pcl.distributed import available_cores, seed_everything
from pcl.features import extract_features
from pcl.loader import IndexedFolder, make_loader
from pcl.metrics import average_precision
from pcl.run import inputs, options, preflight
from pcl.run.logs import describe_machine, log, track, write_result
from pcl.svm import Features, Job, Scores
from pcl.terminal import leave_on_signals

SHOTS = (1, 2, 4, 8, 16)
DRAWS = 5


def get_parser() -> cli.Parser:
    """The command line."""
    # fmt: off
    parser = cli.Parser(__doc__)
    parser.add_argument("data", type=cli.path, metavar="DIR",
                        help="the folder that holds VOCdevkit/VOC2007; with --folder, train/<class>/ and val/<class>/")
    parser.add_argument("--download", action="store_true", help="fetch VOC2007 (900 MB) into DIR, unless it is there")
    parser.add_argument("--folder", action="store_true",
                        help="train on DIR/train/<class>/, score accuracy on DIR/val/<class>/; one label for each image")
    options.add_backbone(parser)
    parser.add_argument("--low-shot", action="store_true",
                        help=f"train on k = {', '.join(map(str, SHOTS))} images of each class, {DRAWS} draws each")
    parser.add_argument("--cost", type=cli.several(cli.positive_float), default="0.5", metavar="C,C,...",
                        help="cost of the SVMs; if you give several, cross-validation on the training images chooses one")
    parser.add_argument("--ignore-difficult", action="store_true",
                        help="leave difficult test images out of a class's score, as the VOC kit does (published: negative)")
    parser.add_argument("--seed", type=cli.seed, default=0, metavar="N", help="seed of the draws, the SVMs and random weights")
    parser.add_argument("-b", "--batch-size", type=cli.batch, default=128, metavar="N", help="images in a batch")
    parser.add_argument("-j", "--workers", "--num-workers", dest="num_workers", type=cli.processes, default=8, metavar="N",
                        help="loader processes, at most one a core")
    # fmt: on
    return parser


def main() -> None:
    parser = get_parser()
    args = options.parse_evaluation(parser)
    network, source, train, test = open_all(parser, args)
    with parser.telling(1):
        evaluate(network, source, train, test, args)


def open_all(parser: cli.Parser, args: Namespace) -> tuple[nn.Module, dict[str, str], Any, Any]:
    """The network, what it is, training and test images; stops on what cannot work, before anything is computed or written."""
    if args.folder and (args.download or args.ignore_difficult):
        parser.error("--folder: --download and --ignore-difficult are for VOC2007; leave them out")
    if args.download:
        preflight.check_folder(parser, "DIR", args.data)
    elif not args.data.is_dir():
        parser.error(f"DIR {args.data}: no such folder; --download makes it")
    preflight.check_output(parser, args)
    seed_everything(args.seed)  # random weights are to be the same each time
    with parser.telling(2):
        network, source = inputs.open_backbone(args)
    try:
        train, test = open_splits(parser, args)
        check(train, test, max(SHOTS) if args.low_shot else 1)
    except voc.VOCError as error:
        parser.error(f"DIR {args.data}: {error}")
    preflight.check_image_size(parser, args, max(len(train), len(test)), len(train) + len(test))
    return network, source, train, test


def open_splits(parser: cli.Parser, args: Namespace) -> list[Any]:
    """Training and test images; VOC2007 is fetched first if it is not there and --download is given."""
    view = center_view(args.image_size)
    if args.folder:
        return [images.with_transform(view) for images in inputs.open_labeled(parser, args.data)]
    try:
        return [voc.VOCSplit(args.data, split, view) for split in ("trainval", "test")]
    except voc.VOCError:
        if not args.download:
            raise
        voc.download(args.data)
        return [voc.VOCSplit(args.data, split, view) for split in ("trainval", "test")]


def labels_of(images: voc.VOCSplit | IndexedFolder) -> np.ndarray:
    """(N, classes): 1 shown, -1 not, 0 difficult."""
    if images.labels.ndim == 2:
        return images.labels
    return np.where(images.labels[:, None] == np.arange(len(images.classes)), np.int8(1), np.int8(-1))


def check(train: Any, test: Any, shots: int) -> None:
    """Every class must be shown often enough."""
    names = ("trainval", "test") if isinstance(train, voc.VOCSplit) else ("train", "val")
    for split, name, least in ((train, names[0], shots), (test, names[1], 1)):
        for label, count in zip(split.classes, (labels_of(split) > 0).sum(axis=0), strict=True):
            if count < least:
                raise voc.VOCError(f"class {label} has {count} positive images in {name}; {least} are needed")


def evaluate(network: nn.Module, source: dict[str, str], train: Any, test: Any, args: Namespace) -> None:
    """Everything that the options ask for."""
    log(f"machine: {describe_machine()}")
    log(f"data: {len(train)} training and {len(test)} test images, {len(train.classes)} classes, at {args.image_size} pixels")
    for line in [*train.layout_notes(), *test.layout_notes()] if args.folder else []:
        log(line)
    start = time.monotonic()
    labels, drawn = [labels_of(images) for images in (train, test)], None
    if args.folder and args.low_shot:  # of very many images, those that are drawn are enough
        drawn = np.unique(np.concatenate([rows for k in SHOTS for rows in draws_of(labels[0], k, args)]))
    seen = train if drawn is None else Subset(train, drawn.tolist())
    vectors = [features_of(network, images, args) for images in (seen, test)]
    features = Features(vectors[0], labels[0], vectors[1], labels[1], train.classes, drawn)
    extracted = time.monotonic()
    log(f"features: {vectors[0].shape[1]} of each image, {extracted - start:.1f} s")
    results = {"low_shot": low_shot(features, args)} if args.low_shot else {"full": full(features, args)}
    seconds = {"features": extracted - start, "svm": time.monotonic() - extracted}
    log(f"seconds: {seconds['features']:.1f} for the features, {seconds['svm']:.1f} for the SVMs")
    write_result(args.output, vars(args), checkpoint=source, classes=train.classes, **results, seconds=seconds)


def features_of(network: nn.Module, images: Any, args: Namespace) -> np.ndarray:
    """(N, C) float32 features, divided by their length plus 1e-5, as published."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = make_loader(images, range(len(images)), args.batch_size, min(args.num_workers, available_cores()))
    features = extract_features(network.to(device), track(loader, "features"), len(images), device)
    return (features / (features.norm(dim=1, keepdim=True) + 1e-5)).cpu().numpy()


def full(features: Features, args: Namespace) -> dict[str, Any]:
    """Train on all training images."""
    rows, name = np.arange(len(features.train_labels)), "accuracy" if args.folder else "mAP"
    by_cost = {cost: precisions(features, [rows], cost, args)[0] for cost in args.cost}
    cost = choose_cost(features, [rows], args)
    for label, ap in by_cost[cost].items() if not args.folder else ():
        log(f"  {label:20s} AP {100 * ap:5.1f}")
    for other, ap in by_cost.items():
        log(f"cost {other:g}{' (chosen)' if other == cost and len(by_cost) > 1 else ''}: {name} {100 * mean_of(ap):.1f}")
    summary = {str(c): {name.lower(): mean_of(ap), "ap": ap} for c, ap in by_cost.items()}
    return {"cost": cost, **summary[str(cost)], "by_cost": summary}


def low_shot(features: Features, args: Namespace) -> dict[str, Any]:
    """Train on k images of each class, several draws of them."""
    result, name, key = {}, *(("acc.", "accuracy") if args.folder else ("mAP", "map"))
    log(f"{'k':>3s}  {name:>5s}  {'std':>5s}   mean and standard deviation over {DRAWS} draws")
    for k in SHOTS:
        draws = draws_of(features.train_labels, k, args)
        by_cost = {cost: precisions(features, draws, cost, args) for cost in args.cost}
        cost = choose_cost(features, draws, args)
        summary = {str(c): {**spread(aps), "draws": [{key: mean_of(ap), "ap": ap} for ap in aps]} for c, aps in by_cost.items()}
        chosen = summary[str(cost)]
        result[str(k)] = {"cost": cost, "mean": chosen["mean"], "std": chosen["std"], "by_cost": summary}
        others = "".join(f"   cost {c}: {100 * s['mean']:.1f}" for c, s in summary.items()) if len(by_cost) > 1 else ""
        log(f"{k:3d}  {100 * chosen['mean']:5.1f}  {100 * chosen['std']:5.1f}{others}")
    return result


def draws_of(labels: np.ndarray, k: int, args: Namespace) -> list[np.ndarray]:
    """The training images of each draw."""
    return [voc.draw_low_shot(labels, k, args.seed, draw) for draw in range(DRAWS)]


def precisions(features: Features, draws: list[np.ndarray], cost: float, args: Namespace) -> list[dict[str, float]]:
    """For each draw of training images, the average precision of each class on the test set; with --folder the accuracy."""
    jobs = [Job(rows, label, cost) for rows in draws for label in range(len(features.classes))]
    scores, result = iter(run(features, jobs, args)), []
    for _ in draws:
        of_draw = [next(scores) for _ in features.classes]
        if args.folder:
            right = np.argmax(of_draw, axis=0) == features.test_labels.argmax(axis=1)
            result.append({"accuracy": float(right.mean())})
            continue
        ap = {}
        for truth, score, name in zip(features.test_labels.T, of_draw, features.classes, strict=True):
            counted = truth != 0 if args.ignore_difficult else np.full(len(truth), True)  # published: 0 is negative
            ap[name] = average_precision(truth[counted], score[counted])
        result.append(ap)
    return result


def choose_cost(features: Features, draws: list[np.ndarray], args: Namespace) -> float:
    """The cost of best mean average precision in cross-validation on the training images; of one, that one.

    Draws with fewer than a positive image for each fold cannot tell: then the first of --cost.
    """
    if len(args.cost) == 1:
        return args.cost[0]
    distinct = [np.unique(rows) for rows in draws]  # an image drawn twice would stand on both sides of a fold
    shown = [(features.train_labels[rows] > 0).sum(axis=0) for rows in distinct]
    fewest = min(min(count.min(), (len(rows) - count).min()) for rows, count in zip(distinct, shown, strict=True))
    if fewest < svm.FOLDS:
        log(f"note: too few images for cross-validation; the first of --cost, {args.cost[0]:g}, is taken")
        return args.cost[0]
    quality = {}
    for cost in args.cost:
        jobs = [Job(rows, label, cost, cross_validated=True) for rows in distinct for label in range(len(features.classes))]
        quality[cost] = float(np.mean(run(features, jobs, args)))
    return max(quality, key=quality.__getitem__)


def run(features: Features, jobs: list[Job], args: Namespace) -> list[np.ndarray]:
    """The scores of each job, in parallel over the cores; processes, since liblinear's random numbers are a process's."""
    workers = min(args.num_workers and available_cores(), len(jobs))
    loader = make_loader(Scores(features, jobs, args.seed), range(len(jobs)), 1, workers, in_order=False)
    found = {int(number): scores[0].numpy().copy() for number, scores in track(loader, "SVMs")}
    return [found[number] for number in range(len(jobs))]


def mean_of(ap: dict[str, float]) -> float:
    """mAP."""
    return float(np.mean(list(ap.values())))


def spread(aps: list[dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation (of the draws themselves, not an estimate for more of them) of mAP."""
    maps = [mean_of(ap) for ap in aps]
    return {"mean": float(np.mean(maps)), "std": float(np.std(maps))}


if __name__ == "__main__":
    with leave_on_signals():
        main()
