"""Whether it learns: what an E-step shows of the features and clusters.

Labels are used here, to look, and nowhere else in pre-training. Letters: N training images, C features, K prototypes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pcl import checkpoint
from pcl.augment import center_view
from pcl.builder import MoCo
from pcl.clustering import Clustering
from pcl.distributed import get_world_size, is_main, wait_for_main
from pcl.features import extract_features
from pcl.loader import IndexedFolder, indices_of_rank, make_loader
from pcl.metrics import cluster_agreement, leave_one_out_accuracy
from pcl.run import options
from pcl.run.logs import RunLog, log, track

LAST_E_STEP = "e_step.pth.tar"  # in the experiment folder, for pcl/figures.py
SAMPLE = 5000  # images whose features it keeps
CHUNK = 2**16  # images whose cosines are taken at once
KNOWN = 2_000_000  # training images among which kNN looks for neighbours


class Monitor:
    """Logs after each E-step, and every `freq` epochs in warm-up, what tells whether a run learns.

    Args:
        images: the training images, whose folders are the labels.
        val_loader: this rank's share of the validation images (`pcl.loader.indices_of_rank`); None without any.
        freq: epochs between two looks in warm-up; 0 turns everything off.
        record: takes the figures.
    """

    def __init__(self, images: IndexedFolder, val_loader: DataLoader | None, freq: int, record: RunLog) -> None:
        self.label = torch.from_numpy(images.labels) if len(np.unique(images.labels)) > 1 else None  # (N,)
        self.val_loader, self.freq, self.record = val_loader, freq, record
        self.previous: list[Tensor] = []  # the clusters (N,) of each granularity at the last E-step

    def is_due(self, epoch: int) -> bool:
        """Whether to look at this epoch of the warm-up, which needs a pass over the images for that alone."""
        return self.freq > 0 and epoch % self.freq == 0 and (self.label is not None or self.val_loader is not None)

    def look(
        self,
        epoch: int,
        model: MoCo,
        features: Tensor,
        seen: range,
        clusterings: Sequence[Clustering],
        start: float | None = None,
    ) -> None:
        """Log the figures. Every rank must call it, with the model in eval mode.

        Args:
            epoch: which is to come, from 0.
            model: whose backbone sees the validation images.
            features: (n, C) unit-length momentum features of the main process; n = N but for sharded k-means.
            seen: which images those are of.
            clusterings: of all images; none in warm-up.
            start: when this look began (`time.monotonic`), if before.
        """
        if self.freq == 0:
            return
        start = time.monotonic() if start is None else start
        figures: dict[str, float] = {}
        if self.val_loader is not None:
            val_label = torch.from_numpy(self.val_loader.dataset.labels)  # type: ignore[attr-defined]
            batches = track(self.val_loader, "monitor", len(self.val_loader))
            represented = extract_features(model.represent, batches, len(val_label), features.device)
            if is_main():
                figures["knn_val"] = leave_one_out_accuracy(represented, val_label)
        if is_main():
            if self.label is not None:
                label = self.label[seen.start : seen.stop : seen.step][:KNOWN]
                figures["knn_train"] = leave_one_out_accuracy(features[:KNOWN], label)
            for position, clustering in enumerate(clusterings):
                previous = self.previous[position] if self.previous else None
                self._describe(epoch, clustering, previous, figures)
            figures["monitor_seconds"] = time.monotonic() - start
            self.record.figures(epoch, **figures)
            self._tell(epoch, figures, [len(c.prototypes) for c in clusterings])
            self.previous = [c.im2cluster.to("cpu", torch.int32) for c in clusterings]
        wait_for_main()

    def _describe(self, epoch: int, clustering: Clustering, previous: Tensor | None, figures: dict[str, float]) -> None:
        """Add one granularity's figures, called clusters_K/.., and show its histograms."""
        num_cluster = len(clustering.prototypes)
        size = torch.bincount(clustering.im2cluster, minlength=num_cluster).cpu().numpy()  # (K,)
        phi = clustering.concentration.cpu().numpy()  # (K,)
        found: dict[str, float] = {"empty": int((size == 0).sum())}
        for name, values in (("size", size), ("concentration", phi)):
            quartiles = np.percentile(values, [25, 50, 75]).tolist()
            found |= {f"{name}_quartile_{i}": value for i, value in enumerate(quartiles, start=1)}
        if self.label is not None:
            found |= cluster_agreement(clustering.im2cluster, self.label)
        if previous is not None:
            # Numbers of clusters mean nothing: an image stays if it goes where most of its old cluster goes.
            stability = cluster_agreement(previous, clustering.im2cluster)
            found |= {"changed": 1 - stability["purity"], "ami_previous": stability["ami"]}
        figures |= {f"clusters_{num_cluster}/{name}": value for name, value in found.items()}
        if self.record.board:
            histograms = {"size": size, "concentration": phi}
            self.record.board.histogram(epoch, **{f"clusters_{num_cluster}/{n}": v for n, v in histograms.items()})

    def _tell(self, epoch: int, figures: dict[str, float], num_clusters: Sequence[int]) -> None:
        accuracies = [f"{name} {100 * figures[f'knn_{name}']:.1f} %" for name in ("train", "val") if f"knn_{name}" in figures]
        knn = f"  kNN {', '.join(accuracies)}" if accuracies else ""
        log(f"monitor before epoch {epoch + 1}{knn}  {figures['monitor_seconds']:.1f} s")
        for num_cluster in num_clusters:
            f = {key.partition("/")[2]: v for key, v in figures.items() if key.startswith(f"clusters_{num_cluster}/")}
            parts = [f"NMI {f['nmi']:.3f}  AMI {f['ami']:.3f}  purity {100 * f['purity']:.1f} %"] if "nmi" in f else []
            parts += [f"changed {100 * f['changed']:.0f} % (AMI {f['ami_previous']:.3f})"] if "changed" in f else []
            sizes = "/".join(f"{f[f'size_quartile_{i}']:.0f}" for i in (1, 2, 3))
            phis = "/".join(f"{f[f'concentration_quartile_{i}']:.3f}" for i in (1, 2, 3))
            parts += [f"size {sizes}", f"concentration {phis}", f"{f['empty']} empty"]
            log(f"  {num_cluster} clusters  {'  '.join(parts)}")


def keep_e_step(
    folder: Path, epoch: int, features: Tensor, seen: range, clusterings: Sequence[Clustering], images: IndexedFolder
) -> None:
    """Write what `pcl/figures.py` draws from, in place of the last E-step's. Every rank must call it.

    Args:
        folder: the experiment's.
        epoch: which is to come, from 0.
        features, seen, clusterings: as for `Monitor.look`.
        images: the training images.
    """
    if is_main():
        _keep(folder, epoch, features, torch.arange(seen.start, seen.stop, seen.step), clusterings, images)
    wait_for_main()


def _keep(
    folder: Path, epoch: int, features: Tensor, ids: Tensor, clusterings: Sequence[Clustering], images: IndexedFolder
) -> None:
    chosen = np.sort(np.random.default_rng(0).permutation(len(features))[:SAMPLE])
    granularities = []
    for clustering in clusterings:
        cosine = [
            (rows * clustering.prototypes[clustering.im2cluster[part.to(features.device)]]).sum(dim=1).cpu()
            for rows, part in zip(features.split(CHUNK), ids.split(CHUNK), strict=True)
        ]
        granularities.append(
            {
                "im2cluster": clustering.im2cluster.cpu(),  # (N,) int64
                "prototypes": clustering.prototypes.cpu(),  # (K, C)
                "concentration": clustering.concentration.cpu(),  # (K,)
                "cosine": torch.cat(cosine),  # (n,) to the own prototype
            }
        )
    state = {
        "epoch": epoch,
        "classes": images.classes,
        "labels": torch.from_numpy(images.labels),  # (N,) int64
        "seen": ids,  # (n,) int64
        "sample": ids[chosen],  # (S,) int64, sorted
        "features": features[torch.from_numpy(chosen).to(features.device)].cpu(),  # (S, C)
        "granularities": granularities,
    }
    checkpoint.save(folder / LAST_E_STEP, state)


def val_folder(args: argparse.Namespace) -> IndexedFolder | None:
    """The images of DIR/val/<class>/, for the monitor; None if there are none."""
    root = (args.data / "val").resolve()
    if args.monitor_freq == 0 or args.images == args.data.resolve() or not root.is_dir():
        return None
    try:
        return IndexedFolder(root, center_view(args.image_size), skip=args.unreadable)
    except OSError:
        return None


def val_loader(args: argparse.Namespace) -> DataLoader | None:
    """This rank's share of the images of DIR/val/<class>/, for the monitor; None if they cannot tell anything.

    At most an eighth of the number of training images, so that looking costs little beside training.
    """
    images = val_folder(args)
    if images is None:
        return None
    chosen = np.random.default_rng(0).permutation(len(images))[: args.num_images // 8]
    images = images.subset(np.sort(chosen))
    if len(images) < get_world_size() or len(np.unique(images.labels)) < 2:
        return None
    batch, workers = options.batch_and_workers(args)
    return make_loader(images, indices_of_rank(len(images)), 5 * batch, workers)
