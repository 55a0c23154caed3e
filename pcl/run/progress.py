"""What is done of an epoch of pre-training, so that another process can finish it to the bit."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from pcl.clustering import Clustering
from pcl.run import options
from pcl.run.logs import Meters, log


def e_step_is_due(epoch: int, args: argparse.Namespace) -> bool:
    """Whether new clusters are made for this epoch, from 0."""
    return epoch >= args.warmup_epoch and (epoch - args.warmup_epoch) % args.kmeans_every == 0


def terms_of_epoch(epoch: int, args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for an epoch to be finished by another run than began it: its steps' images, its clusters."""
    names = ["files", "seed", "warmup_epoch"]
    if epoch >= args.warmup_epoch:
        names += ["num_cluster", "kmeans_every", "kmeans", "kmeans_tf32", "temperature", "image_size", "augment_on", "amp"]
    return {"batch": str(options.global_batch(args))} | {name: str(getattr(args, name)) for name in names}


@dataclass
class Begun:
    """What is done of an epoch: nothing yet, its E-step (or an earlier one's that counts), some steps of its M-step too."""

    epoch: int = 0  # the one to go on with
    steps: int = 0
    clusterings: list[Clustering] = field(default_factory=list)  # one for each granularity; none in warm-up
    meters: Meters = field(default_factory=Meters)

    def next(self, args: argparse.Namespace) -> Begun:
        """The next epoch, of which nothing is done; it keeps the clusters if it is to make no new ones."""
        return Begun(self.epoch + 1, clusterings=[] if e_step_is_due(self.epoch + 1, args) else self.clusterings)

    def state_over_ranks(self, args: argparse.Namespace) -> dict[str, Any]:
        """For a checkpoint. Every rank must call it."""
        if not (self.steps or self.clusterings):
            return {"epoch": self.epoch}
        meters = self.meters.state_over_ranks() if self.steps else {}
        clusterings = [{f.name: getattr(c, f.name) for f in fields(c)} for c in self.clusterings]
        done = {"steps": self.steps, "clusterings": clusterings, "meters": meters}
        return {"epoch": self.epoch, **done, "terms": terms_of_epoch(self.epoch, args)}

    @classmethod
    def of_checkpoint(cls, state: dict[str, Any], device: torch.device, args: argparse.Namespace) -> Begun:
        """Of the epoch to go on with; nothing is done of it if it cannot be finished with these images and options."""
        if "terms" not in state:
            return cls(state["epoch"])
        if state["terms"] != terms_of_epoch(state["epoch"], args):
            log(f"epoch {state['epoch'] + 1} begins anew: images, batch, seed or clusters are not those of {args.resume}")
            return cls(state["epoch"])
        clusterings = [Clustering(**{name: value.to(device) for name, value in c.items()}) for c in state["clusterings"]]
        meters = Meters.go_on(state["meters"]) if state["steps"] else Meters()
        return cls(state["epoch"], state["steps"], clusterings, meters)


def is_whole(state: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether a checkpoint holds what `Begun.of_checkpoint` reads, as far as shapes, dtypes and finite numbers tell."""
    if "terms" not in state:
        return not state["steps"]
    terms = state["terms"]
    if not _is_dict(terms) or not all(isinstance(value, str | int | list) for value in terms.values()):
        return False
    if terms != terms_of_epoch(state["epoch"], args):
        return True  # nothing more is read
    sizes = args.num_cluster if state["epoch"] >= args.warmup_epoch else []
    clusterings = [
        {
            "im2cluster": ((args.num_images,), torch.int64),
            "prototypes": ((k, args.low_dim), torch.float32),
            "concentration": ((k,), torch.float32),
        }
        for k in sizes
    ]
    try:
        found = [{name: (tuple(v.shape), v.dtype) for name, v in c.items()} for c in state["clusterings"]]
        finite = all(bool(v.isfinite().all()) for c in state["clusterings"] for v in c.values())
        meters: dict[str, Any] = state["meters"] if state["steps"] else {"steps": 0, "sums": {}}
        steps, sums = meters["steps"], meters["sums"]
        numbers = _is_dict(sums) and all(isinstance(value, float) for value in sums.values())
    except (KeyError, TypeError, AttributeError, RuntimeError):  # of tensors without numbers
        return False
    fits = found == clusterings and state["steps"] * options.global_batch(args) <= args.num_images
    return fits and finite and numbers and type(steps) is int and steps >= 0 and bool(steps) == bool(state["steps"])


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)
