"""Start the processes of a run, and end them together.

One process runs here, without a group; several are spawned, and end with this one; under a launcher such as torchrun, this
process joins the others.
"""

import os
import random
import re
import signal
import socket
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pcl import distributed
from pcl.distributed import gather, get_world_size, seed_everything, wait_for_all
from pcl.errors import INTERRUPTED, PREEMPTED, USER_ERRORS, RunError, is_out_of_memory, line_of, reason_of
from pcl.images import UnreadableImageError
from pcl.run.preflight import Plan
from pcl.run.rendezvous import LOOPBACK, meet, serve
from pcl.run.watch import GRACE, Watch
from pcl.terminal import SIGNALS, open_streams, shielded, warn

LEAVE = 10.0  # seconds that processes have to end by themselves after one that failed
OWN_FAULT_OF_NCCL = re.compile(r"ncclUnhandledCudaError|ncclInvalid|ncclInternalError|shared memory segment")

Worker = Callable[[torch.device, Namespace, Plan], None]
watch = Watch()  # of this process; started where it is one of a run


def launch(worker: Worker, args: Namespace, plan: Plan) -> None:
    """Run `worker(device, args, plan)` in every process of the run. A seed that the plan lacks is drawn: `worker` gets it.

    Reads `args.dist_backend`, `dist_timeout` (seconds) and `gpu` (None: by local rank).

    Raises:
        RunError: from the worker, because a process was killed, or because the processes did not find each other. Of several
            processes, the one that failed has printed its error.
        SystemExit: code PREEMPTED or INTERRUPTED after a signal to stop, 1 after an error that was told.
    """
    place = plan.place
    if place.local_world == 1 or not place.spawns:
        # Under torchrun the launcher is its agent; one that was started by hand may outlive its shell.
        agent = os.getppid() if not place.spawns and "TORCHELASTIC_RUN_ID" in os.environ else None
        _join(worker, args, plan, agent)
    elif not place.one_node:
        _spawn(worker, args, plan)
    else:  # no other machine takes part, and none can reach the store
        store = serve(LOOPBACK, 0, args.dist_timeout)
        _spawn(worker, args, replace(plan, place=replace(place, host=LOOPBACK, port=store.port)))


def _spawn(worker: Worker, args: Namespace, plan: Plan) -> None:
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
            pass  # starts Python's own helper process
        for number, handler in before.items():
            signal.signal(number, handler if handler is signal.SIG_IGN else pass_on)
        # What is blocked is inherited: Ctrl-C gives no traceback of a process that is still importing.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        arguments = (worker, args, plan, os.getpid(), mp.get_start_method())
        processes += mp.spawn(_spawned, arguments, nprocs=plan.place.local_world, join=False).processes
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for early in list(passed_on):  # it came before there was anybody to pass it on to
            pass_on(early, None)
        local_rank, code = _wait_for(processes)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for number, handler in before.items():
            signal.signal(number, handler)
    if code and interrupted:
        raise SystemExit(INTERRUPTED)
    if -code in passed_on:  # it was still importing
        raise SystemExit(PREEMPTED)
    if code < 0:
        raise RunError(f"process {local_rank} was ended by {signal.Signals(-code).name}; the others were stopped")
    if code:
        raise SystemExit(code)


def _wait_for(processes: Sequence[Any]) -> tuple[int, int]:
    """Wait for all; return rank and exit code of the first failure, or (0, 0). The rest are killed after a grace period."""
    first, deadline = (0, 0), 0.0
    while alive := [process for process in processes if process.is_alive()]:
        if deadline and time.monotonic() > deadline:
            for process in alive:
                process.kill()
        wait([process.sentinel for process in alive], timeout=1)
        bad = [(number, process.exitcode) for number, process in enumerate(processes) if process.exitcode]
        if bad and not deadline:  # time to learn of it, and to save where they were asked to stop
            first, deadline = bad[0], time.monotonic() + (GRACE if bad[0][1] == PREEMPTED else 0) + LEAVE
    return first if first[1] else next(((n, p.exitcode) for n, p in enumerate(processes) if p.exitcode), (0, 0))


def _spawned(local_rank: int, worker: Worker, args: Namespace, plan: Plan, launcher: int, start_method: str) -> None:
    open_streams()
    mp.set_start_method(start_method, force=True)  # of its loaders' workers; a process that was spawned would spawn them
    place = replace(plan.place, rank=plan.place.rank + local_rank, local_rank=local_rank)
    try:
        _join(worker, args, replace(plan, place=place), launcher)
    except USER_ERRORS as error:
        warn(f"error in process {local_rank}: {reason_of(error)}")
        raise SystemExit(1) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def _join(worker: Worker, args: Namespace, plan: Plan, launcher: int | None = None) -> None:
    """Run the worker in this process, as one of the group, watched."""
    global watch
    with closing(Watch(launcher).start()) as watch:
        try:
            device = device_of(plan.place.local_rank, args)
            worker(device, args, replace(plan, seed=_join_group(device, args, plan)))
            wait_for_all()
        except Exception as error:
            lost = _is_lost(error)
            if lost or (watch.stop_signal and not isinstance(error, USER_ERRORS)):
                watch.wait_for_failure()
            told = _with_remedy(error, lost)
            if not watch.publish_failure(reason_of(told)):
                raise SystemExit(1) from None
            if told is error:
                raise
            raise told from None
    if get_world_size() > 1:
        dist.destroy_process_group()  # not after an error: NCCL would wait for ranks that wait for this one


def device_of(local_rank: int, args: Namespace) -> torch.device:
    """The device of a process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Some launchers show each process its own GPU alone; by gloo several may share one.
    return torch.device("cuda", (local_rank if args.gpu is None else args.gpu) % torch.cuda.device_count())


def _join_group(device: torch.device, args: Namespace, plan: Plan) -> int:
    """Set device, group and seed of this process; returns the base of the seeds. A single process needs no group."""
    place, on_gpu = plan.place, device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    # torchrun sets one thread, in which k-means on the CPU takes as many times longer as there are cores for a process.
    given = re.match("[1-9]", os.environ.get("OMP_NUM_THREADS", ""))  # with anything else, each process takes all cores
    if place.local_world > 1 and (not given or "TORCHELASTIC_RUN_ID" in os.environ):
        torch.set_num_threads(place.cores)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = plan.deterministic, not plan.deterministic
    seed = torch.tensor(random.SystemRandom().randrange(2**31) if plan.seed is None else plan.seed)
    if place.world > 1:
        if place.one_node:
            loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
            os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
        store, prefix = meet(place, args.dist_timeout, vars(args))
        # Numbers on the CPU (seeds, the log's means) travel by gloo, also where tensors on GPUs travel by NCCL.
        backend = "cpu:gloo,cuda:nccl" if on_gpu and args.dist_backend == "nccl" else "gloo"
        timeout = timedelta(seconds=args.dist_timeout)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout)
        distributed.patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        watch.join(dist.group.WORLD, (place.host, place.port), prefix, node=place.rank // place.local_world)
        dist.broadcast(seed, 0, group=distributed.patient_group)
    seed_everything(int(seed) + place.rank)  # a spawned process does not inherit its parent's seed
    return int(seed)


def _is_lost(error: Exception) -> bool:
    """Whether another process did not answer, and the error tells of no cause here."""
    text = str(error)
    if is_out_of_memory(error) or OWN_FAULT_OF_NCCL.search(text):
        return False
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)


def _with_remedy(error: Exception, lost: bool) -> Exception:
    """The error, or one whose line tells the user what to do."""
    if isinstance(error, UnreadableImageError):
        return UnreadableImageError(f"{error}, or leave such files out with --skip-unreadable")
    if isinstance(error, RunError):
        return error
    line = line_of(error)
    if lost:
        return RunError(f"another process did not answer, and the reason is unknown ({line}); check whether one hangs")
    if is_out_of_memory(error):
        return RunError(reason_of(error))
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return RunError(f"--compile: {line}; leave it out, or on a CPU install a C++ compiler")
    if OWN_FAULT_OF_NCCL.search(str(error)):
        return RunError(f"NCCL: {line}; NCCL_DEBUG=INFO prints more, and --dist-backend gloo avoids NCCL")
    return error


class SingleProcess(torch.nn.Module):
    """Stands for DistributedDataParallel in a single process, with the same names in its state."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def parallel(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """DistributedDataParallel; with several processes on the CPU, a step's gradients do not depend on the steps before it.

    All ranks begin with rank 0's weights and buffers. Buffers are not broadcast in forward passes: in training mode a pass
    reads no buffer but the queue, which every rank computes alike, so the published numbers stay.
    """
    if get_world_size() == 1:
        return SingleProcess(module)
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
