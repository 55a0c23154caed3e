"""Launch, and what a process asks of its group: its rank, gathering, sharing jobs, seeds.

Letters: W ranks, N images. Without a group everything answers for a single process.
"""

from __future__ import annotations

import heapq
import os
import random
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

# For what may take one rank hours while the others wait (k-means of ImageNet on a CPU): a rank that dies still ends
# the wait at once, since its connections close.
_patient_group: Any = None


class RunError(Exception):
    """What ends a run; the message is one line that names the remedy."""


def launched_outside() -> bool:
    """Whether a launcher such as torchrun has started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def local_processes(args: Namespace) -> int:
    """Number of training processes on this machine."""
    if launched_outside():
        return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    return args.nproc or (1 if args.gpu is not None else max(1, torch.cuda.device_count()))


def total_processes(args: Namespace) -> int:
    """W, the number of training processes on all machines."""
    return int(os.environ["WORLD_SIZE"]) if launched_outside() else args.world_size * local_processes(args)


def launch(worker: Callable[[torch.device, Namespace], None], args: Namespace) -> None:
    """Run `worker(device, args)` in every process of the group, each with its rank, device and seed set.

    One process runs here; several are spawned, and end with this one; under an outside launcher this process joins the
    others.

    Reads `args.nproc`, `gpu`, `world_size`, `rank`, `dist_url`, `dist_backend`, `seed` (None: drawn at random) and
    `deterministic` (on a GPU: slower algorithms that repeat to the bit).

    Raises:
        RunError: from the worker, or because a process was killed. Of several processes, the one that raised has told.
    """
    nproc = local_processes(args)
    if launched_outside():
        args.dist_url = "env://"
        _join(int(os.environ["LOCAL_RANK"]), worker, args, nproc)
    else:
        args.dist_url = args.dist_url or f"tcp://127.0.0.1:{_free_port()}"
        if nproc == 1:
            _join(0, worker, args, nproc)
        else:
            try:
                mp.spawn(_spawned, (worker, args, nproc, os.getpid()), nprocs=nproc)
            except mp.ProcessExitedException as error:
                if error.signal_name:
                    how = f"was ended by {error.signal_name}"
                    raise RunError(f"process {error.error_index} {how}; the others were stopped") from None
                raise SystemExit(1) from None  # the process has told why


def _spawned(local_rank: int, worker: Callable, args: Namespace, nproc: int, launcher: int) -> None:
    threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()
    try:
        _join(local_rank, worker, args, nproc)
    except RunError as error:
        print(f"error in process {local_rank}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _end_with(launcher: int) -> None:
    """End this process within seconds of its launcher, however that ended."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


def _join(local_rank: int, worker: Callable, args: Namespace, nproc: int) -> None:
    global _patient_group
    rank = int(os.environ["RANK"]) if launched_outside() else args.rank * nproc + local_rank
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank if args.gpu is None else args.gpu) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if nproc > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // nproc))
    # Numbers on the CPU (seeds, figures of the log) travel by gloo, also where tensors on GPUs travel by NCCL.
    backend = "cpu:gloo,cuda:nccl" if on_gpu and args.dist_backend == "nccl" else "gloo"
    dist.init_process_group(backend, init_method=args.dist_url, rank=rank, world_size=total_processes(args))
    _patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = args.deterministic, not args.deterministic
    chosen = [random.SystemRandom().randrange(2**31) if args.seed is None else args.seed]
    dist.broadcast_object_list(chosen, group=_patient_group)
    args.seed = chosen[0]
    seed_everything(args.seed + rank)  # a spawned process does not inherit its parent's seed
    worker(device, args)
    dist.destroy_process_group()  # not after an error: NCCL would wait for ranks that wait for this one


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch (every device) from one or more non-negative integers."""
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def derive_seed(*key: int) -> int:
    """A 32-bit seed for each tuple of non-negative integers, unrelated for neighbouring ones (NumPy's SeedSequence)."""
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
    """(B, ..) of each rank -> (W * B, ..) in the order of the ranks, without gradient; B is the same on all."""
    if not dist.is_initialized():
        return tensor
    out = tensor.new_empty(get_world_size() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(out, tensor.contiguous())
    return out


def gather_interleaved(tensor: Tensor, total: int) -> Tensor:
    """Rows rank, rank + W, rank + 2W, .. of each rank -> all (total, ..) rows in order."""
    world = get_world_size()
    longest = -(-total // world)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    rows = gather(padded).view(world, longest, *tensor.shape[1:])  # (W, ceil(N / W), ..)
    return rows.transpose(0, 1).reshape(world * longest, *tensor.shape[1:])[:total]


def add_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of each element over the ranks, in place of `tensor`'s values."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def wait_for_main() -> None:
    """Wait, for days if need be, until every rank is here: after what the main process does alone."""
    if dist.is_initialized():
        dist.barrier(group=_patient_group)


def mean_over_ranks(values: Sequence[float]) -> list[float]:
    """The mean of each number over the ranks."""
    means = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(means, group=_patient_group)
    return (means / get_world_size()).tolist()


def shared_map(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    cost: Sequence[float],
    track: Callable[[list[int]], Iterable[int]] = iter,
) -> list[Any]:
    """`[function(job) for job in jobs]`, each job done by one rank and its result sent to all.

    Args:
        function: must not use a collective; its results must pickle.
        jobs: the same on every rank.
        cost: the expected work of each, in any unit, by which they are dealt out.
        track: is given the numbers of this rank's jobs and gives them back one by one, to show how far it is.
    """
    owner = deal(cost, get_world_size())
    mine = {j: function(jobs[j]) for j in track([j for j, rank in enumerate(owner) if rank == get_rank()])}
    results = []
    for j in range(len(jobs)):
        box = [mine.get(j)]
        if get_world_size() > 1:
            dist.broadcast_object_list(box, src=owner[j], group=_patient_group)
        results.append(box[0])
    return results


def deal(cost: Sequence[float], world: int) -> list[int]:
    """The rank that does each job: largest first, each to the rank with the least work so far."""
    owner = [0] * len(cost)
    load = [(0.0, rank) for rank in range(world)]
    for job in sorted(range(len(cost)), key=lambda j: -cost[j]):
        work, owner[job] = heapq.heappop(load)
        heapq.heappush(load, (work + cost[job], owner[job]))
    return owner


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
