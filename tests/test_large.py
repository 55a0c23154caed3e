import json
import subprocess
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "benchmarks"))
import large
import replicate
import resnet8

SMALL = "-b 8 --epochs 3 --warmup-epoch 1 --save-freq 1 --pcl-r 12 --num-cluster 3,6,9 --kmeans-every 1".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """That of torchvision's networks, put back at the end."""
    monkeypatch.setattr(resnet8._api, "BUILTIN_MODELS", {**resnet8._api.BUILTIN_MODELS})
    resnet8.register()


def test_the_settings_are_those_of_the_readme():
    moco, pcl = (large.settings_of(run, Namespace(data="DIR", extra=[])) for run in large.trained_runs(Namespace(seeds=[0])))
    row = f"| {','.join(map(str, pcl.num_cluster))} | {pcl.pcl_r} | {pcl.batch_size} | {pcl.lr} | {pcl.moco_m} |"
    assert f"| 50,000 {row}" in (ROOT / "README.md").read_text()
    assert (moco.warmup_epoch, pcl.warmup_epoch, moco.epochs, pcl.epochs) == (100, 10, 100, 100)
    different = {name for name in vars(moco) if getattr(moco, name) != getattr(pcl, name)}
    assert different == {"num_cluster", "warmup_epoch"}
    assert {moco.arch, pcl.arch} == {resnet8.RESNET8}
    assert {moco.amp, pcl.amp} == {"off"}


def test_the_methods_take_turns_and_share_their_warm_up(tmp_path, monkeypatch):
    args, turns = Namespace(work=tmp_path, data="DIR", seeds=[0, 1], extra="--epochs 45 --warmup-epoch 20".split()), []  # noqa: SIM905

    def train(run, epochs, args):
        turns.append((run.name, epochs))
        path = large.checkpoint_of(run, epochs, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{run.name} {epochs}")

    monkeypatch.setattr(large, "train", train)
    assert large.train_all(args) == 0
    methods = ("moco-v2", "pcl-v2")
    one = [("moco-v2", 10), ("moco-v2", 20), *((method, epochs) for epochs in (30, 40, 45) for method in methods)]
    assert turns == [(f"{method}_seed{seed}", epochs) for seed in (0, 1) for method, epochs in one]
    assert (tmp_path / "runs" / "pcl-v2_seed1" / "checkpoint_0019.pth.tar").read_text() == "moco-v2_seed1 20"


def test_training_stops_where_its_turn_ends(tmp_path, monkeypatch):
    run = large.trained_runs(Namespace(seeds=[0]))[0]
    args, popen, started = Namespace(work=tmp_path, data="DIR", extra=[]), subprocess.Popen, []
    goal = large.checkpoint_of(run, 10, args)
    goal.parent.mkdir(parents=True)

    def stand_in(command, **options):
        started.append(command)
        text = "import sys, time; open(sys.argv[1], 'w').close(); time.sleep(60)"
        return popen([sys.executable, "-S", "-c", text, str(goal)], **options)

    monkeypatch.setattr(large.subprocess, "Popen", stand_in)
    start = time.monotonic()
    large.train(run, 10, args)
    large.train(run, 10, args)
    assert time.monotonic() - start < 30
    assert len(started) == 1
    assert started[0][2:4] == ["main_pcl.py", "DIR"]


def test_a_failed_run_ends_it_with_its_exit_code(tmp_path, monkeypatch):
    popen = subprocess.Popen
    monkeypatch.setattr(
        large.subprocess, "Popen", lambda command, **o: popen([sys.executable, "-S", "-c", "raise SystemExit(3)"], **o)
    )
    with pytest.raises(SystemExit) as failed:
        large.train(large.trained_runs(Namespace(seeds=[0]))[0], 10, Namespace(work=tmp_path, data="DIR", extra=[]))
    assert failed.value.code == 3


@pytest.mark.slow
def test_checkpoints_are_scored_and_drawn_along_the_way(six_classes, tmp_path, monkeypatch, capfd):
    def in_this_process(command, **_):
        """Up to the end, whatever the turn; it has ended then."""
        monkeypatch.setattr(sys, "argv", command[2:])
        replicate.main_pcl.main()
        return SimpleNamespace(poll=lambda: 0, wait=lambda: 0, returncode=0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(large.subprocess, "Popen", in_this_process)
    monkeypatch.setattr(replicate.eval_svm_voc, "SHOTS", (1, 2))
    options = ["--data", six_classes, "--work", tmp_path / "work", *SMALL]
    run_script(large, *options)
    run_script(large, *options, "--measure")
    out = tmp_path / "work" / "results"
    results = large.results_in(out)
    moco, pcl = (
        [f"{method}_seed0_e00{epoch}" for epoch in epochs] for method, epochs in (("moco-v2", (1, 2, 3)), ("pcl-v2", (2, 3)))
    )
    assert list(results) == [*moco, *pcl, "pixels_seed0_e000", "random_seed0_e000"]
    assert list(results["pcl-v2_seed0_e002"]["figures"]) == ["kNN", "k = 1", "k = 2", "NMI", "AMI"]
    assert results["pcl-v2_seed0_e003"]["before_epoch"] == 3
    assert list(results["pcl-v2_seed0_e003"]["clusters"]) == ["K = 3", "K = 6", "K = 9"]
    assert large.clustering_of(results["pcl-v2_seed0_e003"]) == results["pcl-v2_seed0_e003"]["clusters"]["K = 6"]
    curves = large.curves_of(out)
    assert curves["pcl-v2"][1] == curves["moco-v2"][1]
    (difference,) = large.gains_of(out)["work, all images, ResNet-8, along the epochs"]
    a, b = (results[f"{method}_seed0_e003"]["figures"] for method in ("pcl-v2", "moco-v2"))
    few = [sum(f[name] for name in ("k = 1", "k = 2")) / 2 for f in (a, b)]
    assert difference[1] == {"kNN": [a["kNN"] - b["kNN"]], "few labels (mean of k)": [pytest.approx(few[0] - few[1])]}
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    table = (out / "table.md").read_text()
    assert "| pcl-v2 | 3 | 1 | " in table
    for name in ("curves.png", "purity.png", "table.md"):
        (out / name).unlink()
    monkeypatch.setattr(large, "probe", lambda weights, percent, lr, run, args, folder: float(percent))
    run_script(large, *options, "--report")
    assert (out / "table.md").read_text() == table
    assert (out / "curves.png").exists()
    assert (out / "purity.png").exists()
    run_script(large, *options, "--measure")
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json")} == before
    run_script(large, *options, "--measure", "--probe")
    assert json.loads((out / "moco-v2_seed0_e001.json").read_text())["figures"]["probe 10 %"] == 10
    assert (out / "table.md").read_text() != table
    other = json.loads((out / "moco-v2_seed0_e001.json").read_text()) | {"seed": 1}
    other["figures"] = {"kNN": other["figures"]["kNN"] + 2, "probe 10 %": 20.0}  # of another seed fewer scores are known
    (out / "moco-v2_seed1_e001.json").write_text(json.dumps(other | {"run": "moco-v2_seed1_e001"}))
    run_script(large, *options, "--report")
    lines = [[cell.strip() for cell in line.split("|")] for line in (out / "table.md").read_text().splitlines()]
    head, row = (next(line for line in lines if line[1:3] == start) for start in (["method", "epochs"], ["moco-v2", "1"]))
    found = dict(zip(head, row, strict=True))
    assert (found["seeds"], found["probe 10 %"], found["probe 1 %"]) == ("2", "15.0", "1.0")
    assert found["kNN"] == f"{other['figures']['kNN'] - 1:.1f}"


def test_what_pcl_gains_on_5000_images_is_that_of_the_tables():
    gains = large.gains_of(ROOT / "nowhere")
    (point,) = gains["cifar10, 5,000 images, ResNet-8"]
    table = (ROOT / "benchmarks/replication/cifar10/resnet8/table.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| pcl-v2 minus moco-v2 |"))
    assert sum(point[1]["kNN"]) / 5 == pytest.approx(float(row.split("|")[3].split()[0]), abs=0.051)
    assert point[0] == pytest.approx(39, abs=1)
    (oracle,) = gains["cifar10, 5,000 images, ResNet-18, the classes for clusters"]
    assert oracle[0] == 100
