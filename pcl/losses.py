"""InfoNCE and the prototype term of ProtoNCE (PCL, equations 2 and 11) as pure functions of tensors.

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
    """Each query against its own key (column 0) and the keys in the queue.

    Args:
        q: (B, C) unit-length queries.
        k: (B, C) unit-length keys of the same images.
        queue: (C, r) earlier keys.
        temperature: tau.

    Returns:
        logits (B, 1 + r) and target (B,), all zero.

    Raises:
        TypeError, ValueError: shapes that do not fit, or a temperature that is not above 0 (of a tensor it is not asked).
    """
    q, k, queue = tensors(q=(q, "B C"), k=(k, "B C"), queue=(queue, "C r"))
    if not isinstance(temperature, Tensor):
        above_zero("temperature", temperature)
    own = (q * k).sum(dim=1, keepdim=True)  # (B, 1)
    logits = torch.cat([own, q @ queue], dim=1) / temperature  # (B, 1 + r)
    return logits, torch.zeros(len(q), dtype=torch.long, device=q.device)


def sample_negatives(positive: Tensor, num_prototypes: int, r: int) -> Tensor:
    """Draw r of the prototypes 0..num_prototypes-1 that are no image's own, without replacement.

    Args:
        positive: (B,) int64, the prototype of each image in the batch.
        num_prototypes: how many there are to choose from.
        r: how many to draw.

    Returns:
        (r,) int64 distinct ids on `positive`'s device; all the others where there are fewer than r.

    A GPU is waited for only where fewer than r + B prototypes exist, since the length then depends on the batch;
    `prototype_loss` never waits.

    Raises:
        TypeError, ValueError: an argument that cannot be right.
    """
    (positive,) = tensors(positive=(positive, "int B"))
    num_prototypes, r = integer("num_prototypes", num_prototypes, least=1), integer("r", r)
    below("positive", positive, num_prototypes)
    negative, other = _draw(positive, num_prototypes, r)
    return negative if other is None else negative[other]


def _draw(positive: Tensor, num_prototypes: int, r: int) -> tuple[Tensor, Tensor | None]:
    """Up to r distinct ids and which of them are nobody's own (None: all), of lengths that the host knows."""
    score = torch.rand(num_prototypes, device=positive.device)
    score.index_fill_(0, positive, -1)
    best = score.topk(min(r, num_prototypes), sorted=False)  # a third of the time; nobody asks for their order
    enough = num_prototypes - len(positive) >= r
    return best.indices, None if enough else best.values >= 0


def prototype_logits(
    q: Tensor, positive: Tensor, negative: Tensor, clustering: Clustering, mask_duplicates: bool = False
) -> tuple[Tensor, Tensor]:
    """Each query against the prototypes of the whole batch, then the negatives, each at its own temperature.

    Args:
        q: (B, C) unit-length queries.
        positive: (B,) int64, the prototype of each query.
        negative: (r,) int64, from `sample_negatives`.
        clustering: the granularity.
        mask_duplicates: an image's own prototype is no negative of it (its logit is -inf) where it is another image's too.

    Returns:
        logits (B, B + r) and target (B,), the diagonal: as published, the prototypes of the other images in the batch
        are negatives too, even where two images share one.

    Raises:
        TypeError, ValueError: an argument that cannot be right.
    """
    q, positive, negative, prototypes, phi = tensors(
        q=(q, "B C"), positive=(positive, "int B"), negative=(negative, "int r"),
        prototypes=(clustering.prototypes, "K C"), concentration=(clustering.concentration, "K"),
    )  # fmt: skip
    chosen = torch.cat([positive, negative])  # (B + r,)
    # On a CPU index_select takes a sixth of the time of an index in brackets.
    logits = q @ prototypes.index_select(0, chosen).T  # (B, B + r)
    logits = logits / phi.index_select(0, chosen)
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
        index: (B,) int64, where in the data set each image stands.
        clusterings: one granularity of the E-step, or several.
        r: negatives to draw in each.
        mask_duplicates: as for `prototype_logits`.

    Returns:
        the loss and the share of queries nearest to their own prototype (both scalars, the second without gradient).

    Raises:
        TypeError, ValueError: an argument that cannot be right.
    """
    q, index = tensors(q=(q, "B C"), index=(index, "int B"))
    r = integer("r", r)
    if not isinstance(clusterings, Sequence):
        clusterings = [clusterings]
    if not clusterings:
        raise ValueError("clusterings is empty")
    losses, hits = [], []
    for clustering in clusterings:
        below("index", index, len(clustering.im2cluster))
        positive = clustering.im2cluster[index.to(clustering.im2cluster.device)].to(q.device)  # (B,)
        negative, other = _draw(positive, clustering.num_used, r)  # (r,), (r,)
        logits, target = prototype_logits(q, positive, negative, clustering, mask_duplicates)  # (B, B + r)
        if other is not None:  # fewer than r others: those drawn beyond them take no part
            logits = logits.masked_fill(F.pad(~other, (len(q), 0)), -torch.inf)
        losses.append(F.cross_entropy(logits, target))
        hits.append((logits.detach().argmax(dim=1) == target).float().mean())
    return torch.stack(losses).mean(), torch.stack(hits).mean()
