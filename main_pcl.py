"""Pre-train an image encoder with Prototypical Contrastive Learning, on the images of DIR/train/<class>/, DIR/<class>/ or DIR.

PCL v2 on ImageNet, one node with eight GPUs (PCL v1: --temperature 0.1, without --mlp --aug-plus --cos):

    python main_pcl.py DIR -a resnet50 --lr 0.03 --batch-size 256 --temperature 0.2 --mlp --aug-plus --cos --exp-dir pcl_v2

The cheapest run, a few minutes on two CPU cores, on the images that come with the package:

    python -m pcl.samples samples
    python main_pcl.py samples -a resnet18 --image-size 32 --epochs 6 --warmup-epoch 3 -b 64 --pcl-r 512 \\
        --num-cluster 100,200,400 --moco-m 0.99 --mlp --aug-plus --cos --exp-dir first_run
"""

import time
from argparse import Namespace
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader

from pcl import checkpoint, cli, networks
from pcl.builder import MoCo
from pcl.clustering import Clustering, cluster_all
from pcl.distributed import gather_interleaved, get_rank, is_main, seed_everything, shared_map, wait_for_all
from pcl.features import extract_own
from pcl.loader import EpochSampler, IndexedFolder, indices_of_rank, make_loader
from pcl.losses import instance_logits, prototype_loss
from pcl.run import inputs, kept, launch, monitor, options, preflight, report
from pcl.run.logs import EpochLog, RunLog, log, track
from pcl.run.options import augmentation_of, autocast, make_model, start_model
from pcl.run.preflight import Plan
from pcl.run.progress import Progress, rehearse
from pcl.sharded import cluster_all_sharded
from pcl.terminal import leave_on_signals


def get_parser() -> cli.Parser:
    """The paper's options; `pcl.run.options` adds those that scripts share and those that are not the paper's."""
    # fmt: off
    parser = cli.Parser(__doc__)
    parser.add_argument("data", type=cli.path, metavar="DIR",
                        help="the folder that holds train/<class>/*.jpg, or <class>/*.jpg, or images alone")
    options.add_training(parser, epochs=200, batch_size=256, lr=0.03, schedule=[120, 160], wd=1e-4, print_freq=100)
    model = parser.add_argument_group("model and loss")
    model.add_argument("-a", "--arch", default="resnet50", metavar="NAME", choices=networks.architectures(),
                       help="a torchvision classifier with an fc head, such as resnet18, resnet50 or wide_resnet50_2")
    model.add_argument("--init", type=cli.reachable, metavar="FILE",
                       help="begin with the encoder of a checkpoint of PCL or MoCo, or of a torchvision state dict")
    model.add_argument("--low-dim", type=cli.integer(1, 2**16), default=128, metavar="C", help="size of the head's output")
    model.add_argument("--pcl-r", type=cli.positive, default=16384, metavar="R",
                       help="length of the queue and number of negatives, at least a batch")
    model.add_argument("--moco-m", type=cli.fraction, default=0.999, metavar="M",
                       help="momentum of the key encoder; short runs need a smaller one, such as 0.99")
    model.add_argument("--temperature", type=cli.positive_float, default=0.2, metavar="T",
                       help="temperature of InfoNCE, and the mean of the prototypes' concentrations")
    model.add_argument("--mlp", action="store_true", help="a hidden layer in the head (v2)")
    model.add_argument("--aug-plus", action="store_true", help="MoCo v2's augmentation (v2)")
    model.add_argument("--cos", action="store_true", help="cosine learning rate in place of --schedule (v2)")
    model.add_argument("--image-size", type=cli.side, default=224, metavar="PIXELS",
                       help="side of a view; the E-step scales images to 8/7 of it and crops the center")
    em = parser.add_argument_group("expectation-maximization")
    em.add_argument("--num-cluster", type=cli.integers, default="25000,50000,100000", metavar="K,K,...",
                    help="clusters of each granularity; for N images of your own try N/40,N/20,N/10")
    em.add_argument("--warmup-epoch", type=cli.natural, default=20, metavar="N",
                    help="epochs of InfoNCE alone before the first E-step")
    # fmt: on
    options.add_pretraining(parser)
    options.add_launch(parser)
    return parser


def main() -> None:
    parser = get_parser()
    args = options.parse_fitted(parser)
    with parser.telling(2):
        plan = check(parser, args)
    if plan.epoch >= args.epochs:
        if plan.place.rank == 0:
            log(f"nothing is left to do: {plan.resume} has {plan.epoch} epochs, --epochs asks for {args.epochs}")
        return
    with parser.telling(1):
        launch.launch(train, args, plan)


def check(parser: cli.Parser, args: Namespace) -> Plan:
    """Stop on what cannot work, before a process is started or a file written; return what a run needs besides its options."""
    plan = preflight.check_launch(parser, args)
    images = inputs.open_folder(parser, args.data, "train", labeled=False)
    plan = replace(plan, images=images.root, num_images=len(images))
    preflight.check_number(parser, args, plan)
    views = 2 * 3 * args.batch_size * args.image_size**2
    for wrong, message in (
        (args.pcl_r < plan.global_batch,
         f"--pcl-r {args.pcl_r}: the queue is shorter than one batch; raise it to {plan.global_batch} or more"),
        (args.kmeans == "super" and args.low_dim < 32,
         f"--kmeans super: it needs --low-dim 32 or more, not {args.low_dim}"),
        (args.kmeans_tf32 and args.kmeans != "sharded",
         f"--kmeans-tf32: it is an option of --kmeans sharded, not of --kmeans {args.kmeans}"),
        (args.small_stem and not networks.takes_small_stem(args.arch), networks.NO_SMALL_STEM.format(args.arch)),
        (args.bn_splits > 1 and (plan.batch % args.bn_splits or plan.batch < 2 * args.bn_splits),
         f"--bn-splits {args.bn_splits}: a process's batch has {plan.batch} images; choose a divisor of it that leaves "
         "at least two images in each group"),
        (args.cos and args.schedule is not parser.get_default("schedule"),
         "--cos and --schedule exclude each other; leave one out"),
        (args.keep_every and not args.keep,
         f"--keep-every {args.keep_every}: it needs --keep; give that too"),
        (plan.images in [args.exp_dir.resolve(), *args.exp_dir.resolve().parents],
         f"--exp-dir {args.exp_dir} lies among the images of {plan.images} and would add its figures to them; name another"),
    ):  # fmt: skip
        if wrong:
            parser.error(message)
    preflight.check_memory(parser, f"--pcl-r {args.pcl_r}", args.pcl_r * args.low_dim, "the queue")
    preflight.check_memory(parser, f"--image-size {args.image_size}", views, f"the views of --batch-size {args.batch_size}")
    preflight.check_folder(parser, "--exp-dir", args.exp_dir)
    with networks.without_numbers():
        model = make_model(args)
    preflight.check_lone_image(parser, args, plan, model)
    plan, state = preflight.find_run(parser, args, plan, model)
    if plan.epoch < args.epochs:
        val = monitor.val_folder(args, plan)
        (images, *_), unreadable = inputs.leave_out_unreadable(parser, args, plan.place, images, *([val] if val else []))
        plan = replace(plan, num_images=len(images), files=inputs.describe_files(images), unreadable=unreadable)
        preflight.check_number(parser, args, plan)
        rehearse(parser, args, plan, state)
    return plan


def train(device: torch.device, args: Namespace, plan: Plan) -> None:
    """The EM loop, in each process of the group."""
    facts = {**vars(args), **vars(plan)}
    record = RunLog(args.exp_dir, facts, args.exp_dir / "tensorboard", partial(preflight.check_other_run, args, plan))
    wait_for_all()  # now no other run writes there
    views = augmentation_of(args)
    train_set = IndexedFolder(plan.images, views.two_views, plan.seed, views.read, skip=plan.unreadable)
    inputs.check_same_images(plan.images, train_set)
    val = monitor.val_loader(args, plan)
    inputs.check_same_images(args.data / "val", val and val.dataset)
    inputs.keep_unreadable(args.exp_dir, plan.unreadable)
    train_loader = make_loader(train_set, EpochSampler(train_set, plan.seed), plan.batch, plan.workers, drop_last=True)
    center_set = train_set.with_transform(views.center)
    # The E-step keeps no activations for a backward pass, so five times as many images fit in memory.
    center_loader = make_loader(center_set, indices_of_rank(len(center_set)), 5 * plan.batch, plan.workers)

    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model = start_model(args, plan).to(device, memory_format=memory_format)
    wrapped = launch.parallel(model, device)
    optimizer = SGD(wrapped.parameters(), args.lr, args.momentum, weight_decay=args.wd, fused=True)
    progress, plan = Progress.resume(wrapped, optimizer, args, plan)
    report.settings(args, plan, train_set, len(train_loader), device, record)
    watcher = monitor.Monitor(train_set, val, args.monitor_freq, record, progress.clusterings)

    for epoch in range(progress.epoch, args.epochs):
        seed_everything(plan.seed + get_rank(), epoch)  # an epoch's randomness is its own: a resumed run repeats it
        if epoch >= args.warmup_epoch and not progress.clusterings:
            progress.clusterings = e_step(model, center_loader, epoch, args, plan, record, watcher)
            save(wrapped, optimizer, progress, args, plan)
        elif epoch < args.warmup_epoch and progress.steps == 0 and watcher.is_due(epoch):
            measure(model, center_loader, epoch, args, plan, watcher)
        with launch.watch.finish_before_leaving():  # after a signal to stop, it saves first
            means = m_step(wrapped, train_loader, optimizer, progress, args, plan, record)
            progress = progress.next(args)
            save(wrapped, optimizer, progress, args, plan, finished=True)
            if progress.epoch < args.epochs and launch.watch.last_vote():
                launch.watch.leave_saved()
        if epoch == plan.epoch:
            report.advise(means, args, plan)
    if is_main() and args.monitor_freq:
        report.draw_pictures(args.exp_dir)


def e_step(
    model: MoCo, loader: DataLoader, epoch: int, args: Namespace, plan: Plan, record: RunLog, watcher: monitor.Monitor
) -> list[Clustering]:
    """Cluster the momentum features of every training image at each granularity."""
    start, label = time.monotonic(), f"E-step {epoch + 1}/{args.epochs}"
    features, seen = momentum_features(model, loader, epoch, args, plan, label)  # (N, C), or this rank's (n, C)
    report.warn_if_collapsed(features, epoch, loader.dataset)
    between = time.monotonic()
    show = partial(track, label=f"{label} k-means")
    if args.kmeans == "sharded":
        num_images, tf32 = len(loader.dataset), args.kmeans_tf32
        clusterings = cluster_all_sharded(features, num_images, args.num_cluster, args.temperature, tf32=tf32, track=show)
    else:
        share = partial(shared_map, track=show)
        clusterings = cluster_all(features, args.num_cluster, args.temperature, share=share, algorithm=args.kmeans)
    if args.fixed_phi:
        clusterings = [replace(c, concentration=torch.full_like(c.concentration, args.temperature)) for c in clusterings]
    seconds = {"features_seconds": between - start, "kmeans_seconds": time.monotonic() - between}
    record.metrics(epoch, **seconds)
    log(f"{label}  features {seconds['features_seconds']:.1f} s  k-means {seconds['kmeans_seconds']:.1f} s")
    watcher.measure(epoch, model, features, seen, clusterings)
    monitor.save_e_step(args.exp_dir, epoch, features, seen, clusterings, loader.dataset)
    return clusterings


def measure(model: MoCo, loader: DataLoader, epoch: int, args: Namespace, plan: Plan, watcher: monitor.Monitor) -> None:
    """Measure whether it learns during warm-up, where there are no clusters yet."""
    start = time.monotonic()
    features, seen = momentum_features(model, loader, epoch, args, plan, "monitor")
    watcher.measure(epoch, model, features, seen, [], start)
    monitor.save_e_step(args.exp_dir, epoch, features, seen, [], loader.dataset)


def momentum_features(
    model: MoCo, loader: DataLoader, epoch: int, args: Namespace, plan: Plan, label: str
) -> tuple[Tensor, range]:
    """The key encoder's unit-length features of the center-cropped training images, and the indices of these images.

    (N, C) for all images; with sharded k-means (n, C) for those of this rank.
    """
    model.eval()
    model.broadcast_buffers()
    num_images, device = len(loader.dataset), model.queue.device
    own = indices_of_rank(num_images)
    with autocast(args, device):
        features = extract_own(model, track(loader, label), len(own), device)
    report.check_features(features, label, epoch, args, plan)
    if args.kmeans == "sharded":
        return features, own
    return gather_interleaved(features, num_images), range(num_images)


def m_step(
    model: nn.Module, loader: DataLoader, optimizer: Optimizer, progress: Progress, args: Namespace, plan: Plan, record: RunLog
) -> dict[str, float]:
    """Finish an epoch of SGD on ProtoNCE (InfoNCE alone during warm-up) from `progress` on; return its means and times."""
    epoch, clusterings, meters = progress.epoch, progress.clusterings, progress.meters
    device, augmentation = model.module.queue.device, augmentation_of(args)
    lr = options.set_learning_rate(optimizer, args, epoch)
    model.train()
    loader.sampler.set_epoch(epoch)
    loader.sampler.skip = progress.steps * loader.batch_size
    label, total = f"epoch {epoch + 1}/{args.epochs}", len(loader)
    epoch_log = EpochLog(label, total, plan.global_batch, args.print_freq, record, epoch, progress.steps)
    for step, (views, index) in epoch_log.batches(loader):
        seed_everything(plan.seed + get_rank(), epoch, step)  # so no generator's state need be saved to resume within an epoch
        im_q, im_k = (augmentation.apply(view, device, args.channels_last) for view in views)  # (B, 3, H, W) each
        index = index.to(device, non_blocking=True)
        with autocast(args, device):
            q, k, queue = model(im_q, im_k)
        logits, target = instance_logits(q, k, queue, args.temperature)
        loss = loss_instance = F.cross_entropy(logits, target)
        highest = logits.detach()[:, 0] >= logits.detach().amax(dim=1)  # in an eighth of the time that a topk takes
        values = {"loss_instance": loss_instance, "acc_instance": highest.float().mean()}
        if clusterings:
            loss_prototype, acc_prototype = prototype_loss(q, index, clusterings, args.pcl_r, args.mask_duplicates)
            values |= {"loss_prototype": loss_prototype, "acc_prototype": acc_prototype}
            loss = loss_instance + args.proto_weight * loss_prototype  # published: a weight of 1

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        meters.add(loss=loss, **values)
        epoch_log.step(step, meters)
        progress.steps = step
        stop = launch.watch.stop_voted()
        if step < total and (stop or (args.save_steps and step % args.save_steps == 0)):
            report.check_loss(meters, epoch, args, plan)
            save(model, optimizer, progress, args, plan)
            if stop:
                launch.watch.leave_saved()
    report.check_loss(meters, epoch, args, plan)
    return epoch_log.close(meters, lr=lr)


def save(
    model: nn.Module, optimizer: Optimizer, progress: Progress, args: Namespace, plan: Plan, finished: bool = False
) -> None:
    """Write a checkpoint in the published form, plus what a resumed run needs. Every rank must call it.

    A resumed run goes on from `progress`. `finished` says that the epoch before it has just ended: after every `--save-freq`
    epochs and after the last one, the checkpoint is a numbered one.
    """
    done = progress.state_over_ranks(args, plan)
    if not is_main():
        return
    report.check_weights(model, progress, args, plan)
    state = {**done, "arch": args.arch, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"seed": plan.seed, "deterministic": plan.deterministic, "args": plan.settings(args)}
    if finished and (progress.epoch % args.save_freq == 0 or progress.epoch == args.epochs):
        checkpoint.save(args.exp_dir / f"checkpoint_{progress.epoch - 1:04d}.pth.tar", state)
        (args.exp_dir / checkpoint.LAST).unlink(missing_ok=True)
        kept.prune(args.exp_dir, args.keep, args.keep_every)
    elif finished or progress.steps or args.save_steps:  # with --save-steps 0, within an epoch only when stopped
        checkpoint.save(args.exp_dir / checkpoint.LAST, state)


if __name__ == "__main__":
    with leave_on_signals():
        main()
