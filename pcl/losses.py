"""InfoNCE and the prototype term of ProtoNCE (PCL, sections 3.1 and 3.2) as pure functions of tensors.

An invalid argument raises a TypeError or ValueError that names it.
Letters: B batch, C features, K prototypes, r negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl.checks import above_zero, below, integer, tensors

if TYPE_CHECKING:
    from pcl.clustering import Clustering


def instance_logits(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compare each query with its own key (column 0) and with the keys in the queue.

    Args:
        q, k: (B, C) unit-length queries and the keys of the same images.
        queue: (C, r) earlier keys.
        temperature: tau, above 0 (not checked if it is a tensor).

    Returns:
        logits (B, 1 + r) and target (B,), all zero.
    """
    q, k, queue = tensors(q=(q, "B C"), k=(k, "B C"), queue=(queue, "C r"))
    if not isinstance(temperature, Tensor):
        temperature = above_zero("temperature", temperature)
    own = (q * k).sum(dim=1, keepdim=True)  # (B, 1)
    logits = torch.cat([own, q @ queue], dim=1) / temperature  # (B, 1 + r)
    return logits, torch.zeros(len(q), dtype=torch.long, device=q.device)


def sample_negatives(positive: Tensor, num_prototypes: int, r: int) -> Tensor:
    """Draw r of the prototypes 0..num_prototypes-1 without replacement, none of them in `positive` (B,) int64.

    Returns:
        (r,) int64 distinct ids on `positive`'s device, or all the others if there are fewer than r. The host waits for a GPU
        only if there are fewer than r + B prototypes, since the length then depends on the batch.
    """
    (positive,) = tensors(positive=(positive, "int B"))
    num_prototypes, r = integer("num_prototypes", num_prototypes, 1, 2**31 - 1), integer("r", r)
    below("positive", positive, num_prototypes)
    negative, other = _draw(positive, num_prototypes, r)
    return negative if other is None else negative[other]


def _draw(positive: Tensor, num_prototypes: int, r: int) -> tuple[Tensor, Tensor | None]:
    """Up to r distinct ids and a mask of those that are not in `positive` (None: all); shapes do not depend on the batch."""
    score = torch.rand(num_prototypes, dtype=torch.float32, device=positive.device)
    score.index_fill_(0, positive, -1)
    best = score.topk(min(r, num_prototypes), sorted=False)  # unsorted takes a third of the time; the order does not matter
    enough = num_prototypes - len(positive) >= r
    return best.indices, None if enough else best.values >= 0


def prototype_logits(
    q: Tensor, positive: Tensor, negative: Tensor, clustering: Clustering, mask_duplicates: bool = False
) -> tuple[Tensor, Tensor]:
    """Compare each query with the prototypes of the whole batch and with the negatives, each at its own temperature.

    Args:
        q: (B, C) unit-length queries.
        positive: (B,) int64, the prototype of each query.
        negative: (r,) int64, from `sample_negatives`.
        mask_duplicates: set an image's logits to -inf in the columns of other images that share its prototype.

    Returns:
        logits (B, B + r) and target (B,), the diagonal: as published, the prototypes of the other images in the batch
        are negatives too, even where two images share one.
    """
    q, positive, negative, prototypes, phi = tensors(
        q=(q, "B C"), positive=(positive, "int B"), negative=(negative, "int r"),
        prototypes=(clustering.prototypes, "K C"), concentration=(clustering.concentration, "K"),
    )  # fmt: skip
    for name, ids in (("positive", positive), ("negative", negative)):
        below(name, ids, len(prototypes))
    chosen = torch.cat([positive, negative])  # (B + r,)
    # On a CPU, index_select takes a sixth of the time of `prototypes[chosen]`.
    logits = q @ prototypes.index_select(0, chosen).T / phi.index_select(0, chosen)  # (B, B + r)
    if mask_duplicates:
        same = (positive[:, None] == positive).fill_diagonal_(False)  # (B, B)
        logits = logits.masked_fill(F.pad(same, (0, len(negative))), -torch.inf)
    return logits, torch.arange(len(q), device=q.device)


def prototype_loss(
    q: Tensor, index: Tensor, clusterings: Clustering | Sequence[Clustering], r: int, mask_duplicates: bool = False
) -> tuple[Tensor, Tensor]:
    """The prototype term of ProtoNCE: the mean over granularities of the cross-entropy of `prototype_logits`.

    Args:
        q: (B, C) unit-length queries.
        index: (B,) int64, the place of each image in the data set.
        clusterings: one granularity of the E-step, or several.
        r: negatives to draw at each granularity.
        mask_duplicates: as for `prototype_logits`.

    Returns:
        the loss and the fraction of queries whose target is their largest logit, both scalars, the second without gradient.
        Without `mask_duplicates`, only the first of images that share a prototype counts, as published.
    """
    q, index = tensors(q=(q, "B C"), index=(index, "int B"))
    r = integer("r", r)
    granularities: list[Clustering] = [clusterings] if hasattr(clusterings, "im2cluster") else list(clusterings)  # type: ignore
    if not granularities:
        raise ValueError("clusterings is empty")
    losses, hits = [], []
    for clustering in granularities:
        (im2cluster,) = tensors(im2cluster=(clustering.im2cluster, "int N"))
        below("index", index, len(im2cluster))
        positive = im2cluster[index.to(im2cluster.device)].to(q.device)  # (B,)
        negative, other = _draw(positive, clustering.num_used, r)  # (r,), (r,)
        logits, target = prototype_logits(q, positive, negative, clustering, mask_duplicates)  # (B, B + r)
        if other is not None:  # fewer than r others: those drawn beyond them take no part
            logits = logits.masked_fill(F.pad(~other, (len(q), 0)), -torch.inf)
        losses.append(F.cross_entropy(logits, target))
        hits.append((logits.detach().argmax(dim=1) == target).float().mean())
    return torch.stack(losses).mean(), torch.stack(hits).mean()
