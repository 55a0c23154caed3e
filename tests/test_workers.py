"""Loader workers however they are started: they end with their process, and leave nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_voc_shaped
from test_watch import faults

STARTED_BY = """
import multiprocessing, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    del sys.argv[:2]
    sys.path.insert(0, {root!r})
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
SHARED = "-a shufflenet_v2_x0_5 --image-size 32"
TRAINING = f"-b 8 --pcl-r 16 --low-dim 8 --num-cluster 3 --warmup-epoch 0 --seed 0 -j 1 {SHARED}"


def start(method, folder, script, *options):
    """A script whose worker processes are started so, alone in a session, with a folder of its own for temporary files.

    A fork server's socket lies there, whose path must be short.
    """
    folder.mkdir()
    (folder / "started_by.py").write_text(STARTED_BY.format(root=str(ROOT)))
    (folder / "t").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "t")}
    command = [sys.executable, "started_by.py", method, str(ROOT / script), *map(str, options)]
    with (folder / "out").open("w") as out:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True)


def assert_nothing_left(process, folder):
    end = time.monotonic() + 20
    while (left := faults.processes_of(process.pid)) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []
    assert list((folder / "t").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_every_script_ends_with_its_workers(method, six_classes, tmp_path_factory):
    root = tmp_path_factory.mktemp("w")
    write_voc_shaped(root / "voc")
    commands = {
        "main_pcl.py": f"{six_classes} --epochs 1 --monitor-freq 0 {TRAINING}",
        "eval_cls_imagenet.py": f"{six_classes} --random-init --epochs 1 --lr 0.03 --schedule 1 -b 8 -j 1 {SHARED}",
        "eval_svm_voc.py": f"{root / 'voc'} --random-init --num-workers 1 {SHARED}",
    }
    runs = {script: start(method, root / script, script, *options.split()) for script, options in commands.items()}
    for script, process in runs.items():
        assert process.wait(300) == 0, (root / script / "out").read_text()
        assert_nothing_left(process, root / script)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_process_that_is_killed_leaves_no_worker(method, six_classes, tmp_path_factory):
    root = tmp_path_factory.mktemp("w")
    process = start(method, root / "run", "main_pcl.py", six_classes, *TRAINING.split(), "--epochs", "500")
    end = time.monotonic() + 200
    while "epoch 1/500" not in (root / "run" / "out").read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert process.poll() is None, (root / "run" / "out").read_text()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_nothing_left(process, root / "run")
