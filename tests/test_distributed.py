import multiprocessing
import os
import pickle
import random
import re
import shutil
import subprocess
import threading
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import plan_of, save_result
from torch._inductor.exc import InvalidCxxCompiler

from pcl import cli, distributed
from pcl.distributed import (
    assign_jobs,
    derive_seed,
    equal_on_all_ranks,
    gather,
    gather_interleaved,
    get_rank,
    mean_over_ranks,
    seed_everything,
    shared_map,
)
from pcl.errors import RunError
from pcl.run import launch, preflight, rendezvous
from pcl.run.logs import describe_machine
from pcl.run.preflight import Plan
from pcl.run.rendezvous import Place


def test_without_a_group_a_process_answers_for_itself():
    x = torch.randn(5, 2)
    assert distributed.is_main()
    assert distributed.get_world_size() == 1
    assert gather(x) is x
    assert torch.equal(gather_interleaved(x, 5), x)
    assert mean_over_ranks([1.0, 2.0]) == [1.0, 2.0]
    assert shared_map(lambda job: job + 1, [3, 1], cost=[1, 2]) == [4, 2]


def test_seeds_repeat_and_differ():
    def draw(*key):
        seed_everything(*key)
        return random.random(), np.random.rand(), float(torch.rand(()))

    assert draw(7, 1) == draw(7, 1)
    assert len({draw(7), draw(8), draw(7, 1), draw(1, 7)}) == 4
    assert len({derive_seed(0, epoch, index) for epoch in range(20) for index in range(500)}) > 0.999 * 20 * 500


@pytest.mark.parametrize("world", [1, 2, 8, 20])
def test_jobs_are_dealt_evenly(world):
    cost = [100, 100, 100, 100, 100, 50, 50, 50, 50, 50, 25, 25, 25, 25, 25]  # three granularities, five restarts
    owner = assign_jobs(cost, world)
    load = [sum(c for c, o in zip(cost, owner, strict=True) if o == rank) for rank in range(world)]
    assert sum(load) == sum(cost)
    assert max(load) <= 1.34 * max(sum(cost) / world, max(cost))


TORCHRUN = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "a", "MASTER_PORT": 7}
SRUN = {"SLURM_STEP_NUM_TASKS": 4, "SLURM_PROCID": 3, "SLURM_LOCALID": 1, "SLURM_NTASKS": 4, "SLURM_NODELIST": "n[09-10]"}
SRUN |= {"SLURM_JOB_ID": 4100123, "SLURM_STEP_ID": 0}
MPI = {"OMPI_COMM_WORLD_RANK": 1, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_RANK": 1, "OMPI_COMM_WORLD_LOCAL_SIZE": 2}
BATCH_SCRIPT = {"SLURM_NTASKS": 4, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODELIST": "n[09-10]"}
ADDRESS = {"MASTER_ADDR": "b", "MASTER_PORT": 9}


def place_in(monkeypatch, variables, **options):
    monkeypatch.setattr(os, "environ", {name: str(value) for name, value in variables.items()})
    args = Namespace(**{"nproc": None, "gpu": None, "world_size": 1, "rank": 0, "dist_url": None} | options)
    place = rendezvous.launched_outside(args)
    return place and (place.rank, place.world, place.local_rank, place.local_world, place.host, place.port, place.one_node)


@pytest.mark.parametrize(
    ("variables", "options", "place"),
    [
        ({}, {}, None),
        (ADDRESS, {}, None),
        ({"WORLD_SIZE": 1, "RANK": 0}, {}, None),
        (BATCH_SCRIPT, {}, None),
        ({"SLURM_STEP_NUM_TASKS": 1, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NTASKS": 4}, {}, None),
        ({"RANK": 1, "WORLD_SIZE": 2}, {"world_size": 2, "dist_url": "tcp://c:1"}, None),
        (SRUN, {"world_size": 2, "dist_url": "tcp://c:1"}, None),
        (TORCHRUN, {}, (5, 8, 1, 4, "a", 7, False)),
        (TORCHRUN | SRUN, {}, (5, 8, 1, 4, "a", 7, False)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": 8}, {}, (5, 8, 1, 8, "a", 7, True)),
        (SRUN, {}, (3, 4, 1, 2, "n09", 10123, False)),
        (SRUN | ADDRESS | {"WORLD_SIZE": 4}, {}, (3, 4, 1, 2, "b", 9, False)),
        (SRUN, {"dist_url": "tcp://c:1"}, (3, 4, 1, 2, "c", 1, False)),
        (SRUN | {"SLURM_STEP_NODELIST": "n3"}, {}, (3, 4, 1, 4, "127.0.0.1", 10123, True)),
        (MPI | ADDRESS, {}, (1, 2, 1, 2, "b", 9, True)),
    ],
)
def test_a_process_finds_its_place_in_what_launchers_set(monkeypatch, variables, options, place):
    assert place_in(monkeypatch, variables, **options) == place


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        *((without(TORCHRUN, name), f"{name} is not set") for name in TORCHRUN if name != "LOCAL_WORLD_SIZE"),
        *((without(SRUN, name), f"{name} is not set") for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODELIST")),
        (BATCH_SCRIPT | {"SLURM_PROCID": 1}, "SLURM_STEP_NUM_TASKS is not set"),
        (MPI, "MASTER_ADDR is not set"),
        ({"PMI_RANK": 0, "PMI_SIZE": 2}, "MPI_LOCALRANKID is not set"),
        ({"RANK": 0}, "WORLD_SIZE is not set"),
        (TORCHRUN | {"RANK": 8}, "RANK=8 must be less than WORLD_SIZE=8"),
        (TORCHRUN | {"LOCAL_RANK": 4}, "LOCAL_RANK=4 must be less than LOCAL_WORLD_SIZE=4"),
        (TORCHRUN | {"RANK": "zero"}, "RANK=zero is not a number"),
        (TORCHRUN | {"RANK": -1}, "RANK=-1 is not a number"),
        (TORCHRUN | {"MASTER_PORT": 70000}, "MASTER_PORT=70000 is not a number from 0 to 65535"),
        (SRUN | {"SLURM_NODELIST": "a[1-2],b"}, "SLURM's 3 nodes need equally many tasks"),
    ],
)
def test_what_a_launcher_sets_by_half_is_one_line(monkeypatch, capsys, variables, told):
    with pytest.raises(RunError, match=re.escape(told)) as caught:
        place_in(monkeypatch, variables)
    assert "\n" not in str(caught.value)
    args = Namespace(nproc=None, gpu=None, world_size=1, rank=0, dist_url=None, seed=None, batch_size=1)
    with pytest.raises(SystemExit, match="2"):
        preflight.check_launch(cli.Parser(None), args)
    assert told in capsys.readouterr().err


def test_the_list_of_nodes_is_slurm_s():
    assert rendezvous._hosts("a[01-03,5]-x,b,c[9-10]") == ["a01-x", "a02-x", "a03-x", "a5-x", "b", "c9", "c10"]


def processes_of(args):
    place = rendezvous.place_of(args)
    return place.local_world, place.world


def to_check(**options):
    """What `check_launch` reads."""
    usual = {"gpu": None, "world_size": 1, "rank": 0, "dist_url": None, "seed": None, "batch_size": 12, "workers": 0}
    return Namespace(**usual | {"dist_backend": "nccl"} | options)


def test_numbers_of_processes(monkeypatch):
    args = Namespace(nproc=3, gpu=None, world_size=2, rank=0, dist_url=None)
    assert processes_of(args) == (3, 6)
    place_in(monkeypatch, TORCHRUN)
    assert processes_of(args) == (4, 8)


def test_one_task_of_srun_on_a_node_starts_the_processes_of_the_node(monkeypatch):
    place_in(monkeypatch, SRUN | {"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1, "SLURM_LOCALID": 0})
    args = to_check(nproc=4, workers=6)
    plan = preflight.check_launch(cli.Parser(None), args)
    place = plan.place
    assert (plan.batch, plan.workers) == (3, 2)  # of each process; six loader processes at least
    assert (place.world, place.rank, place.host, place.port) == (8, 4, "n09", 10123)
    assert processes_of(args) == (4, 8)


def test_processes_may_share_gpus_by_gloo_or_have_one_of_their_own(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = to_check(nproc=3, dist_backend="gloo")
    preflight.check_launch(cli.Parser(None), args)
    assert [str(launch.device_of(local_rank, args)) for local_rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    args.dist_backend = "nccl"
    with pytest.raises(SystemExit):
        preflight.check_launch(cli.Parser(None), args)
    assert "--nproc: 3 processes for 2 GPUs; start fewer, give --dist-backend gloo" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    place_in(monkeypatch, TORCHRUN)
    args.nproc = None
    preflight.check_launch(cli.Parser(None), args)
    assert str(launch.device_of(3, args)) == "cuda:0"


def test_gpus_that_torch_cannot_use_are_told_and_may_be_hidden(monkeypatch, capsys):
    args = to_check(nproc=None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # by the driver; is_available() asks CUDA's runtime
    with pytest.raises(SystemExit):
        preflight.check_launch(cli.Parser(None), args)
    assert "cannot use the 2 GPUs of this machine: install a newer driver" in capsys.readouterr().err
    assert "no GPU" in describe_machine()


def ask_the_group(device, args, plan):
    rank = get_rank()
    drawn = float(torch.rand(()))
    rows = gather_interleaved(torch.arange(rank, 7, 2)[:, None].float(), 7)
    jobs = [1, 2, 3, 4, 5]
    squares = shared_map(lambda job: (torch.tensor(job * job), torch.full((job, 2), os.getpid()))[:job], jobs, cost=jobs)
    shown = rank == 0 and shutil.which("ss")  # Linux has it
    listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True).stdout if shown else ""
    own = (f"pid={os.getpid()},", f"pid={os.getppid()},")
    save_result(args, rank=rank, device=str(device), seed=plan.seed, starts_workers_by=multiprocessing.get_start_method(),
                drawn=drawn, rows=rows, mean=mean_over_ranks([rank]),
                alike=[equal_on_all_ranks(7), equal_on_all_ranks(7 + rank)],
                squares=[int(result[0]) for result in squares], shapes=[list(result[-1].shape) for result in squares],
                owners=len({int(result[1][0, 0]) for result in squares[1:]}),
                listening=[line.split()[3] for line in listening.splitlines() if any(pid in line for pid in own)])  # fmt: skip


@pytest.mark.dist
def test_two_ranks_know_themselves_and_each_other(two_ranks, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")  # of a batch script
    results = two_ranks(ask_the_group, seed=None)
    assert results[0]["listening"] or not shutil.which("ss")
    for rank, result in enumerate(results):
        assert result["rank"] == rank
        assert result["device"] == "cpu"
        assert result["starts_workers_by"] == multiprocessing.get_start_method()  # as a single process would
        assert result["rows"][:, 0].tolist() == list(range(7))
        assert result["mean"] == [0.5]
        assert result["squares"] == [1, 4, 9, 16, 25]
        assert result["shapes"] == [[], [2, 2], [3, 2], [4, 2], [5, 2]]
        assert result["owners"] == 2
        assert all(address.startswith("127.0.0.1:") for address in result["listening"])
        assert result["alike"] == [True, False]
        assert result["seed"] == results[0]["seed"]
        seed_everything(result["seed"] + rank)
        assert result["drawn"] == float(torch.rand(()))
    assert results[0]["drawn"] != results[1]["drawn"]


def test_a_seed_is_drawn_where_none_is_given_and_known_to_all():
    seeds = []
    for _ in range(2):
        launch.launch(lambda device, args, plan: seeds.append(plan.seed), alone(seed=None), plan_of(alone(seed=None)))
    assert seeds[0] != seeds[1]
    assert not torch.distributed.is_initialized()


def gradients_of_two_steps(device, args, plan):
    torch.manual_seed(get_rank())
    images = torch.randn(4, 3, 8, 8)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 96, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(96 * 36, 96), torch.nn.Linear(96, 7)
    )
    wrapped, steps = launch.parallel(network, device), []
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(images).square().sum().backward()
        steps.append([parameter.grad.clone() for parameter in network.parameters()])
    own = torch.autograd.grad(network(images).square().sum(), list(network.parameters()))
    save_result(args, first=steps[0], second=steps[1], own=list(own))


@pytest.mark.dist
def test_of_three_processes_the_second_step_s_gradients_are_the_first_one_s_to_the_bit(two_ranks):
    results = two_ranks(gradients_of_two_steps, nproc=3)
    for number, (first, second) in enumerate(zip(results[0]["first"], results[0]["second"], strict=True)):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, sum(result["own"][number] for result in results) / 3, rtol=1e-4, atol=1e-4)


NCCL = "NCCL error in: ../c10d/NCCLUtils.cpp:77, {}, NCCL version 2.27.5\n{}: Some words.\nLast error:\n{}\n"
OUT_OF_MEMORY = "out of memory: lower --batch-size or --image-size"
LOST = "another process did not answer"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), OUT_OF_MEMORY),
        (RuntimeError("Error: 'err == cudaSuccess' failed: alloc fail (cudaMalloc error out of memory [2])"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OUT_OF_MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), OUT_OF_MEMORY),
        (MemoryError(), f"{OUT_OF_MEMORY} (MemoryError)"),
        (
            torch.distributed.DistBackendError(
                NCCL.format("unhandled cuda error", "ncclUnhandledCudaError", "Cuda failure 2 'out of memory'")
            ),
            f"{OUT_OF_MEMORY} (Cuda failure 2 'out of memory')",
        ),
        (
            torch.distributed.DistBackendError(
                NCCL.format("invalid usage", "ncclInvalidUsage", "Duplicate GPU detected : rank 0 and rank 1")
            ),
            "NCCL: Duplicate GPU detected : rank 0 and rank 1; ",
        ),
        (
            torch.distributed.DistBackendError(
                NCCL.format("remote process exited", "ncclRemoteError", "socketPollConnect: Connection closed by peer a<7>")
            ),
            f"{LOST}, and the reason is unknown (socketPollConnect: Connection closed by peer a<7>)",
        ),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7"), LOST),
        (torch.distributed.DistNetworkError("Connection reset"), LOST),
        (InvalidCxxCompiler(), "--compile: No working C++ compiler found"),
    ],
)
def test_what_often_ends_a_run_is_one_line_with_its_remedy(error, told):
    def worker(device, args, plan):
        raise error

    with pytest.raises(RunError) as caught:
        launch.launch(worker, alone(), plan_of(alone()))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def alone(**options):
    usual = {"nproc": 1, "gpu": None, "world_size": 1, "rank": 0, "dist_url": None, "dist_backend": "nccl", "seed": 0}
    return Namespace(**usual | {"deterministic": False, "dist_timeout": 60} | options)


def test_an_error_in_the_code_keeps_its_traceback():
    def worker(device, args, plan):
        raise ZeroDivisionError("a fault of ours")

    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        launch.launch(worker, alone(), plan_of(alone()))


def test_a_single_process_has_no_group_no_store_and_the_names_of_several():
    def worker(device, args, plan):
        assert not torch.distributed.is_initialized()
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (False, True)
        assert threading.active_count() == threads + 1  # the one that watches for signals
        network = torch.nn.Linear(2, 3)
        wrapped = launch.parallel(network, device)
        x = torch.randn(4, 2)
        assert torch.equal(wrapped(x), network(x))
        assert list(wrapped.state_dict()) == ["module.weight", "module.bias"]
        assert wrapped.module is network
        seen.append(launch.watch.stop_voted())
        with launch.watch.finish_before_leaving():
            launch.watch.stop_signal = 15
            seen.append(launch.watch.stop_voted())
            launch.watch.stop_signal = 0

    seen, threads = [], threading.active_count()
    launch.launch(worker, alone(), plan_of(alone()))
    assert seen == [False, True]


def test_a_machine_without_a_loopback_interface_says_so(monkeypatch):
    def refuse(*_, **__):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(rendezvous.socket, "create_connection", refuse)
    with pytest.raises(RunError, match=r"the loopback interface does not work \(Network is unreachable\); .*--nproc 1"):
        launch.launch(pytest.fail, alone(nproc=2), plan_of(alone(nproc=2)))


@pytest.mark.parametrize(("on_node", "task", "cores"), [("128", True, 16), ("16", True, 2), ("", True, 2), ("128", False, 2)])
def test_a_process_has_its_part_of_the_cores_or_those_that_it_is_bound_to(monkeypatch, on_node, task, cores):
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", on_node)
    monkeypatch.setattr(rendezvous, "available_cores", lambda: 16)
    assert rendezvous.Place(local_world=8, is_task=task).cores == cores


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "told"),
    [
        ((1, 2, 0.1), "--temperature is 0.2 on one node, 0.1 on another; give all the same options"),
        ((1, 3), "a node counts 3 processes, 1 on each node, another 2 processes, 1 on each node; start equally many on each"),
        ((0, 2), "two processes are number 0 of 2; give each node its own --rank"),
    ],
)
def test_nodes_that_do_not_fit_together_are_told_so_all(monkeypatch, second, told):
    store, ends = rendezvous.serve("127.0.0.1", 0, 20), []
    monkeypatch.setattr(rendezvous, "serve", lambda host, port, _: store)

    def meet(rank, world, temperature=0.2):
        here = rendezvous.Place(rank, world, 0, 1, "127.0.0.1", store.port, True, hosted=False)
        with pytest.raises(RunError) as caught:
            rendezvous.meet(here, 20, {"temperature": temperature, "rank": rank, "data": f"/{rank}"})
        ends.append(str(caught.value))

    threads = [threading.Thread(target=meet, args=place) for place in ((0, 2), second)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    assert ends == [f"--dist-url tcp://127.0.0.1:{store.port}: {ends[0].split(': ', 1)[1]}"] * 2
    assert told in ends[0]


def test_words_of_processes_that_a_launcher_started_before_are_not_heard(monkeypatch):
    store = rendezvous.serve("127.0.0.1", 0, 20)
    prefixes = []

    def meet(rank):
        here = rendezvous.Place(rank, 2, rank, 2, "127.0.0.1", store.port, True, hosted=True)
        prefixes.append(rendezvous.meet(here, 20)[1])

    for attempt in range(2):  # first by the ones, then by those that are started again
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        ranks = [threading.Thread(target=meet, args=(rank,)) for rank in range(2)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join(20)
    assert prefixes[0] == prefixes[1] != prefixes[2] == prefixes[3]


def test_nothing_is_unpickled_from_other_processes(monkeypatch, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    bad = np.frombuffer(pickle.dumps(Trap()), np.uint8)

    def broadcast(tensor, *_, **__):
        tensor.copy_(torch.tensor(len(bad)) if tensor.dim() == 0 else torch.from_numpy(bad.copy()))

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "gloo")
    with pytest.raises(ValueError, match="allow_pickle"):
        distributed._sent_to_all((), 1)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("given", "honored"), [(None, False), ("", False), ("0", False), ("x", False), ("4,2", True), ("2", True)]
)
def test_processes_share_the_cores_unless_a_number_of_threads_is_given(monkeypatch, given, honored):
    monkeypatch.setattr(os, "environ", {} if given is None else {"OMP_NUM_THREADS": given})
    told, place = [], Place(0, 2, 0, 2, one_node=False)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(launch, "meet", lambda *_: 1 / 0)  # nobody is to come
    with pytest.raises(ZeroDivisionError):
        launch._join_group(torch.device("cpu"), Namespace(dist_timeout=1), Plan(place, seed=0, deterministic=True))
    assert told == ([] if honored else [place.cores])
