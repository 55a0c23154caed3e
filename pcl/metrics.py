"""Figures of merit: top-k accuracy, nearest neighbours, few labels, agreement of clusters and labels, average precision.

Letters: B batch, N images with known labels, Q images to classify, C features, k neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pcl.checks import above_zero, integer, tensors
from pcl.clustering import nearest_neighbours


def topk_accuracy(logits: Tensor, target: Tensor, k: int = 1) -> Tensor:
    """Share of rows of (B, classes) logits whose target (B,) is among the k largest; a scalar in 0..1 on their device."""
    logits, target = tensors(logits=(logits, "B classes"), target=(target, "int B"))
    k = integer("k", k, 1, logits.shape[1])
    return (logits.topk(k, dim=1).indices == target[:, None]).any(dim=1).float().mean()


def knn_accuracy(
    known: Tensor, known_label: Tensor, query: Tensor, label: Tensor, k: int = 20, temperature: float = 0.1
) -> float:
    """Share of queries that the weighted vote of the k nearest known images classifies rightly.

    Each neighbour votes exp(cosine / temperature) for its label (Wu et al. 2018, section 3.4).

    Args:
        known: (N, C) features, of any length.
        known_label: (N,) integer.
        query: (Q, C) features.
        label: (Q,) integer.
        k: neighbours; all known images if there are fewer.
        temperature: small ones listen to the nearest alone.

    Raises:
        TypeError, ValueError: an argument that cannot be right, as in all functions here.
    """
    known, known_label, query, label = _labelled(known, known_label, query, label)
    k, temperature = min(integer("k", k, least=1), len(known)), above_zero("temperature", temperature)
    cosine, near = nearest_neighbours(known, query, k, known.device)  # (Q, k)
    return _share_of_right_votes((cosine / temperature).exp(), known_label.cpu()[near], label.cpu())


def leave_one_out_accuracy(
    features: Tensor, label: Tensor, k: int = 20, temperature: float = 0.1, most: int = 20_000, seed: int = 0
) -> float:
    """`knn_accuracy` of images among all the others: each is classified by its neighbours, itself left out.

    Args:
        features: (N, C), of any length; N is at least 2.
        label: (N,) integer.
        k, temperature: as for `knn_accuracy`.
        most: images to classify; of more, that many are drawn.
        seed: of that choice.
    """
    features, label = tensors(features=(features, "N C"), label=(label, "int N"))
    k, most, temperature = integer("k", k, 1), integer("most", most, 1), above_zero("temperature", temperature)
    if len(features) < 2:
        raise ValueError("features holds one image; there are no others to classify it by")
    features = F.normalize(features.detach(), dim=1)
    chosen = torch.from_numpy(np.random.default_rng(integer("seed", seed)).permutation(len(features))[:most])  # (Q,)
    # One more neighbour, since an image is its own nearest one (or one of several that are equal to it).
    count = min(k + 1, len(features))
    cosine, near = nearest_neighbours(features, features[chosen.to(features.device)], count, features.device)
    weight = (cosine / temperature).exp()  # (Q, k + 1)
    itself = near == chosen[:, None]
    weight[itself] = 0
    if count > k:
        weight[~itself.any(dim=1), -1] = 0
    label = label.cpu()
    return _share_of_right_votes(weight, label[near], label[chosen])


def _labelled(known: Tensor, known_label: Tensor, query: Tensor, label: Tensor) -> list[Tensor]:
    """Checked, on one device, the features (N, C) and (Q, C) of unit length."""
    known, known_label, query, label = tensors(
        known=(known, "N C"), known_label=(known_label, "int N"), query=(query, "Q C"), label=(label, "int Q")
    )
    for name, rows in (("known", known), ("query", query)):
        if not rows.isfinite().all():
            raise ValueError(f"{name} must hold finite numbers")
    return [F.normalize(known.detach(), dim=1), known_label, F.normalize(query.detach(), dim=1), label]


def _share_of_right_votes(weight: Tensor, voted: Tensor, truth: Tensor) -> float:
    """Each row's (Q, k) weights go to the labels (Q, k); the heaviest label is compared with the truth (Q,)."""
    labels, code = torch.cat([voted.flatten(), truth]).unique(return_inverse=True)  # labels may be any integers
    voted, truth, classes = code[: -len(truth)].view_as(voted), code[-len(truth) :], len(labels)
    hits = 0
    for w, v, t in zip(weight.split(1024), voted.split(1024), truth.split(1024), strict=True):
        votes = w.new_zeros(len(w), classes).scatter_add_(1, v, w)
        hits += int((votes.argmax(dim=1) == t).sum())
    return hits / len(truth)


def one_shot_accuracy(
    known: Tensor, known_label: Tensor, query: Tensor, label: Tensor, draws: int = 20, seed: int = 0
) -> float:
    """Mean share of queries nearest (by cosine) to the one known image of their class, over random choices of those.

    Args:
        known, known_label, query, label: as for `knn_accuracy`.
        draws: how often one image of each class is chosen.
        seed: of the choices.
    """
    known, known_label, query, label = _labelled(known, known_label, query, label)
    draws = integer("draws", draws, least=1)
    generator = torch.Generator().manual_seed(integer("seed", seed, -(2**63), 2**64 - 1))
    classes = known_label.unique()
    accuracy = []
    for _ in range(draws):
        members = [(known_label == c).nonzero()[:, 0] for c in classes]
        chosen = torch.stack([m[torch.randint(len(m), (), generator=generator)] for m in members])
        nearest = (query @ known[chosen].T).argmax(dim=1)  # (Q,)
        accuracy.append((classes[nearest] == label).float().mean())
    return float(torch.stack(accuracy).mean())


def cluster_agreement(im2cluster: Tensor | np.ndarray, label: Tensor | np.ndarray) -> dict[str, float]:
    """How far clusters and labels, both (N,) integer, say the same.

    Returns:
        nmi: normalised mutual information (arithmetic mean), 0 to 1; many small clusters raise it by chance alone.
        ami: adjusted for that: 1 if the same, 0 on average for clusters drawn at random (Vinh et al. 2010).
        purity: share of images that have the commonest label of their cluster.
    """
    from sklearn.metrics.cluster import contingency_matrix, mutual_info_score  # slow to import

    im2cluster, label = tensors(im2cluster=(im2cluster, "int N"), label=(label, "int N"))
    table = contingency_matrix(im2cluster.cpu(), label.cpu(), sparse=True)
    size, shown = np.asarray(table.sum(axis=1)).ravel(), np.asarray(table.sum(axis=0)).ravel()
    purity = float(table.max(axis=1).sum() / table.sum())
    if len(size) == len(shown) == 1:
        return {"nmi": 1.0, "ami": 1.0, "purity": purity}
    mutual = mutual_info_score(None, None, contingency=table)
    entropy = [-float(np.sum(p * np.log(p))) for p in (size / size.sum(), shown / shown.sum())]
    mean, chance = np.mean(entropy), _expected_mutual_information(size, shown)
    tiny = np.finfo(float).eps  # where each image is a cluster of its own, chance reaches the mean
    return {"nmi": float(mutual / mean), "ami": float((mutual - chance) / max(mean - chance, tiny)), "purity": purity}


def _expected_mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Of two random labellings with groups of sizes a and b (Vinh et al. 2010, equation 24a).

    scikit-learn's takes a step for each pair of groups: hours for 100,000 clusters and as many. Groups of one size
    have one term, so that a pair of distinct sizes is enough.
    """
    from scipy.special import gammaln

    total = int(a.sum())
    (size_a, times_a), (size_b, times_b) = (np.unique(sizes, return_counts=True) for sizes in (a, b))
    if len(size_a) > len(size_b):
        size_a, times_a, size_b, times_b = size_b, times_b, size_a, times_a
    expected = 0.0
    for x, times in zip(size_a, times_a, strict=True):
        y = size_b[:, None]  # (sizes, 1)
        shared = np.arange(1, min(x, size_b[-1]) + 1)  # images in both groups
        possible = (shared <= y) & (shared >= x + y - total)  # (sizes, min(x, y))
        row, column = np.nonzero(possible)
        y, n = size_b[row], shared[column]
        log_probability = (
            gammaln(x + 1) + gammaln(total - x + 1) + gammaln(y + 1) + gammaln(total - y + 1) - gammaln(total + 1)
            - gammaln(n + 1) - gammaln(x - n + 1) - gammaln(y - n + 1) - gammaln(total - x - y + n + 1)
        )  # fmt: skip
        term = n / total * np.log(total * n / (x * y)) * np.exp(log_probability)
        expected += times * float(np.sum(times_b[row] * term))
    return expected


def average_precision(target: Tensor | np.ndarray, score: Tensor | np.ndarray) -> float:
    """Area under the precision-recall curve after precision is made non-increasing in recall (all-points interpolation).

    Args:
        target: (N,) of any dtype; above 0 is positive, everything else negative.
        score: (N,) float, finite. Images of equal score enter the curve together, so that their order has no say.

    Raises:
        ValueError: no positive, or scores that are not finite.

    Source: the PASCAL VOC development kit from 2010 on; neither its 11-point rule of 2007 nor scikit-learn's
    `average_precision_score`, which does not interpolate.
    """
    target, score = (x.detach().cpu().double().numpy() for x in tensors(target=(target, "N"), score=(score, "N")))
    shown = target > 0
    if not shown.any():
        raise ValueError("average precision of no positive is not defined")
    if not np.isfinite(score).all():
        raise ValueError("scores are not finite")
    order = np.argsort(-score)
    last = np.append(np.diff(score[order]) != 0, True)  # of the images that share a score
    found = np.cumsum(shown[order])[last]  # (thresholds,) positives at least as high
    recall, precision = found / shown.sum(), found / (np.flatnonzero(last) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))
