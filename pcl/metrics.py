"""Top-k, nearest-neighbor and one-shot accuracy, agreement of clusters and labels, average precision.

Letters: B batch, N images with known labels, Q images to classify, C features, k neighbors. Features may have any length whose
square float32 holds; labels are any integers. An invalid argument raises a TypeError or ValueError that names it.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pcl.checks import above_zero, integer, tensors
from pcl.clustering import nearest_neighbors


def topk_accuracy(logits: Tensor, target: Tensor, k: int = 1) -> Tensor:
    """Fraction of rows of (B, classes) logits whose target (B,) is among the k largest; a scalar in 0..1 on their device."""
    logits, target = tensors(logits=(logits, "B classes"), target=(target, "int B"))
    k = integer("k", k, 1, logits.shape[1])
    return (logits.topk(k, dim=1).indices == target[:, None]).any(dim=1).float().mean()


def knn_accuracy(
    known: Tensor, known_label: Tensor, query: Tensor, label: Tensor, k: int = 200, temperature: float = 0.1
) -> float:
    """Fraction of queries that a weighted vote of their k nearest known images classifies correctly.

    Each neighbor votes for its label with weight exp(cosine / temperature) (Wu et al. 2018, section 3.4).

    Args:
        known, known_label: (N, C) features and (N,) labels.
        query, label: (Q, C) features and (Q,) labels.
        k: neighbors; all known images if there are fewer.
        temperature: the smaller, the more the nearest neighbors count.
    """
    return _vote_accuracy(_labeled(known, known_label, query, label), k, temperature)


def leave_one_out_accuracy(
    features: Tensor, label: Tensor, k: int = 200, temperature: float = 0.1, most: int = 20_000, seed: int = 0
) -> float:
    """`knn_accuracy` of (N, C) features with (N,) labels, N >= 2: all other images classify each image.

    Classifies at most `most` images, drawn with `seed`.
    """
    features, label = tensors(features=(features, "N C"), label=(label, "int N"))
    if len(features) < 2:
        raise ValueError("features holds one image; there are no others to classify it by")
    if not features.isfinite().all():
        raise ValueError("features must hold finite numbers")
    order = np.random.default_rng(integer("seed", seed)).permutation(len(features))
    chosen = torch.from_numpy(order[: integer("most", most, 1)]).to(features.device)  # (Q,)
    features = _unit(features)
    return _vote_accuracy([features, label, features[chosen], label[chosen]], k, temperature, chosen.cpu())


def one_shot_accuracy(
    known: Tensor, known_label: Tensor, query: Tensor, label: Tensor, draws: int = 20, seed: int = 0
) -> float:
    """Fraction of queries nearest (by cosine) to the one known image of their class; mean over `draws` random choices of these.

    Arguments as for `knn_accuracy`.
    """
    known, known_label, query, label = _labeled(known, known_label, query, label)
    generator = torch.Generator().manual_seed(integer("seed", seed, -(2**63), 2**64 - 1))
    classes = known_label.unique()
    members = [(known_label == c).nonzero()[:, 0] for c in classes]
    accuracy = []
    for _ in range(integer("draws", draws, least=1)):
        chosen = torch.stack([m[torch.randint(len(m), (), generator=generator)] for m in members])
        with torch.autocast(query.device.type, enabled=False):  # a caller's would round to 16 bits
            nearest = (query @ known[chosen].T).argmax(dim=1)  # (Q,)
        accuracy.append((classes[nearest] == label).float().mean())
    return float(torch.stack(accuracy).mean())


def _labeled(known: Tensor, known_label: Tensor, query: Tensor, label: Tensor) -> list[Tensor]:
    """The checked arguments on one device, with features of unit length."""
    result = tensors(known=(known, "N C"), known_label=(known_label, "int N"), query=(query, "Q C"), label=(label, "int Q"))
    for name, place in (("known", 0), ("query", 2)):
        if not result[place].isfinite().all():
            raise ValueError(f"{name} must hold finite numbers")
        result[place] = _unit(result[place])
    return result


def _unit(features: Tensor) -> Tensor:
    """Rows of unit length; a zero stays. torch's own smallest length, 1e-12, is 0 in float16."""
    return F.normalize(features.detach().float(), dim=1, eps=1e-19)


def _vote_accuracy(labeled: list[Tensor], k: int, temperature: float, itself: Tensor | None = None) -> float:
    """`knn_accuracy` of what `_labeled` returns; `itself` (Q,) is each query's own row in `known`, which does not vote."""
    known, known_label, query, label = labeled
    k, temperature = integer("k", k, 1), above_zero("temperature", temperature)
    # One more neighbor, since an image is its own nearest one (or one of several equal ones).
    count = min(k + (itself is not None), len(known))
    cosine, near = nearest_neighbors(known, query, count, known.device)  # (Q, count)
    if itself is not None:
        own = near == itself[:, None]
        cosine[own] = -torch.inf
        if count > k:
            cosine[~own.any(dim=1), -1] = -torch.inf
    # Relative to the largest, so at most 1: float32 does not hold exp(1 / 0.01).
    weight = ((cosine - cosine.amax(dim=1, keepdim=True)) / temperature).exp()
    votes_for, truth = known_label.cpu()[near], label.cpu()
    labels, code = torch.cat([votes_for.flatten(), truth]).unique(return_inverse=True)
    votes_for, truth = code[: near.numel()].view_as(near), code[near.numel() :]
    hits = 0
    for w, v, t in zip(weight.split(1024), votes_for.split(1024), truth.split(1024), strict=True):
        votes = w.new_zeros(len(w), len(labels)).scatter_add_(1, v, w)
        hits += int((votes.argmax(dim=1) == t).sum())
    return hits / len(truth)


def cluster_agreement(im2cluster: Tensor | np.ndarray, label: Tensor | np.ndarray) -> dict[str, float]:
    """How far clusters and labels, both (N,) integer, agree.

    Returns:
        nmi: normalized mutual information (arithmetic mean), 0 to 1; many small clusters raise it by chance alone.
        ami: adjusted for chance: 1 if the same, 0 on average for random clusters (Vinh et al. 2010).
        purity: fraction of images that have the most frequent label of their cluster.
    """
    from sklearn.metrics.cluster import contingency_matrix, mutual_info_score  # slow to import

    im2cluster, label = tensors(im2cluster=(im2cluster, "int N"), label=(label, "int N"))
    table = contingency_matrix(im2cluster.cpu(), label.cpu(), sparse=True)
    size, shown = np.asarray(table.sum(axis=1)).ravel(), np.asarray(table.sum(axis=0)).ravel()
    purity = float(table.max(axis=1).sum() / table.sum())
    if table.nnz == len(size) == len(shown):  # the same
        return {"nmi": 1.0, "ami": 1.0, "purity": purity}
    mutual = mutual_info_score(None, None, contingency=table)
    entropy = [-float(np.sum(p * np.log(p))) for p in (size / size.sum(), shown / shown.sum())]
    mean, chance = np.mean(entropy), _expected_mutual_information(size, shown)
    tiny = np.finfo(float).eps
    return {"nmi": float(mutual / mean), "ami": float((mutual - chance) / max(mean - chance, tiny)), "purity": purity}


def _expected_mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of two random labelings with groups of sizes a and b (Vinh et al. 2010, equation 24a).

    Takes one step for each pair of distinct sizes. scikit-learn's takes one for each pair of groups: hours for
    100,000 clusters and as many labels.
    """
    from scipy.special import gammaln

    total, expected = int(a.sum()), 0.0
    counted = [np.unique(sizes, return_counts=True) for sizes in (a, b)]
    (size_a, times_a), (size_b, times_b) = sorted(counted, key=lambda pair: len(pair[0]))  # loop over the fewer sizes
    for x, times in zip(size_a, times_a, strict=True):
        least = np.maximum(1, x + size_b - total)
        count = np.minimum(x, size_b) - least + 1  # of possible numbers n of images in both groups: least, least + 1, ...
        row = np.repeat(np.arange(len(size_b)), count)
        y, n = size_b[row], np.arange(len(row)) - (count.cumsum() - count - least)[row]
        log_probability = (
            gammaln(x + 1) + gammaln(total - x + 1) + gammaln(y + 1) + gammaln(total - y + 1) - gammaln(total + 1)
            - gammaln(n + 1) - gammaln(x - n + 1) - gammaln(y - n + 1) - gammaln(total - x - y + n + 1)
        )  # fmt: skip
        term = n / total * np.log(total * n / (x * y)) * np.exp(log_probability)
        expected += times * float(np.sum(times_b[row] * term))
    return expected


def average_precision(target: Tensor | np.ndarray, score: Tensor | np.ndarray) -> float:
    """Area under the precision-recall curve with all-points interpolation, as in the PASCAL VOC kit from 2010 on.

    Precision is first made non-increasing in recall, which scikit-learn's `average_precision_score` does not do.

    Args:
        target: (N,); above 0 is positive.
        score: (N,) float, finite. Images of equal score enter the curve together, so their order does not matter.

    Raises:
        ValueError: no positive, or scores that are not finite.
    """
    from sklearn.metrics import precision_recall_curve  # slow to import

    target, score = (x.detach().cpu().double().numpy() for x in tensors(target=(target, "N"), score=(score, "N")))
    if not (target > 0).any():
        raise ValueError("average precision of no positive is not defined")
    if not np.isfinite(score).all():
        raise ValueError("scores are not finite")
    precision, recall, _ = precision_recall_curve(target > 0, score)  # from the lowest threshold to the highest
    recall, precision = recall[::-1], np.maximum.accumulate(precision)[::-1]
    return float(np.sum(np.diff(recall) * precision[1:]))
