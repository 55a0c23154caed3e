"""What is done of an epoch of pre-training, so that another process can finish it to the bit.

Letters: N images, C features, K prototypes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from pcl import checkpoint, cli
from pcl.clustering import Clustering
from pcl.logs import Meters, log


def e_step_is_due(epoch: int, args: argparse.Namespace) -> bool:
    """Whether new clusters are made for this epoch, from 0."""
    return epoch >= args.warmup_epoch and (epoch - args.warmup_epoch) % args.kmeans_every == 0


def terms_of_epoch(num_images: int, args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for an epoch to be finished by another run than began it."""
    batch, clusters = cli.global_batch(args), args.num_cluster if args.warmup_epoch < args.epochs else []
    return {"images": num_images, "batch": batch, "seed": args.seed, "clusters": clusters, "warm_up": args.warmup_epoch}


@dataclass
class Begun:
    """What is done of an epoch: nothing yet, its E-step (or an earlier one's that counts), some steps of its M-step too."""

    steps: int = 0
    clusterings: list[Clustering] = field(default_factory=list)  # one for each granularity; none in warm-up
    meters: Meters = field(default_factory=Meters)

    def state_over_ranks(self, num_images: int, args: argparse.Namespace) -> dict[str, Any]:
        """For a checkpoint; empty if nothing is done. Every rank must call it."""
        if not (self.steps or self.clusterings):
            return {}
        meters = self.meters.state_over_ranks() if self.steps else {}
        clusterings = [{f.name: getattr(c, f.name) for f in fields(c)} for c in self.clusterings]
        terms = terms_of_epoch(num_images, args)
        return {"steps": self.steps, "clusterings": clusterings, "meters": meters, "terms": terms}

    @classmethod
    def of_checkpoint(cls, state: dict[str, Any], num_images: int, device: torch.device, args: argparse.Namespace) -> Begun:
        """Of the epoch to go on with; nothing if it cannot be finished with these images and options."""
        if "terms" not in state or (state["steps"] == 0 and e_step_is_due(state["epoch"], args)):
            return cls()
        if state["terms"] != terms_of_epoch(num_images, args):
            log(f"epoch {state['epoch'] + 1} begins anew: images, batch, seed or clusters are not those of {args.resume}")
            return cls()
        clusterings = [Clustering(**{name: value.to(device) for name, value in c.items()}) for c in state["clusterings"]]
        return cls(state["steps"], clusterings, Meters.go_on(state["meters"], device) if state["steps"] else Meters())


def is_whole(state: dict[str, Any], num_images: int, args: argparse.Namespace) -> bool:
    """Whether a checkpoint holds what `Begun.of_checkpoint` reads, as far as shapes and dtypes tell."""
    if "terms" not in state:
        return not state["steps"]
    wanted, terms = terms_of_epoch(num_images, args), state["terms"]
    lists_or_counts = checkpoint.is_list_of(checkpoint.is_count), checkpoint.is_count
    if not checkpoint.is_dict(terms) or not all(any(holds(v) for holds in lists_or_counts) for v in terms.values()):
        return False
    if terms != wanted:
        return True  # nothing more is read
    sizes = args.num_cluster if state["epoch"] >= args.warmup_epoch else []
    clusterings = [
        {
            "im2cluster": ((num_images,), torch.int64),
            "prototypes": ((k, args.low_dim), torch.float32),
            "concentration": ((k,), torch.float32),
        }
        for k in sizes
    ]
    try:
        found = [{name: (tuple(v.shape), v.dtype) for name, v in c.items()} for c in state["clusterings"]]
        meters: dict[str, Any] = state["meters"] if state["steps"] else {"steps": 0, "sums": {}}
        steps, sums = meters["steps"], meters["sums"]
        numbers = checkpoint.is_dict(sums) and all(isinstance(value, float) for value in sums.values())
    except (KeyError, TypeError, AttributeError):
        return False
    fits = found == clusterings and state["steps"] * wanted["batch"] <= num_images
    return fits and numbers and checkpoint.is_count(steps) and bool(steps) == bool(state["steps"])
