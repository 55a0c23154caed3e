"""PCL that is told the classes: each is one cluster, whatever --num-cluster says. What the prototype term does at its best.

    python benchmarks/oracle.py [options of main_pcl.py, with --nproc 1] DIR

It learns from labels, so that its scores say nothing of PCL's. They tell apart two reasons for which prototypes may not help:
clusters that have little to do with the classes, and a fault in what is made of them.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from demo import ROOT
from pcl.clustering import Clustering, concentration
from pcl.loader import IndexedFolder

sys.path.insert(0, str(ROOT))  # the scripts

import main_pcl


def class_clusters(features: Tensor, labels: Tensor, temperature: float) -> Clustering:
    """The clustering whose clusters are the classes.

    Args:
        features: (N, C) float, unit length.
        labels: (N,) integer, 0..K-1.
        temperature: mean concentration.
    """
    sums = torch.zeros(int(labels.max()) + 1, features.shape[1], device=features.device).index_add(0, labels, features)
    prototypes = F.normalize(sums, dim=1)
    distance = (features - prototypes[labels]).norm(dim=1)
    return Clustering(labels, prototypes, concentration(distance, labels, len(prototypes), temperature))


def main() -> None:
    parser = main_pcl.get_parser()
    args = parser.parse_args()
    if args.nproc != 1:
        parser.error("--nproc: give --nproc 1, since other processes would not be told the classes")
    labels = torch.from_numpy(IndexedFolder(args.data / "train", transform=None).labels)

    def cluster_all(features: Tensor, *_: Any, **__: Any) -> list[Clustering]:
        return [class_clusters(features, labels.to(features.device), args.temperature)]

    main_pcl.cluster_all = main_pcl.cluster_all_sharded = cluster_all
    main_pcl.main()


if __name__ == "__main__":
    main()
