from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save_result

from pcl import sharded
from pcl.clustering import RESTARTS, cluster_all, concentration, kmeans
from pcl.distributed import get_rank, get_world_size
from pcl.sharded import assign, assign_in_tiles, cluster_all_sharded, kmeans_sharded


def unit_rows(n, c, groups=12):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(groups, c))[rng.integers(groups, size=n)] + 0.6 * rng.normal(size=(n, c))
    return F.normalize(torch.from_numpy(rows).float(), dim=1)


@pytest.mark.parametrize(
    ("n", "k", "most"), [(600, 20, 1000), (600, 20, 25), (30, 30, 1000)], ids=["all", "subsample", "K = N"]
)
def test_each_restart_is_faiss_s(n, k, most, monkeypatch):
    monkeypatch.setattr("pcl.clustering.MAX_POINTS", most)
    features = unit_rows(n, 8)
    for restart in range(RESTARTS):
        objective, centroids = kmeans_sharded(features, n, k, seed=3, restart=restart)
        expected, expected_centroids = kmeans(features.numpy(), k, 3, restart)
        assert objective == pytest.approx(expected, rel=1e-4, abs=1e-4)
        if k < n:
            torch.testing.assert_close(centroids, torch.from_numpy(expected_centroids), rtol=0, atol=1e-3)


def test_clusterings_are_those_of_one_device():
    features = unit_rows(500, 8)
    for ours, theirs in zip(
        cluster_all_sharded(features, 500, [10, 40], 0.2), cluster_all(features, [10, 40], 0.2), strict=True
    ):
        assert (ours.im2cluster == theirs.im2cluster).float().mean() > 0.99
        torch.testing.assert_close(ours.prototypes, theirs.prototypes, rtol=0, atol=1e-2)
        torch.testing.assert_close(ours.concentration, theirs.concentration, rtol=1e-2, atol=1e-3)
        assert ours.prototypes.norm(dim=1).sub(1).abs().max() < 1e-5


def test_what_other_threads_print_meanwhile_is_not_lost(monkeypatch, capsys):
    search = sharded.assign
    monkeypatch.setattr(sharded, "assign", lambda *arguments: print("stopped") or search(*arguments))
    kmeans_sharded(unit_rows(50, 8), 50, 5, seed=0)
    assert set(capsys.readouterr().out.splitlines()) == {"stopped"}


def crowded():
    """280 copies of one row and 20 others: most of the centroids that are drawn are the same, and all but one run empty."""
    return torch.cat([F.normalize(torch.ones(1, 6), dim=1).repeat(280, 1), unit_rows(20, 6)])


@pytest.mark.parametrize("filled", [True, False])
def test_an_empty_cluster_is_filled(monkeypatch, filled):
    if not filled:
        monkeypatch.setitem(sharded.kmeans.__globals__, "reassign_centroids", lambda *_: 0)
    (clustering,) = cluster_all_sharded(crowded(), 300, [15], 0.2)
    used = len(clustering.im2cluster.unique())
    assert used >= 10 if filled else used < 8
    assert clustering.concentration.isfinite().all()
    assert (clustering.concentration > 0).all()


def test_equal_granularities_are_told_apart():
    features = unit_rows(200, 8)
    first, second = cluster_all_sharded(features, 200, [20, 20], 0.2, seeds=[0, 7])
    for ours, seed in ((first, 0), (second, 7)):
        (expected,) = cluster_all(features, [20], 0.2, seeds=[seed])
        assert (ours.im2cluster == expected.im2cluster).float().mean() > 0.95
    assert not torch.equal(first.im2cluster, second.im2cluster)


@pytest.mark.parametrize("tile", [(7, 5), (64, 1000), (1000, 9)])
def test_tiles_find_the_nearest_centroid(tile):
    features, centroids = unit_rows(150, 6), 0.9 * unit_rows(40, 6)
    squared, nearest = assign_in_tiles(features, centroids, tile)
    expected = torch.cdist(features.double(), centroids.double()).square().min(dim=1)
    assert torch.equal(nearest, expected.indices)
    torch.testing.assert_close(squared, expected.values.float(), rtol=1e-5, atol=1e-6)
    for ours, faiss_s in zip((squared, nearest), assign(features, centroids), strict=True):
        torch.testing.assert_close(ours, faiss_s, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # a caller's, which must not round
        assert torch.equal(assign_in_tiles(features, centroids, tile)[1], nearest)


@pytest.mark.parametrize(("features", "k"), [(unit_rows(10, 4), 11), (torch.full((10, 4), torch.nan), 2)])
def test_what_cannot_be_clustered_is_an_error(features, k):
    with pytest.raises(ValueError, match=r"11 clusters of 10|not finite"):
        cluster_all_sharded(features, 10, [k], 0.2)


def test_a_shift_changes_no_cluster():
    features = unit_rows(200, 8).double()
    (near,), (far,) = (cluster_all_sharded(rows, 200, [12], 0.2) for rows in (features, features + 1e7))
    assert (near.im2cluster == far.im2cluster).float().mean() > 0.95
    torch.testing.assert_close(far.prototypes, torch.full((12, 8), 8**-0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("options", "name"), [
    ((unit_rows(20, 8), 30, [5], 0.2), "num_images"),
    ((unit_rows(20, 8)[0], 20, [5], 0.2), "features"),
    ((unit_rows(20, 8), 20, [0], 0.2), "num_clusters"),
    ((unit_rows(20, 8), 20, [5], -1), "temperature"),
    ((unit_rows(20, 8), 20, [5], 0.2, [1, 2]), "seeds"),
])  # fmt: skip
def test_what_cannot_work_names_the_argument(options, name):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}"):
        cluster_all_sharded(*options)


def test_where_faiss_cannot_use_the_gpu_products_find_as_good_clusters(monkeypatch):
    features = unit_rows(2000, 16)

    def objective():
        (found,) = cluster_all(features, [40], 0.2)
        return sum(float((rows - rows.mean(0)).square().sum()) for c in range(40) for rows in [features[found.im2cluster == c]])

    expected = objective()
    monkeypatch.setattr("pcl.clustering.faiss_lacks", lambda device: True)
    monkeypatch.setattr(sharded, "assign", lambda features, centroids, tf32: assign_in_tiles(features, centroids, (64, 16)))
    monkeypatch.setattr("pcl.clustering.kmeans", lambda *_: pytest.fail("faiss's k-means"))
    assert objective() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("caller", ["nobody", "an old name", "a new name"])
def test_a_gpu_rounds_to_tf32_only_where_asked_whatever_the_caller_has_set(monkeypatch, caller, tf32):
    matmul, seen = torch.backends.cuda.matmul, []
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    default = getattr(matmul, name)
    monkeypatch.setattr(sharded, "assign_in_tiles", lambda *_: seen.append(getattr(matmul, name)))
    try:
        if caller == "an old name":
            matmul.allow_tf32 = True
        elif caller == "a new name" and name == "fp32_precision":
            matmul.fp32_precision = "tf32"
        before = getattr(matmul, name)
        assign(Namespace(device=torch.device("cuda")), None, tf32)
        assert seen == [{"fp32_precision": "tf32" if tf32 else "ieee", "allow_tf32": tf32}[name]]
        assert getattr(matmul, name) == before
    finally:
        matmul.allow_tf32 = False
        setattr(matmul, name, default)


def cluster_share(device, args, plan):
    with pytest.raises(ValueError, match=r"^num_images"):  # on both ranks; otherwise one would wait for ever
        cluster_all_sharded(unit_rows(30, 8)[: 16 - 2 * get_rank()], 30, [5], 0.2)
    features = unit_rows(301, 8)[get_rank() :: get_world_size()]  # two ranks do not divide them
    (clustering,) = cluster_all_sharded(features, 301, [15], 0.2)
    objective, _ = kmeans_sharded(features, 301, 15, seed=1)
    save_result(args, im2cluster=clustering.im2cluster, prototypes=clustering.prototypes, phi=clustering.concentration,
                objective=torch.tensor(objective), held=torch.tensor(len(features)))  # fmt: skip


@pytest.mark.dist
def test_two_ranks_cluster_as_one(two_ranks):
    results = two_ranks(cluster_share)
    assert [int(result["held"]) for result in results] == [151, 150]
    features = unit_rows(301, 8)
    (alone,) = cluster_all_sharded(features, 301, [15], 0.2)
    for result in results:
        assert torch.equal(result["im2cluster"], alone.im2cluster)
        torch.testing.assert_close(result["prototypes"], alone.prototypes, rtol=0, atol=1e-5)
        torch.testing.assert_close(result["phi"], alone.concentration, rtol=1e-4, atol=1e-5)
        assert float(result["objective"]) == pytest.approx(kmeans_sharded(features, 301, 15, seed=1)[0], rel=1e-5)
    # The concentration is that of all images, measured slowly.
    raw = torch.stack([features[alone.im2cluster == c].mean(0) for c in range(15)])
    distance = (features - raw[alone.im2cluster]).norm(dim=1)
    torch.testing.assert_close(results[0]["phi"], concentration(distance, alone.im2cluster, 15, 0.2), rtol=0.02, atol=0.002)


@pytest.mark.gpu
def test_a_gpu_describes_the_same_clusters():
    features = unit_rows(3000, 16)
    ours, theirs = (cluster_all_sharded(rows, 3000, [30], 0.2)[0] for rows in (features.cuda(), features))
    assert ours.prototypes.device == features.cuda().device
    assert (ours.im2cluster.cpu() == theirs.im2cluster).float().mean() > 0.9
    torch.testing.assert_close(ours.concentration.cpu().sort().values, theirs.concentration.sort().values, rtol=0.1, atol=0.02)


@pytest.mark.gpu
def test_a_gpu_finds_the_same_centroids():
    features = unit_rows(3000, 16)
    objective, _ = kmeans_sharded(features.cuda(), 3000, 50, seed=0)
    assert objective == pytest.approx(kmeans_sharded(features, 3000, 50, seed=0)[0], rel=1e-3)
    rough, _ = kmeans_sharded(features.cuda(), 3000, 50, seed=0, tf32=True)
    assert rough == pytest.approx(objective, rel=1e-2)
