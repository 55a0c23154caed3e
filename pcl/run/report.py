"""What a run tells and advises."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from pcl import checkpoint
from pcl.augment import center_view
from pcl.clustering import faiss_lacks
from pcl.distributed import available_cores, get_world_size, is_main
from pcl.loader import IndexedFolder
from pcl.run import options
from pcl.run.logs import RunLog, describe_machine, log, versions


def introduce(
    args: argparse.Namespace, images: IndexedFolder, epoch: int, steps: int, device: torch.device, record: RunLog
) -> None:
    """Say on what, with what and how long this run will train."""
    world, batch = get_world_size(), options.global_batch(args)
    facts = {
        "processes": world,
        "backend": "gloo" if device.type == "cpu" else args.dist_backend,
        "images": len(images),
        "folders": len(images.classes),
        "batch": batch,
        "batch_of_a_process": batch // world,
        "steps_of_an_epoch": steps,
        "seed": args.seed,
        "first_epoch": epoch,
        "negatives_at_most": [min(args.pcl_r, k - 1) for k in args.num_cluster],
    }
    record.write(**facts)
    log(f"machine: {describe_machine()}, talking by {facts['backend']}")
    log("versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()))
    where = f"in {facts['folders']} folders of {args.images}" if images.classes else f"without labels in {args.images}"
    log(f"data: {len(images)} images {where}, at {args.image_size} pixels")
    for line in images.layout_notes() if is_main() else []:
        log(line)
    log(f"batch: {batch} images, {batch // world} in each process; {steps} steps an epoch; seed {args.seed}")
    if args.kmeans == "faiss" and faiss_lacks(device):
        log("k-means: by matrix products, as --kmeans sharded, since this build of faiss cannot use the GPU")
    if args.warmup_epoch >= args.epochs:
        log(f"clusters: none, the warm-up lasts for all of the {args.epochs} epochs (this is MoCo)")
    else:
        for k, negatives in zip(args.num_cluster, facts["negatives_at_most"], strict=True):
            few = "; fewer than 10 images in each: prototypes of so few say little" if len(images) < 10 * k else ""
            log(f"clusters: {k} of {len(images) / k:.0f} images, {negatives} negatives at most{few}")
    log(f"epochs: {epoch + 1} to {args.epochs}, prototypes from {args.warmup_epoch + 1} on; into {args.exp_dir}")


def tell_the_limit(means: dict[str, float], args: argparse.Namespace) -> None:
    """Say whether loading or computing holds this run up, and what would help."""
    waiting = means["data_seconds"] / means["seconds"]
    if waiting < 0.1:
        remedy = "a faster or further GPU, or on new ones --amp bf16 --channels-last"
        log(f"computing takes {1 - waiting:.0%} of the time, loading does not hold it up; what would help: {remedy}")
        return
    cores = available_cores()
    if args.workers < cores:
        remedy = f"more loader processes (-j {args.workers} of {cores} cores)"
    elif args.augment_on == "workers":
        remedy = "--augment-on device, which leaves the loader's processes a fifth of their work"
    else:
        remedy = "faster storage, smaller image files or more cores"
    log(f"waiting for data takes {waiting:.0%} of the time; what would help: {remedy}")


def draw_pictures(exp_dir: Path) -> None:
    """Draw the finished run; it stays finished if that fails."""
    try:
        from pcl.figures import draw  # slow to import

        draw(exp_dir)
        log(f"pictures: {exp_dir / 'figures'}")
    except Exception as error:  # the checkpoints are what the run was for
        reason = " ".join(str(error).split())
        log(f"pictures could not be drawn ({reason}); mend that and try: python -m pcl.figures {exp_dir}")


def remedy(epoch: int, args: argparse.Namespace, step: int = 0) -> str:
    """What to do about numbers that are not finite; `step`: in which they appeared, from 1, before the weights changed."""
    if (epoch, step) == (args.start_epoch, args.start_step + 1):
        cause = f"the weights in {args.resume}; name another checkpoint" if args.resume else "a small --temperature; raise it"
        return f"before this run has changed a weight: look for the cause in {cause}"
    if look_alike(IndexedFolder(args.images, center_view(args.image_size), skip=args.unreadable)):
        return "since the images are all the same, which leaves BatchNorm nothing to divide by; give other images"
    lr = options.learning_rate(args, epoch)
    good = checkpoint.newest(args.exp_dir)
    return f"at learning rate {lr:g}; lower --lr, and {f'go on with --resume {good}' if good else 'start again'}"


def look_alike(images: IndexedFolder) -> bool:
    """Whether no pixel differs between sixteen of the images, evenly spread over all."""
    first, *others = (images[i][0] for i in np.linspace(0, len(images) - 1, 16, dtype=int))
    return all(torch.equal(first, other) for other in others)
