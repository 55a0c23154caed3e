"""Start the processes of a run, and end them together."""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import socket
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, NoReturn
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pcl import distributed
from pcl.distributed import available_cores, gather, get_world_size, is_main, seed_everything, wait_for_main
from pcl.errors import FORESEEN, INTERRUPTED, PREEMPTED, RunError, reason_of
from pcl.run.options import Parser
from pcl.run.rendezvous import LOOPBACK, Place, launched_outside, meet, own_processes, serve
from pcl.run.watch import GRACE, Watch
from pcl.terminal import SIGNALS, open_streams, shielded, warn

_watch: Watch | None = None
LEAVE = 10.0  # seconds that processes have to end by themselves after one that has failed
# Of the allocators of torch, faiss, cuBLAS, cuDNN, NCCL and C++.
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory|ALLOC_FAILED|bad_alloc", re.IGNORECASE)
OWN_FAULT_OF_NCCL = re.compile(r"ncclUnhandledCudaError|ncclInvalid|ncclInternalError|shared memory segment")


def launch(worker: Callable[[torch.device, Namespace], None], args: Namespace) -> None:
    """Run `worker(device, args)` in every process of the group, each with its rank, device and seed set.

    One process runs here, without a group; several are spawned, and end with this one; under an outside launcher this
    process joins the others.

    Reads `args.nproc`, `gpu`, `world_size`, `rank`, `dist_url`, `dist_backend`, `dist_timeout` (seconds), `seed` (None: drawn
    at random) and `deterministic` (on a GPU: slower algorithms that repeat to the bit).

    Raises:
        RunError: from the worker, because a process was killed, or because the processes did not find each other. Of several
            processes, the one that raised has told.
        SystemExit: of code PREEMPTED or INTERRUPTED after a signal that asked to stop, of 1 after an error that was told.
    """
    nproc, outside = own_processes(args), launched_outside(args)
    if outside:
        # Under torchrun the launcher is its agent; one that was started by hand may outlive its shell.
        agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        _join(outside.local_rank, worker, args, outside.local_world, agent)
    elif nproc == 1:
        _join(0, worker, args, nproc)
    elif args.world_size > 1:
        _spawn(worker, args, nproc)
    else:  # no other machine takes part, and none can reach the store
        store = serve(LOOPBACK, 0, args.dist_timeout)
        args.dist_url = f"tcp://{LOOPBACK}:{store.port}"
        _spawn(worker, args, nproc)
        del store


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
            lost = _is_lost(error)
            if lost or (_watch.asked and not isinstance(error, FORESEEN)):
                _watch.wait_for_reason()
            told = _with_remedy(error, lost)
            if not _watch.tell_failure(reason_of(told)):
                raise SystemExit(1) from None
            if told is error:
                raise
            raise told from None
    if get_world_size() > 1:
        dist.destroy_process_group()  # not after an error: NCCL would wait for ranks that wait for this one


def _is_lost(error: Exception) -> bool:
    """Whether another process did not answer, and the error tells of no cause here."""
    text = str(error)
    if OUT_OF_MEMORY.search(text) or OWN_FAULT_OF_NCCL.search(text):
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)


def _with_remedy(error: Exception, lost: bool) -> Exception:
    """The error, or what a user can make of it; `lost`: another process did not answer."""
    if isinstance(error, RunError):
        return error
    text = str(error).strip() or type(error).__name__
    last_of_nccl = re.search(r"Last error:\s*(.+)", text)
    line = last_of_nccl[1] if last_of_nccl else text.splitlines()[0]
    if lost:
        return RunError(f"another process did not answer, and nothing is known of its end ({line}); does one hang?")
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        return RunError(f"out of memory: lower --batch-size or --image-size ({line})")
    if OWN_FAULT_OF_NCCL.search(text):
        return RunError(f"NCCL: {line}; NCCL_DEBUG=INFO tells more, and --dist-backend gloo does without it")
    return error


def _device(local_rank: int, args: Namespace) -> str:
    if not torch.cuda.is_available():
        return "cpu"
    # Some launchers show each process its own GPU alone; by gloo several may share one.
    return f"cuda:{(local_rank if args.gpu is None else args.gpu) % torch.cuda.device_count()}"


def _join_group(local_rank: int, args: Namespace, nproc: int) -> None:
    """Make this process one of the group, with its device and its seed; a single one needs no group."""

    url = urlsplit(args.dist_url or "")
    rank, world = args.rank * nproc + local_rank, args.world_size * nproc
    one_node = args.world_size == 1
    here = Place(rank, world, local_rank, nproc, url.hostname or "", url.port or 0, one_node, hosted=one_node)
    here = launched_outside(args) or here
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(_device(local_rank, args))
    # torchrun sets one thread, in which k-means on the CPU would take as many times longer as there are cores for a process.
    if nproc > 1 and ("OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        torch.set_num_threads(max(1, available_cores() // nproc))
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = args.deterministic, not args.deterministic
    chosen = torch.tensor(random.SystemRandom().randrange(2**31) if args.seed is None else args.seed)
    if here.world > 1:
        if here.one_node:
            loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
            os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
        store, prefix = meet(args, here)
        # Numbers on the CPU (seeds, figures of the log) travel by gloo, also where tensors on GPUs travel by NCCL.
        backend = "cpu:gloo,cuda:nccl" if on_gpu and args.dist_backend == "nccl" else "gloo"
        timeout = timedelta(seconds=args.dist_timeout)
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world, timeout=timeout)
        distributed.patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        assert _watch
        _watch.join(distributed.patient_group, (here.host, here.port), prefix, node=here.rank // here.local_world)
        dist.broadcast(chosen, 0, group=distributed.patient_group)
    args.seed = int(chosen)
    seed_everything(args.seed + here.rank)  # a spawned process does not inherit its parent's seed


class _Alone(torch.nn.Module):
    """What DistributedDataParallel is to several processes, with the same names in its state."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def parallel(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """DistributedDataParallel; of several processes on the CPU, a step's gradients do not depend on the steps before it.

    All ranks begin with rank 0's weights and buffers. Those of the forward passes stay each rank's own, and the published
    numbers stay too: a pass in training mode reads no buffer but the queue, which every rank computes alike.
    """
    if get_world_size() == 1:
        return _Alone(module)
    device_ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # given to the constructor, it would leave them different at the start too
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
    """`Watch.guarded` of this process: what is inside is finished and saved where a signal asks to stop."""
    return _watch.guarded() if _watch else nullcontext()


def should_stop() -> bool:
    """`Watch.should_stop`: asked after each step, by all."""
    return _watch.should_stop() if _watch else False


def leave_if_asked() -> None:
    """End the run, which has saved, if a signal asked for that at the last step of its epoch."""
    if _watch and _watch.forget_question():
        exit_stopped()


def exit_stopped() -> NoReturn:
    """End a run that was asked to stop and has saved."""
    if is_main():
        print("\nstopped and saved: go on with --resume auto", flush=True)
    raise SystemExit(_watch.exit_code if _watch else PREEMPTED)


def launch_or_exit(
    parser: Parser, worker: Callable[[torch.device, argparse.Namespace], None], args: argparse.Namespace
) -> None:
    """`pcl.run.launch.launch`; what ends the run is one line and exit code 1."""
    try:
        launch(worker, args)
    except FORESEEN as error:
        parser.fail(1, reason_of(error))
