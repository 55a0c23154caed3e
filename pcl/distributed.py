"""Launch, and what a process asks of its group: its rank, gathering, sharing jobs, seeds.

Letters: W ranks, N images. Without a group everything answers for a single process.
"""

from __future__ import annotations

import errno
import heapq
import os
import random
import re
import signal
import socket
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pcl.terminal import open_streams, warn
from pcl.watch import GRACE, INTERRUPTED, PREEMPTED, SIGNALS, Watch, shielded

# For what may take one rank hours while the others wait (k-means of ImageNet on a CPU): a rank that dies still ends
# the wait at once, since its connections close.
_patient_group: Any = None
_watch: Watch | None = None
LEAVE = 10.0  # seconds that processes have to end by themselves after one that has failed


class RunError(Exception):
    """What ends a run; the message is one line that names the remedy."""


FORESEEN = (RunError, OSError)  # what a user can mend, without a traceback: an OSError is a full disk, a folder that is gone ..


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        remedy = "; raise the limit (ulimit -n 4096)" if error.errno == errno.EMFILE else ""
        return (f"{error.filename}: {error.strerror}" if error.filename else error.strerror) + remedy
    return f"{type(error).__name__}: {error}"


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

    Reads `args.nproc`, `gpu`, `world_size`, `rank`, `dist_url`, `dist_backend`, `dist_timeout` (seconds), `seed` (None: drawn
    at random) and `deterministic` (on a GPU: slower algorithms that repeat to the bit).

    Raises:
        RunError: from the worker, because a process was killed, or because the processes did not find each other. Of several
            processes, the one that raised has told.
        SystemExit: of code PREEMPTED or INTERRUPTED after a signal that asked to stop, of 1 after an error that was told.
    """
    nproc = local_processes(args)
    if launched_outside():
        args.dist_url = "env://"
        # Under torchrun the launcher is its agent; one that was started by hand may outlive its shell.
        agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        _join(int(os.environ["LOCAL_RANK"]), worker, args, nproc, agent)
        return
    args.dist_url = args.dist_url or f"tcp://127.0.0.1:{_free_port()}"
    if nproc == 1:
        _join(0, worker, args, nproc)
    else:
        _spawn(worker, args, nproc)


def _spawn(worker: Callable, args: Namespace, nproc: int) -> None:
    """Start the processes of this node, pass signals on to them, and end them all if one ends badly."""
    processes: list[Any] = []
    interrupted, passed_on = 0.0, set()

    def pass_on(number: int, _: Any) -> None:
        nonlocal interrupted
        passed_on.add(number)
        if number == signal.SIGINT:
            if interrupted and time.monotonic() - interrupted > 1:
                for process in processes:
                    process.kill()
            interrupted = interrupted or time.monotonic()
        for process in processes:
            if process.is_alive():
                # Ctrl-C reaches the processes of a terminal too, where it is blocked.
                os.kill(process.pid, signal.SIGTERM if number == signal.SIGINT else number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with shielded():
            pass  # Python's own helper process is started so
        for number, handler in before.items():
            signal.signal(number, handler if handler is signal.SIG_IGN else pass_on)
        # What is blocked is inherited: Ctrl-C gives no traceback of a process that is still importing.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        processes += mp.spawn(_spawned, (worker, args, nproc, os.getpid()), nprocs=nproc, join=False).processes
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for early in list(passed_on):  # it came before there was anybody to pass it on to
            pass_on(early, None)
        first = _await(processes)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for number, handler in before.items():
            signal.signal(number, handler)
    local_rank, code = first
    if code and interrupted:
        raise SystemExit(INTERRUPTED)
    if -code in passed_on:  # it was still importing
        raise SystemExit(PREEMPTED)
    if code < 0:
        raise RunError(f"process {local_rank} was ended by {signal.Signals(-code).name}; the others were stopped")
    if code:
        raise SystemExit(code)


def _await(processes: Sequence[Any]) -> tuple[int, int]:
    """Number and exit code of the first process that ended badly, of which the others are stopped a while after; or (0, 0)."""
    first, deadline = (0, 0), 0.0
    while True:
        alive = [process for process in processes if process.is_alive()]
        bad = [(number, process.exitcode) for number, process in enumerate(processes) if process.exitcode]
        if bad and not deadline:
            # Time to learn of it, and to save where they were asked to stop.
            first, deadline = bad[0], time.monotonic() + (GRACE if bad[0][1] == PREEMPTED else 0) + LEAVE
        if not alive:
            return first
        if deadline and time.monotonic() > deadline:
            for process in alive:
                process.kill()
                process.join()
        wait([process.sentinel for process in alive], timeout=1)


def _spawned(local_rank: int, worker: Callable, args: Namespace, nproc: int, launcher: int) -> None:
    open_streams()
    try:
        _join(local_rank, worker, args, nproc, launcher)
    except FORESEEN as error:
        warn(f"error in process {local_rank}: {reason_of(error)}")
        raise SystemExit(1) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def _join(local_rank: int, worker: Callable, args: Namespace, nproc: int, launcher: int | None = None) -> None:
    """Run the worker in this process, as one of the group, watched."""
    global _watch
    with closing(Watch(launcher)) as _watch:
        try:
            _join_group(local_rank, args, nproc)
            worker(torch.device(_device(local_rank, args)), args)
            wait_for_main()
        except Exception as error:
            lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
            if lost or (_watch.asked and not isinstance(error, FORESEEN)):
                _watch.wait_for_reason()
            told = _with_remedy(error, lost)
            if not _watch.tell_failure(reason_of(told)):
                raise SystemExit(1) from None
            if told is error:
                raise
            raise told from None
    dist.destroy_process_group()  # not after an error: NCCL would wait for ranks that wait for this one


def _with_remedy(error: Exception, lost: bool) -> Exception:
    """The error, or what a user can make of it; `lost`: another process did not answer."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if lost:
        return RunError(f"another process did not answer, and nothing is known of its end ({text}); does one hang?")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text:
        return RunError(f"out of memory: lower --batch-size or --image-size ({text})")
    return error


def _device(local_rank: int, args: Namespace) -> str:
    return f"cuda:{local_rank if args.gpu is None else args.gpu}" if torch.cuda.is_available() else "cpu"


def _join_group(local_rank: int, args: Namespace, nproc: int) -> None:
    global _patient_group
    rank, world = args.rank * nproc + local_rank, total_processes(args)
    if launched_outside():
        rank = int(os.environ["RANK"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_device(local_rank, args))
    if nproc > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // nproc))
    # Numbers on the CPU (seeds, figures of the log) travel by gloo, also where tensors on GPUs travel by NCCL.
    backend = "cpu:gloo,cuda:nccl" if on_gpu and args.dist_backend == "nccl" else "gloo"
    timeout = timedelta(seconds=args.dist_timeout)
    store, address = _meet(args, rank, world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    _patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    assert _watch
    _watch.join(_patient_group, address, node=int(os.environ.get("GROUP_RANK", args.rank)))
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = args.deterministic, not args.deterministic
    chosen = [random.SystemRandom().randrange(2**31) if args.seed is None else args.seed]
    dist.broadcast_object_list(chosen, group=_patient_group)
    args.seed = chosen[0]
    seed_everything(args.seed + rank)  # a spawned process does not inherit its parent's seed


def _meet(args: Namespace, rank: int, world: int) -> tuple[dist.Store, tuple[str, int]]:
    """The store by which the processes find each other, and its address.

    Raises:
        RunError: the port is in use, or not all came in time.
    """
    if launched_outside():
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    else:
        url = urlsplit(args.dist_url)
        host, port = str(url.hostname), int(url.port or 0)
    end = time.monotonic() + args.dist_timeout
    try:
        if rank > 0:
            _wait_for_server(host, port, end)  # torch's own waiting fills pages with warnings
        left = timedelta(seconds=max(1.0, end - time.monotonic()))
        return next(dist.rendezvous(args.dist_url, rank, world, timeout=left))[0], (host, port)
    except (OSError, dist.DistError) as error:
        where, seconds = f"--dist-url tcp://{host}:{port}", f"within {args.dist_timeout:g} s (--dist-timeout)"
        if "EADDRINUSE" in str(error):
            raise RunError(f"{where}: the port is in use; name another one") from None
        if rank > 0:
            reason = str(error).splitlines()[0]
            raise RunError(
                f"{where}: process 0 did not answer {seconds}: {reason}; is node 0 running, and is it there?"
            ) from None
        joined = re.search(r"(\d+)/\d+ clients joined", str(error))
        came = f"{joined[1]} of {world} processes came" if joined else str(error).splitlines()[0]
        raise RunError(
            f"{where}: {came} {seconds}; start every node with this URL and --world-size {args.world_size}"
        ) from None


def _wait_for_server(host: str, port: int, end: float) -> None:
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def parallel(module: torch.nn.Module, device: torch.device) -> DistributedDataParallel:
    """DistributedDataParallel; of several processes on the CPU, a step's gradients do not depend on the steps before it."""
    wrapped = DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)
    if device.type == "cpu" and get_world_size() > 2:
        # From its second step on it sends gradients in another order, in which gloo adds the ranks in another order.
        wrapped.register_comm_hook(None, lambda _, bucket: _mean_in_order_of_ranks(bucket))
    return wrapped


def _mean_in_order_of_ranks(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    gradients = gather(bucket.buffer()).view(get_world_size(), -1)  # (W, numbers)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(gradients.sum(dim=0) / get_world_size())
    return future


def guarded() -> Any:
    """`pcl.watch.Watch.guarded` of this process's watch: what is inside is finished and saved where a signal asks to stop."""
    return _watch.guarded() if _watch else nullcontext()


def should_stop() -> bool:
    """`pcl.watch.Watch.should_stop`: asked after each step, by all."""
    return _watch.should_stop() if _watch and dist.is_initialized() else False


def leave_if_asked() -> None:
    """End the run, which has saved, if a signal asked for that at the last step of its epoch."""
    if _watch and _watch.forget_question():
        exit_stopped()


def exit_stopped() -> NoReturn:
    """End a run that was asked to stop and has saved."""
    if is_main():
        print("\nstopped and saved: go on with --resume auto", flush=True)
    raise SystemExit(_watch.exit_code if _watch else PREEMPTED)


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
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name up to torch 2.13
    all_gather(out, tensor.contiguous())
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


def same_on_all(number: int) -> bool:
    """Whether every rank has this number; every rank must call it."""
    differs = broadcast(torch.tensor(number)) != number
    return not add_over_ranks(differs.int())


def wait_for_main() -> None:
    """Wait, for days if need be, until every rank is here: after what the main process does alone."""
    if dist.is_initialized():
        dist.barrier(group=_patient_group)


def mean_over_ranks(values: Sequence[float]) -> list[float]:
    """The mean of each number over the ranks."""
    means = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(means)
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
