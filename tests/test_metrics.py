import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from pcl.metrics import (
    average_precision,
    cluster_agreement,
    knn_accuracy,
    leave_one_out_accuracy,
    one_shot_accuracy,
    topk_accuracy,
)


def test_topk_accuracy_counts_rows():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [5, 4, 0, 1]])
    target = torch.tensor([0, 2, 3])
    assert float(topk_accuracy(logits, target)) == pytest.approx(1 / 3)
    assert float(topk_accuracy(logits, target, k=2)) == pytest.approx(2 / 3)
    assert float(topk_accuracy(logits, target, k=3)) == 1


def test_knn_is_the_weighted_vote():
    known, query = torch.randn(60, 5), torch.randn(40, 5)
    known_label, label = torch.randint(4, (60,)), torch.randint(4, (40,))
    hits = 0
    for q, truth in zip(query, label, strict=True):
        near = sorted(((float(F.cosine_similarity(q, x, dim=0)), int(y)) for x, y in zip(known, known_label, strict=True)))[-7:]
        votes = [sum(math.exp(cosine / 0.1) for cosine, y in near if y == c) for c in range(4)]
        hits += votes.index(max(votes)) == int(truth)
    assert knn_accuracy(known, known_label, query, label, k=7, temperature=0.1) == hits / 40


def test_knn_takes_more_neighbors_than_there_are():
    assert knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), k=50) == 1


@pytest.mark.parametrize("k", [1, 5, 100])
def test_leaving_one_out_is_a_vote_of_all_the_others(k):
    features, label = torch.randn(40, 5), torch.randint(4, (40,))
    features[7] = features[3]  # two images alike: each is the other's nearest neighbor
    hits = sum(
        knn_accuracy(features[others], label[others], features[i : i + 1], label[i : i + 1], k=k)
        for i, others in ((i, torch.arange(40) != i) for i in range(40))
    )
    assert leave_one_out_accuracy(features, label, k=k) == hits / 40


def test_leaving_one_out_does_not_see_the_image_itself():
    twins, label = torch.eye(8).repeat(2, 1), torch.tensor([0] * 8 + [1] * 8)
    assert leave_one_out_accuracy(twins, label, k=1) == 0
    # Here the search does not even find each image among its six nearest ones, all equally near.
    assert leave_one_out_accuracy(torch.eye(8).repeat(30, 1), torch.randint(2, (240,)), k=5) < 0.75


def test_leaving_one_out_asks_about_some_of_many():
    features, label = torch.randn(500, 5), torch.randint(2, (500,))
    few = [leave_one_out_accuracy(features, label, most=50, seed=seed) for seed in (0, 0, 1, 2)]
    assert few[0] == few[1]
    assert len(set(few)) > 1
    assert all((accuracy * 50) % 1 == pytest.approx(0, abs=1e-9) for accuracy in few)


def test_one_shot_is_one_for_separate_classes_and_chance_for_noise():
    centers, label = torch.eye(5), torch.arange(5).repeat(40)
    x = centers[label] + 0.01 * torch.randn(200, 5)
    assert one_shot_accuracy(x, label, x, label) == 1
    noise = torch.randn(200, 5)
    assert one_shot_accuracy(noise[:100], label[:100], noise[100:], label[100:], draws=50) == pytest.approx(0.2, abs=0.05)
    expected = one_shot_accuracy(noise[:100], label[:100], noise[100:], label[100:])
    with torch.autocast("cpu", torch.bfloat16):  # a caller's, which must not round
        assert one_shot_accuracy(noise[:100], label[:100], noise[100:], label[100:]) == expected


X, LABEL = torch.eye(6), torch.arange(6)
WRONG = {
    "k > classes": (lambda: topk_accuracy(X, LABEL, 7), "k"),
    "a target too few": (lambda: topk_accuracy(X, LABEL[:5]), "target"),
    "targets that are no integers": (lambda: topk_accuracy(X, LABEL / 2), "target"),
    "a label too few": (lambda: knn_accuracy(X, LABEL[:5], X, LABEL), "known_label"),
    "other columns": (lambda: knn_accuracy(X, LABEL, X[:, :3], LABEL), "query"),
    "nothing known": (lambda: knn_accuracy(X[:0], LABEL[:0], X, LABEL), "known"),
    "nothing asked": (lambda: knn_accuracy(X, LABEL, X[:0], LABEL[:0]), "query"),
    "no neighbor": (lambda: knn_accuracy(X, LABEL, X, LABEL, k=0), "k"),
    "temperature 0": (lambda: leave_one_out_accuracy(X, LABEL, temperature=0), "temperature"),
    "one image": (lambda: leave_one_out_accuracy(X[:1], LABEL[:1]), "features"),
    "no draw": (lambda: one_shot_accuracy(X, LABEL, X, LABEL, draws=0), "draws"),
    "NaN": (lambda: one_shot_accuracy(X, LABEL, X / 0, LABEL), "query"),
    "an image without label": (lambda: cluster_agreement(LABEL, LABEL[:5]), "label"),
    "no image": (lambda: cluster_agreement(LABEL[:0], LABEL[:0]), "im2cluster"),
    "a score too few": (lambda: average_precision(LABEL, X[0, :5]), "score"),
}


@pytest.mark.parametrize(("call", "name"), WRONG.values(), ids=WRONG)
def test_what_cannot_work_names_the_argument(call, name):
    with pytest.raises((TypeError, ValueError), match=rf"^{name} "):
        call()


def everything(known, known_label, query, label):
    return [
        topk_accuracy(query, label, k=np.int64(2)).item(),
        knn_accuracy(known, known_label, query, label, k=np.int64(3)),
        leave_one_out_accuracy(known, known_label),
        one_shot_accuracy(known, known_label, query, label),
        cluster_agreement(known_label, np.arange(60) % 5),
        average_precision(label, query[:, 0]),
    ]


def test_arrays_and_integers_of_any_type_are_taken():
    known, query, known_label, label = torch.randn(60, 5), torch.randn(40, 5), torch.arange(60) % 4, torch.arange(40) % 4
    expected = everything(known, known_label, query, label)
    bytes_ = [x.numpy().astype(np.uint8) for x in (known_label, label)]
    assert everything(known.requires_grad_(), bytes_[0], query.numpy()[::-1][::-1], bytes_[1]) == expected
    # Labels are names: any integers will do.
    far = known_label - 10**12, label - 10**12
    assert knn_accuracy(known, far[0], query, far[1]) == knn_accuracy(known, known_label, query, label)


@pytest.mark.gpu
def test_labels_may_lie_on_another_device():
    known, query, known_label, label = torch.randn(60, 5), torch.randn(40, 5), torch.arange(60) % 4, torch.arange(40) % 4
    expected = everything(known, known_label, query, label)
    for on_gpu in ((0,), (0, 2), (1,), (3,), (0, 1, 2)):
        arguments = [x.cuda() if i in on_gpu else x for i, x in enumerate((known, known_label, query, label))]
        ours = everything(*arguments)
        assert ours[4] == expected[4]
        assert ours[:4] + ours[5:] == pytest.approx(expected[:4] + expected[5:])


def test_agreement_does_not_depend_on_names():
    label = torch.tensor([0, 0, 1, 1, 2, 2])
    assert cluster_agreement(torch.tensor([5, 5, 3, 3, 9, 9]), label) == pytest.approx({"nmi": 1, "ami": 1, "purity": 1})
    one = cluster_agreement(torch.zeros(6, dtype=torch.long), label)
    assert one == pytest.approx({"nmi": 0, "ami": 0, "purity": 1 / 3})


@pytest.mark.parametrize(("n", "clusters", "labels"), [(60, 5, 4), (500, 200, 10), (300, 2, 290), (40, 1, 1), (40, 40, 40)])
def test_agreement_is_scikit_learn_s(n, clusters, labels):
    im2cluster, label = torch.randint(clusters, (n,)), torch.randint(labels, (n,))
    im2cluster[: n // 2] = label[: n // 2] % clusters
    ours = cluster_agreement(im2cluster, label)
    assert ours["nmi"] == pytest.approx(normalized_mutual_info_score(label, im2cluster), abs=1e-9)
    assert ours["ami"] == pytest.approx(adjusted_mutual_info_score(label, im2cluster), abs=1e-9)
    commonest = [int(label[im2cluster == c].bincount().max()) for c in im2cluster.unique()]
    assert ours["purity"] == pytest.approx(sum(commonest) / n)


def test_agreement_of_each_image_for_itself_is_no_better_than_chance():
    assert cluster_agreement(torch.arange(30), torch.arange(30) % 3)["ami"] == pytest.approx(0, abs=1e-6)


def test_average_precision_is_the_published_one():
    with np.load(GOLDEN / "average_precision.npz") as golden:
        count = sum(key.endswith("/ap") for key in golden)
        assert count > 0
        for i in range(count):
            ours = average_precision(golden[f"{i}/targets"], golden[f"{i}/scores"])
            assert ours == pytest.approx(float(golden[f"{i}/ap"]), abs=1e-9)


def slow_average_precision(target, score):
    """The area, one threshold after the other: the step up in recall times the best precision from there on."""
    curve = []
    for threshold in sorted(set(score), reverse=True):
        taken = [t > 0 for t, s in zip(target, score, strict=True) if s >= threshold]
        curve.append((sum(taken) / sum(t > 0 for t in target), sum(taken) / len(taken)))
    area, before = 0.0, 0.0
    for at, (recall, _) in enumerate(curve):
        area += (recall - before) * max(precision for _, precision in curve[at:])
        before = recall
    return area


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_matches_a_slow_transcription_also_with_ties(levels):
    rng = np.random.default_rng(levels)
    for _ in range(100):
        n = int(rng.integers(1, 40))
        target = rng.choice([1, 0, -1], n)
        target[rng.integers(n)] = 1
        score = rng.integers(levels, size=n) / levels
        ours = average_precision(target, score)
        assert ours == pytest.approx(slow_average_precision(target, score), abs=1e-9)
        order = rng.permutation(n)
        assert ours == pytest.approx(average_precision(target[order], score[order]), abs=1e-12)


def test_average_precision_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no positive"):
        average_precision(np.array([-1, 0]), np.array([0.1, 0.2]))
    with pytest.raises(ValueError, match="finite"):
        average_precision(np.array([1, 0]), np.array([np.nan, 0.2]))


@pytest.mark.parametrize("count", [2, 5, 100])
def test_equal_clusterings_agree_entirely_also_where_each_image_is_one(count):
    found = cluster_agreement(torch.arange(count), torch.arange(count).flip(0))
    assert found == pytest.approx({"nmi": 1, "ami": 1, "purity": 1})


def test_neighbors_at_a_small_temperature_are_the_nearest_ones():
    known, label = torch.randn(40, 8), torch.arange(40) % 4
    for temperature in (0.1, 0.01, 0.001):
        assert knn_accuracy(known, label, known, label, k=20, temperature=temperature) == 1.0
    assert leave_one_out_accuracy(known, label, 20, 1e-4) == leave_one_out_accuracy(known, label, 1)
    with pytest.raises(ValueError, match="features must hold finite numbers"):
        leave_one_out_accuracy(known / 0, label)


@pytest.mark.parametrize(("scale", "dtype"), [(1e-14, torch.float32), (1e17, torch.float32), (1e4, torch.float16)])
def test_the_length_of_features_does_not_matter(scale, dtype):
    features, label = torch.randn(60, 50), torch.arange(60) % 3
    features[:, :3] += 2 * torch.eye(3)[label]
    features[0] = 0
    scores = [
        (knn_accuracy(x, label, x, label, k=5), leave_one_out_accuracy(x, label, k=5), one_shot_accuracy(x, label, x, label))
        for x in (features.to(dtype), features.to(dtype) * scale)
    ]
    assert scores[0] == scores[1]
    assert scores[0][1] < 1
