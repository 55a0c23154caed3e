"""Progress within an epoch, saved so that a resumed run finishes it bit for bit."""

import zlib
from argparse import Namespace
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from pcl import checkpoint
from pcl.cli import Parser
from pcl.clustering import Clustering
from pcl.run import inputs, kept
from pcl.run.logs import Meters, log
from pcl.run.preflight import Plan, note_changes


def terms_of(epoch: int, args: Namespace, plan: Plan) -> dict[str, Any]:
    """What must be the same for another run to finish an epoch: its steps' images, its clusters."""
    names = ["warmup_epoch"]
    if epoch >= args.warmup_epoch:
        names += ["num_cluster", "kmeans_every", "kmeans", "kmeans_tf32", "temperature", "image_size", "augment_on", "amp"]
        names += ["fixed_phi"] if args.fixed_phi else []  # an option of later versions
    terms = {"batch": plan.global_batch, "files": plan.files, "seed": plan.seed} | {name: getattr(args, name) for name in names}
    return {name: str(value) for name, value in terms.items()}


@dataclass
class Progress:
    """How far an epoch has come: nothing yet, its clusters (new or of an earlier E-step), or steps of its M-step too."""

    epoch: int = 0
    steps: int = 0
    clusterings: list[Clustering] = field(default_factory=list)  # one for each granularity; none in warm-up
    meters: Meters = field(default_factory=Meters)

    def next(self, args: Namespace) -> "Progress":
        """The start of the next epoch; clusters are kept unless a new E-step is due."""
        due = (self.epoch + 1 - args.warmup_epoch) % args.kmeans_every == 0  # before the first one there are none to keep
        return Progress(self.epoch + 1, clusterings=[] if due else self.clusterings)

    def state_over_ranks(self, args: Namespace, plan: Plan) -> dict[str, Any]:
        """For a checkpoint; every rank must call it."""
        if not (self.steps or self.clusterings):
            return {"epoch": self.epoch}
        meters = self.meters.state_over_ranks() if self.steps else {}
        clusterings = [{f.name: getattr(c, f.name) for f in fields(c)} for c in self.clusterings]
        done = {"epoch": self.epoch, "steps": self.steps, "clusterings": clusterings, "meters": meters}
        return done | {"terms": terms_of(self.epoch, args, plan)}

    @classmethod
    def from_state(cls, state: dict[str, Any], args: Namespace, plan: Plan, device: torch.device | str = "cpu") -> "Progress":
        """The progress in the saved epoch: none if these images and options cannot finish that epoch.

        An exception of any kind, if the state is not one that a run writes.
        """
        epoch, steps = state["epoch"], state["steps"]
        terms = dict(state.get("terms", {}))
        if (steps and not terms) or not all(isinstance(value, str | int | list) for value in terms.values()):
            raise ValueError("no terms, or other ones than a run writes")
        if terms != terms_of(epoch, args, plan):
            return cls(epoch)
        clusterings = [Clustering(**c).to(device) for c in state["clusterings"]]
        wanted = args.num_cluster if epoch >= args.warmup_epoch else []
        for clustering, k in zip(clusterings, wanted, strict=True):
            tensors = (clustering.im2cluster, clustering.prototypes, clustering.concentration)
            shapes = [((plan.num_images,), torch.int64), ((k, args.low_dim), torch.float32), ((k,), torch.float32)]
            if [(tuple(v.shape), v.dtype) for v in tensors] != shapes or not all(v.isfinite().all() for v in tensors):
                raise ValueError("clusters of another shape, or not finite")
        if steps * plan.global_batch > plan.num_images:
            raise ValueError("more steps than an epoch has")
        return cls(epoch, steps, clusterings, Meters.from_state(state["meters"]) if steps else Meters())

    @classmethod
    def resume(cls, model: Any, optimizer: torch.optim.Optimizer, args: Namespace, plan: Plan) -> tuple["Progress", Plan]:
        """Load the checkpoint to go on from, if any, into model and optimizer; return its progress and the plan from there."""
        progress = cls(plan.epoch)
        if args.resume == "auto":  # another run may have been about to end when the command line was checked
            plan = replace(plan, resume=str(kept.newest(args.exp_dir) or ""))
        if plan.resume:
            state = checkpoint.load_for_resume(plan.resume, model.module, args.arch)
            checkpoint.load_optimizer(optimizer, state["optimizer"])
            note_changes(state, plan.settings(args))
            progress = cls.from_state(state, args, plan, model.module.queue.device)
            if "terms" in state and not (progress.steps or progress.clusterings):
                log(f"epoch {progress.epoch + 1} starts over: images, batch, seed or clusters are not those of {plan.resume}")
        queue = zlib.crc32(model.module.queue.cpu().numpy().tobytes())  # no two steps have the same
        inputs.check_same_start(f"--exp-dir {args.exp_dir}", progress.epoch, progress.steps, queue)
        return progress, replace(plan, epoch=progress.epoch, step=progress.steps)


def rehearse(parser: Parser, args: Namespace, plan: Plan, state: dict[str, Any] | None) -> None:
    """Stop if `Progress.from_state` of a checkpoint would fail in the run."""
    try:
        if state:
            Progress.from_state(state, args, plan)
    except Exception:  # of many kinds, as many as a file can be wrong
        parser.error(f"--resume: the progress within epoch {plan.epoch + 1} in {plan.resume} cannot be read; name another file")
