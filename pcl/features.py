"""Features of a whole data set, each image passed through the network once, the ranks sharing the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pcl.augment import normalize
from pcl.distributed import gather_interleaved, get_rank, get_world_size
from pcl.errors import RunError


@torch.no_grad()
def extract_features(
    network: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]], num_images: int, device: torch.device
) -> Tensor:
    """Features of a whole data set, each image passed through the network once, the ranks sharing the work.

    Args:
        network: (B, 3, H, W) -> (B, C), in eval mode.
        loader: batches of this rank's images (`pcl.loader.indices_of_rank`), uint8, and their indices.
        num_images: N, on all ranks together.
        device: where the network is.

    Returns:
        (N, C) float32 on `device`, in the order of the data set, the same on every rank.

    Raises:
        RunError: features that are not finite numbers.
    """
    own = len(range(get_rank(), num_images, get_world_size()))
    features = gather_interleaved(extract_share(network, loader, own, device), num_images)
    if not features.sum(dim=1).isfinite().all():
        raise RunError("features of images are not finite numbers: the weights are those of a run that has failed, or damaged")
    return features


@torch.no_grad()
def extract_share(
    network: Callable[[Tensor], Tensor], loader: Iterable[tuple[Tensor, Tensor]], num_images: int, device: torch.device
) -> Tensor:
    """`extract_features` of this rank's images alone, of which there are `num_images`: (n, C) float32."""
    features, done = torch.empty(0), 0
    for images, _ in loader:
        batch = network(normalize(images.to(device, non_blocking=True)))  # (B, C)
        if done == 0:
            features = batch.new_empty(num_images, batch.shape[1], dtype=torch.float32)
        features[done : done + len(batch)] = batch
        done += len(batch)
    return features
