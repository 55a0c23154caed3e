"""Figures of merit: top-k accuracy, nearest neighbours, few labels, agreement of clusters and labels, average precision.

Letters: B batch, N images with known labels, Q images to classify, C features.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def topk_accuracy(logits: Tensor, target: Tensor, k: int = 1) -> Tensor:
    """Share of rows of (B, classes) logits whose target (B,) is among the k largest; a scalar in 0..1 on their device."""
    return (logits.topk(k, dim=1).indices == target[:, None]).any(dim=1).float().mean()


def knn_accuracy(
    known: Tensor, known_label: Tensor, query: Tensor, label: Tensor, k: int = 20, temperature: float = 0.1
) -> float:
    """Share of queries that the weighted vote of the k nearest known images classifies rightly.

    Each neighbour votes exp(cosine / temperature) for its label (Wu et al. 2018, section 3.4).

    Args:
        known: (N, C) features, of any length.
        known_label: (N,) int64, from 0.
        query: (Q, C) features.
        label: (Q,) int64.
        k: neighbours, at most N.
        temperature: small ones listen to the nearest alone.
    """
    known, query = F.normalize(known, dim=1), F.normalize(query, dim=1)
    classes = int(torch.cat([known_label, label]).max()) + 1
    hits = 0
    for part, truth in zip(query.split(1024), label.split(1024), strict=True):
        cosine, near = (part @ known.T).topk(min(k, len(known)), dim=1)  # (1024, k)
        votes = cosine.new_zeros(len(part), classes)
        votes.scatter_add_(1, known_label[near], (cosine / temperature).exp())
        hits += int((votes.argmax(dim=1) == truth).sum())
    return hits / len(label)


def one_shot_accuracy(
    known: Tensor, known_label: Tensor, query: Tensor, label: Tensor, draws: int = 20, seed: int = 0
) -> float:
    """Mean share of queries nearest (by cosine) to the one known image of their class, over random choices of those.

    Args:
        known, known_label, query, label: as for `knn_accuracy`.
        draws: how often one image of each class is chosen.
        seed: of the choices.
    """
    known, query = F.normalize(known, dim=1), F.normalize(query, dim=1)
    generator = torch.Generator().manual_seed(seed)
    classes = known_label.unique()
    accuracy = []
    for _ in range(draws):
        members = [(known_label == c).nonzero()[:, 0] for c in classes]
        chosen = torch.stack([m[torch.randint(len(m), (), generator=generator)] for m in members])
        nearest = (query @ known[chosen].T).argmax(dim=1)  # (Q,)
        accuracy.append((classes[nearest] == label).float().mean())
    return float(torch.stack(accuracy).mean())


def cluster_agreement(im2cluster: Tensor, label: Tensor) -> float:
    """Normalised mutual information (arithmetic mean) of two labellings (N,): 1 if the same, 0 if independent."""
    from sklearn.metrics import normalized_mutual_info_score  # slow to import, and training does not need it

    return float(normalized_mutual_info_score(label.cpu().numpy(), im2cluster.cpu().numpy()))


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
    positive, score = np.asarray(target) > 0, np.asarray(score, dtype=np.float64)
    if not positive.any():
        raise ValueError("average precision of no positive is not defined")
    if not np.isfinite(score).all():
        raise ValueError("scores are not finite")
    order = np.argsort(-score)
    last = np.append(np.diff(score[order]) != 0, True)  # of the images that share a score
    found = np.cumsum(positive[order])[last]  # (thresholds,) positives at least as high
    recall, precision = found / positive.sum(), found / (np.flatnonzero(last) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))
