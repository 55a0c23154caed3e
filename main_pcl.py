"""Pre-train an image encoder with Prototypical Contrastive Learning, on the images of DIR/train/<class>/, DIR/<class>/ or DIR.

PCL v2 on ImageNet, one node with eight GPUs (PCL v1: without --mlp --aug-plus --cos):

    python main_pcl.py DIR -a resnet50 --lr 0.03 --batch-size 256 --temperature 0.2 --mlp --aug-plus --cos --exp-dir pcl_v2

The cheapest run, a few minutes on two CPU cores after `make demo` has written its images to demo/images:

    python main_pcl.py demo/images -a resnet18 --image-size 32 --epochs 6 --warmup-epoch 3 -b 64 --pcl-r 512 \\
        --num-cluster 100,200,400 --moco-m 0.99 --mlp --aug-plus --cos --exp-dir first_run
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pcl import checkpoint, networks
from pcl.augment import RecipeView, TwoViews, center_view, finish, normalize, random_view
from pcl.builder import MoCo, split_batch_norm
from pcl.clustering import Clustering, cluster_all
from pcl.distributed import (
    add_over_ranks,
    gather_interleaved,
    get_rank,
    is_main,
    same_on_all,
    seed_everything,
    shared_map,
    wait_for_main,
)
from pcl.errors import RunError
from pcl.features import extract_share
from pcl.images import read_image, read_tensor
from pcl.loader import EpochSampler, IndexedFolder, indices_of_rank, make_loader
from pcl.losses import instance_logits, prototype_loss
from pcl.run import inputs, launch, options, preflight, rendezvous
from pcl.run.launch import exit_stopped, guarded, leave_if_asked, parallel, should_stop
from pcl.run.logs import Meters, RunLog, StepProgress, log, track
from pcl.run.monitor import Monitor, keep_e_step, val_folder, val_loader
from pcl.run.progress import Begun, is_whole
from pcl.run.report import draw_pictures, introduce, look_alike, remedy, tell_the_limit
from pcl.sharded import cluster_all_sharded
from pcl.terminal import leave_on_signals, warn


def get_parser() -> options.Parser:
    """The command line."""
    # fmt: off
    parser = options.Parser(__doc__)
    parser.add_argument("data", type=options.path, metavar="DIR",
                        help="the folder that holds train/<class>/*.jpg, or <class>/*.jpg, or images alone")
    options.add_training_arguments(
        parser, epochs=200, batch_size=256, lr=0.03, schedule=[120, 160], wd=1e-4, print_freq=100
    )
    options.add_launch_arguments(parser)
    model = parser.add_argument_group("model and loss")
    model.add_argument("-a", "--arch", default="resnet50", metavar="NAME", choices=networks.architectures(),
                       help="a torchvision classifier with an fc head: resnet18, resnet50, wide_resnet50_2, ..")
    model.add_argument("--low-dim", type=options.integer(1, 2**16), default=128, metavar="C", help="size of the feature")
    model.add_argument("--pcl-r", type=options.positive, default=16384, metavar="R",
                       help="length of the queue and number of negatives, at least a batch")
    model.add_argument("--moco-m", type=options.fraction, default=0.999, metavar="M",
                       help="momentum of the key encoder; short runs need a smaller one, such as 0.99")
    model.add_argument("--temperature", type=options.positive_float, default=0.2, metavar="T",
                       help="of InfoNCE, and the mean concentration of the prototypes")
    model.add_argument("--mlp", action="store_true", help="a hidden layer in the head (v2)")
    model.add_argument("--aug-plus", action="store_true", help="MoCo v2's augmentation (v2)")
    model.add_argument("--cos", action="store_true", help="cosine learning rate in place of --schedule (v2)")
    model.add_argument("--image-size", type=options.integer(1, options.LARGEST_SIDE), default=224, metavar="PIXELS",
                       help="side of a view; the E-step's center crop comes from 8/7 of it")
    model.add_argument("--augment-on", choices=["workers", "device"], default="workers",
                       help="device: loader workers only decode and crop; colors and blur follow on whole batches")
    model.add_argument("--amp", choices=["off", "bf16"], default="off", help="features in bfloat16: faster on new GPUs")
    model.add_argument("--channels-last", action="store_true", help="another layout of images and weights: faster with --amp")
    em = parser.add_argument_group("expectation-maximisation")
    em.add_argument("--num-cluster", type=options.integers, default="25000,50000,100000", metavar="K,K,..",
                    help="clusters of each granularity; for N images of your own try N/40,N/20,N/10")
    em.add_argument("--warmup-epoch", type=options.natural, default=20, metavar="N",
                    help="epochs of InfoNCE alone before the first E-step")
    em.add_argument("--kmeans", choices=["faiss", "super", "sharded"], default="faiss",
                    help="super prunes the search, on the CPU, faster if few directions hold the features' variance; "
                    "sharded leaves features on their rank, for very many images")
    em.add_argument("--kmeans-tf32", action="store_true", help="sharded k-means on a GPU searches in TF32")
    em.add_argument("--monitor-freq", type=options.natural, default=10, metavar="N",
                    help="look whether it learns after each E-step and every N epochs of warm-up; 0 never, nor draw pictures")
    small = parser.add_argument_group("small data", "what the published algorithm does without; the README says when it helps")
    small.add_argument("--small-stem", action="store_true",
                       help="begin with a 3x3 convolution and no max-pool, for images of at most 64 pixels; slower")
    small.add_argument("--bn-splits", type=options.positive, default=1, metavar="S",
                       help="BatchNorm statistics over each of S groups of a process's batch, as over S GPUs")
    small.add_argument("--mask-duplicates", action="store_true",
                       help="an image's own prototype is no negative of it where it is another image's of the batch too")
    small.add_argument("--kmeans-every", type=options.positive, default=1, metavar="E",
                       help="an E-step at every E-th epoch after warm-up; the clusters are kept in between")
    small.add_argument("--proto-weight", type=options.nonnegative_float, default=1.0, metavar="W",
                       help="weight of the prototype term beside InfoNCE")
    files = parser.add_argument_group("files")
    files.add_argument("--exp-dir", type=options.path, default=Path("experiment_pcl"), metavar="DIR",
                       help="checkpoints, log.jsonl, TensorBoard's files and figures")
    files.add_argument("--save-freq", type=options.positive, default=5, metavar="N",
                       help="epochs between two checkpoints that are kept; the last epoch is always kept")
    files.add_argument("--save-steps", type=options.natural, default=1000, metavar="N",
                       help=f"steps between two saves into {checkpoint.LAST}, which is rewritten after each epoch too; 0 none")
    files.add_argument("--keep", type=options.natural, default=0, metavar="N",
                       help="remove kept checkpoints but for the newest N; 0 keeps all")
    files.add_argument("--keep-every", type=options.natural, default=0, metavar="N",
                       help="with --keep, spare those of every N-th epoch")
    # fmt: on
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    check(parser, args)
    if args.start_epoch >= args.epochs:
        log(f"nothing is left to do: {args.resume} has all of its {args.epochs} epochs")
        return
    launch.launch_or_exit(parser, train, args)


def check(parser: options.Parser, args: argparse.Namespace) -> None:
    """Stop on what cannot work, before any process is started or file written; take the seed of a run that is resumed."""
    preflight.check_launch(parser, args)
    preflight.check_batch(parser, args)
    images = inputs.open_folder(parser, args.data, "train", labelled=False)
    args.images = images.root
    check_number(parser, args, len(images))
    batch = options.global_batch(args)
    if args.pcl_r < batch:
        parser.error(f"--pcl-r {args.pcl_r}: the queue is shorter than one batch; raise it to {batch} or more")
    preflight.check_memory(parser, f"--pcl-r {args.pcl_r}", args.pcl_r * args.low_dim, "the queue")
    views = 2 * 3 * args.batch_size * args.image_size**2
    preflight.check_memory(parser, f"--image-size {args.image_size}", views, f"the views of --batch-size {args.batch_size}")
    if args.kmeans == "super" and args.low_dim < 32:
        parser.error(f"--kmeans super: it needs --low-dim 32 or more, not {args.low_dim}")
    if args.kmeans_tf32 and args.kmeans != "sharded":
        parser.error(f"--kmeans-tf32: it is an option of --kmeans sharded, not of --kmeans {args.kmeans}")
    if args.small_stem and not networks.takes_small_stem(args.arch):
        parser.error(networks.no_small_stem(args.arch))
    own_batch, _ = options.batch_and_workers(args)
    if args.bn_splits > 1 and (own_batch % args.bn_splits or own_batch < 2 * args.bn_splits):
        remedy = "take a divisor of it that leaves two images or more in a group"
        parser.error(f"--bn-splits {args.bn_splits}: a process's batch has {own_batch} images; {remedy}")
    if args.cos and args.schedule is not parser.get_default("schedule"):
        parser.error("--cos and --schedule exclude each other; leave one out")
    if args.keep_every and not args.keep:
        parser.error(f"--keep-every {args.keep_every}: it spares checkpoints from --keep; give that too")
    preflight.check_folder(parser, "--exp-dir", args.exp_dir)
    args.automatic, notes, state = args.resume == "auto", [], None
    with networks.without_numbers():
        model = make_model(args)
    if own_batch == 1:
        check_lone_image(parser, model, args)
    if args.automatic:
        args.resume = str(checkpoint.newest(args.exp_dir, notes.append) or "")
        if notes and not args.resume:
            parser.error(f"--resume auto: no checkpoint of {args.exp_dir} can be opened; move them away to begin anew")
    try:
        check_other_run(args)
        if args.resume:
            state = checkpoint.load_for_resume(args.resume, model, args.arch)
    except checkpoint.CheckpointError as error:
        parser.error(f"--resume: {error}")
    except RunError as error:
        parser.error(str(error))
    if state:
        args.start_epoch = state["epoch"]
        if args.start_epoch >= args.epochs and not args.automatic:
            parser.error(f"--resume: {args.resume} has all of its {state['epoch']} epochs; raise --epochs to go on")
        if args.seed is None:
            args.seed, args.deterministic = state["seed"], state["deterministic"]
    elif args.start_epoch >= args.epochs:
        parser.error(f"--start-epoch {args.start_epoch}: the epochs of --epochs {args.epochs} are 0 to {args.epochs - 1}")
    if args.images in [args.exp_dir.resolve(), *args.exp_dir.resolve().parents]:
        parser.error(f"--exp-dir {args.exp_dir} lies among the images of {args.images}; its pictures would be trained on")
    for note in notes:  # now that there is no error, which is a line alone
        warn(note)
    if args.start_epoch < args.epochs:
        val = val_folder(args)
        images, *_ = inputs.leave_out_unreadable(parser, args, images, *([val] if val else []))
        check_number(parser, args, len(images))
        args.num_images, args.files, args.processes = (
            len(images),
            inputs.describe_files(images),
            rendezvous.total_processes(args),
        )
        if state and not is_whole(state, args):
            parser.error(f"--resume: {args.resume} does not tell what is done of epoch {state['epoch'] + 1}; name another file")


def check_lone_image(parser: options.Parser, model: MoCo, args: argparse.Namespace) -> None:
    """Stop if BatchNorm would have but one number of a channel to normalize, where a process has one image in a step."""
    try:
        model.encoder_q(torch.empty(1, 3, args.image_size, args.image_size, device="meta"))
    except ValueError:
        remedy = f"give -b {2 * rendezvous.local_processes(args)} or more, or a larger --image-size"
        parser.error(f"--batch-size {args.batch_size}: BatchNorm needs more than one image in a process's step; {remedy}")


def check_other_run(args: argparse.Namespace) -> None:
    """Asked before anything is written, and again as soon as no other run can write.

    Raises:
        RunError: the folder holds a run that is not to be gone on with, or one that has come further than --resume.
    """
    if args.automatic:
        return
    if not args.resume:
        if [*args.exp_dir.glob("log.jsonl"), *args.exp_dir.glob("checkpoint_*")]:
            raise RunError(
                f"--exp-dir {args.exp_dir} holds another run; name another folder, or give --resume to go on with it"
            )
    elif (newest := checkpoint.newest(args.exp_dir)) and newest.resolve() != Path(args.resume).resolve():
        raise RunError(
            f"--resume: --exp-dir {args.exp_dir} holds a newer checkpoint, {newest.name}; move it away, or name another folder"
        )


def check_number(parser: options.Parser, args: argparse.Namespace, num_images: int) -> None:
    """Stop if there are fewer images than a batch or the clusters need."""
    batch = options.global_batch(args)
    if num_images < batch:
        parser.error(f"--batch-size: {batch} images in a step, but {args.images} holds {num_images}; lower it")
    if args.warmup_epoch < args.epochs and max(args.num_cluster) > num_images:
        parser.error(f"--num-cluster {max(args.num_cluster)}: more clusters than the {num_images} images; lower it")


def train(device: torch.device, args: argparse.Namespace) -> None:
    """The EM loop, in each process of the group."""
    record = RunLog(args.exp_dir, vars(args), args.exp_dir / "tensorboard", partial(check_other_run, args))
    wait_for_main()  # now no other run writes there
    on_device = args.augment_on == "device"
    view = (RecipeView if on_device else random_view)(args.image_size, args.aug_plus)
    read = read_tensor if on_device else read_image
    train_set = IndexedFolder(args.images, TwoViews(view), args.seed, read, skip=args.unreadable)
    inputs.check_same_images(train_set)
    inputs.keep_unreadable(args.exp_dir, args)
    center_set = train_set.with_transform(center_view(args.image_size, tensors=on_device))
    batch, workers = options.batch_and_workers(args)
    sampler = EpochSampler(train_set, args.seed)
    train_loader = make_loader(train_set, sampler, batch, workers, drop_last=True)
    # No gradients are kept in the E-step, so that five times the images fit.
    center_loader = make_loader(center_set, indices_of_rank(len(center_set)), 5 * batch, workers)

    model = make_model(args).to(device, memory_format=memory_format(args))
    wrapped = parallel(model, device)
    optimizer = torch.optim.SGD(wrapped.parameters(), args.lr, args.momentum, weight_decay=args.wd, fused=True)
    begun = go_on(wrapped, optimizer, device, args)
    introduce(args, train_set, begun.epoch, len(train_loader), device, record)
    monitor = Monitor(train_set, val_loader(args), args.monitor_freq, record)

    first = begun.epoch
    for epoch in range(first, args.epochs):
        seed_everything(args.seed + get_rank(), epoch)  # an epoch's randomness is its own: a resumed run repeats it
        sampler.set_epoch(epoch)
        if epoch >= args.warmup_epoch and not begun.clusterings:
            begun.clusterings = e_step(model, center_loader, epoch, args, record, monitor)
            save(wrapped, optimizer, begun, args)
        elif epoch < args.warmup_epoch and begun.steps == 0:
            look_in_warm_up(model, center_loader, epoch, args, monitor)
        with guarded():
            means = m_step(wrapped, train_loader, optimizer, begun, args, record)
            begun = begun.next(args)
            save(wrapped, optimizer, begun, args, finished=True)
            if begun.epoch < args.epochs:
                leave_if_asked()
        if epoch == first:
            tell_the_limit(means, args)
    if is_main() and args.monitor_freq:
        draw_pictures(args.exp_dir)


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, args: argparse.Namespace) -> Begun:
    """Load the checkpoint to go on from, if there is one; what is done of its epoch."""
    begun = Begun(args.start_epoch)
    if args.automatic:  # another run may have been about to end when the command line was checked
        args.resume = str(checkpoint.newest(args.exp_dir) or "")
    if args.resume:
        state = checkpoint.load_for_resume(args.resume, model.module, args.arch)
        checkpoint.load_optimizer(optimizer, state["optimizer"])
        options.note_changes(state, options.settings(args))
        begun = Begun.of_checkpoint(state, device, args)
    args.start_epoch, args.start_step = begun.epoch, begun.steps
    if not same_on_all(begun.epoch * 2**32 + begun.steps):
        raise RunError(
            f"the processes go on from different checkpoints; --exp-dir {args.exp_dir} must be one folder for all nodes"
        )
    return begun


def e_step(
    model: MoCo, loader: DataLoader, epoch: int, args: argparse.Namespace, record: RunLog, monitor: Monitor
) -> list[Clustering]:
    """Cluster the momentum features of every training image at each granularity."""
    start, label = time.monotonic(), f"E-step {epoch + 1}/{args.epochs}"
    features, seen = momentum_features(model, loader, epoch, args, label)  # (N, C), or this rank's (n, C)
    if epoch > 0 and float(features.mean(dim=0).square().sum()) > 0.99:  # 1 if all of these unit vectors are the same
        why = (
            ", and so are the images"
            if look_alike(loader.dataset)
            else " (collapsed); lower --lr, or see the README's settings"
        )
        log(f"warning: the features of all images are almost the same{why}")
    between = time.monotonic()
    torch.cuda.empty_cache()  # faiss takes its memory beside PyTorch's, which still holds what training took
    show = partial(track_all, f"{label} k-means")
    if args.kmeans == "sharded":
        num_images = len(loader.dataset)
        options = {"tf32": args.kmeans_tf32, "track": show}
        clusterings = cluster_all_sharded(features, num_images, args.num_cluster, args.temperature, **options)
    else:
        share = partial(shared_map, track=show)
        clusterings = cluster_all(features, args.num_cluster, args.temperature, share=share, algorithm=args.kmeans)
    seconds = {"features_seconds": between - start, "kmeans_seconds": time.monotonic() - between}
    record.figures(epoch, **seconds)
    log(f"{label}  features {seconds['features_seconds']:.1f} s  k-means {seconds['kmeans_seconds']:.1f} s")
    monitor.look(epoch, model, features, seen, clusterings)
    keep_e_step(args.exp_dir, epoch, features, seen, clusterings, loader.dataset)
    return clusterings


def momentum_features(
    model: MoCo, loader: DataLoader, epoch: int, args: argparse.Namespace, label: str
) -> tuple[Tensor, range]:
    """Unit-length features of the center-cropped training images by the key encoder, and which images they are of.

    (N, C) of all, or with sharded k-means (n, C) of those that this rank has seen.
    """
    model.eval()
    model.share_statistics()
    num_images = len(loader.dataset)
    with reduced_precision(args, model.queue.device):
        share = indices_of_rank(num_images)
        features = extract_share(model, track_all(label, loader), len(share), model.queue.device)
    if int(add_over_ranks((~features.sum(dim=1).isfinite()).sum())):
        raise RunError(f"{label}: features of images are not finite numbers, {remedy(epoch, args, step=1)}")
    if args.kmeans == "sharded":
        return features, share
    return gather_interleaved(features, num_images), range(num_images)


def track_all(label: str, items: Any) -> Any:
    """The items behind a progress bar."""
    return track(items, label, len(items))


def look_in_warm_up(model: MoCo, loader: DataLoader, epoch: int, args: argparse.Namespace, monitor: Monitor) -> None:
    """Show whether it learns, as after an E-step, where there are no clusters yet; not at each epoch."""
    if not monitor.is_due(epoch):
        return
    start = time.monotonic()
    features, seen = momentum_features(model, loader, epoch, args, "monitor")
    monitor.look(epoch, model, features, seen, [], start)
    keep_e_step(args.exp_dir, epoch, features, seen, [], loader.dataset)


def m_step(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    begun: Begun,
    args: argparse.Namespace,
    record: RunLog,
) -> dict[str, float]:
    """An epoch of SGD on ProtoNCE, or on InfoNCE alone during warm-up, from what is begun; the means of its figures."""
    epoch = begun.epoch
    lr = options.set_learning_rate(optimizer, args, epoch)
    model.train()
    device, clusterings, meters = model.module.queue.device, begun.clusterings, begun.meters
    loader.sampler.skip = begun.steps * loader.batch_size
    label, images = f"epoch {epoch + 1}/{args.epochs}", options.global_batch(args)
    progress = StepProgress(label, len(loader), images, args.print_freq, record, epoch, begun.steps)
    for step, (views, index) in progress.batches(loader):
        seed_everything(args.seed + get_rank(), epoch, step)  # nothing else is needed to go on in the middle of an epoch
        im_q, im_k = (images_of(view, device, args) for view in views)  # (B, 3, H, W) each
        index = index.to(device, non_blocking=True)
        with reduced_precision(args, device):
            q, k, queue = model(im_q, im_k)
        logits, target = instance_logits(q, k, queue, args.temperature)
        loss_instance = F.cross_entropy(logits, target)
        highest = logits.detach()[:, 0] >= logits.detach().amax(dim=1)  # in an eighth of the time that a topk takes
        figures = {"loss_instance": loss_instance, "acc_instance": highest.float().mean()}
        loss = loss_instance
        if clusterings:
            loss_prototype, acc_prototype = prototype_loss(q, index, clusterings, args.pcl_r, args.mask_duplicates)
            figures |= {"loss_prototype": loss_prototype, "acc_prototype": acc_prototype}
            loss = loss_instance + args.proto_weight * loss_prototype

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        meters.add(loss=loss, **figures)
        progress.step(step, meters)
        begun.steps, stop = step, should_stop()
        if step < len(loader) and (stop or (args.save_steps and step % args.save_steps == 0)):
            check_loss(meters, epoch, args)
            save(model, optimizer, begun, args)
            if stop:
                exit_stopped()
    check_loss(meters, epoch, args)
    return progress.close(meters, lr=lr)


def check_loss(meters: Meters, epoch: int, args: argparse.Namespace) -> None:
    """Stop before weights that are not numbers are saved."""
    if is_main() and (step := meters.finite_steps + 1) <= meters.steps:
        raise RunError(f"the loss is not a finite number from epoch {epoch + 1}, step {step} on, {remedy(epoch, args, step)}")


def images_of(view: Any, device: torch.device, args: argparse.Namespace) -> Tensor:
    """What the loader gives for a view of each image -> (B, 3, H, W), normalized, on the device."""
    if args.augment_on == "device":
        crops, recipe = view
        images = finish(crops.to(device, non_blocking=True), recipe, args.aug_plus)
    else:
        images = normalize(view.to(device, non_blocking=True))
    return images.contiguous(memory_format=memory_format(args))


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """Of images and weights."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def reduced_precision(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Inside, the encoders give features in bfloat16 if --amp asks for it; weights and all that follows stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")


def make_model(args: argparse.Namespace) -> MoCo:
    """The model that the options describe, with random weights."""
    encoder = partial(networks.new_network, args.arch, args.small_stem)
    model = MoCo(encoder, args.low_dim, args.pcl_r, args.moco_m, args.mlp)
    if args.bn_splits > 1:
        split_batch_norm(model, args.bn_splits)
    return model


def save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    begun: Begun,
    args: argparse.Namespace,
    finished: bool = False,
) -> None:
    """Write a checkpoint in the published form, with what a resumed run needs besides. Every rank must call it.

    Args:
        begun: what is done of the epoch to go on with.
        finished: the one before it has just been finished; it is kept if its number says so.
    """
    done, epoch = begun.state_over_ranks(args), begun.epoch
    if not is_main():
        return
    if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
        raise RunError(f"weights are not finite numbers after epoch {epoch}, {remedy(epoch - (begun.steps == 0), args)}")
    state = {
        **done,
        "arch": args.arch,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "seed": args.seed,
        "deterministic": args.deterministic,
        "args": {name: str(value) for name, value in vars(args).items()},
    }
    last = args.exp_dir / checkpoint.LAST
    if finished and (epoch % args.save_freq == 0 or epoch == args.epochs):
        checkpoint.save(args.exp_dir / f"checkpoint_{epoch - 1:04d}.pth.tar", state)
        last.unlink(missing_ok=True)
        checkpoint.prune(args.exp_dir, args.keep, args.keep_every)
    elif finished or args.save_steps:
        checkpoint.save(last, state)


if __name__ == "__main__":
    with leave_on_signals():
        main()
