import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pcl.clustering import Clustering, cluster
from pcl.losses import instance_logits, prototype_logits, prototype_loss, sample_negatives


def unit(*shape, dim):
    return F.normalize(torch.randn(*shape), dim=dim)


def random_clustering(n, k, c):
    return Clustering(torch.randint(k, (n,)), unit(k, c, dim=1), 0.1 + torch.rand(k))


def test_info_nce_is_the_paper_s_formula():
    q, k, queue, tau = unit(4, 8, dim=1), unit(4, 8, dim=1), unit(8, 10, dim=0), 0.2
    logits, target = instance_logits(q, k, queue, tau)
    slow = 0.0
    for i in range(4):
        own = math.exp(float(q[i] @ k[i]) / tau)
        others = sum(math.exp(float(q[i] @ queue[:, j]) / tau) for j in range(10))
        slow -= math.log(own / (own + others)) / 4
    assert logits.shape == (4, 11)
    assert float(F.cross_entropy(logits, target)) == pytest.approx(slow, rel=1e-5)


def test_prototype_term_is_the_paper_s_formula_with_the_batch_s_prototypes_among_the_negatives():
    clustering = random_clustering(20, 12, 8)
    q, index = unit(4, 8, dim=1), torch.tensor([3, 7, 7, 19])  # an image that stands there twice keeps two columns
    positive = clustering.im2cluster[index]
    negative = sample_negatives(positive, 12, 5)
    logits, target = prototype_logits(q, positive, negative, clustering)
    slow = 0.0
    for i in range(4):
        columns = [*positive.tolist(), *negative.tolist()]
        exponents = [math.exp(float(q[i] @ clustering.prototypes[c]) / float(clustering.concentration[c])) for c in columns]
        slow -= math.log(exponents[i] / sum(exponents)) / 4
    assert logits.shape == (4, 4 + 5)
    assert float(F.cross_entropy(logits, target)) == pytest.approx(slow, rel=1e-5)


def test_with_duplicates_masked_an_image_s_own_prototype_is_no_negative_of_it():
    clustering = random_clustering(20, 30, 8)
    clustering.im2cluster[:4] = torch.tensor([5, 2, 5, 5])
    q, index, negative = unit(4, 8, dim=1), torch.arange(4), torch.tensor([7, 29])
    positive = clustering.im2cluster[index]
    logits, target = prototype_logits(q, positive, negative, clustering, mask_duplicates=True)
    slow = 0.0
    for i in range(4):

        def exponent(c, i=i):
            return math.exp(float(q[i] @ clustering.prototypes[c]) / float(clustering.concentration[c]))

        own = int(positive[i])
        others = [c for c in [*positive.tolist(), *negative.tolist()] if c != own]
        slow -= math.log(exponent(own) / (exponent(own) + sum(map(exponent, others)))) / 4
    assert float(F.cross_entropy(logits, target)) == pytest.approx(slow, rel=1e-5)

    ours, accuracy = prototype_loss(q.requires_grad_(), index, [clustering] * 2, r=100, mask_duplicates=True)
    negative = sample_negatives(positive, clustering.num_used, 100)
    logits, target = prototype_logits(q, positive, negative, clustering, mask_duplicates=True)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target))
    torch.testing.assert_close(accuracy, (logits.argmax(dim=1) == target).float().mean())
    assert ours < prototype_loss(q, index, [clustering] * 2, r=100)[0]
    ours.backward()
    assert q.grad.isfinite().all()


def test_prototype_loss_is_the_mean_over_granularities():
    clusterings = [random_clustering(20, k, 8) for k in (6, 9)]  # r is larger: no randomness left but the order
    q, index = unit(4, 8, dim=1).requires_grad_(), torch.tensor([0, 5, 10, 15])
    loss, accuracy = prototype_loss(q, index, clusterings, r=100)
    terms, hits = [], []
    for clustering in clusterings:
        positive = clustering.im2cluster[index]
        logits, target = prototype_logits(q, positive, sample_negatives(positive, clustering.num_used, 100), clustering)
        terms.append(F.cross_entropy(logits, target))
        hits.append((logits.argmax(1) == target).float().mean())
    torch.testing.assert_close(loss, (terms[0] + terms[1]) / 2)
    torch.testing.assert_close(accuracy, (hits[0] + hits[1]) / 2)
    loss.backward()
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize(("num_prototypes", "r"), [(50, 10), (50, 47), (50, 48), (50, 200), (4, 3)])
def test_negatives_are_distinct_and_no_image_s_own(num_prototypes, r):
    positive = torch.tensor([3, 1, 3])
    negative = sample_negatives(positive, num_prototypes, r)
    assert len(negative) == len(negative.unique()) == min(r, num_prototypes - 2)
    assert not set(negative.tolist()) & {1, 3}
    assert set(negative.tolist()) <= set(range(num_prototypes))


def test_there_may_be_no_negative_left():
    assert len(sample_negatives(torch.tensor([0, 1]), 2, 5)) == 0


Q, INDEX = torch.eye(4, 8), torch.arange(4)
WRONG = {
    "keys of other rows": (lambda: instance_logits(Q, Q[:1], torch.eye(8), 0.2), "k"),
    "a queue lying down": (lambda: instance_logits(Q, Q, torch.eye(7, 8), 0.2), "queue"),
    "temperature 0": (lambda: instance_logits(Q, Q, torch.eye(8), 0), "temperature"),
    "no prototype": (lambda: sample_negatives(INDEX, 0, 3), "num_prototypes"),
    "r = -1": (lambda: sample_negatives(INDEX, 9, -1), "r"),
    "a positive beyond": (lambda: sample_negatives(INDEX, 3, 3), "positive"),
    "positives too few": (lambda: prototype_logits(Q, INDEX[:3], INDEX, random_clustering(9, 5, 8)), "positive"),
    "negatives that are no integers": (lambda: prototype_logits(Q, INDEX, Q[0], random_clustering(9, 5, 8)), "negative"),
    "prototypes of other columns": (lambda: prototype_loss(Q, INDEX, [random_clustering(9, 5, 7)], 3), "prototypes"),
    "indices too few": (lambda: prototype_loss(Q, INDEX[:3], [random_clustering(9, 5, 8)], 3), "index"),
    "an index beyond": (lambda: prototype_loss(Q, INDEX, [random_clustering(3, 5, 8)], 3), "index"),
    "no clustering": (lambda: prototype_loss(Q, INDEX, [], 3), "clusterings"),
    "r = 2.5": (lambda: prototype_loss(Q, INDEX, [random_clustering(9, 5, 8)], 2.5), "r"),
}


@pytest.mark.parametrize(("call", "name"), WRONG.values(), ids=WRONG)
def test_what_cannot_work_names_the_argument(call, name):
    with pytest.raises((TypeError, ValueError), match=rf"^{name} "):
        call()


@pytest.mark.gpu
def test_a_clustering_may_lie_on_another_device():
    clustering, q = random_clustering(9, 5, 8), unit(4, 8, dim=1)
    expected, _ = prototype_loss(q, INDEX, [clustering], 100)
    for device, others in (("cuda", "cpu"), ("cpu", "cuda")):
        ours, _ = prototype_loss(q.to(device), INDEX.to(others), [clustering.to(others)], np.int64(100))
        torch.testing.assert_close(ours.cpu(), expected)


def test_negatives_are_drawn_evenly():
    drawn = Counter(i for _ in range(4000) for i in sample_negatives(torch.tensor([0]), 9, 2).tolist())
    for i in range(1, 9):  # binomial(4000, 1/4): standard deviation 27
        assert abs(drawn[i] - 1000) < 5 * 27


@pytest.mark.parametrize(("k", "r"), [(12, 3), (12, 9), (12, 11), (12, 12), (12, 50)])
def test_prototype_loss_counts_only_true_negatives(k, r):
    clustering = Clustering(torch.arange(k), unit(k, 8, dim=1), 0.1 + torch.rand(k))
    q, index = unit(4, 8, dim=1), torch.tensor([3, 7, 7, 1])
    torch.manual_seed(1)
    ours, _ = prototype_loss(q, index, [clustering], r)
    torch.manual_seed(1)
    negative = sample_negatives(index, k, r)
    assert len(negative) == min(r, k - 3)
    logits, target = prototype_logits(q, index, negative, clustering)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [400, 30], ids=["many prototypes", "fewer than r"])
def test_the_losses_do_not_wait_for_the_gpu(k):
    clustering = random_clustering(500, k, 8).to("cuda")
    clustering.num_used  # noqa: B018 - once an epoch
    q, k, queue = (t.cuda() for t in (unit(16, 8, dim=1), unit(16, 8, dim=1), unit(8, 64, dim=0)))
    index = torch.arange(16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = F.cross_entropy(*instance_logits(q.requires_grad_(), k, queue, 0.2))
        (loss + prototype_loss(q, index, [clustering], r=64, mask_duplicates=True)[0]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_clustering_will_do_and_queries_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(40, 8, generator=generator), dim=1)
    found, index = cluster(rows, 5, temperature=0.2), torch.arange(6)
    losses = []
    for clusterings, q in ((found, rows[:6]), ([found], rows[:6]), (found, rows[:6].bfloat16())):
        torch.manual_seed(0)
        losses.append(prototype_loss(q, index, clusterings, r=2)[0])
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[0], rtol=0.05, atol=0)
    assert losses[2].dtype == torch.float32


def test_numbers_that_cannot_be_right_are_named():
    clustering, q, index = random_clustering(20, 6, 8), unit(4, 8, dim=1), torch.tensor([0, 5, 10, 15])
    with pytest.raises(ValueError, match="negative must hold numbers from 0 to 5"):
        prototype_logits(q, clustering.im2cluster[index], torch.tensor([6]), clustering)
    for temperature in ("x", 10**400, -1):
        with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
            instance_logits(q, q, unit(8, 5, dim=0), temperature)
    several = prototype_loss(q, index, (c for c in [clustering]), 100)[0]
    torch.testing.assert_close(several, prototype_loss(q, index, clustering, 100)[0])


def test_negatives_are_drawn_evenly_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        drawn = torch.cat([sample_negatives(torch.tensor([0]), 100_000, 16) for _ in range(200)])
    finally:
        torch.set_default_dtype(torch.float32)
    counts = torch.bincount(drawn // 10_000, minlength=10)
    assert counts.max() < 2 * counts.min()
