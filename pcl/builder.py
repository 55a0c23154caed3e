"""The model: a query encoder, its momentum copy, and a queue of keys (MoCo; PCL, section 3.1).

Letters: B batch of this rank, W ranks, C features, r length of the queue.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl.distributed import broadcast, exchange, gather, get_rank, get_world_size, on_device, talking_device


class MoCo(nn.Module):
    """Momentum contrast encoder with a queue.

    Args:
        base_encoder: `base_encoder(num_classes=dim)` gives a network whose head is `fc`, as torchvision's ResNets.
        dim: C, the size of a feature.
        r: length of the queue, which is also the number of negatives.
        m: momentum of the key encoder.
        mlp: a hidden layer in the head, as in MoCo v2.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self, base_encoder: Callable[..., nn.Module], dim: int = 128, r: int = 16384, m: float = 0.999, mlp: bool = False
    ) -> None:
        super().__init__()
        self.r, self.m = r, m
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        if mlp:
            for encoder in (self.encoder_q, self.encoder_k):
                head: nn.Linear = encoder.fc  # type: ignore[assignment]
                hidden = nn.Linear(head.in_features, head.in_features)
                encoder.fc = nn.Sequential(hidden, nn.ReLU(), head)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, r), dim=0))  # (C, r)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Encode two views (B, 3, H, W) of the same images for a training step, or one for the E-step.

        Returns:
            q (B, C), k (B, C) of unit length and queue (C, r) as it was before these keys entered; with `im_q` alone,
            (B, C) unit-length features of the key encoder. In a training step B is the same on every rank.
        """
        if im_k is None:
            with torch.no_grad():
                return F.normalize(self.encoder_k(im_q).float(), dim=1)
        q = F.normalize(self.encoder_q(im_q).float(), dim=1)  # (B, C)
        self._update_key_encoder()
        all_k = self._encode_keys(im_k)  # (W * B, C)
        queue = self.queue.clone()
        self._enqueue(all_k)
        start = get_rank() * len(q)
        return q, all_k[start : start + len(q)], queue

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        """Move the key encoder's weights a step towards the query encoder's; its BatchNorm statistics are its own."""
        keys: list[Tensor] = list(self.encoder_k.parameters())
        queries: list[Tensor] = list(self.encoder_q.parameters())
        if self.queue.device.type == "cpu":  # weight by weight: no extra memory, the second operation finds it cached
            one = torch.ones((), dtype=queries[0].dtype)
            for key, query in zip(keys, queries, strict=True):  # `add_` with alpha would round once less than published
                key.mul_(self.m).addcmul_(query, one, value=1 - self.m)
        else:  # a few kernels for all
            torch._foreach_mul_(keys, self.m)
            torch._foreach_add_(keys, torch._foreach_mul(queries, 1 - self.m))

    @torch.no_grad()
    def _encode_keys(self, im_k: Tensor) -> Tensor:
        """(B, 3, H, W) -> (W * B, C): the keys of all ranks in the order of the ranks.

        Shuffling BatchNorm (MoCo, section 3.3): each rank encodes a random part of the global batch, so that a key's
        batch statistics do not reveal the queries it belongs to.
        """
        order = broadcast(torch.randperm(get_world_size() * len(im_k), device=talking_device())).cpu()  # (W * B,)
        mine = exchange(im_k, order.view(get_world_size(), -1))  # (B, 3, H, W)
        if im_k.is_contiguous(memory_format=torch.channels_last):  # exchange does not keep the layout
            mine = mine.contiguous(memory_format=torch.channels_last)
        keys = gather(F.normalize(self.encoder_k(mine).float(), dim=1))  # (W * B, C)
        return keys[on_device(order.argsort(), keys.device)]

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest keys by (W * B, C) new ones, wrapping around the end; the host never waits."""
        place = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % self.r
        self.queue.index_copy_(1, place, keys.T.to(self.queue.dtype))
        self.queue_ptr.add_(len(keys)).remainder_(self.r)

    @torch.no_grad()
    def backbone_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, features): the input of the query encoder's head."""
        head, self.encoder_q.fc = self.encoder_q.fc, nn.Identity()
        try:
            return self.encoder_q(images)
        finally:
            self.encoder_q.fc = head

    @torch.no_grad()
    def broadcast_buffers(self) -> None:
        """Give every rank rank 0's buffers, so that all encode alike in the E-step, as published."""
        for buffer in self.buffers():
            broadcast(buffer)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that in training normalizes each of S = `splits` groups of B / S consecutive images apart, as S GPUs would.

    The running statistics become the mean of those that each group alone would give. Eval mode is as for `nn.BatchNorm2d`.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, splits: int, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if not self.training:
            return super().forward(x)
        own = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, variance, weight, bias = (values.repeat(self.splits) for values in own)  # (S * C,)
        # The groups lie side by side, as S * C channels of one batch: S calls would be as many kernels.
        side_by_side = torch.cat(x.unflatten(0, (self.splits, -1)).unbind(), dim=1)  # (B / S, S * C, H, W)
        out = F.batch_norm(side_by_side, mean, variance, weight, bias, True, self.momentum, self.eps)
        torch.mean(mean.view(self.splits, -1), dim=0, out=self.running_mean)
        torch.mean(variance.view(self.splits, -1), dim=0, out=self.running_var)
        self.num_batches_tracked.add_(1)
        return torch.cat(out.chunk(self.splits, dim=1))


def split_batch_norm(network: nn.Module, splits: int) -> None:
    """Replace each BatchNorm2d inside `network` by a `SplitBatchNorm2d`; weights, statistics and names stay.

    One without weights or without running statistics is left as it is.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d and child.affine and child.track_running_stats:
                momentum = 0.1 if child.momentum is None else child.momentum
                split = SplitBatchNorm2d(splits, child.num_features, child.eps, momentum)
                for part, value in [*child.named_parameters(), *child.named_buffers()]:
                    setattr(split, part, value)  # the very tensors: a frozen weight stays frozen
                setattr(parent, name, split.train(child.training))
