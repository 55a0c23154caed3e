"""What a process asks of its group: its rank, gathering, sharing jobs, seeds.

Letters: W ranks, N images. Without a group everything answers for a single process.
"""

import heapq
import io
import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# For what may take one rank hours while the others wait (k-means of ImageNet on a CPU): a rank that dies still ends
# the wait at once, since its connections close.
patient_group: Any = None


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch (every device) from one or more non-negative integers."""
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def derive_seed(*key: int) -> int:
    """A 32-bit seed for each tuple of non-negative integers, unrelated for neighboring ones (NumPy's SeedSequence).

    Of up to four numbers, zeros at the end do not count.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def get_rank() -> int:
    """Rank of this process among all, 0..W-1."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return get_rank() == 0


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's values, written into `tensor` on every rank."""
    if dist.is_initialized():
        dist.broadcast(tensor, 0)
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """(B, ...) of each rank -> (W * B, ...) in the order of the ranks, without gradient; B is the same on all."""
    if not dist.is_initialized():
        return tensor
    out = tensor.new_empty(get_world_size() * len(tensor), *tensor.shape[1:])
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name up to torch 2.13
    all_gather(out, tensor.contiguous())
    return out


def exchange(rows: Tensor, order: Tensor) -> Tensor:
    """Redistribute the rows of all ranks: each is sent only to the rank that is to have it.

    Args:
        rows: (B, ...) numbers rank * B to rank * B + B - 1 of all; B is the same on every rank.
        order: (W, B) int64 on the CPU, the same on every rank: the numbers of the rows that each is to have, each number once.

    Returns:
        (B, ...) this rank's rows in their order. The host does not wait for a GPU, since it knows who sends what to whom.
    """
    rank, world = get_rank(), get_world_size()
    if world == 1:
        return rows[on_device(order[0], rows.device)]
    holder = order // len(rows)  # (W, B) the rank that has each
    sent = rows[on_device(order[holder == rank] - rank * len(rows), rows.device)].contiguous()
    received, lengths = torch.empty_like(sent), holder[rank].bincount(minlength=world).tolist()
    dist.all_to_all_single(received, sent, lengths, (holder == rank).sum(dim=1).tolist())
    return received[on_device(holder[rank].argsort(stable=True).argsort(), rows.device)]  # they came rank by rank


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device; the host does not wait for a GPU."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def talking_device() -> str:
    """Where numbers that the host knows travel: on the CPU, except in a group that somebody else has made with NCCL alone."""
    return "cuda" if dist.is_initialized() and dist.get_backend(patient_group) == "nccl" else "cpu"


def gather_interleaved(tensor: Tensor, total: int) -> Tensor:
    """Rows rank, rank + W, rank + 2W, ... of each rank -> all (total, ...) rows in order."""
    world = get_world_size()
    if world == 1:
        return tensor[:total]
    longest = -(-total // world)
    padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
    rows = gather(padded).view(world, longest, *tensor.shape[1:])  # (W, ceil(N / W), ...)
    return rows.transpose(0, 1).reshape(world * longest, *tensor.shape[1:])[:total]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of each element over the ranks, in place of `tensor`'s values."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def equal_on_all_ranks(number: int) -> bool:
    """Whether every rank has this number; every rank must call it."""
    differs = broadcast(torch.tensor(number)) != number
    return not sum_over_ranks(differs.int())


def wait_for_all() -> None:
    """Wait, for days if need be, until every rank is here: after what the main process does alone."""
    if dist.is_initialized():
        dist.barrier(group=patient_group)


def mean_over_ranks(values: Sequence[float]) -> list[float]:
    """The mean of each number over the ranks."""
    return (sum_over_ranks(torch.tensor(values, dtype=torch.float64)) / get_world_size()).tolist()


def shared_map(
    function: Callable[[Any], Sequence[Tensor]],
    jobs: Sequence[Any],
    cost: Sequence[float],
    track: Callable[[list[int]], Iterable[int]] = iter,
) -> list[Sequence[Tensor]]:
    """`[function(job) for job in jobs]`, each job done by one rank and its result sent to all.

    Args:
        function: gives tensors on the CPU, of dtypes that NumPy has; must not use a collective.
        jobs: the same on every rank.
        cost: the expected work of each, in any unit, by which they are dealt out: equal costs, equal ranks.
        track: is given the numbers of this rank's jobs and gives them back one by one, to show how far it is.
    """
    owner = assign_jobs(cost, get_world_size())
    mine = {j: function(jobs[j]) for j in track([j for j, rank in enumerate(owner) if rank == get_rank()])}
    return [_sent_to_all(mine.get(j, ()), owner[j]) if dist.is_initialized() else mine[j] for j in range(len(jobs))]


def _sent_to_all(tensors: Sequence[Tensor], source: int) -> list[Tensor]:
    """The tensors of the rank `source`, in NumPy's file format: shapes and dtypes travel too, and nothing is unpickled."""
    file = io.BytesIO()
    np.savez(file, *tensors)
    device = talking_device()
    size = torch.tensor(len(file.getvalue()), device=device)
    dist.broadcast(size, source, group=patient_group)
    content = torch.empty(int(size), dtype=torch.uint8, device=device)
    if get_rank() == source:
        content.copy_(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
    dist.broadcast(content, source, group=patient_group)
    with np.load(io.BytesIO(content.cpu().numpy().tobytes()), allow_pickle=False) as arrays:
        return [torch.from_numpy(arrays[name]) for name in arrays.files]


def assign_jobs(cost: Sequence[float], world: int) -> list[int]:
    """The rank that does each job: largest first, each to the rank with the least work so far."""
    owner = [0] * len(cost)
    load = [(0.0, rank) for rank in range(world)]
    for job in sorted(range(len(cost)), key=lambda j: -cost[j]):
        work, owner[job] = heapq.heappop(load)
        heapq.heappush(load, (work + cost[job], owner[job]))
    return owner
