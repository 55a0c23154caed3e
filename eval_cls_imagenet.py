"""Linear probe: train a linear classifier on the frozen backbone, on DIR/train/<class>/, and score it on DIR/val/<class>/.

    python eval_cls_imagenet.py --pretrained pcl_v2/checkpoint_0199.pth.tar --id pcl_v2 DIR
    python eval_cls_imagenet.py --resume Linear_eval/pcl_v2/model_best.pth.tar --evaluate DIR

Several learning rates on the same features, or the whole network fine-tuned with 1 % of the labels:

    python eval_cls_imagenet.py --pretrained pcl_v2/checkpoint_0199.pth.tar --lr 0.3,1,5,30 --id rates DIR
    python eval_cls_imagenet.py --pretrained pcl_v1/checkpoint_0199.pth.tar --finetune --percent 1 --id one_percent DIR

The cheapest run, a minute on two CPU cores, on the images that come with the package:

    python -m pcl.samples samples
    python eval_cls_imagenet.py --random-init -a resnet18 --image-size 32 --epochs 3 --lr 0.03 --schedule 2 --id first samples
"""

import math
import time
from argparse import ArgumentTypeError, Namespace
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pcl import checkpoint, cli
from pcl.augment import center_view, crop_view, normalize
from pcl.distributed import broadcast, get_rank, is_main, seed_everything, wait_for_all
from pcl.errors import RunError
from pcl.features import extract_features
from pcl.loader import EpochSampler, IndexedFolder, indices_of_rank, make_loader
from pcl.metrics import topk_accuracy
from pcl.run import inputs, launch, options
from pcl.run.logs import EpochLog, Meters, RunLog, TensorBoard, describe_machine, log, track, write_result
from pcl.run.preflight import Plan, note_changes
from pcl.run.probe import RESULTS, Head, Probe, check_other_run, first_difference, open_probe, places_of, save
from pcl.run.probe_checks import check, labeled_images, names_in
from pcl.terminal import leave_on_signals


def get_parser() -> cli.Parser:
    """The command line."""
    # fmt: off
    parser = cli.Parser(__doc__)
    parser.add_argument("data", type=cli.path, metavar="DIR", help="the folder that holds train/<class>/ and val/<class>/")
    options.add_backbone(parser)
    options.add_training(parser, epochs=100, batch_size=256, lr="5", schedule=[60, 80], wd=0.0, print_freq=10,
                         lr_type=cli.several(cli.positive_float),
                         lr_help="initial learning rate of the classifier; 0.3,1,5 trains one with each on the same features")
    options.add_launch(parser)
    probe = parser.add_argument_group("probe")
    probe.add_argument("-e", "--evaluate", action="store_true", help="score the finished probe of --resume and stop")
    probe.add_argument("--gamma", type=cli.fraction, default=0.1, metavar="G",
                       help="factor of the learning rate at each epoch of --schedule, in place of a tenth")
    probe.add_argument("--percent", type=cli.percentage, default=100.0, metavar="P",
                       help="train on P %% of the images of each class (at least one), drawn with --seed")
    probe.add_argument("--subset", type=cli.path, metavar="FILE",
                       help="train on the images that a text file names, one in a line, such as n01440764_10026.JPEG")
    probe.add_argument("--id", type=folder_name, default="linear", metavar="NAME",
                       help=f"checkpoints and log go to {RESULTS}/NAME, TensorBoard's files to {RESULTS}/NAME_tensorboard")
    finetune = parser.add_argument_group("fine-tuning")
    finetune.add_argument("--finetune", action="store_true",
                          help="train the backbone too; the defaults become --epochs 20 --schedule 12 16 --gamma 0.2 --wd 5e-4 "
                          "--lr-backbone 0.01, and --lr 1 with at most 1 %% of the labels, else 0.1")
    finetune.add_argument("--lr-backbone", type=cli.positive_float, metavar="LR", help="initial learning rate of the backbone")
    # fmt: on
    return parser


def folder_name(text: str) -> str:
    """A name below `RESULTS`, in which it stays."""
    cli.reachable(text and str(RESULTS / f"{text}_tensorboard"))
    if Path(text).is_absolute() or not Path(text).parts or ".." in Path(text).parts:
        raise ArgumentTypeError(f"{text!r} is not the name of a folder in {RESULTS}")
    return text


def main() -> None:
    parser = get_parser()
    args = parse(parser)
    with parser.telling(2):
        plan = check(parser, args)
    with parser.telling(1):
        launch.launch(probe, args, plan)


def parse(parser: cli.Parser) -> Namespace:
    """Parse the command line; with --finetune, the paper's settings take the place of the linear probe's defaults."""
    args = options.parse_evaluation(parser, lambda args: [path for _, _, path in places_of(args)])
    if args.finetune:
        percent = args.percent
        if args.subset:
            with suppress(RunError, OSError):  # `check` tells
                percent = 100 * len(names_in(args.subset)) / len(IndexedFolder(args.data / "train", transform=None))
        lr = "1" if percent <= 1 else "0.1"
        parser.set_defaults(epochs=20, schedule=[12, 16], gamma=0.2, wd=5e-4, lr=lr, lr_backbone=0.01)
        args = parser.parse_args()
    return args


def probe(device: torch.device, args: Namespace, plan: Plan) -> None:
    """Train and score, in each process of the group."""
    inputs.check_same_start(RESULTS / args.id, plan.epoch)
    evaluate = args.evaluate or plan.epoch >= args.epochs
    if not evaluate:
        record = RunLog(RESULTS / args.id, {**vars(args), **vars(plan)}, check=partial(check_other_run, args))
        wait_for_all()  # now no other run writes there
    seed_everything(plan.seed)  # random weights are to be the same on every rank
    train_root, val_root = ((args.data / split).resolve() for split in ("train", "val"))
    train_set = IndexedFolder(train_root, crop_view(args.image_size), plan.seed, skip=plan.unreadable)
    val_set = IndexedFolder(val_root, center_view(args.image_size), skip=plan.unreadable)
    model = open_probe(args, train_set.classes)
    inputs.check_same_start(RESULTS / args.id, model.source.get("sha256"), *(head.epoch for head in model.heads))
    model.backbone.to(device).requires_grad_(args.finetune)
    for head in model.heads:
        head.layer.to(device)
    for head in [head for head in model.heads if head.state][:1]:
        note_changes(head.state, {"image_size": str(args.image_size)} if evaluate else head.settings(args, plan))
    log(f"machine: {describe_machine()}")
    data = f"{len(train_set)} training and {len(val_set)} validation images, {len(val_set.classes)} classes"
    log(f"data: {data}, at {args.image_size} pixels")
    inputs.check_same_images(val_root, val_set)
    for line in [*train_set.layout_notes(), *val_set.layout_notes()] if is_main() else []:
        log(line)

    start = time.monotonic()
    val_loader = make_loader(val_set, indices_of_rank(len(val_set)), plan.batch, plan.workers)
    val_labels = torch.from_numpy(val_set.labels).to(device)

    def features_of_val() -> Tensor:
        return extract_features(model.backbone.eval(), track(val_loader, "features"), len(val_set), device)

    if evaluate or not args.finetune:  # center crops through a frozen network: the same features at every epoch
        val_features = features_of_val()
        log(f"features: {val_features.shape[1]} of each validation image, {time.monotonic() - start:.1f} s")
    if evaluate:
        for head in model.heads:
            score = validate(head.layer, val_features, val_labels)
            head.history = [score] if args.evaluate else [*head.history[:-1], dict(*head.history[-1:]) | score]
        report(model, args, val_set.classes)
        return

    train_set = labeled_images(train_set, args, plan.seed)
    inputs.check_same_images(train_root, train_set)
    if len(train_set) < plan.num_images:
        log(f"labels: those of {len(train_set)} training images")
    labels = torch.from_numpy(train_set.labels).to(device)
    sampler = EpochSampler(train_set, plan.seed)
    lone = args.finetune and len(sampler) % plan.batch == 1  # a last batch of one image, which BatchNorm cannot take
    loader = make_loader(train_set, sampler, plan.batch, plan.workers, drop_last=lone)
    for head in model.heads:
        layers = nn.Sequential(model.backbone, head.layer) if args.finetune else head.layer
        head.network = launch.parallel(layers, device)
        groups = [{"params": [*part.parameters()]} for part in (layers if args.finetune else [layers])]
        head.optimizer = torch.optim.SGD(groups, head.lr, momentum=args.momentum, weight_decay=args.wd)
        if head.state:
            checkpoint.load_optimizer(head.optimizer, head.state["optimizer"])
    inputs.keep_unreadable(RESULTS / args.id, plan.unreadable)
    board = TensorBoard(RESULTS / f"{args.id}_tensorboard")
    untouched = {} if args.finetune else {name: value.clone() for name, value in model.backbone.state_dict().items()}

    for epoch in range(min(head.epoch for head in model.heads), args.epochs):
        active = [head for head in model.heads if head.epoch == epoch]  # a run may be stopped between two heads' checkpoints
        if not active:
            continue
        seed_everything(plan.seed + get_rank(), epoch)  # an epoch's randomness is its own: a resumed run repeats it
        sampler.set_epoch(epoch)
        trained = train_heads(model.backbone, active, loader, labels, epoch, args, plan, record)
        if not trained:  # a run that is resumed repeats the epoch at which a head ended
            continue
        if args.finetune:
            for buffer in model.backbone.buffers():  # rank 0's statistics for all, as its checkpoint has them
                broadcast(buffer)
            val_features = features_of_val()
        elif changed := first_difference(model.backbone, untouched):
            raise RuntimeError(f"the frozen backbone has changed: {changed}")
        told = {}
        for head, metrics in trained:
            metrics |= validate(head.layer, val_features, val_labels)
            told |= {f"{name}{head.mark}": value for name, value in metrics.items()}
        shown = "  ".join(f"{name} {value:.2f} %" for name, value in told.items() if name.startswith("test"))
        log(f"epoch {epoch + 1}/{args.epochs}  {shown}")
        record.write(epoch=epoch, **told)
        board.write(epoch, **told)
        for head, metrics in trained:  # last: a resumed run does not record again what is saved
            head.history.append({"epoch": epoch, **metrics})
            head.epoch = epoch + 1
            save(model, head, train_set.classes, args, plan)
    report(model, args, val_set.classes)


def train_heads(
    backbone: nn.Module, heads: list[Head], loader: DataLoader, labels: Tensor, epoch: int, args: Namespace, plan: Plan,
    record: RunLog
) -> list[tuple[Head, dict[str, float]]]:  # fmt: skip
    """One epoch of SGD on each head (with --finetune on the backbone too); the heads and their values for TensorBoard.

    RunError if a loss or weight is not finite; of several heads, such a one is left out with a warning.
    """
    first = [args.lr_backbone] if args.finetune else []
    rates = {head.mark: options.set_learning_rate(head.optimizer, args, epoch, *first, head.lr) for head in heads}
    backbone.train(args.finetune)  # a linear probe sees it in eval mode, as published
    meters = Meters()
    progress = EpochLog(f"epoch {epoch + 1}/{args.epochs}", len(loader), plan.global_batch, args.print_freq, record, epoch)
    for step, (images, index) in progress.batches(loader):
        target = labels[index.to(labels.device, non_blocking=True)]
        given = normalize(images.to(labels.device, non_blocking=True))
        if not args.finetune:
            with torch.no_grad():
                given = backbone(given)
        values = {}
        for head in heads:
            logits = head.network(given)
            loss = F.cross_entropy(logits, target)
            head.optimizer.zero_grad()
            loss.backward()
            head.optimizer.step()
            values |= {f"loss{head.mark}": loss, f"acc{head.mark}": topk_accuracy(logits, target)}
        meters.add(len(images), **values)
        progress.step(step, meters)
    means = progress.close(meters, **{f"lr{mark}": lr for mark, lr in rates.items()})
    trained = []
    for head in heads:
        loss, accuracy, lr = means[f"loss{head.mark}"], 100 * means[f"acc{head.mark}"], rates[head.mark]
        if math.isfinite(loss) and all(value.isfinite().all() for value in head.network.parameters()):
            trained.append((head, {"train_loss": loss, "train_acc": accuracy, "lr": lr}))
            continue
        wrong = f"the loss of epoch {epoch + 1} is not a finite number, at learning rate {lr:g}"
        if len(args.lr) == 1:
            raise RunError(f"{wrong}; lower --lr")
        log(f"warning: {wrong}; its training ends here")
    return trained


@torch.no_grad()
def validate(head: nn.Linear, features: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and, of five or more classes, top-5 accuracy in percent over all validation images, the same on every rank."""
    logits = head(features)  # (N, classes)
    ks = {"test_acc": 1, "test_acc5": 5}
    return {name: 100 * float(topk_accuracy(logits, labels, k)) for name, k in ks.items() if k <= logits.shape[1]}


def report(model: Probe, args: Namespace, classes: list[str]) -> None:
    """Print the last and the best accuracies of each head; write --output."""
    results = {}
    for head in model.heads:
        name = head.mark.removeprefix("_")
        if not head.history:
            log(f"lr {name}: no epoch with a finite loss")
            continue
        last, best = head.history[-1], max(head.history, key=lambda metrics: metrics["test_acc"])
        top5 = f", top-5 {last['test_acc5']:.2f} %" if "test_acc5" in last else ""
        ended = f" (ended after epoch {head.epoch})" if head.epoch < args.epochs and not args.evaluate else ""
        where = f"lr {name}: " if name else ""
        log(f"{where}top-1 {last['test_acc']:.2f} %{top5}; best top-1 {best['test_acc']:.2f} %{ended}")
        results[name] = {"last": last, "best": best, "epochs": head.history}
    found = results.get("") or {"rates": results}
    write_result(args.output, vars(args), checkpoint=model.source, classes=classes, **found)


if __name__ == "__main__":
    with leave_on_signals():
        main()
