"""The E-step on plain features: k-means by faiss, and the concentration of each cluster (PCL, sections 3.2 and 3.3).

    from pcl.clustering import cluster
    clustering = cluster(features, num_cluster=100, temperature=0.2)  # features (N, C) float32, of any origin

An invalid argument raises a TypeError or ValueError that names it.
Letters: N images (or whatever the rows stand for), C features, K prototypes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pcl.checks import above_zero, below, integer, tensors
from pcl.distributed import get_rank, get_world_size

RESTARTS = 5  # published setting (faiss: nredo)
ITERATIONS = 20  # published setting (faiss: niter)
MAX_POINTS = 1000  # published setting: k-means sees at most that many images for each centroid
RESTART_SEED_STEP = 15486557  # what faiss adds to the seed of each further restart
CHUNK = 2**16  # rows that are held in double precision at once
# With so many ranks, all take part in each restart: one rank each, the 15 unequal restarts would keep 16 busy half the time.
MANY_RANKS = 16
LARGEST = 1e15  # bound on a feature's size: its square is far within float32

Array = Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Clustering:
    """One granularity of the E-step; the published code's `im2cluster`, `centroids` and `density`."""

    im2cluster: Tensor  # (N,) int64, the cluster of each image
    prototypes: Tensor  # (K, C) float32, unit length (zero where the rows of a cluster cancel out)
    concentration: Tensor  # (K,) float32, the temperature of each prototype: positive, finite

    @cached_property
    def num_used(self) -> int:
        """1 + the largest cluster id that an image has: negatives are drawn from the prototypes below it, as published."""
        return int(self.im2cluster.max()) + 1

    def to(self, device: torch.device | str) -> "Clustering":
        """The same clustering on `device`."""
        return Clustering(self.im2cluster.to(device), self.prototypes.to(device), self.concentration.to(device))


torch.serialization.add_safe_globals([Clustering])  # torch.load(weights_only=True) opens one that torch.save wrote


def concentration(distance: Array, im2cluster: Array, num_cluster: int, temperature: float, alpha: float = 10) -> Tensor:
    """Concentration phi of each cluster: small where the images lie close to their centroid (PCL, equation 12).

    Args:
        distance: (N,) float, L2 (not squared) distance of each image to the centroid of its cluster.
        im2cluster: (N,) integer, the cluster of each image, 0..K-1.
        temperature: the mean of the result.
        alpha: larger values keep the phi of small clusters small.

    Returns:
        (K,), of `distance`'s dtype, positive and finite as far as that holds them. Clusters of at most one image take the
        largest phi; then all are clipped to their 10th and 90th percentile.
    """
    distance, im2cluster = tensors(distance=(distance, "n"), im2cluster=(im2cluster, "int n"))
    num_cluster, temperature = integer("num_cluster", num_cluster, 1, 2**31 - 1), above_zero("temperature", temperature)
    below("im2cluster", im2cluster.cpu(), num_cluster)
    if not ((distance >= 0) & distance.isfinite()).all():
        raise ValueError("distance must hold finite numbers of at least 0")
    alpha = above_zero("alpha", alpha) if alpha != 0 else 0.0
    size = torch.bincount(im2cluster, minlength=num_cluster)  # (K,)
    spread = torch.bincount(im2cluster, weights=distance.detach().double(), minlength=num_cluster)  # (K,)
    return concentration_of_sums(size, spread, temperature, alpha).to(distance.dtype)


def concentration_of_sums(size: Tensor, spread: Tensor, temperature: float, alpha: float = 10) -> Tensor:
    """`concentration` from each cluster's number of images and the sum of their distances, both (K,); float64."""
    phi = spread / size.clamp(min=1) / torch.log(size.double() + alpha)
    phi[size <= 1] = phi[size > 1].max() if (size > 1).any() else 1.0  # a lone image tells nothing of its cluster's spread
    # The published order: percentiles first, then the mean of the clipped values.
    low, high = np.percentile(phi.cpu().numpy(), [10, 90])
    phi = phi.clamp(low, high)
    # If more than a tenth of the clusters hold identical images, their phi would be 0 and the loss NaN.
    positive = phi[phi > 0]
    phi = phi.clamp(min=float(positive.min())) if len(positive) else torch.ones_like(phi)
    return temperature * phi / phi.mean()


def kmeans(
    features: np.ndarray, num_cluster: int, seed: int, restart: int = 0, device: torch.device | None = None,
    algorithm: str = "faiss",
) -> tuple[float, np.ndarray]:  # fmt: skip
    """One restart of faiss's k-means, the same to the bit as restart number `restart` inside a faiss run with several.

    Args:
        features: (N, C) float, N >= K.
        seed: of the whole run (all its restarts), any integer; faiss takes 31 bits of it.
        restart: 0..RESTARTS-1.
        device: a CUDA device, used if this build of faiss can; otherwise faiss runs on the CPU.
        algorithm: "super" is faiss's SuperKMeans, on the CPU, for C >= 32: it skips centroids that are unlikely to be nearest.

    Returns:
        the objective (sum of squared distances, lower is better) and the raw centroids (K, C), float32.
    """
    (features,) = _points(features=(features, "N C"))
    num_images, dim = features.shape
    num_cluster = integer("num_cluster", num_cluster, 1, num_images)
    seed, start_seed = seeds_of(seed, restart)
    if algorithm not in ("faiss", "super") or (algorithm == "super" and dim < 32):
        raise ValueError(f'algorithm {algorithm!r} of {dim} features: "faiss", or from 32 features on "super"')
    if num_images > MAX_POINTS * num_cluster:  # faiss's restarts share one subsample, drawn with the run's seed
        features = features[permutation(num_images, seed)[: MAX_POINTS * num_cluster]]
    settings = faiss.SuperKMeansParameters() if algorithm == "super" else faiss.ClusteringParameters()
    settings.niter, settings.nredo, settings.max_points_per_centroid = ITERATIONS, 1, MAX_POINTS
    settings.min_points_per_centroid = 1  # the published 10 only prints a warning, at every restart
    settings.seed = start_seed
    index = _flat_index(dim, device if algorithm == "faiss" else None)  # also sets the number of threads
    if algorithm == "super":
        run = faiss.SuperKMeans(dim, num_cluster, settings)
        run.train(features)
    else:
        run = faiss.Clustering(dim, num_cluster, settings)  # not spherical, as published
        run.train(features, index)
    stats = run.iteration_stats
    objective = stats.at(stats.size() - 1).obj if stats.size() else 0.0  # no iteration where K = N
    return objective, faiss.vector_to_array(run.centroids).reshape(num_cluster, dim)


def seeds_of(seed: int, restart: int) -> tuple[int, int]:
    """The seeds of a run and of one of its restarts, never negative: faiss would take the time of day."""
    seed = integer("seed", seed, -np.inf)
    return seed % 2**31, (seed + integer("restart", restart) * RESTART_SEED_STEP) % 2**31


def permutation(count: int, seed: int) -> np.ndarray:
    """faiss's random order of 0..count-1, (count,) int32."""
    order = np.empty(integer("count", count, 0, 2**31 - 1), np.int32)
    faiss.rand_perm(faiss.swig_ptr(order), len(order), integer("seed", seed, -(2**63), 2**63 - 1))
    return order


def assign_and_measure(features: Array, centroids: Array, temperature: float, device: torch.device | None = None) -> Clustering:
    """Assign features (N, C) to their nearest raw centroid (K, C), both float32; return the clustering, on the CPU."""
    (centroids,) = _points(centroids=(centroids, "K C"))
    squared, im2cluster = nearest_centroids(features, centroids, device)  # (N,), (N,)
    # As published, distances are to the centroids before they are put on the sphere.
    phi = concentration(squared.clamp(min=0).sqrt(), im2cluster, len(centroids), temperature)
    return Clustering(im2cluster, F.normalize(torch.from_numpy(centroids), dim=1), phi)


def nearest_centroids(features: Array, centroids: Array, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The nearest of (K, C) centroids: its squared L2 distance, (N,) float32, and its index, (N,) int64; on the CPU."""
    features, centroids = _points(features=(features, "n C"), centroids=(centroids, "K C"))
    index = _flat_index(features.shape[1], device)
    index.add(centroids)
    squared, im2cluster = index.search(features, 1)
    return torch.from_numpy(squared[:, 0]), torch.from_numpy(im2cluster[:, 0])


def nearest_neighbors(known: Array, query: Array, k: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The k largest inner products of each query (Q, C) with rows of `known` (N, C): (Q, k) float32, and row indices, int64."""
    known, query = _points(known=(known, "N C"), query=(query, "Q C"))
    index = _flat_index(known.shape[1], device, faiss.METRIC_INNER_PRODUCT)
    index.add(known)
    product, row = index.search(query, integer("k", k, 1, len(known)))
    return torch.from_numpy(product), torch.from_numpy(row)


def cluster_all(
    features: Array,
    num_clusters: Sequence[int],
    temperature: float,
    seeds: Sequence[int] | None = None,
    share: Callable[..., list] | None = None,
    algorithm: str = "faiss",
) -> list[Clustering]:
    """Cluster the same features at several granularities, each by the best of RESTARTS restarts.

    Args:
        features: (N, C) real numbers of any type, unit length for PCL. On a CUDA device that this faiss cannot use,
            `pcl.sharded` clusters there; every rank takes part.
        num_clusters: K of each granularity, each at most N.
        temperature: mean concentration of each granularity.
        seeds: of each granularity; as published, its position in the list.
        share: `share(function, jobs, cost)` returns [function(job) for job in jobs], each a few tensors. By default this
            process does all; `pcl.distributed.shared_map` spreads the jobs over the ranks of a group, with the same result.
            Given in a group of MANY_RANKS or more, `pcl.sharded` clusters instead: the same objective up to rounding.
        algorithm: as for `kmeans`.

    Returns:
        a clustering for each granularity, on the device of `features`.
    """
    (features,) = tensors(features=(features, "N C"))
    device, temperature = features.device, above_zero("temperature", temperature)
    jobs = jobs_of(num_clusters, seeds, len(features))
    many = share is not None and get_world_size() >= MANY_RANKS
    if algorithm == "faiss" and (many or faiss_lacks(device)):
        from pcl.sharded import cluster_all_sharded  # imports this module

        rows = features.detach().float()[get_rank() :: get_world_size()]
        return cluster_all_sharded(rows, len(features), num_clusters, temperature, seeds)
    rows, prototypes_of = held_by_float32(features.detach().cpu())
    (points,) = _points(features=(rows, "N C"))
    cost = [k for k, _, _ in jobs]
    share = share or (lambda function, jobs, cost: list(map(function, jobs)))
    centroids: dict[tuple[int, int, int], np.ndarray] = {}  # of the jobs that this process has done

    def run(job: tuple[int, int, int]) -> tuple[Tensor]:
        objective, centroids[job] = kmeans(points, *job, device, algorithm)
        return (torch.tensor(objective, dtype=torch.float64),)

    objectives = np.reshape([float(objective) for (objective,) in share(run, jobs, cost)], (-1, RESTARTS))
    best = [jobs[g * RESTARTS + restart] for g, restart in enumerate(objectives.argmin(1))]  # the first, as in faiss

    def measure(job: tuple[int, int, int]) -> tuple[Tensor, ...]:
        if job not in best:
            return ()
        found = assign_and_measure(points, centroids[job], temperature, device)
        return found.im2cluster, prototypes_of(centroids[job]), found.concentration

    # Equal costs give each rank the same jobs as before, so centroids need not be sent.
    return [Clustering(*found).to(device) for found in share(measure, jobs, cost) if len(found)]


def cluster(features: Array, num_cluster: int, temperature: float, seed: int = 0) -> Clustering:
    """`cluster_all` for a single granularity."""
    return cluster_all(features, [integer("num_cluster", num_cluster, least=1)], temperature, [seed])[0]


def jobs_of(num_clusters: Sequence[int], seeds: Sequence[int] | None, num_images: int) -> list[tuple[int, int, int]]:
    """K, seed and restart of every run of k-means, RESTARTS in a row for each granularity."""
    num_clusters = [integer("num_clusters", k, least=1) for k in np.ravel(np.asarray(num_clusters, dtype=object))]
    if max(num_clusters, default=0) > num_images:
        raise ValueError(f"num_clusters: {max(num_clusters)} clusters of {num_images} images; ask for at most as many")
    places = range(len(num_clusters))  # the seeds as published
    given = [integer("seeds", seed, -np.inf) for seed in np.ravel(np.asarray(places if seeds is None else seeds, dtype=object))]
    if len(given) != len(num_clusters):
        raise ValueError(f"seeds: {len(given)} of them for {len(num_clusters)} granularities")
    return [(k, seed, restart) for k, seed in zip(num_clusters, given, strict=True) for restart in range(RESTARTS)]


def held_by_float32(
    features: Tensor, add_up: Callable[[Tensor], Tensor] = lambda sums: sums
) -> tuple[Tensor, Callable[[Array], Tensor]]:
    """Shift and scale rows (N, C) if float32 would lose their distances; return them and a map from centroids to prototypes.

    Shift and scale do not change the clusters, but faiss's distances are differences of squares, which cancel if the mean is
    far larger than the spread. Other rows, such as PCL's of unit length, stay as they are. `add_up` sums over the ranks.
    """
    dim = features.shape[1]
    sums = features.new_zeros(dim + 3, dtype=torch.float64)  # sum of rows, of their squares; rows not of unit length; rows
    for rows in features.split(CHUNK):
        rows = rows.double()
        square = rows.square().sum(dim=1)
        others = ((square - 1).abs() > 0.02).sum()
        sums += torch.cat([rows.sum(dim=0), torch.stack([square.sum(), others, others.new_tensor(len(rows))])])
    sums = add_up(sums)
    if not sums.isfinite().all():
        raise ValueError("features are not finite, or too large to be squared")
    mean, (square, others, count) = sums[:dim] / sums[-1], sums[dim:]
    square = square / count
    if not others or (mean.square().sum() < 0.99 * square and 1e-20 < square < 1e20):
        return features, lambda centroids: F.normalize(torch.as_tensor(centroids), dim=1)
    features = features.double() - mean
    size = (add_up(features.square().sum()) / count).sqrt()
    size = torch.where(size > 0, size, 1)  # of identical rows
    # The prototypes are those of the rows as they were.
    return (features / size).float(), lambda c: F.normalize(mean + size * torch.as_tensor(c), dim=1, eps=1e-300).float()


def _points(**rows: tuple[Any, str]) -> list[np.ndarray]:
    """Rows as faiss takes them: float32, finite, on the CPU, of the shapes for `pcl.checks.tensors`."""
    points = [tensor.detach().float().cpu().contiguous().numpy() for tensor in tensors(**rows)]
    for name, array in zip(rows, points, strict=True):
        if array.size and not (array.min() > -LARGEST and array.max() < LARGEST):
            raise ValueError(f"{name} are not finite numbers below {LARGEST:g}")
    return points


def faiss_lacks(device: torch.device) -> bool:
    """Whether features are on a GPU that this build of faiss cannot use."""
    return device.type == "cuda" and not (hasattr(faiss, "GpuIndexFlat") and faiss.get_num_gpus() > 0)


def _flat_index(dim: int, device: torch.device | None, metric: int = faiss.METRIC_L2) -> Any:
    faiss.omp_set_num_threads(torch.get_num_threads())  # the ranks of one machine share its cores
    device = torch.device(device or "cpu")
    if device.type != "cuda" or faiss_lacks(device):
        return faiss.IndexFlat(dim, metric)
    torch.cuda.empty_cache()  # faiss allocates beside PyTorch, whose cache still holds training's memory
    config = faiss.GpuIndexFlatConfig()
    config.device = device.index or 0
    return faiss.GpuIndexFlat(faiss.StandardGpuResources(), dim, metric, config)
