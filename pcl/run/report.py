"""What a pre-training run says at its start, its advice, its pictures."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcl.augment import center_view
from pcl.clustering import MANY_RANKS, faiss_lacks
from pcl.distributed import is_main, sum_over_ranks
from pcl.errors import RunError
from pcl.loader import IndexedFolder
from pcl.run import kept
from pcl.run.logs import Meters, RunLog, describe_machine, log, versions
from pcl.run.options import FITTED, learning_rate_factor
from pcl.run.preflight import Plan
from pcl.run.progress import Progress


def settings(args: Namespace, plan: Plan, images: IndexedFolder, steps: int, device: torch.device, record: RunLog) -> None:
    """Say on what, with what and how long this run trains; `steps` of an epoch."""
    world, few = plan.place.world, "; fewer than 10 images in each: prototypes of so few say little"
    negatives = [min(args.pcl_r, k - 1) for k in args.num_cluster]
    facts: dict[str, Any] = {"processes": world, "images": len(images), "folders": len(images.classes)}
    facts |= {"batch": plan.global_batch, "batch_of_a_process": plan.batch, "steps_of_an_epoch": steps}
    facts |= {"seed": plan.seed, "first_epoch": plan.epoch}
    record.write(**facts, negatives_at_most=negatives)
    backend = f", connected by {'gloo' if device.type == 'cpu' else args.dist_backend}" if world > 1 else ""
    log(f"machine: {describe_machine()}{backend}")
    log("versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()))
    where = f"in {len(images.classes)} folders of {plan.images}" if images.classes else f"without labels in {plan.images}"
    log(f"data: {len(images)} images {where}, at {args.image_size} pixels")
    for line in images.layout_notes() if is_main() else []:
        log(line)
    if args.fit:
        chosen = [f"--{name.replace('_', '-')} {str(getattr(args, name)).strip('[]').replace(' ', '')}" for name in FITTED]
        log(f"--fit {args.fit} is short for: {' '.join(chosen)}")
    log(f"batch: {plan.global_batch} images, {plan.batch} in each process; {steps} steps an epoch; seed {plan.seed}")
    if args.kmeans == "faiss" and faiss_lacks(device):
        log("k-means: by matrix products, as --kmeans sharded, since this build of faiss cannot use the GPU")
    elif args.kmeans == "faiss" and world >= MANY_RANKS:
        log("k-means: all processes take part in each restart, as with --kmeans sharded")
    if args.warmup_epoch >= args.epochs:
        log("clusters: none, the warm-up lasts for the whole run (this is MoCo)")
        phase = ""
    else:
        phase = f", prototypes from {args.warmup_epoch + 1} on"
        for k, most in zip(args.num_cluster, negatives, strict=True):
            told = few if len(images) < 10 * k else ""
            log(f"clusters: {k}, of {len(images) / k:.0f} images on average, with at most {most} negatives{told}")
    log(f"epochs: {plan.epoch + 1} to {args.epochs}{phase}; into {args.exp_dir}")


def advise(means: dict[str, float], args: Namespace, plan: Plan) -> None:
    """Say, after the first epoch, whether loading or computing holds this run up, and what would help."""
    waiting, processes = means["data_seconds"] / means["seconds"], plan.place.local_world
    if waiting < 0.1:
        remedy = "a faster GPU or more GPUs" + ", or on new ones --amp bf16 --channels-last" * (args.amp == "off")
        log(f"computing takes {1 - waiting:.0%} of the time, loading does not hold it up; what would help: {remedy}")
        return
    if plan.workers < plan.place.cores:
        remedy = f"more loader processes (-j is {processes * plan.workers}, the cores are {processes * plan.place.cores})"
    elif args.augment_on == "workers":
        remedy = "--augment-on device, which leaves the loader's processes a quarter of their work"
    else:
        remedy = "faster storage, smaller image files or more cores"
    log(f"waiting for data takes {waiting:.0%} of the time; what would help: {remedy}")


def draw_pictures(exp_dir: Path) -> None:
    """Draw the finished run; a failed picture must not fail it."""
    try:
        from pcl.figures import draw  # slow to import

        draw(exp_dir)
        log(f"pictures: {exp_dir / 'figures'}")
    except Exception as error:
        reason = " ".join(str(error).split())
        log(f"pictures could not be drawn ({reason}); fix that and run: python -m pcl.figures {exp_dir}")


def warn_if_collapsed(features: torch.Tensor, epoch: int, images: IndexedFolder) -> None:
    """Say so if the unit-length features (N, C) of all images are the same, after the first epoch."""
    if epoch > 0 and float(features.mean(dim=0).square().sum()) > 0.99:
        why = ", and so are the images" if look_alike(images) else " (collapsed); lower --lr, or see docs/settings.md"
        log(f"warning: the features of all images are almost the same{why}")


def check_loss(meters: Meters, epoch: int, args: Namespace, plan: Plan) -> None:
    """RunError if a loss was not finite, before weights that are not numbers are saved."""
    if is_main() and (step := meters.finite_steps + 1) <= meters.steps:
        advice = remedy(args, plan, epoch, step)
        raise RunError(f"the loss is not a finite number from epoch {epoch + 1}, step {step} on, {advice}")


def check_features(features: torch.Tensor, label: str, epoch: int, args: Namespace, plan: Plan) -> None:
    """RunError if features of images are not finite on some rank; every rank must call it."""
    if int(sum_over_ranks((~features.sum(dim=1).isfinite()).sum())):
        raise RunError(f"{label}: features of images are not finite numbers, {remedy(args, plan, epoch, step=1)}")


def check_weights(model: torch.nn.Module, progress: Progress, args: Namespace, plan: Plan) -> None:
    """RunError if weights or statistics are not finite."""
    if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
        advice = remedy(args, plan, progress.epoch - (progress.steps == 0))
        raise RunError(f"weights are not finite numbers after epoch {progress.epoch}, {advice}")


def remedy(args: Namespace, plan: Plan, epoch: int, step: int = 0) -> str:
    """What to do about numbers that are not finite: in this epoch (from 0), before this step's change (from 1; 0: unknown)."""
    if (epoch, step) == (plan.epoch, plan.step + 1):
        cause = f"the weights in {plan.resume}; name another checkpoint" if plan.resume else "a small --temperature; raise it"
        return f"before this run has changed a weight: look for the cause in {cause}"
    if look_alike(IndexedFolder(plan.images, center_view(args.image_size), skip=plan.unreadable)):
        return "since the images are all the same, which leaves BatchNorm nothing to divide by; give other images"
    good = kept.newest(args.exp_dir)
    then = f"go on with --resume {good}" if good else "start again"
    return f"at learning rate {args.lr * learning_rate_factor(args, epoch):g}; lower --lr, and {then}"


def look_alike(images: IndexedFolder) -> bool:
    """Whether no pixel differs between sixteen of the images, evenly spread over all."""
    first, *others = (images[i][0] for i in np.linspace(0, len(images) - 1, 16, dtype=int))
    return all(torch.equal(first, other) for other in others)
