import faiss
import numpy as np
import pytest
import torch
from conftest import GOLDEN, save_result

from pcl import clustering
from pcl.clustering import Clustering, assign_and_measure, cluster, cluster_all, concentration, nearest_neighbors
from pcl.distributed import shared_map
from pcl.metrics import cluster_agreement


def unit_rows(n, c, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, c)).astype(np.float32)
    return torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_concentration_and_prototypes_are_the_published_ones(number):
    with np.load(GOLDEN / f"concentration_{number}.npz") as golden:
        distance = np.sqrt(golden["squared_distance"])
        ours = concentration(distance, golden["assignment"], len(golden["density"]), float(golden["temperature"]))
        np.testing.assert_allclose(ours, golden["density"], rtol=1e-5)
        described = assign_and_measure(golden["raw_centroids"], golden["raw_centroids"], 0.2)
        np.testing.assert_allclose(described.prototypes, golden["centroids"], atol=1e-6)


def test_concentration_matches_a_plain_loop():
    rng = np.random.default_rng(0)
    distance, im2cluster = rng.random(500), rng.integers(0, 200, 500)
    members = [distance[im2cluster == c] for c in range(200)]
    assert {len(m) for m in members} >= {0, 1, 2}
    slow = np.array([m.mean() / np.log(len(m) + 10) if len(m) > 1 else -1 for m in members])
    slow[slow < 0] = slow.max()
    slow = slow.clip(*np.percentile(slow, [10, 90]))
    ours = concentration(distance, im2cluster, 200, temperature=0.2)
    np.testing.assert_allclose(ours, 0.2 * slow / slow.mean(), rtol=1e-12)


@pytest.mark.parametrize(
    ("distance", "im2cluster", "num_cluster"),
    [
        pytest.param([0.3, 0.4], [0, 1], 2, id="every image alone"),
        pytest.param([0.0, 0.0, 0.0, 0.0], [0, 0, 1, 1], 2, id="only identical images"),
        pytest.param([0.0] * 6 + [0.5, 0.4], [0, 0, 1, 1, 2, 2, 3, 3], 4, id="many clusters of identical images"),
        pytest.param([0.2, 0.1, 0.0], [5, 5, 2], 9, id="mostly empty clusters"),
        pytest.param([0.5], [0], 1, id="one image"),
    ],
)
def test_concentration_is_positive_finite_and_of_the_right_mean_always(distance, im2cluster, num_cluster):
    phi = concentration(torch.tensor(distance), torch.tensor(im2cluster), num_cluster, temperature=0.2)
    assert phi.shape == (num_cluster,)
    assert torch.isfinite(phi).all()
    assert (phi > 0).all()
    assert float(phi.mean()) == pytest.approx(0.2)


@pytest.mark.parametrize(("n", "k"), [(600, 20), (2500, 2)], ids=["all points", "subsampled to 1000 per centroid"])
def test_restarts_run_apart_give_what_faiss_gives_in_one_run(n, k):
    features = unit_rows(n, 8)
    whole = faiss.Clustering(8, k)
    whole.niter, whole.nredo, whole.seed, whole.max_points_per_centroid, whole.min_points_per_centroid = 20, 5, 3, 1000, 10
    index = faiss.IndexFlatL2(8)
    whole.train(features.numpy(), index)
    squared, im2cluster = index.search(features.numpy(), 1)

    ours = cluster(features, k, temperature=0.2, seed=3)

    centroids = faiss.vector_to_array(whole.centroids).reshape(k, 8)
    torch.testing.assert_close(ours.prototypes, torch.nn.functional.normalize(torch.from_numpy(centroids)), rtol=0, atol=0)
    np.testing.assert_array_equal(ours.im2cluster, im2cluster[:, 0])
    expected = concentration(np.sqrt(squared[:, 0]), im2cluster[:, 0], k, 0.2)
    torch.testing.assert_close(ours.concentration, expected, rtol=0, atol=0)


def test_the_restart_with_the_best_objective_wins(monkeypatch):
    objectives = iter([3.0, 1.0, 2.0, 1.0, 4.0])
    monkeypatch.setattr(
        clustering, "kmeans", lambda x, k, seed, restart, *_: (next(objectives), np.full((k, 4), 1 + restart, np.float32))
    )
    seen = []
    monkeypatch.setattr(
        clustering, "assign_and_measure", lambda x, centroids, t, device: seen.append(centroids[0, 0]) or fake()
    )
    cluster(unit_rows(10, 4), 2, 0.2)
    assert seen == [2.0]  # restart 1; restart 3 is as good, but later


def fake():
    return Clustering(torch.zeros(10, dtype=torch.long), torch.ones(2, 4), torch.ones(2))


@pytest.mark.parametrize("k", [99, 100], ids=["N - 1", "N"])
def test_nearly_as_many_clusters_as_images(k):
    result = cluster(unit_rows(100, 8).numpy(), k, temperature=0.2)
    assert torch.isfinite(result.concentration).all()
    assert (result.concentration > 0).all()


def test_identical_images_give_usable_clusters():
    result = cluster(torch.nn.functional.normalize(torch.ones(50, 8)), 5, temperature=0.2)
    assert torch.isfinite(result.concentration).all()
    assert (result.concentration > 0).all()


def test_more_clusters_than_images_and_features_that_are_not_finite_are_errors():
    with pytest.raises(ValueError, match="11 clusters of 10 images"):
        cluster(unit_rows(10, 4), 11, 0.2)
    features = unit_rows(5000, 4)
    for wrong in (torch.nan, -torch.inf):
        features[clustering.permutation(5000, 0)[2000]] = wrong  # k-means does not see it
        with pytest.raises(ValueError, match="features are not finite"):
            cluster(features, 2, 0.2)


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


AS = {
    "a tensor that wants a gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "big-endian": lambda x: x.astype(">f4"),
    "double": lambda x: x.astype(np.float64),
    "long double": lambda x: x.astype(np.longdouble),
    "columns in order": np.asfortranarray,
    "read-only": read_only,
    "a view": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "a list": lambda x: x.tolist(),
    "turned round twice": lambda x: x[::-1].copy()[::-1],
}


@pytest.mark.parametrize("convert", AS.values(), ids=AS)
@pytest.mark.filterwarnings("error")
def test_features_and_numbers_may_be_of_any_type(convert):
    x = unit_rows(60, 8).numpy()
    ours = cluster(convert(x), np.int16(5), np.float32(0.25), seed=np.uint64(3))
    expected = cluster(x, 5, 0.25, seed=3)
    for name in expected.__dataclass_fields__:
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=0, atol=0)


@pytest.mark.parametrize(
    "convert",
    [lambda c: c.astype(">f4"), lambda c: c[::-1].copy()[::-1], lambda c: torch.from_numpy(c).requires_grad_()],
    ids=["big-endian", "turned round twice", "with gradient"],
)
def test_centroids_may_be_of_any_type(convert):
    x = unit_rows(60, 8).numpy()
    ours, expected = assign_and_measure(x, convert(x[:5]), 0.2), assign_and_measure(x, x[:5], 0.2)
    assert torch.equal(ours.prototypes, expected.prototypes)
    assert not ours.prototypes.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool])
def test_features_of_few_bits_are_taken(dtype):
    x = (4 * unit_rows(60, 8)).to(dtype)
    assert torch.equal(cluster(x, 5, 0.2).im2cluster, cluster(x.float(), 5, 0.2).im2cluster)


@pytest.mark.parametrize("seed", [-1, 2**31 - 1, 2**31, 10**30])
def test_seeds_of_any_size_repeat(seed):
    first, second = (cluster(unit_rows(50, 8), 5, 0.2, seed=seed) for _ in range(2))
    assert torch.equal(first.prototypes, second.prototypes)


X = unit_rows(20, 8)
WRONG = {
    "K = 0": (lambda: cluster(X, 0, 0.2), "num_cluster"),
    "K = -1": (lambda: cluster(X, -1, 0.2), "num_cluster"),
    "K = 7.5": (lambda: cluster(X, 7.5, 0.2), "num_cluster"),
    "K = True": (lambda: cluster(X, True, 0.2), "num_cluster"),
    "a fraction for a seed": (lambda: cluster(X, 5, 0.2, seed=0.5), "seed"),
    "one dimension": (lambda: cluster(X[0], 5, 0.2), "features"),
    "three dimensions": (lambda: cluster(X[None], 5, 0.2), "features"),
    "no row": (lambda: cluster(X[:0], 5, 0.2), "features"),
    "no column": (lambda: cluster(X[:, :0], 5, 0.2), "features"),
    "complex numbers": (lambda: cluster(X.numpy() + 1j, 5, 0.2), "features"),
    "words": (lambda: cluster([["a", "b"]], 1, 0.2), "features"),
    "rows of several lengths": (lambda: cluster([[1], [1, 2]], 1, 0.2), "features"),
    "a sparse tensor": (lambda: cluster(X.to_sparse(), 5, 0.2), "features"),
    "temperature 0": (lambda: cluster(X, 5, 0), "temperature"),
    "numbers too large": (lambda: cluster(X.double() * 1e200, 5, 0.2), "features"),
    "no temperature": (lambda: cluster(X, 5, None), "temperature"),
    "temperature NaN": (lambda: cluster(X, 5, float("nan")), "temperature"),
    "a seed too few": (lambda: cluster_all(X, [5, 6], 0.2, seeds=[1]), "seeds"),
    "super in few dimensions": (lambda: cluster_all(X, [5], 0.2, algorithm="super"), "algorithm"),
    "another algorithm": (lambda: clustering.kmeans(X.numpy(), 5, 0, algorithm="best"), "algorithm"),
    "kmeans, K > N": (lambda: clustering.kmeans(X.numpy(), 21, 0), "num_cluster"),
    "centroids of other columns": (lambda: clustering.nearest_centroids(X, X[:, :4]), "centroids"),
    "no centroid": (lambda: clustering.nearest_centroids(X, X[:0]), "centroids"),
    "centroids that are no numbers": (lambda: assign_and_measure(X, X / 0, 0.2), "centroids"),
    "queries of other columns": (lambda: nearest_neighbors(X, X[:, :4], 1), "query"),
    "more neighbors than rows": (lambda: nearest_neighbors(X, X, 21), "k"),
    "no neighbor": (lambda: nearest_neighbors(X, X, 0), "k"),
    "alpha a word": (lambda: concentration([0.1, 0.2], [0, 1], 2, 0.2, alpha="ten"), "alpha"),
    "a distance too few": (lambda: concentration([0.1], [0, 1], 2, 0.2), "im2cluster"),
    "a cluster beyond K": (lambda: concentration([0.1, 0.2], [0, 2], 2, 0.2), "im2cluster"),
    "a cluster below 0": (lambda: concentration([0.1, 0.2], [0, -1], 2, 0.2), "im2cluster"),
    "a cluster and a half": (lambda: concentration([0.1, 0.2], [0, 1.5], 2, 0.2), "im2cluster"),
    "a distance NaN": (lambda: concentration([0.1, np.nan], [0, 1], 2, 0.2), "distance"),
    "alpha -1": (lambda: concentration([0.1, 0.2], [0, 1], 2, 0.2, alpha=-1), "alpha"),
}


@pytest.mark.parametrize(("call", "name"), WRONG.values(), ids=WRONG)
def test_what_cannot_work_names_the_argument(call, name):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}"):
        call()


def offset(kind, spread):
    """Twenty groups in 64 dimensions, far from the origin: rows, and the same less their mean."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 30)
    x = spread * (rng.normal(size=(20, 64))[groups] + 0.2 * rng.normal(size=(600, 64)))
    far = x + (rng.normal(0, kind, 64) if spread == 1 else kind)
    return far if spread < 1e-3 else far.astype(np.float32), x, groups


@pytest.mark.parametrize(
    ("mean", "spread"), [(100, 0.1), (3000, 1), (1e5, 1), (1, 1e-9), (1e3, 1e-6), (0, 1e-25), (0, 1e25), (1e25, 1e22)]
)
def test_clusters_do_not_depend_on_a_shift_or_a_scale(mean, spread):
    far, near, groups = offset(mean, spread)
    ours = cluster(far, 20, 0.2)
    expected = cluster(near / spread, 20, 0.2)
    assert cluster_agreement(ours.im2cluster, groups)["ami"] > cluster_agreement(expected.im2cluster, groups)["ami"] - 0.05
    means = np.stack([far[ours.im2cluster == c].mean(axis=0, dtype=np.float64) for c in range(20)])
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    torch.testing.assert_close(ours.prototypes.numpy(), unit.astype(np.float32), rtol=0, atol=1e-3)
    assert float(ours.concentration.mean()) == pytest.approx(0.2)


def test_rows_of_unit_length_are_not_shifted_however_close_they_are():
    features = torch.nn.functional.normalize(torch.ones(50, 8) + 0.01 * unit_rows(50, 8))
    assert clustering.held_by_float32(features)[0] is features
    points = 3 * unit_rows(50, 8)
    assert clustering.held_by_float32(points)[0] is points


def test_num_used_counts_up_to_the_largest_id_with_an_image():
    assert Clustering(torch.tensor([0, 4, 2]), torch.ones(9, 3), torch.ones(9)).num_used == 5


def cluster_together(device, args, plan):
    features = unit_rows(700, 8)
    shared = cluster_all(features, [10, 40, 25], 0.2, share=shared_map)
    clustering.MANY_RANKS = 2
    many = cluster_all(features, [10, 40, 25], 0.2, share=shared_map)
    shared += many + cluster_all(features, [10], 0.2)  # alone, each rank for itself
    save_result(args, **{f"{name}{j}": getattr(c, name) for j, c in enumerate(shared) for name in c.__dataclass_fields__})


@pytest.mark.dist
def test_clusterings_are_the_same_for_one_and_two_ranks(two_ranks):
    alone = cluster_all(unit_rows(700, 8), [10, 40, 25], 0.2)
    for result in two_ranks(cluster_together):
        for j, expected in [*enumerate(alone), (6, alone[0])]:
            for name in expected.__dataclass_fields__:
                torch.testing.assert_close(result[f"{name}{j}"], getattr(expected, name), rtol=0, atol=0)
        for j, expected in enumerate(alone, start=3):  # where many ranks share each restart
            assert torch.equal(result[f"im2cluster{j}"], expected.im2cluster)
            torch.testing.assert_close(result[f"prototypes{j}"], expected.prototypes)
            torch.testing.assert_close(result[f"concentration{j}"], expected.concentration)


def test_nearest_neighbors_are_those_of_largest_inner_product():
    known, query = torch.randn(50, 6), torch.randn(9, 6)
    product, row = nearest_neighbors(known, query.numpy(), 4)
    expected = (query @ known.T).topk(4, dim=1)
    assert torch.equal(row, expected.indices)
    torch.testing.assert_close(product, expected.values)


def test_the_pruned_search_reaches_the_same_objective():
    features = unit_rows(3000, 32).numpy()
    plain, _ = clustering.kmeans(features, 60, seed=0)
    pruned, centroids = clustering.kmeans(features, 60, seed=0, algorithm="super")
    assert pruned == pytest.approx(plain, rel=1e-2)
    nearest = np.square(features[:, None] - centroids[None]).sum(axis=2).min(axis=1).sum()
    assert pruned == pytest.approx(float(nearest), rel=1e-2)


def test_a_clustering_is_saved_and_opened_safely(tmp_path):
    found = clustering.cluster(torch.randn(40, 8), 5, temperature=0.2)
    assert found.num_used == 5  # is kept with it
    torch.save({"clusterings": [found]}, tmp_path / "c.pth")
    (opened,) = torch.load(tmp_path / "c.pth", weights_only=True)["clusterings"]
    for name in ("im2cluster", "prototypes", "concentration"):
        assert torch.equal(getattr(opened, name), getattr(found, name))


def test_the_seed_of_a_granularity_is_its_position():
    features = unit_rows(300, 8)
    for position, found in enumerate(cluster_all(features, [20, 20], 0.2)):
        assert torch.equal(found.prototypes, cluster(features, 20, 0.2, seed=position).prototypes)
