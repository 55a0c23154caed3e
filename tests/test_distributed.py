import os
import random
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import save_result

from pcl import distributed
from pcl.distributed import (
    deal,
    derive_seed,
    gather,
    gather_interleaved,
    get_rank,
    mean_over_ranks,
    same_on_all,
    seed_everything,
    shared_map,
)


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
    owner = deal(cost, world)
    load = [sum(c for c, o in zip(cost, owner, strict=True) if o == rank) for rank in range(world)]
    assert sum(load) == sum(cost)
    assert max(load) <= 1.34 * max(sum(cost) / world, max(cost))


def test_an_outside_launcher_sets_the_numbers(monkeypatch):
    args = Namespace(nproc=None, gpu=None, world_size=1)
    assert not distributed.launched_outside()
    assert distributed.total_processes(args) == 1
    assert distributed.total_processes(Namespace(nproc=3, gpu=None, world_size=2)) == 6
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.launched_outside()
    assert distributed.local_processes(args) == 4
    assert distributed.total_processes(args) == 8


def ask_the_group(device, args):
    rank = get_rank()
    drawn = float(torch.rand(()))
    rows = gather_interleaved(torch.arange(rank, 7, 2)[:, None].float(), 7)
    squares = shared_map(lambda job: (job * job, os.getpid()), [1, 2, 3, 4, 5], cost=[1, 2, 3, 4, 5])
    save_result(args, rank=rank, device=str(device), seed=args.seed, drawn=drawn, rows=rows, mean=mean_over_ranks([rank]),
                alike=[same_on_all(7), same_on_all(7 + rank)],
                squares=[s for s, _ in squares], owners=len({pid for _, pid in squares}))  # fmt: skip


@pytest.mark.dist
def test_two_ranks_know_themselves_and_each_other(two_ranks):
    results = two_ranks(ask_the_group)
    for rank, result in enumerate(results):
        assert result["rank"] == rank
        assert result["device"] == "cpu"
        assert result["rows"][:, 0].tolist() == list(range(7))
        assert result["mean"] == [0.5]
        assert result["squares"] == [1, 4, 9, 16, 25]
        assert result["owners"] == 2
        assert result["alike"] == [True, False]
        seed_everything(0 + rank)
        assert result["drawn"] == float(torch.rand(()))
    assert results[0]["drawn"] != results[1]["drawn"]


def test_a_seed_is_drawn_where_none_is_given_and_known_to_all():
    seeds = []
    for _ in range(2):
        args = Namespace(
            nproc=1,
            gpu=None,
            world_size=1,
            rank=0,
            dist_url=None,
            dist_backend="nccl",
            seed=None,
            deterministic=False,
            dist_timeout=60,
        )
        distributed.launch(lambda device, args: seeds.append(args.seed), args)
    assert seeds[0] != seeds[1]
    assert not torch.distributed.is_initialized()


def gradients_of_two_steps(device, args):
    torch.manual_seed(get_rank())
    images = torch.randn(4, 3, 8, 8)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 96, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(96 * 36, 96), torch.nn.Linear(96, 7)
    )
    wrapped, steps = distributed.parallel(network, device), []
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


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory: lower --batch-size"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (MemoryError(), "out of memory: lower --batch-size or --image-size (MemoryError)"),
    ],
)
def test_what_often_ends_a_run_is_one_line_with_its_remedy(error, told):
    def worker(device, args):
        raise error

    args = Namespace(nproc=1, gpu=None, world_size=1, rank=0, dist_url=None, dist_backend="nccl", seed=0, dist_timeout=60)
    args.deterministic = False
    with pytest.raises(distributed.RunError) as caught:
        distributed.launch(worker, args)
    torch.distributed.destroy_process_group()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_in_the_code_keeps_its_traceback():
    def worker(device, args):
        raise ZeroDivisionError("a fault of ours")

    args = Namespace(nproc=1, gpu=None, world_size=1, rank=0, dist_url=None, dist_backend="nccl", seed=0, dist_timeout=60)
    args.deterministic = False
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        distributed.launch(worker, args)
    torch.distributed.destroy_process_group()
