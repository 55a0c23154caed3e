import errno
import io
import json
import os
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pcl.errors import RunError
from pcl.run import logs
from pcl.run.logs import EpochLog, Meters, RunLog, TensorBoard, log, show, write_result


def test_meters_are_means():
    meters = Meters()
    assert meters.means() == {}
    for value in (1.0, 2.0, 6.0):
        meters.add(loss=torch.tensor(value, requires_grad=True), acc=torch.tensor(value / 10))
    assert meters.means() == pytest.approx({"loss": 3, "acc": 0.3})
    assert meters.means_over_ranks() == pytest.approx({"loss": 3, "acc": 0.3})
    meters = Meters.from_state(meters.state_over_ranks())
    meters.add(loss=torch.tensor(7.0), acc=torch.tensor(0.7, dtype=torch.float64))
    assert meters.means() == pytest.approx({"loss": 4, "acc": 0.4})
    meters.add(2, loss=torch.tensor(1.0), acc=torch.tensor(0.7))  # a step that counts twice
    assert meters.means() == pytest.approx({"loss": 3, "acc": 0.5})
    meters.add(loss=torch.tensor(torch.nan), acc=torch.tensor(0.4))
    assert (meters.finite_steps, meters.steps) == (5, 6)


def test_meters_that_nobody_asks_keep_few_figures():
    meters = Meters()
    for _ in range(1500):
        meters.add(loss=torch.tensor(0.1))
    assert len(meters._waiting) == 500
    assert meters.means() == pytest.approx({"loss": 0.1})


@pytest.mark.parametrize(
    ("encoding", "shown"), [("utf-8", "Käse 猫 caf\\udce9"), ("latin-1", "Käse \\u732b caf\\udce9"), ("ascii", "K\\xe4se ")]
)
def test_a_name_that_cannot_be_shown_is_escaped(monkeypatch, encoding, shown):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    log("Käse 猫 caf\udce9")
    assert out.getvalue().decode(encoding).startswith(shown)


def test_losses_are_shown_with_the_accuracy_in_percent():
    means = {"loss": 7.5, "loss_instance": 1.5, "acc_instance": 0.25, "loss_prototype": 6.0, "acc_prototype": 0.0123}
    assert show(means) == "loss 7.500  instance 1.500 (25.0 %)  prototype 6.000 (1.2 %)"
    assert show({"loss": 1.5, "loss_instance": 1.5}) == "loss 1.500  instance 1.500"


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_printed_figure_is_in_the_log(tmp_path, capsys):
    record = RunLog(tmp_path / "new", {"data": tmp_path})
    progress = EpochLog("epoch 1/2", 5, 8, print_freq=2, record=record, epoch=0)
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


def test_a_resumed_epoch_is_as_fast_as_the_steps_that_are_new(tmp_path, capsys):
    progress = EpochLog("epoch 1/2", 10, 8, print_freq=2, record=RunLog(tmp_path, {}), epoch=0, first=4)
    meters = Meters()
    meters.add(loss=torch.tensor(1.0))
    progress.start -= 8  # seconds
    progress.step(6, meters)
    progress.close(meters)
    step, epoch = capsys.readouterr().out.splitlines()
    assert step.endswith("  2 images/s (0% waiting for data)  16 s left")
    assert epoch.endswith("  6 images/s  8 s")


def test_the_time_that_a_loader_needs_is_told_apart(tmp_path):
    record = RunLog(tmp_path, {}, tmp_path)
    progress = EpochLog("epoch 1/1", 3, 8, print_freq=9, record=record, epoch=4)

    def slow_loader():
        for batch in "abc":
            time.sleep(0.1)
            yield batch

    assert list(progress.batches(slow_loader())) == [(1, "a"), (2, "b"), (3, "c")]
    time.sleep(0.2)
    progress.close(Meters(), lr=0.5)
    figures = records(tmp_path)[-1]
    assert figures["data_seconds"] >= 0.3
    assert figures["compute_seconds"] >= 0.2
    assert figures["data_seconds"] + figures["compute_seconds"] == pytest.approx(figures["seconds"])
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("lr")] == [(4, 0.5)]
    assert {"data_seconds", "compute_seconds", "images_per_second"} <= set(board.Tags()["scalars"])


def test_a_full_disk_costs_curves_and_no_run(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    board = TensorBoard(tmp_path / "board")
    monkeypatch.setattr("tensorboard_logger.Logger._write_event", full)
    board.write(0, loss=1.0)
    assert capsys.readouterr().out == (
        f"warning: {tmp_path}/board cannot be written (No space left on device); the run goes on\n"
    )
    with pytest.raises(RunError, match=r"^\S+/new cannot be written: No space left on device$"):
        TensorBoard(tmp_path / "new")


def test_only_the_main_process_speaks_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logs, "is_main", lambda: False)
    record = RunLog(tmp_path / "new", {})
    meters = Meters()
    meters.add(loss=torch.tensor(1.0))
    progress = EpochLog("epoch", 1, 8, print_freq=1, record=record, epoch=0)
    progress.step(1, meters)
    progress.close(meters)
    log("hello")
    assert not (tmp_path / "new").exists()
    assert capsys.readouterr() == ("", "")


def test_a_result_is_written_whole_or_the_earlier_one_stays(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "real.json").write_text("earlier")
    (tmp_path / "o.json").symlink_to("real.json")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"real\.json cannot be written: No space left"):
            write_result(tmp_path / "o.json", {"seed": 3}, full=0.5)
    assert (tmp_path / "o.json").read_text() == "earlier"
    write_result(tmp_path / "o.json", {"seed": 3}, full=0.5)
    result = json.loads((tmp_path / "real.json").read_text())
    assert (result["settings"], result["full"]) == ({"seed": "3"}, 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.json", "real.json"]
