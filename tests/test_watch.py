"""Signals, failures and silence, in processes of their own: what a run of days meets."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same, fork_server, free_port, plan_of, run_script, save_result, weights, write_voc_shaped
from PIL import Image

import main_pcl
from pcl import terminal
from pcl.checkpoint import LAST, load
from pcl.distributed import get_rank
from pcl.errors import INTERRUPTED, PREEMPTED, RunError
from pcl.run import launch, rendezvous, watch
from pcl.run.rendezvous import Place

sys.path.insert(0, str(ROOT / "benchmarks"))
import faults

SETTINGS = "-a shufflenet_v2_x0_5 --image-size 32 -b 4 --pcl-r 20 --low-dim 16 --num-cluster 3,5 --warmup-epoch 1 --epochs 2 "
SETTINGS += "--mlp --aug-plus --cos --moco-m 0.9 -p 1 -j 0 --seed 1 --lr 0.001 --monitor-freq 0"


class Run:
    """`python main_pcl.py` as a user starts it, but for the imports: leader of processes that Ctrl-C reaches all."""

    def __init__(self, images, exp_dir, *options):
        self.exp_dir, self.out = exp_dir, exp_dir.with_suffix(".out")
        command = [str(ROOT / "main_pcl.py"), str(images), *SETTINGS.split(), "--exp-dir", str(exp_dir), *options]
        self.out.touch()
        self.process = fork_server().Process(target=faults.lead, args=(command, self.out))
        self.process.start()

    def ranks(self):
        """Process ids of its training processes."""
        return faults.ranks_of(self.process.pid)

    def wait_for(self, text, seconds=120):
        end = time.monotonic() + seconds
        while text not in self.out.read_text():
            assert self.process.is_alive(), self.out.read_text()
            assert time.monotonic() < end, self.out.read_text()
            time.sleep(0.05)

    def end(self, seconds=60):
        """Its exit code and what it printed; no process of it may be left."""
        self.process.join(seconds)
        end = time.monotonic() + 20
        while left := faults.processes_of(self.process.pid):
            assert time.monotonic() < end, f"{left} still run"
            time.sleep(0.1)
        return self.process.exitcode, self.out.read_text()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """DIR with train/ of 65 noisy images: an epoch of 16 steps, long enough to be met in its middle."""
    root = tmp_path_factory.mktemp("noise")
    (root / "train").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (65, 36, 36, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(root / "train" / f"{i:02d}.png")
    return root


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("number", "code", "nproc"),
    [
        (signal.SIGTERM, PREEMPTED, 2),
        (signal.SIGUSR1, PREEMPTED, 2),
        (signal.SIGINT, INTERRUPTED, 2),
        (signal.SIGUSR1, PREEMPTED, 1),
    ],
    ids=["SIGTERM to the launcher", "SIGUSR1 to all", "Ctrl-C", "a single process"],
)
def test_a_signal_ends_all_processes_saved(images, tmp_path, number, code, nproc):
    run = Run(images, tmp_path / "run", "--nproc", str(nproc))
    run.wait_for("epoch 2/2  step 2/16")
    start = time.monotonic()
    (os.kill if number == signal.SIGTERM else os.killpg)(run.process.pid, number)
    ended, out = run.end()
    assert time.monotonic() - start < 30
    assert (ended, out.count("stopped and saved: go on with --resume auto")) == (code, 1), out
    assert not any(word in out for word in ("Traceback", "rror", "KeyboardInterrupt")), out
    saved = load(run.exp_dir / LAST)
    assert (saved["epoch"], len(saved["clusterings"])) == (1, 2)
    assert 2 <= saved["steps"] < 16
    if number == signal.SIGTERM:
        for exp_dir in ("whole", "run"):
            run_script(main_pcl, images, *SETTINGS.split(), "--exp-dir", tmp_path / exp_dir, "--nproc", 2, "--resume", "auto")
        assert_same(weights(tmp_path / "run", 1), weights(tmp_path / "whole", 1))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_while_processes_start_has_its_code_too(images, tmp_path, number, code):
    run = Run(images, tmp_path / "run", "--nproc", "2")
    end = time.monotonic() + 60
    while not run.ranks():
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(run.process.pid, number)
    ended, out = run.end()
    assert (ended, "Traceback" in out) == (code, False), out


def freeze_for_a_while(device, args, plan):
    if get_rank() == 0:
        subprocess.Popen(["sh", "-c", f"kill -STOP {os.getpid()}; sleep 7; kill -CONT {os.getpid()}"])
    time.sleep(11)
    torch.distributed.all_reduce(torch.zeros(1))
    save_result(args, done=True)


@pytest.mark.dist
def test_a_pause_ends_nothing(two_ranks):
    assert all(result["done"] for result in two_ranks(freeze_for_a_while))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("victim", ["launcher", "process 0", "process 1"])
def test_a_process_that_is_killed_takes_the_others_with_it(images, tmp_path, victim):
    run = Run(images, tmp_path / "run", "--nproc", "2", "--epochs", "1000")
    run.wait_for("epoch 1/1000  step 1")
    ranks = sorted(run.ranks())
    assert len(ranks) == 2
    os.kill({"launcher": run.process.pid, "process 0": ranks[0], "process 1": ranks[1]}[victim], signal.SIGKILL)
    code, out = run.end()
    assert code not in (0, PREEMPTED)
    if victim != "launcher":
        assert f"main_pcl.py: error: {victim} was ended by SIGKILL; the others were stopped" in out
    assert "Traceback" not in out
    assert not list(run.exp_dir.glob("checkpoint_0*"))  # nothing that could be taken for a finished epoch


def fall_silent(device, args, plan):
    launch.watch._silence = 4
    if get_rank() == args.silent:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def cluster_for_long(device, args, plan):
    launch.watch._silence = 6
    time.sleep(2)
    if get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@pytest.mark.dist
def test_a_signal_to_one_rank_ends_the_others_as_stopped(two_ranks, capfd):
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        two_ranks(cluster_for_long)
    out, err = capfd.readouterr()
    assert (stop.value.code, out.count("stopped: go on with --resume auto"), err) == (PREEMPTED, 1, "")
    assert time.monotonic() - start < 50


def fail_alone(device, args, plan):
    if get_rank() == 1:
        raise RunError("the sky is falling")
    torch.distributed.all_reduce(torch.zeros(1))


def hang_in_a_step(device, args, plan):
    if get_rank() == 1:
        time.sleep(60)
    for _ in range(2):
        launch.watch.stop_voted()


@pytest.mark.dist
def test_a_process_that_hangs_is_waited_for_no_longer_than_the_timeout(two_ranks, capfd, monkeypatch):
    monkeypatch.setattr(launch, "LEAVE", 4)
    with pytest.raises(SystemExit):
        two_ranks(hang_in_a_step, dist_timeout=5)
    assert "another process did not answer, and the reason is unknown" in capfd.readouterr().err


@pytest.mark.dist
@pytest.mark.parametrize(
    ("worker", "silent", "reason"),
    [
        (fall_silent, 1, "process 1 no longer answers"),
        (fall_silent, 0, "process 0 no longer answers"),
        (fail_alone, None, "process 1: the sky is falling"),
    ],
)
def test_the_others_end_with_the_reason_of_the_first_failure(two_ranks, capfd, monkeypatch, worker, silent, reason):
    monkeypatch.setattr(launch, "LEAVE", 4)
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        two_ranks(worker, silent=silent)
    assert stop.value.code == 1
    assert time.monotonic() - start < 50
    err = capfd.readouterr().err
    assert err.count(reason) == 1
    assert "Traceback" not in err


def meeting(**options):
    usual = {"nproc": 1, "gpu": None, "world_size": 1, "rank": 0, "dist_backend": "nccl", "seed": 0, "deterministic": True}
    return Namespace(**usual | {"dist_timeout": 2} | options)


def join_at(host, port, rank):
    """A node of two, in a process of its own: its exit code and what it prints on stderr."""
    place = f"Place({rank}, 2, 0, 1, host={host!r}, port={port})"
    code = (
        f"from pcl.run.rendezvous import Place, meet\nfrom pcl.cli import Parser\nwith Parser().telling(1): meet({place}, 2.0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_an_address_where_no_store_can_answer_is_one_line_in_time():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        code, err = join_at("127.0.0.1", mute.getsockname()[1], rank=1)
    assert (code, err.count("\n")) == (1, 1)
    assert "what listens there did not answer within 2 s (--dist-timeout); check that it is node 0" in err
    code, err = join_at("no-such-host.invalid", free_port(), rank=0)
    assert (code, err.count("\n")) == (1, 1)
    assert "processes cannot meet there" in err
    for host in ("a..b", "a" * 300):
        with pytest.raises(RunError, match="did not answer within 1 s"):
            rendezvous.meet(Place(1, 2, 0, 1, host=host, port=29555), 1.0)


@pytest.mark.slow
def test_a_port_in_use_and_a_node_that_stays_away_are_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=rf"--dist-url tcp://127.0.0.1:{port}: the port is in use; name another one"):
            launch.launch(
                pytest.fail,
                meeting(world_size=2, dist_url=f"tcp://127.0.0.1:{port}"),
                plan_of(meeting(world_size=2, dist_url=f"tcp://127.0.0.1:{port}")),
            )
    url = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(RunError, match=r"1 of 2 processes came within 2 s \(--dist-timeout\); start every node"):
        launch.launch(pytest.fail, meeting(world_size=2, dist_url=url), plan_of(meeting(world_size=2, dist_url=url)))
    with pytest.raises(RunError, match="process 0 did not answer within 2 s"):
        launch.launch(
            pytest.fail, meeting(world_size=2, rank=1, dist_url=url), plan_of(meeting(world_size=2, rank=1, dist_url=url))
        )


def test_signals_are_handled_as_before_once_the_watch_is_closed():
    before = {number: signal.getsignal(number) for number in terminal.SIGNALS}
    watching = watch.Watch().start()
    assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    with watching.finish_before_leaving():
        os.kill(os.getpid(), signal.SIGUSR1)
        end = time.monotonic() + 10
        while not watching.stop_signal:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert watching._exit_code == PREEMPTED
        watching.close()
    assert {number: signal.getsignal(number) for number in terminal.SIGNALS} == before


LOADS = """
import multiprocessing, signal, sys, time
from pcl.loader import make_loader
from pcl.terminal import SIGNALS

class Slow:
    def __len__(self):
        return 10**6

    def __getitem__(self, number):
        time.sleep(0.02)
        return number

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    for number, batch in enumerate(make_loader(Slow(), range(10**6), 2, 2)):
        print(number, flush=True)
"""
METHODS = ("fork", "forkserver", "spawn")


@pytest.mark.dist
@pytest.mark.parametrize("method", METHODS)
def test_loader_workers_outlive_a_signal_to_all_and_end_with_their_process(tmp_path_factory, method):
    tmp_path = tmp_path_factory.mktemp("w")  # a fork server's socket lies below it, whose path must be short
    (tmp_path / "loads.py").write_text(LOADS)
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "PYTHONWARNINGS": "ignore"}  # one core
    with out.open("w") as file:
        command = [sys.executable, str(tmp_path / "loads.py"), method]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    end = time.monotonic() + 120
    try:
        for batches in (1, 100, 200):
            while out.read_text().count("\n") < batches:
                assert process.poll() is None, out.read_text()
                assert time.monotonic() < end, out.read_text()
                time.sleep(0.05)
            for number in terminal.SIGNALS:
                os.killpg(process.pid, number)
        assert out.read_text().replace("\n", "").isdigit()
    finally:  # a process that nobody ends would load for hours
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while faults.processes_of(process.pid):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not list(temporary.glob("pymp-*"))


SCRIPTS = """
import multiprocessing, runpy, shlex, sys

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    for command in sys.argv[2:]:
        sys.argv = shlex.split(command)
        runpy.run_path(sys.argv[0], run_name="__main__")
    print("all done")
"""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("method", METHODS[1:])
def test_each_script_ends_under_other_start_methods_and_leaves_nothing(image_folder, six_classes, tmp_path_factory, method):
    tmp_path = tmp_path_factory.mktemp("w")  # a fork server's socket lies below it, whose path must be short
    (tmp_path / "scripts.py").write_text(SCRIPTS)
    (tmp_path / "tmp").mkdir()
    voc, network = write_voc_shaped(tmp_path / "voc"), "--random-init -a shufflenet_v2_x0_5 --image-size 32"
    commands = [
        f"{ROOT}/main_pcl.py {image_folder} {SETTINGS} --epochs 1 --warmup-epoch 0 -j 1 --exp-dir run",
        f"{ROOT}/eval_cls_imagenet.py {six_classes} {network} --epochs 1 --lr 0.03 --schedule 1 -b 8 -j 1",
        f"{ROOT}/eval_svm_voc.py {voc} {network} --num-workers 1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")}
    with (tmp_path / "out").open("w") as out:
        command = [sys.executable, str(tmp_path / "scripts.py"), method, *commands]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out, start_new_session=True)
    assert process.wait(400) == 0, (tmp_path / "out").read_text()
    assert (tmp_path / "out").read_text().endswith("all done\n")
    end = time.monotonic() + 20
    while faults.processes_of(process.pid):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not list((tmp_path / "tmp").glob("pymp-*"))


HOLDER = (
    "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@pytest.mark.slow
def test_two_runs_in_one_folder_exclude_each_other(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pcl.run.logs.PATIENCE", 0.1)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(SystemExit) as stop:
        run_script(main_pcl, image_folder, *SETTINGS.split(), "--exp-dir", tmp_path)
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        f"main_pcl.py: error: another run is writing into {tmp_path}; wait for its end, or name another folder\n"
    )
    assert os.listdir(tmp_path) == [".lock"]
    other.communicate(b"\n")
    run_script(main_pcl, image_folder, *SETTINGS.split(), "--exp-dir", tmp_path, "--epochs", "1")
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["args"]["epochs"] == 1
