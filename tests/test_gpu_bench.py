import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import main_pcl
from pcl.clustering import Clustering
from pcl.run.preflight import Plan

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu

TINY = "-a shufflenet_v2_x0_5 -b 16 --image-size 64 --images 50 --num-cluster 5,20 --steps 1".split()  # noqa: SIM905


def test_both_sides_take_the_same_step():
    args = gpu.get_parser().parse_args(TINY)
    given = gpu.settings(args, "--lr 0.003 --moco-m 0.5")
    model = main_pcl.start_model(given, Plan())
    for key in model.encoder_k.parameters():
        key.data.mul_(1.1)  # so that the momentum update has something to do
    views = torch.randint(256, (2, 16, 3, 64, 64), dtype=torch.uint8)
    clusterings = [
        Clustering(torch.arange(50) % k, F.normalize(torch.randn(k, 128), dim=1), torch.rand(k) + 1) for k in (5, 20)
    ]
    losses, states = [], []
    for epoch in (gpu.epoch_published, gpu.epoch_here):
        own = copy.deepcopy(model)
        losses.append(epoch(own, gpu.Batches((views, torch.arange(16)), 1, lambda number: None), clusterings, given))
        states.append(own.state_dict())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-4)
    moved = (states[0]["encoder_q.conv1.0.weight"] - model.encoder_q.conv1[0].weight).abs().max()
    assert moved > 1e-3


def test_tables_are_made(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "OPTIONS", {"here": "", "reduced": "--amp bf16 --channels-last"})
    args = gpu.get_parser().parse_args(TINY)
    rows = [line.split(" | ") for line in gpu.steps(args, torch.device("cpu")) if " ms " in line]
    assert [row[0] for row in rows] == ["| published", "| here", "| reduced"]
    assert all(float(row[1].removesuffix(" ms")) > 0 for row in rows)
    assert len([*gpu.clusters(args, torch.device("cpu"))]) == 7
    assert "images/s  " not in capsys.readouterr().out  # the lines of the runs
