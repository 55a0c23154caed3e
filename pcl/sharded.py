"""k-means of features that stay on the rank that computed them (`--kmeans sharded`), where one device cannot hold them all.

The loop is faiss's `contrib.clustering.kmeans`. Each rank finds the nearest centroids of its own images; sums and counts are
added over the ranks. A rank needs memory for its N/W features, the centroids, and 8 bytes for each of the N images and each
granularity (the cluster that training looks up; twice that while they are gathered).

Letters: N images, n of them on this rank, W ranks, C features, K prototypes.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from types import FunctionType

import numpy as np
import torch
from faiss.contrib import clustering as contrib
from faiss.contrib.torch.clustering import DatasetAssign
from torch import Tensor

from pcl import clustering
from pcl.checks import above_zero, integer, tensors
from pcl.clustering import Clustering, permutation
from pcl.distributed import gather_interleaved, get_rank, get_world_size, sum_over_ranks

# faiss's function with a `print` that does nothing: it prints even if it is not verbose.
kmeans = FunctionType(
    contrib.kmeans.__code__, vars(contrib) | {"print": contrib.print_nop}, "kmeans", contrib.kmeans.__defaults__
)
TILE = 4096, 2048  # images and centroids whose distances a GPU holds at once: 32 MiB, which its cache may keep


def cluster_all_sharded(
    features: Tensor,
    num_images: int,
    num_clusters: Sequence[int],
    temperature: float,
    seeds: Sequence[int] | None = None,
    tf32: bool = False,
    track: Callable = iter,
) -> list[Clustering]:
    """`pcl.clustering.cluster_all` of features spread over the ranks. Every rank must call it.

    Args:
        features: (n, C) float32 of images rank, rank + W, ...; on a GPU it is searched by matrix products in tiles.
        num_images: N.
        num_clusters, temperature, seeds: as for `cluster_all`.
        tf32: a GPU may round the factors of those products to 10 bits; the sums keep their precision.
        track: wraps the iterable of restarts to show progress, as `tqdm` does.

    Returns:
        a clustering for each granularity, of all N images, the same on every rank. Two runs on a GPU agree up to rounding.

    Raises:
        TypeError, ValueError: an invalid argument.
    """
    features = tensors(features=(features, "n C"))[0].detach()
    num_images, temperature = integer("num_images", num_images, 1), above_zero("temperature", temperature)
    jobs = clustering.jobs_of(num_clusters, seeds, num_images)
    rows = len(range(get_rank(), num_images, get_world_size()))
    if sum_over_ranks(torch.tensor(int(len(features) != rows), device=features.device)):  # on one rank: all raise
        told = f"this one has {len(features)} rows, its share is {rows}"
        raise ValueError(f"num_images is {num_images}, and not every rank has its share of the features; {told}")
    features, prototypes_of = clustering.held_by_float32(features, sum_over_ranks)
    features = features.float().contiguous()
    runs = (kmeans_sharded(features, num_images, k, seed, restart, tf32) for k, seed, restart in track(jobs))
    found = []
    for _ in range(0, len(jobs), clustering.RESTARTS):
        _, centroids = min(islice(runs, clustering.RESTARTS), key=lambda run: run[0])  # of equal ones the first, as in faiss
        squared, nearest = assign(features, centroids, tf32)
        sums = features.new_zeros(2, len(centroids), dtype=torch.float64)
        sums[0].index_add_(0, nearest, torch.ones_like(squared, dtype=torch.float64))
        sums[1].index_add_(0, nearest, squared.clamp(min=0).sqrt().double())
        size, spread = sum_over_ranks(sums)
        phi = clustering.concentration_of_sums(size, spread, temperature).float()
        found.append(Clustering(gather_interleaved(nearest, num_images), prototypes_of(centroids), phi))
    return found


def kmeans_sharded(
    features: Tensor, num_images: int, num_cluster: int, seed: int, restart: int = 0, tf32: bool = False
) -> tuple[float, Tensor]:
    """`pcl.clustering.kmeans` of features spread over the ranks, as for `cluster_all_sharded`; the same up to rounding.

    Returns:
        the objective (sum of squared distances) and the raw centroids (K, C), on the device of `features`.
    """
    # faiss's own choice of images to learn from and to start from. A cluster that runs empty is filled by other random numbers.
    rank, world = get_rank(), get_world_size()
    (seed, start_seed), most = clustering.seeds_of(seed, restart), clustering.MAX_POINTS * num_cluster
    seen = permutation(num_images, seed)[:most] if num_images > most else None
    first = permutation(min(num_images, most), start_seed + 1)[:num_cluster]
    first = first if seen is None else seen[first]  # (K,)
    here, start = first % world == rank, features.new_zeros(num_cluster, features.shape[1])  # (K,), (K, C)
    start[torch.from_numpy(here)] = features[torch.from_numpy(first[here] // world).to(features.device)]
    if seen is not None:
        features = features[torch.from_numpy(seen[seen % world == rank] // world).to(features.device)]
    del seen, first  # they hold whole permutations
    options = {"niter": clustering.ITERATIONS, "seed": start_seed, "verbose": False, "return_stats": True}
    centroids, steps = kmeans(num_cluster, RankAssign(features, sum_over_ranks(start), tf32), **options)
    return steps[-1]["obj"], centroids.float()


class RankAssign(DatasetAssign):
    """This rank's images (n, C) for `faiss.contrib.clustering.kmeans`, which begins with `start` (K, C); sums are of all."""

    def __init__(self, features: Tensor, start: Tensor, tf32: bool) -> None:
        super().__init__(features)
        self.start, self.tf32 = start, tf32

    def count(self) -> int:
        """How many images kmeans chooses its K starting points from: they are chosen already."""
        return len(self.start)

    def get_subset(self, _: np.ndarray) -> Tensor:
        """The starting points."""
        return self.start

    def assign_to(self, centroids: Tensor, weights: None = None) -> tuple[np.ndarray, Tensor, Tensor]:
        """Each cluster's number once per image (kmeans counts them), the sum of squared distances, sums of features (K, C)."""
        squared, nearest = assign(self.x, centroids.float(), self.tf32)  # (n,), (n,)
        # In double precision, so that the order in which ranks add does not show.
        total = self.x.new_zeros(centroids.shape, dtype=torch.float64)
        for rows, place in zip(self.x.split(clustering.CHUNK), nearest.split(clustering.CHUNK), strict=True):
            total.index_add_(0, place, rows.double())
        count = sum_over_ranks(torch.bincount(nearest, minlength=len(centroids))).cpu().numpy()
        return np.repeat(np.arange(len(count)), count), sum_over_ranks(squared.double().sum()), sum_over_ranks(total)


def assign(features: Tensor, centroids: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each row: its squared L2 distance, (n,) float32, and its index, (n,) int64."""
    if features.device.type != "cuda":
        return clustering.nearest_centroids(features, centroids)
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")  # from torch 2.9 on, which refuses the old name where a caller has used the new one
    name, value = ("fp32_precision", "tf32" if tf32 else "ieee") if new else ("allow_tf32", tf32)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        return assign_in_tiles(features, centroids)
    finally:
        setattr(matmul, name, before)


def assign_in_tiles(features: Tensor, centroids: Tensor, tile: tuple[int, int] = TILE) -> tuple[Tensor, Tensor]:
    """The same by matrix products, a tile of distances at a time."""
    images, many = tile
    squared, nearest = [], []
    # cuBLAS adds a vector to a product in its epilogue if neither has a factor, so -2 goes into the matrix, which is exact.
    parts = [(part.square().sum(dim=1), -2 * part.T) for part in centroids.split(many)]  # (many,), (C, many)
    for rows in features.split(images):
        with torch.autocast(features.device.type, enabled=False):  # a caller's would round to 16 bits
            least, where = zip(*(torch.addmm(length, rows, part).min(dim=1) for length, part in parts), strict=True)
        best = torch.stack(least).argmin(dim=0)  # (images,) the part that has the nearest
        place = torch.stack(where).gather(0, best[None])[0] + best * many
        # Small distances are differences of large numbers there; the found one is measured directly.
        squared.append((rows - centroids[place]).square().sum(dim=1))
        nearest.append(place)
    return torch.cat(squared), torch.cat(nearest)
