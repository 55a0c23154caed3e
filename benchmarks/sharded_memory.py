"""Memory and speed of `--kmeans sharded` for two million images in two processes on the CPU.

    python benchmarks/sharded_memory.py

From the speed it reckons what an E-step of more images would take on more processes that are as fast.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pcl and the scripts

import torch

from pcl import clustering, sharded
from pcl.cli import Parser
from pcl.clustering import ITERATIONS, MAX_POINTS, RESTARTS
from pcl.distributed import get_world_size, sum_over_ranks
from pcl.run.launch import launch
from pcl.run.logs import log
from pcl.run.preflight import Plan
from pcl.run.rendezvous import place_of

NUM_IMAGES, NUM_CLUSTER, DIM, MEASURED = 2_000_000, 2_000, 128, 2  # at 1,000 images a cluster none is left out
GRANULARITIES = (25_000, 50_000, 100_000)


def peak() -> float:
    """Of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def operations(num_images: int) -> float:
    """Multiplications and additions of the E-step's k-means, three granularities, and of a last search of all images."""
    searches = sum(k * (RESTARTS * ITERATIONS * min(num_images, MAX_POINTS * k) + num_images) for k in GRANULARITIES)
    return 2.0 * DIM * searches


def work(device: torch.device, args: argparse.Namespace, plan: Plan) -> None:
    clustering.ITERATIONS, clustering.RESTARTS = MEASURED, 1
    empty = peak()
    features = torch.empty(NUM_IMAGES // 2, DIM).normal_()
    for rows in features.split(10_000):
        rows.div_(rows.norm(dim=1, keepdim=True))
    loaded, start = peak(), time.perf_counter()
    sharded.cluster_all_sharded(features, NUM_IMAGES, [NUM_CLUSTER], temperature=0.2)
    seconds = (time.perf_counter() - start) / (MEASURED + 1)  # the last search describes the clusters
    mib = sum_over_ranks(torch.tensor([empty, loaded - empty, peak() - loaded])) / get_world_size()
    rate = 2 * NUM_IMAGES * NUM_CLUSTER * DIM / seconds / get_world_size()
    log("mean of the processes: {:.0f} MiB before, {:.0f} MiB of features, {:.0f} MiB more at the peak".format(*mib.tolist()))
    log(f"{seconds:.1f} s an iteration, {rate / 1e9:.0f} billion operations a second in each process")
    for num_images in (1_281_167, 100_000_000, 1_000_000_000):
        total = operations(num_images)
        hours = ", ".join(f"{total / rate / world / 3600:,.1f} h on {world}" for world in (8, 64, 512))
        log(f"{num_images:13,d} images, K = 25,000 + 50,000 + 100,000: {total:.2g} operations; {hours} such processes")


if __name__ == "__main__":
    Parser(__doc__).parse_args()
    options = {"nproc": 2, "gpu": None, "world_size": 1, "rank": 0, "dist_url": None, "dist_backend": "gloo", "seed": 0}
    args = argparse.Namespace(**options, dist_timeout=600)
    launch(work, args, Plan(place_of(args), seed=0))
