"""The place of this process among all that train together, and the store by which they find each other."""

import errno
import json
import os
import re
import socket
import threading
import time
from argparse import Namespace
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from pcl.distributed import available_cores
from pcl.errors import RunError, reason_of
from pcl.terminal import leave_now, warn

# The variables in which a launcher tells each process: rank, W, rank on its node, processes of its node.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),  # srun; a batch script alone has no number of tasks
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # the mpiexec of MPICH and Intel MPI
)
LOOPBACK = "127.0.0.1"
# Options that may differ from node to node or from process to process: paths, cores, the place itself.
OWN = {
    "data", "exp_dir", "resume", "init", "pretrained", "subset", "output", "workers", "gpu", "rank", "local_rank", "dist_url",
    "nproc", "multiprocessing_distributed", "dist_timeout", "print_freq",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The place of a process among all that train together."""

    rank: int = 0
    world: int = 1  # W
    local_rank: int = 0
    local_world: int = 1  # processes of this node
    host: str = ""  # of the store
    port: int = 0
    one_node: bool = True
    hosted: bool = False  # the store is in the launcher's process, not in rank 0's
    spawns: bool = True  # no launcher: this process starts those of its node, and is none of them if several
    is_task: bool = False  # of SLURM or MPI; a task that is alone on its node may stand for the node

    @property
    def cores(self) -> int:
        """CPU cores for this process alone: its part of its node's, or those that srun has bound it to."""
        own = available_cores()
        bound = self.is_task and (_number_of("SLURM_CPUS_ON_NODE") or 0) >= own * self.local_world
        return own if bound else max(1, own // self.local_world)


def place_of(args: Namespace) -> Place:
    """The place that a launcher gave to this process, or that of the first process which this one is to start.

    Reads `args.nproc`, `gpu`, `world_size`, `rank` and `dist_url`. RunError if a launcher's variables are missing or wrong.
    """
    outside, nproc = launched_outside(args), args.nproc or (1 if args.gpu is not None else max(1, torch.cuda.device_count()))
    if outside and not (outside.is_task and outside.local_world == 1 and nproc > 1):
        return outside
    url = urlsplit(args.dist_url or "")
    node = outside or Place(args.rank, args.world_size, host=url.hostname or "", port=url.port or 0)
    one = node.world == 1
    return Place(node.rank * nproc, node.world * nproc, 0, nproc, node.host, node.port, one_node=one, hosted=one)


def launched_outside(args: Namespace) -> Place | None:
    """The place that torchrun, srun or mpirun gave to this process; None if there was no launcher.

    Reads `args.world_size` (nodes that are named by hand need no launcher) and `dist_url`.
    """
    told = [name for name in LAUNCHERS[0][:3] if os.environ.get(name)]
    others = [names for names in LAUNCHERS[1:] if (_number_of(names[1]) or 1) > 1 or _number_of(names[0])]
    if len(told) < 3 and (not (told or others) or args.world_size > 1):
        return None
    names = others[0] if others and len(told) < 3 else LAUNCHERS[0]
    rank, world, local_rank, local_world = map(_number_of, names)
    for number, name, total, of in ((rank, names[0], world, names[1]), (local_rank, names[2], local_world, names[3])):
        if number is not None and total is not None and number >= total:
            raise RunError(f"{name}={number} must be less than {of}={total}; correct what sets them")
    if world == 1 and len(told) < 3:
        return None  # variables of a single process
    if rank is None or world is None or local_rank is None:
        raise _missing(next(name for name in names if not os.environ.get(name)))
    url = urlsplit(args.dist_url or "")
    host, port = os.environ.get("MASTER_ADDR") or url.hostname, _number_of("MASTER_PORT") or url.port
    if names[0] == "SLURM_PROCID":
        hosts = _hosts(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "")
        if not hosts:
            raise _missing("SLURM_NODELIST")
        if world % len(hosts):
            raise RunError(f"{names[1]}={world}: SLURM's {len(hosts)} nodes need equally many tasks (--ntasks-per-node)")
        local_world, host = world // len(hosts), host or (hosts[0] if len(hosts) > 1 else LOOPBACK)
        # The same for all tasks of a step, and most likely another one for another step or job.
        port = port or 10000 + sum(_number_of(name, 2**63) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")) % 20000
    if world > 1 and not (host and port):
        raise _missing("MASTER_PORT" if host else "MASTER_ADDR")
    one_node = local_world == world or host in (LOOPBACK, "localhost")
    hosted, is_task = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True", names in others
    return Place(rank, world, local_rank, local_world or world, host or "", port or 0, one_node, hosted, False, is_task)


def _number_of(variable: str, limit: int = 2**16) -> int | None:
    text = os.environ.get(variable, "")
    if text and not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < limit):
        raise RunError(f"{variable}={text} is not a number from 0 to {limit - 1}; correct what sets it, or unset it")
    return int(text) if text else None


def _missing(variable: str) -> RunError:
    given = ", ".join(name for names in LAUNCHERS for name in names if os.environ.get(name))
    return RunError(
        f"{variable} is not set, but a launcher seems to have started this as one of several processes (set: {given}); "
        "set it too, as torchrun does, or unset those to train alone"
    )


def _hosts(nodes: str) -> list[str]:
    """Expand SLURM's list of nodes: "a[01-02,5],b" -> a01, a02, a5, b."""
    hosts = []
    for head, numbers, tail in re.findall(r"([^,\[]+)(?:\[((?:\d+(?:-\d+)?,?)+)\])?([^,]*)", nodes):
        for part in numbers.split(","):
            first, _, last = part.partition("-")
            these = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)] if last else [first]
            hosts += [head + number + tail for number in these]
    return hosts


def serve(host: str, port: int, seconds: float) -> dist.TCPStore:
    """Start a store in this process; on all interfaces, unless the host is this machine alone."""
    listener = None
    socket.getaddrinfo(host, port)  # torch tries a name that is wrong for twice the timeout, and prints pages
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
        host, port, is_master=True, timeout=timedelta(seconds=seconds), wait_for_workers=False,
        master_listen_fd=listener, use_libuv=listener is None,  # torch 2.7's libuv takes no listener
    )  # fmt: skip


def _give_up(told: str) -> None:
    warn(told)
    leave_now(1)


def meet(place: Place, seconds: float, options: dict[str, Any] | None = None) -> tuple[dist.Store, str]:
    """Wait until all processes are here. Returns their store, and the prefix of its keys.

    RunError if the port is in use, not all come within `seconds`, or they differ in their numbers of processes or `options`.
    """
    given = {name: str(value) for name, value in (options or {}).items() if name not in OWN}
    where, within = f"--dist-url tcp://{place.host}:{place.port}", f"within {seconds:g} s (--dist-timeout)"
    serves, end = place.rank == 0 and not place.hosted, time.monotonic() + seconds
    try:
        if serves:
            store = serve(place.host, place.port, seconds)
        else:
            _wait_for_server(place.host, place.port, end)  # torch's own waiting fills pages with warnings
            left = timedelta(seconds=max(1.0, end - time.monotonic()))
            mute = f"error: {where}: what listens there did not answer {within}; check that it is node 0"
            alarm = threading.Timer(left.total_seconds(), _give_up, [mute])  # torch would wait for ever
            alarm.daemon = True
            alarm.start()
            store = dist.TCPStore(place.host, place.port, is_master=False, timeout=left, wait_for_workers=False)
            alarm.cancel()
        # The store of torchrun's agent still holds the words of the processes of an earlier attempt.
        prefix = f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        words, plan = dist.PrefixStore(prefix, store), f"{place.world} processes, {place.local_world} on each node"
        others = json.loads(words.compare_set("options", "", json.dumps(given)))
        differ = [(name, others.get(name), value) for name, value in given.items() if others.get(name) != value]
        if (other := words.compare_set("plan", "", plan).decode()) != plan:
            words.set("problem", f"a node counts {plan}, another {other}; start equally many on each (--nproc, --world-size)")
        elif words.add(f"process/{place.rank}", 1) > 1:
            words.set("problem", f"two processes are number {place.rank} of {place.world}; give each node its own --rank")
        elif differ:
            name, first, second = differ[0]
            told = f"--{name.replace('_', '-')} is {first} on one node, {second} on another"
            words.set("problem", f"{told}; give all the same options")
        words.add("came", 1)
        while place.rank == 0 and not words.check(["verdict"]):
            came, hopeless = words.add("came", 0), words.check(["problem"])
            end = min(end, time.monotonic() + 1) if hopeless else end  # who comes until then is told so too
            if came >= place.world and not hopeless:
                words.set("verdict", "")
            elif time.monotonic() > end:
                late = f"{came} of {place.world} processes came {within}"
                late += "; start every node with this URL and the same --world-size"
                words.set("verdict", words.compare_set("problem", "", late).decode())
            time.sleep(0.05)
        while not words.check(["verdict"]):
            if time.monotonic() > end:
                raise TimeoutError("timed out")
            time.sleep(0.05)
    except (OSError, UnicodeError, dist.DistError) as error:  # UnicodeError: no host can have such a name
        if "EADDRINUSE" in str(error) or (isinstance(error, OSError) and error.errno == errno.EADDRINUSE):
            raise RunError(f"{where}: the port is in use; name another one") from None
        reason = reason_of(error).splitlines()[0]
        if serves:
            raise RunError(f"{where}: processes cannot meet there: {reason}") from None
        raise RunError(f"{where}: process 0 did not answer {within}: {reason}; check that node 0 runs there") from None
    if verdict := words.get("verdict").decode():
        time.sleep(1)  # the others are to hear of it before the store is gone
        del words, store
        raise RunError(f"{where}: {verdict}") if place.local_rank == 0 else SystemExit(1)  # one process of a node tells
    return words, prefix


def _wait_for_server(host: str, port: int, end: float) -> None:
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
