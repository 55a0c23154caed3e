"""How the processes of a run find each other."""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from argparse import Namespace
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from pcl.errors import RunError, reason_of

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


def serve(host: str, port: int, patience: float) -> dist.TCPStore:
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


def meet(args: Namespace, here: Place) -> tuple[dist.Store, str]:
    """The store by which the processes find each other, once all are here, and the prefix of its keys.

    Raises:
        RunError: the port is in use, not all came in time, or they do not fit together.
    """
    where, end = f"--dist-url tcp://{here.host}:{here.port}", time.monotonic() + args.dist_timeout
    serves, in_time = here.rank == 0 and not here.hosted, f"within {args.dist_timeout:g} s (--dist-timeout)"
    try:
        if serves:
            store = serve(here.host, here.port, args.dist_timeout)
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
