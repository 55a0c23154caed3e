"""Whether it learns: what an E-step shows of the features and clusters.

Labels are used here, to measure, and nowhere else in pre-training. Letters: N training images, C features, K prototypes.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pcl import checkpoint
from pcl.augment import center_view
from pcl.builder import MoCo
from pcl.clustering import CHUNK, Clustering
from pcl.distributed import get_world_size, is_main, shared_map, wait_for_all
from pcl.features import extract_features
from pcl.loader import IndexedFolder, indices_of_rank, make_loader
from pcl.metrics import cluster_agreement, leave_one_out_accuracy
from pcl.run.logs import RunLog, log, track
from pcl.run.preflight import Plan

SAMPLE = 5000  # images whose features are kept for the pictures
KNN_POOL = 2_000_000  # training images among which kNN searches


class Monitor:
    """Measures and logs whether a run learns, after each E-step and every `freq` epochs of warm-up; never if `freq` is 0.

    The folders of the training images are the labels; `val_loader` has this rank's share of the validation images.
    `clusterings` are the last ones of a resumed run.
    """

    def __init__(
        self, images: IndexedFolder, val_loader: DataLoader | None, freq: int, record: RunLog,
        clusterings: Sequence[Clustering] = ()
    ) -> None:  # fmt: skip
        self.label = torch.from_numpy(images.labels) if len(np.unique(images.labels)) > 1 else None  # (N,)
        self.val_loader, self.freq, self.record = val_loader, freq, record
        self.remember(clusterings)

    def remember(self, clusterings: Sequence[Clustering]) -> None:
        """Keep the clusters (N,) of each granularity, to compare those of the next E-step with."""
        self.previous = [clustering.im2cluster.to("cpu", torch.int32) for clustering in clusterings]

    def is_due(self, epoch: int) -> bool:
        """Whether to measure at this epoch of the warm-up, which needs a pass over the images for that alone."""
        return self.freq > 0 and epoch % self.freq == 0 and (self.label is not None or self.val_loader is not None)

    def measure(
        self, epoch: int, model: MoCo, features: Tensor, seen: range, clusterings: Sequence[Clustering], start: float = 0
    ) -> None:
        """Log the results before `epoch`. Every rank must call it, with the model in eval mode.

        `features` (n, C) are the unit-length momentum features of the images `seen`: all N, or with sharded k-means this
        rank's; knn_train then uses the main process's. `clusterings` are of all images; there are none in warm-up.
        `start` is when a pass over the images for this alone began (`time.monotonic`).
        """
        if self.freq == 0:
            return
        start = start or time.monotonic()
        jobs: dict[str, Callable[[], dict[str, float]]] = {}
        if self.label is not None and len(self.label) > get_world_size():  # an image has others beside it
            label = self.label[seen.start : seen.stop : seen.step][:KNN_POOL]
            jobs["knn_train"] = lambda: {"accuracy": leave_one_out_accuracy(features[:KNN_POOL], label)}
        if self.val_loader is not None:
            val_label = torch.from_numpy(self.val_loader.dataset.labels)  # type: ignore[attr-defined]
            rows = extract_features(model.backbone_features, track(self.val_loader, "monitor"), len(val_label), features.device)
            jobs["knn_val"] = lambda: {"accuracy": leave_one_out_accuracy(rows, val_label)}
        for number, im2cluster in enumerate(clustering.im2cluster.cpu() for clustering in clusterings):
            if self.label is not None:
                jobs[f"label {number}"] = partial(cluster_agreement, im2cluster, self.label)
            if self.previous:
                jobs[f"previous {number}"] = partial(cluster_agreement, self.previous[number], im2cluster)
        # Each rank does some jobs. The costliest, knn_train, goes to the main process: it is to measure that one's features.
        cost = [2.0 if name == "knn_train" else 1.0 for name in jobs]
        values = shared_map(lambda job: [torch.tensor([*job().values()], dtype=torch.float64)], [*jobs.values()], cost)
        done = {name: result.tolist() for name, (result,) in zip(jobs, values, strict=True)}
        if is_main():
            found = {name: result[0] for name, result in done.items() if name.startswith("knn")}
            for number, clustering in enumerate(clusterings):
                found |= self._of_clusters(epoch, clustering, done.get(f"label {number}"), done.get(f"previous {number}"))
            found["monitor_seconds"] = time.monotonic() - start
            self.record.metrics(epoch, **found)
            _tell(epoch, found, [len(c.prototypes) for c in clusterings])
        self.remember(clusterings)

    def _of_clusters(
        self, epoch: int, clustering: Clustering, agreement: Sequence[float] | None, stability: Sequence[float] | None
    ) -> dict[str, float]:
        """One granularity's results, called clusters_K/...; shows its histograms.

        `agreement` with the labels and `stability`, with the clusters before, are values of `cluster_agreement`.
        """
        num_cluster = len(clustering.prototypes)
        size = torch.bincount(clustering.im2cluster, minlength=num_cluster).cpu().numpy()  # (K,)
        phi = clustering.concentration.cpu().numpy()  # (K,)
        found: dict[str, float] = {"empty": int((size == 0).sum())}
        for name, values in (("size", size), ("concentration", phi)):
            quartiles = np.percentile(values, [25, 50, 75]).tolist()
            found |= {f"{name}_quartile_{i}": value for i, value in enumerate(quartiles, start=1)}
        if agreement is not None:
            found |= dict(zip(("nmi", "ami", "purity"), agreement, strict=True))
        if stability is not None:
            # Cluster ids are arbitrary: an image stays if it goes where most of its old cluster goes.
            _, ami, purity = stability
            found |= {"changed": 1 - purity, "ami_previous": ami}
        if self.record.board:
            shown = {f"clusters_{num_cluster}/size": size, f"clusters_{num_cluster}/concentration": phi}
            self.record.board.histogram(epoch, **shown)
        return {f"clusters_{num_cluster}/{name}": value for name, value in found.items()}


def _tell(epoch: int, found: dict[str, float], num_clusters: Sequence[int]) -> None:
    accuracies = [f"{name} {100 * found[f'knn_{name}']:.1f} %" for name in ("train", "val") if f"knn_{name}" in found]
    knn = f"  kNN {', '.join(accuracies)}" if accuracies else ""
    log(f"monitor before epoch {epoch + 1}{knn}  {found['monitor_seconds']:.1f} s")
    for num_cluster in num_clusters:
        f = {key.partition("/")[2]: v for key, v in found.items() if key.startswith(f"clusters_{num_cluster}/")}
        parts = [f"NMI {f['nmi']:.3f}  AMI {f['ami']:.3f}  purity {100 * f['purity']:.1f} %"] if "nmi" in f else []
        parts += [f"changed {100 * f['changed']:.0f} % (AMI {f['ami_previous']:.3f})"] if "changed" in f else []
        sizes = "/".join(f"{f[f'size_quartile_{i}']:.0f}" for i in (1, 2, 3))
        phis = "/".join(f"{f[f'concentration_quartile_{i}']:.3f}" for i in (1, 2, 3))
        parts += [f"size {sizes}", f"concentration {phis}", f"{f['empty']} empty"]
        log(f"  {num_cluster} clusters  {'  '.join(parts)}")


def save_e_step(
    folder: Path, epoch: int, features: Tensor, seen: range, clusterings: Sequence[Clustering], images: IndexedFolder
) -> None:
    """Write what `pcl/figures.py` draws from, in place of the last E-step's. Every rank must call it.

    `folder` is the experiment's, `images` are those of training; the others are as for `Monitor.measure`.
    """
    if is_main():
        ids = torch.arange(seen.start, seen.stop, seen.step)  # (n,)
        chosen = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(len(features))[:SAMPLE]))  # (S,)
        granularities = []
        for c in clusterings:
            parts = zip(features.split(CHUNK), ids.to(c.im2cluster.device).split(CHUNK), strict=True)
            cosine = [(rows * c.prototypes[c.im2cluster[part]]).sum(dim=1).cpu() for rows, part in parts]
            granularities.append({**vars(c.to("cpu")), "cosine": torch.cat(cosine)})  # (n,) to the own prototype
        state = {
            "epoch": epoch,
            "classes": images.classes,
            "files": images.names(),  # N, relative to the folder of training images
            "labels": torch.from_numpy(images.labels),  # (N,) int64
            "seen": ids,  # int64
            "sample": ids[chosen],  # sorted
            "features": features[chosen.to(features.device)].cpu(),  # (S, C)
            "granularities": granularities,
        }
        checkpoint.save(folder / checkpoint.LAST_E_STEP, state)
    wait_for_all()


def val_folder(args: Namespace, plan: Plan) -> IndexedFolder | None:
    """The images of DIR/val/<class>/; None if there are none."""
    root = (args.data / "val").resolve()
    if args.monitor_freq == 0 or plan.images == args.data.resolve() or not root.is_dir():
        return None
    try:
        return IndexedFolder(root, center_view(args.image_size), skip=plan.unreadable)
    except OSError:
        return None


def val_loader(args: Namespace, plan: Plan) -> DataLoader | None:
    """This rank's share of the images of `val_folder`; None if they cannot tell anything."""
    images = val_folder(args, plan)
    if images is None:
        return None
    # At most an eighth of the number of training images, so that measuring costs little beside training.
    chosen = np.random.default_rng(0).permutation(len(images))[: plan.num_images // 8]
    images = images.subset(np.sort(chosen))
    if len(images) < get_world_size() or len(np.unique(images.labels)) < 2:
        return None
    return make_loader(images, indices_of_rank(len(images)), 5 * plan.batch, plan.workers)
