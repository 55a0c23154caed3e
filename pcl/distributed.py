"""Launch, and what a process asks of its group: its rank, gathering, sharing jobs, seeds.

Letters: W ranks, N images. Without a group everything answers for a single process.
"""

from __future__ import annotations

import errno
import heapq
import io
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
from dataclasses import dataclass
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
# Of the allocators of torch, faiss, cuBLAS, cuDNN, NCCL and C++.
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory|ALLOC_FAILED|bad_alloc", re.IGNORECASE)
OWN_FAULT_OF_NCCL = re.compile(r"ncclUnhandledCudaError|ncclInvalid|ncclInternalError|shared memory segment")


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


# What a launcher says of each process: rank, W, rank on its node, processes of its node.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),  # srun: a batch script alone has no such number of tasks
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # the mpiexec of MPICH and Intel MPI
)
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """The place of this process among all that train together."""

    rank: int
    world: int  # W
    local_rank: int
    local_world: int  # processes of this node
    host: str  # where the store is
    port: int
    one_node: bool
    hosted: bool  # the store is in the launcher's process, not in rank 0's
    is_task: bool = False  # of SLURM or MPI; the only one of a node may stand for the node


def launched_outside(args: Namespace) -> Place | None:
    """The place that an outside launcher such as torchrun, srun or mpirun has given to this process; None if there is none.

    Reads `args.world_size` (nodes that are named by hand need no launcher) and `dist_url`.

    Raises:
        RunError: other processes are meant, but a variable that says how to join them is missing or wrong.
    """
    told = [name for name in LAUNCHERS[0][:3] if os.environ.get(name)]
    others = [names for names in LAUNCHERS[1:] if (_number_of(names[1]) or 1) > 1 or _number_of(names[0])]
    if len(told) < 3 and (not (told or others) or args.world_size > 1):
        return None
    names = others[0] if others and len(told) < 3 else LAUNCHERS[0]
    rank, world, local_rank, local_world = map(_number_of, names)
    for number, name, total, of in ((rank, names[0], world, names[1]), (local_rank, names[2], local_world, names[3])):
        if number is not None and total is not None and number >= total:
            raise RunError(f"{name}={number} must be less than {of}={total}; mend what sets them")
    if world == 1 and len(told) < 3:
        return None  # half a word, but of nobody else
    if rank is None or world is None or local_rank is None:
        raise _missing(next(name for name in names if not os.environ.get(name)))
    host, port = os.environ.get("MASTER_ADDR"), _number_of("MASTER_PORT")
    if args.dist_url:
        url = urlsplit(args.dist_url)
        host, port = host or url.hostname, port or url.port
    if names[0] == "SLURM_PROCID":
        hosts = _hosts(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "")
        if not hosts:
            raise _missing("SLURM_NODELIST")
        if world % len(hosts):
            raise RunError(f"{names[1]}={world}: SLURM's {len(hosts)} nodes must have as many tasks each (--ntasks-per-node)")
        local_world, host = world // len(hosts), host or (hosts[0] if len(hosts) > 1 else LOOPBACK)
        # The same for all of a step, and most likely another one for another step or job.
        port = port or 10000 + sum(_number_of(name, 2**63) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")) % 20000
    if world > 1 and not (host and port):
        raise _missing("MASTER_PORT" if host else "MASTER_ADDR")
    one_node = local_world == world or host in (LOOPBACK, "localhost")
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, world, local_rank, local_world or world, host or "", port or 0, one_node, hosted, names in others)


def _number_of(variable: str, limit: int = 2**16) -> int | None:
    text = os.environ.get(variable, "")
    if text and not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < limit):
        raise RunError(f"{variable}={text} is not a number from 0 to {limit - 1}; mend what sets it, or unset it")
    return int(text) if text else None


def _missing(variable: str) -> RunError:
    return RunError(
        f"{variable} is not set, but other variables say that a launcher has started this as one of several processes; "
        "set it too, as torchrun does, or unset those to train alone"
    )


def _hosts(nodes: str) -> list[str]:
    """SLURM's list of nodes: "a[01-02,5],b" -> a01, a02, a5, b."""
    hosts = []
    for head, numbers, tail in re.findall(r"([^,\[]+)(?:\[((?:\d+(?:-\d+)?,?)+)\])?([^,]*)", nodes):
        for part in numbers.split(","):
            first, _, last = part.partition("-")
            width = len(first)
            these = [f"{n:0{width}}" for n in range(int(first), int(last) + 1)] if last else [first]
            hosts += [head + number + tail for number in these]
    return hosts


def own_processes(args: Namespace) -> int:
    """Number of training processes that this one starts where no launcher did: as many as GPUs, if it is not told."""
    return args.nproc or (1 if args.gpu is not None else max(1, torch.cuda.device_count()))


def local_processes(args: Namespace) -> int:
    """Number of training processes on this machine."""
    outside = launched_outside(args)
    return outside.local_world if outside else own_processes(args)


def total_processes(args: Namespace) -> int:
    """W, the number of training processes on all machines."""
    outside = launched_outside(args)
    return outside.world if outside else args.world_size * own_processes(args)


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
        store = _serve(LOOPBACK, 0, args.dist_timeout)
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
    global _patient_group
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
        store, prefix = _meet(args, here)
        # Numbers on the CPU (seeds, figures of the log) travel by gloo, also where tensors on GPUs travel by NCCL.
        backend = "cpu:gloo,cuda:nccl" if on_gpu and args.dist_backend == "nccl" else "gloo"
        timeout = timedelta(seconds=args.dist_timeout)
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world, timeout=timeout)
        _patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        assert _watch
        _watch.join(_patient_group, (here.host, here.port), prefix, node=here.rank // here.local_world)
        dist.broadcast(chosen, 0, group=_patient_group)
    args.seed = int(chosen)
    seed_everything(args.seed + here.rank)  # a spawned process does not inherit its parent's seed


def _serve(host: str, port: int, patience: float) -> dist.TCPStore:
    """A store in this process; on all interfaces, unless the host is this machine alone.

    Raises:
        RunError: there is no loopback interface.
        OSError, dist.DistError: the port is in use, among others.
    """
    listener = None
    if host in (LOOPBACK, "localhost"):
        server = socket.create_server((LOOPBACK, port))
        port = server.getsockname()[1]
        try:
            socket.create_connection((LOOPBACK, port), timeout=5).close()
        except OSError as error:
            remedy = "switch it on (ip link set lo up), or train with --nproc 1"
            raise RunError(f"the loopback interface does not work ({error.strerror or error}); {remedy}") from None
        listener = server.detach()
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=patience),
        wait_for_workers=False,
        master_listen_fd=listener,
        use_libuv=listener is None,  # torch 2.7's libuv takes no listener
    )


def _meet(args: Namespace, here: Place) -> tuple[dist.Store, str]:
    """The store by which the processes find each other, once all are here, and the prefix of its keys.

    Raises:
        RunError: the port is in use, not all came in time, or they do not fit together.
    """
    where, end = f"--dist-url tcp://{here.host}:{here.port}", time.monotonic() + args.dist_timeout
    serves, in_time = here.rank == 0 and not here.hosted, f"within {args.dist_timeout:g} s (--dist-timeout)"
    try:
        if serves:
            store = _serve(here.host, here.port, args.dist_timeout)
        else:
            _wait_for_server(here.host, here.port, end)  # torch's own waiting fills pages with warnings
            left = timedelta(seconds=max(1.0, end - time.monotonic()))
            store = dist.TCPStore(here.host, here.port, is_master=False, timeout=left, wait_for_workers=False)
        # The store of an outside launcher may hold the words of processes that it started before. Nobody had this process's
        # ticket before, and only a rank 0 that is here now tells it the prefix.
        ticket = store.add("ticket", 1)
        if here.rank > 0 or (serves and store.add("served", 1) > 1):  # a second rank 0 is told so like others
            ticket = int(_wait_for_word(store, f"attempt/{ticket}", end))
        prefix = f"attempt{ticket}"
        words = dist.PrefixStore(prefix, store)
        plan = f"{here.world} processes, {here.local_world} on each node"
        if (other := words.compare_set("plan", "", plan).decode()) != plan:
            words.set("problem", f"a node counts {plan}, another {other}; start as many on each (--nproc, --world-size)")
        elif words.add(f"process/{here.rank}", 1) > 1:
            words.set("problem", f"two processes are number {here.rank} of {here.world}; give each node its own --rank")
        came, answered = words.add("came", 1), 0
        while here.rank == 0 and not words.check(["verdict"]):
            latest = store.add("ticket", 0)
            for asked in range(answered + 1, latest + 1):
                store.set(f"attempt/{asked}", str(ticket))
            answered, came = latest, words.add("came", 0)
            if hopeless := words.check(["problem"]):
                end = min(end, time.monotonic() + 1)  # who comes until then is told so too
            if came >= here.world and not hopeless:
                words.set("verdict", "")
            elif time.monotonic() > end:
                remedy = f"start every node with this URL and --world-size {args.world_size}"
                late = f"{came} of {here.world} processes came {in_time}; {remedy}"
                words.set("verdict", words.compare_set("problem", "", late).decode())
            time.sleep(0.05)
        if verdict := _wait_for_word(words, "verdict", end):
            time.sleep(1)  # the store may end with this process; the others are to hear of it
            raise RunError(f"{where}: {verdict}") if here.local_rank == 0 else SystemExit(1)  # one of a node tells
        return words, prefix
    except (OSError, dist.DistError) as error:
        if "EADDRINUSE" in str(error) or (isinstance(error, OSError) and error.errno == errno.EADDRINUSE):
            raise RunError(f"{where}: the port is in use; name another one") from None
        reason = reason_of(error).splitlines()[0]
        if serves:
            raise RunError(f"{where}: processes cannot meet there: {reason}") from None
        raise RunError(f"{where}: process 0 did not answer {in_time}: {reason}; is node 0 running, and is it there?") from None


def _wait_for_word(store: dist.Store, key: str, end: float) -> str:
    while not store.check([key]):
        if time.monotonic() > end:
            raise TimeoutError("timed out")
        time.sleep(0.05)
    return store.get(key).decode()


def _wait_for_server(host: str, port: int, end: float) -> None:
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


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
    """`pcl.watch.Watch.guarded` of this process's watch: what is inside is finished and saved where a signal asks to stop."""
    return _watch.guarded() if _watch else nullcontext()


def should_stop() -> bool:
    """`pcl.watch.Watch.should_stop`: asked after each step, by all."""
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


def exchange(rows: Tensor, order: Tensor) -> Tensor:
    """Deal the rows of all ranks out anew: each is sent only to the rank that is to have it.

    Args:
        rows: (B, ..) numbers rank * B to rank * B + B - 1 of all; B is the same on every rank.
        order: (W, B) int64 on the CPU, the same on every rank: the numbers of the rows that each is to have, each number once.

    Returns:
        (B, ..) this rank's rows in their order. The host does not wait for a GPU, since it knows who sends what to whom.
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
    """What is on the CPU, on a device that fetches it while the host goes on."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def talking_device() -> str:
    """Where numbers that the host knows travel: on the CPU, except in a group that somebody else has made with NCCL alone."""
    return "cuda" if dist.is_initialized() and dist.get_backend(_patient_group) == "nccl" else "cpu"


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
    function: Callable[[Any], Sequence[Tensor]],
    jobs: Sequence[Any],
    cost: Sequence[float],
    track: Callable[[list[int]], Iterable[int]] = iter,
) -> list[Sequence[Tensor]]:
    """`[function(job) for job in jobs]`, each job done by one rank and its result sent to all.

    Args:
        function: gives tensors on the CPU; must not use a collective.
        jobs: the same on every rank.
        cost: the expected work of each, in any unit, by which they are dealt out: equal costs, equal ranks.
        track: is given the numbers of this rank's jobs and gives them back one by one, to show how far it is.
    """
    owner = deal(cost, get_world_size())
    mine = {j: function(jobs[j]) for j in track([j for j, rank in enumerate(owner) if rank == get_rank()])}
    if not dist.is_initialized():
        return [mine[j] for j in range(len(jobs))]
    return [_sent_to_all(mine.get(j, ()), owner[j]) for j in range(len(jobs))]


def _sent_to_all(tensors: Sequence[Tensor], source: int) -> list[Tensor]:
    """The tensors of the rank `source`, in NumPy's file format: shapes and dtypes travel too, and nothing is unpickled."""
    file = io.BytesIO()
    np.savez(file, *tensors)
    device = talking_device()
    size = torch.tensor(len(file.getvalue()), device=device)
    dist.broadcast(size, source, group=_patient_group)
    content = torch.empty(int(size), dtype=torch.uint8, device=device)
    if get_rank() == source:
        content.copy_(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
    dist.broadcast(content, source, group=_patient_group)
    with np.load(io.BytesIO(content.cpu().numpy().tobytes()), allow_pickle=False) as arrays:
        return [torch.from_numpy(arrays[name]) for name in arrays.files]


def deal(cost: Sequence[float], world: int) -> list[int]:
    """The rank that does each job: largest first, each to the rank with the least work so far."""
    owner = [0] * len(cost)
    load = [(0.0, rank) for rank in range(world)]
    for job in sorted(range(len(cost)), key=lambda j: -cost[j]):
        work, owner[job] = heapq.heappop(load)
        heapq.heappush(load, (work + cost[job], owner[job]))
    return owner
