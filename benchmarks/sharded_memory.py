"""Memory of `--kmeans sharded` for two million images in two processes on the CPU: python benchmarks/sharded_memory.py"""

import argparse
import resource
import time

import torch

from pcl import sharded
from pcl.distributed import launch

NUM_IMAGES, NUM_CLUSTER, ITERATIONS = 2_000_000, 2_000, 2  # at 1,000 images a cluster none is left out


def peak() -> float:
    """Of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(device: torch.device, args: argparse.Namespace) -> None:
    sharded.ITERATIONS = ITERATIONS
    empty = peak()
    features = torch.empty(NUM_IMAGES // 2, 128).normal_()
    for rows in features.split(10_000):
        rows.div_(rows.norm(dim=1, keepdim=True))
    loaded, start = peak(), time.perf_counter()
    sharded.RESTARTS = 1
    sharded.cluster_all_sharded(features, NUM_IMAGES, [NUM_CLUSTER], temperature=0.2)
    seconds = (time.perf_counter() - start) / (ITERATIONS + 1)  # the last search describes the clusters
    rate = 2 * NUM_IMAGES * NUM_CLUSTER * 128 / seconds / 1e9
    print(
        f"process: {empty:.0f} MiB before, {loaded - empty:.0f} MiB of features, {peak() - loaded:.0f} MiB more at the peak; "
        f"{seconds:.1f} s an iteration, {rate:.0f} billion operations a second in both"
    )


if __name__ == "__main__":
    options = {"nproc": 2, "gpu": None, "world_size": 1, "rank": 0, "dist_url": None, "dist_backend": "gloo", "seed": 0}
    launch(work, argparse.Namespace(**options, deterministic=False))
