import json
import time

import pytest
import torch

from pcl import logs
from pcl.logs import Meters, RunLog, StepProgress, log, show


def test_meters_are_means():
    meters = Meters()
    assert meters.means() == {}
    for value in (1.0, 2.0, 6.0):
        meters.add(loss=torch.tensor(value, requires_grad=True), acc=torch.tensor(value / 10))
    assert meters.means() == pytest.approx({"loss": 3, "acc": 0.3})
    assert meters.means_over_ranks() == pytest.approx({"loss": 3, "acc": 0.3})


def test_losses_are_shown_with_the_accuracy_in_percent():
    means = {"loss": 7.5, "loss_instance": 1.5, "acc_instance": 0.25, "loss_prototype": 6.0, "acc_prototype": 0.0123}
    assert show(means) == "loss 7.500  instance 1.500 (25.0 %)  prototype 6.000 (1.2 %)"
    assert show({"loss": 1.5, "loss_instance": 1.5}) == "loss 1.500  instance 1.500"


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_printed_figure_is_in_the_log(tmp_path, capsys):
    record = RunLog(tmp_path / "new", {"data": tmp_path})
    progress = StepProgress("epoch 1/2", 5, 8, print_freq=2, record=record, epoch=0)
    meters = Meters()
    for step in range(1, 6):
        meters.add(loss=torch.tensor(float(step)))
        progress.step(step, meters)
    progress.close(meters, lr=0.5)

    head, *rest = records(tmp_path / "new")
    assert head.keys() == {"time", "command", "args", "machine", "versions"}
    assert head["args"] == {"data": str(tmp_path)}
    assert abs(head["time"] - time.time()) < 60
    assert [(r["epoch"], r.get("step"), r["loss"]) for r in rest] == [(0, 2, 1.5), (0, 4, 2.5), (0, None, 3.0)]
    assert rest[-1]["lr"] == 0.5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("epoch 1/2  step 2/5  loss 1.500")
    assert lines[2].startswith("epoch 1/2  loss 3.000")


def test_only_the_main_process_speaks_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logs, "is_main", lambda: False)
    record = RunLog(tmp_path / "new", {})
    meters = Meters()
    meters.add(loss=torch.tensor(1.0))
    progress = StepProgress("epoch", 1, 8, print_freq=1, record=record, epoch=0)
    progress.step(1, meters)
    progress.close(meters)
    log("hello")
    assert not (tmp_path / "new").exists()
    assert capsys.readouterr() == ("", "")
