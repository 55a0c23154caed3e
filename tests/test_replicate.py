import dataclasses
import gzip
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import ROOT, run_script
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))
import oracle
import replicate
import replication_report
import resnet8

KNN = {"lr0.06": 3, "lr0.015": 2, "r2048": 5, "k50-100-200": 9, "w10": 4}  # what a run's name is worth to choosing


def stand_in(run, plan=replicate.FULL):
    """The result of a run that was not made."""
    result = {"run": run.name, "method": run.method, "seed": run.seed, "data": run.data, "seconds": 1, "machine": "none"}
    result |= {"options": replicate.command_of(run, plan, []), "probe_lr": run.probe_lr}
    if run.method.startswith("probe-"):
        return result | {"accuracy": {f"{lr:g}": lr for lr in replicate.PROBE_GRID}}
    knn = sum(worth for part, worth in KNN.items() if part in run.name.split("_"))
    names = ["kNN", "k = 1", "k = 2", *(f"probe {percent} %" for percent in replicate.PROBES)]
    return result | {"figures": dict.fromkeys(names, float(knn)), "gradient_ratio": 1.5}


def test_settings_are_chosen_one_after_the_other_and_never_on_the_test_set():
    results, done = {}, []
    while ready := [run for run in replicate.queue(replicate.FULL, results) if run.ready and run.name not in results]:
        results[ready[0].name] = stand_in(ready[0])
        done.append(ready[0])
    assert len({run.name for run in done}) == len(done) == len(replicate.queue(replicate.FULL, results))
    choosing = [run for run in done if run.data == "choose"]
    assert {run.seed for run in choosing} == {replicate.CHOICE_SEED}
    assert not {run.seed for run in done if run.data == "final"} & {replicate.CHOICE_SEED}
    assert [run.method for run in choosing[:14]] == ["moco-v2"] * 8 + ["pcl-v2"] * 6
    assert [run.options.split("--lr ")[1] for run in choosing[:9]] == [
        "0.03 --pcl-r 512",
        "0.06 --pcl-r 512",
        "0.015 --pcl-r 512",
        "0.0075 --pcl-r 512",
        "0.00375 --pcl-r 512",
        "0.12 --pcl-r 512",
        "0.06 --pcl-r 2048",
        "0.06 --pcl-r 256",
        "0.06 --pcl-r 2048 --num-cluster 125,250,500 --warmup-epoch 5",
    ]
    final = {run.name: run for run in done}
    chosen = "--lr 0.06 --pcl-r 2048"
    assert final["pcl-v1_seed4"].options == f"--schedule 12 16 {chosen} --num-cluster 50,100,200 --warmup-epoch 10"
    assert final["moco-v2_seed0"].options == f"--mlp --aug-plus --cos {chosen}"
    assert "--lr 0.09 " in final["moco-v2-lr_seed0"].options  # 1.5 times
    assert "--lr 0.04 " in final["pcl-v2-lr_seed0"].options
    assert {run.probe_lr for run in done if run.data == "final"} == {3.0}
    main = [run.name for run in done if "_seed" in run.name and run.method in ("moco-v2", "pcl-v2", "moco-v2-lr", "moco-v1")]
    assert main[:3] == ["moco-v2_seed0", "pcl-v2_seed0", "moco-v2_seed1"]
    assert main.index("pcl-v2_seed4") < main.index("moco-v1_seed0") < main.index("moco-v2-lr_seed0")


def test_the_second_set_has_the_settings_that_cifar10_chose():
    settings, chosen = replicate.decide(replication_report.results_in(ROOT / "benchmarks" / "replication" / "cifar10"))
    assert chosen >= replicate.CHOSEN.keys()
    assert {name: settings[name] for name in replicate.CHOSEN} == replicate.CHOSEN


def test_what_was_not_probed_waits_for_it():
    run = next(run for run in replicate.queue(replicate.FULL, {}) if run.name == "pixels_seed0")
    whole = stand_in(run)
    bare = {**whole, "figures": {"kNN": 30.0}}
    del bare["probe_lr"]
    assert replicate.is_done(run, whole, replicate.FULL, [])
    assert not replicate.is_done(run, whole | {"probe_lr": 9.0}, replicate.FULL, [])
    assert not replicate.is_done(run, bare, replicate.FULL, [])
    assert replicate.is_done(dataclasses.replace(run, probe_lr=0.0), bare, replicate.FULL, [])


def test_a_tie_goes_to_the_first():
    assert replicate.first_of_the_best({"a": 49.0, "b": 49.4, "c": 50.0, "d": 49.9}, images=10_000) == "c"
    assert replicate.first_of_the_best({"a": 49.0, "b": 49.6, "c": 50.0, "d": 49.9}, images=10_000) == "b"  # 0.5 is the error


@pytest.fixture
def registry(monkeypatch):
    """That of torchvision's networks, put back at the end."""
    monkeypatch.setattr(resnet8._api, "BUILTIN_MODELS", {**resnet8._api.BUILTIN_MODELS})


def test_the_options_of_every_run_parse(registry):
    resnet8.register()
    for plan in (replicate.FULL, replicate.QUICK, replicate.SECOND, replicate.GPU, replicate.TINY):
        for run in replicate.queue(plan, {}):
            options = replicate.command_of(run, plan, ["--seed", "1"])
            replicate.main_pcl.get_parser().parse_args(["DIR", *options.split()])


def test_moco_is_warm_up_to_the_end_whatever_options_are_added():
    warm_up = {}
    for run in replicate.queue(replicate.QUICK, {})[2:]:
        options = replicate.command_of(run, replicate.QUICK, ["--epochs", "60", "--warmup-epoch", "5"])
        warm_up[run.method] = replicate.main_pcl.get_parser().parse_args(["DIR", *options.split()]).warmup_epoch
    assert warm_up == {"moco-v2": 60, "pcl-v2": 5}


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "out").mkdir()
    return Namespace(work=tmp_path / "work", out=tmp_path / "out", jobs=2, extra=[])


def python(text, *arguments):
    return [sys.executable, "-S", "-c", text, *map(str, arguments)]


@pytest.mark.slow
def test_all_is_worked_off_whatever_fails_and_nothing_twice(folders, capsys):
    write = "import os, sys; part = sys.argv[1] + '.part'; open(part, 'w').write(sys.argv[2]); os.replace(part, sys.argv[1])"

    def work_off(plan, broken):
        def command(run):
            if run.name in broken:
                return python("raise SystemExit(3)")
            return python(write, folders.out / f"{run.name}.json", json.dumps(stand_in(run, plan)))

        return replicate.work_off(plan, folders, command)

    assert work_off(replicate.QUICK, {"random_seed0"}) == (["random_seed0"], [])
    out = capsys.readouterr().out
    assert "random_seed0  0.0 min  failed with exit code 3  " in out
    assert out.count("kNN 0.00 %") == 3
    before = {path.name: path.stat().st_mtime_ns for path in folders.out.iterdir()}
    assert work_off(replicate.QUICK, set()) == ([], [])
    assert {path.name: path.stat().st_mtime_ns for path in folders.out.iterdir()}.items() > before.items()
    assert len(before) == 3
    assert capsys.readouterr().out.count("\n") == 1

    # What was trained with other options is trained again, and a run that leaves such a result has failed.
    folders.extra = ["--lr", "1"]
    assert work_off(replicate.QUICK, set()) == (["moco-v2_seed0", "pcl-v2_seed0"], [])
    assert capsys.readouterr().out.count("\n") == 2

    folders.extra, folders.jobs = [], 8
    failed, waiting = work_off(replicate.FULL, {"choose_moco-v2_lr0.015_r512"})  # nothing can be chosen then
    assert failed == ["choose_moco-v2_lr0.015_r512"]
    assert "pcl-v2_seed1" in waiting
    assert "pixels_seed4" not in waiting


def test_a_stop_ends_all_processes(folders):
    started = []

    def command(run):
        started.append(folders.work / f"{run.name}.pid")
        return python("import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)", started[-1])

    def stop():
        while len(started) < 2 or not all(path.exists() and path.read_text() for path in started):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        replicate.work_off(replicate.QUICK, folders, command)
    assert stopped.value.code == 130
    assert len(started) == 2
    for path in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_intervals_are_those_of_a_paired_t_test():
    a, b = np.random.default_rng(0).normal(50, 3, (2, 5))
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    mean, std, half, count = replication_report.spread(a - b)
    assert count == 5
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert std == pytest.approx(np.std(a - b, ddof=1))
    scores = {name: {s: {"kNN": value} for s, value in enumerate(values)} for name, values in (("A", a), ("B", b))}
    scores["B"][7] = {"kNN": 1e9}  # a seed that A lacks
    row = replication_report.table_of_differences(scores, [("A", "B"), ("A", "C")])[-1]
    assert row == f"| A minus B | 5 | {mean:+.1f} [{expected.low:.1f}, {expected.high:.1f}] |"


def test_a_download_becomes_an_image_folder(tmp_path, monkeypatch):
    class Fetched(list):
        classes = ("T-shirt/top", "bag")

        def __init__(self, root, train, download):
            super().__init__([(Image.new("L", (4, 4), label), label) for label in ((0, 1, 1) if train else (1, 0))])

    monkeypatch.setattr(replicate.torchvision.datasets, "FashionMNIST", Fetched)
    (tmp_path / "debian").mkdir()
    (tmp_path / "debian" / "labels.gz").write_bytes(gzip.compress(b"7"))
    monkeypatch.setattr(replicate, "DEBIAN", tmp_path / "debian")
    replicate.download("fashion", tmp_path / "fashion")
    assert (tmp_path / "downloads" / "FashionMNIST" / "raw" / "labels").read_bytes() == b"7"
    found = sorted(str(path.relative_to(tmp_path / "fashion")) for path in tmp_path.rglob("*.png"))
    shirt = "T-shirt or top"
    assert found == [f"train/{shirt}/00000.png", "train/bag/00001.png", "train/bag/00002.png",
                     f"val/{shirt}/00001.png", "val/bag/00000.png"]  # fmt: skip


@pytest.mark.slow
def test_the_quick_mode_runs_on_a_handful_of_images(six_classes, tmp_path, monkeypatch, capfd):
    def in_this_process(command):
        monkeypatch.setattr(sys, "argv", [*command[1:]])
        importlib.import_module(Path(command[1]).stem).main()
        return Namespace(returncode=0)

    def work_off(plan, args, command):
        for run in replicate.queue(plan, {}):
            replicate.carry_out(run, plan, args)
        return [], []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(replicate.subprocess, "run", in_this_process)
    monkeypatch.setattr(replicate, "work_off", work_off)
    monkeypatch.setattr(replicate, "PROBES", {100: "--epochs 1 --schedule 1"})
    monkeypatch.setattr(replicate.eval_svm_voc, "SHOTS", (1, 2))
    extra = "-b 8 --epochs 2 --pcl-r 20 --num-cluster 3,5".split()  # noqa: SIM905
    options, out = ["--quick", "--data", six_classes, "--work", tmp_path / "work"], tmp_path / "work" / "results"
    out.mkdir(parents=True)
    (out / "pcl-v2_seed0.json").write_text('{"run": "pcl-v2_seed0", "figures": "of somebody else"}')
    run_script(replicate, *options, *extra)
    assert "of somebody else" in (tmp_path / "work" / "earlier" / "pcl-v2_seed0.json").read_text()
    results = replication_report.results_in(out)
    assert list(results) == ["moco-v2_seed0", "pcl-v2_seed0", "pixels_seed0", "random_seed0"]
    for result in results.values():
        assert list(result["figures"]) == ["kNN", "k = 1", "k = 2", "NMI", "AMI", "probe 100 %"]
        assert all(0 <= value <= 100 for name, value in result["figures"].items() if name != "AMI")
    assert "torch" in results["pcl-v2_seed0"]["versions"]
    known, validation, test = (
        {path.resolve() for path in (tmp_path / "work" / part).rglob("*.png")}
        for part in ("final/train", "choose/val", "final/val")
    )
    assert (len(known), len(validation), len(test)) == (18, 18, 18)
    assert not known & validation
    assert {path.resolve() for path in (tmp_path / "work" / "choose/train").rglob("*.png")} == known
    assert list(results["pcl-v2_seed0"]["clusters"]) == ["K = 3", "K = 5"]
    table = (out / "table.md").read_text()
    assert "| pcl-v2 | K = 5 | 1 | " in table
    assert "| pcl-v2 minus moco-v2 | 1 | " in table
    assert (out / "low_shot.png").exists()
    (out / "table.md").unlink()
    run_script(replicate, *options, "--report")
    assert (out / "table.md").read_text() == table

    # The prototype term of weight 0 adds nothing to the gradient, and one of weight 1 something.
    folder, ratios = tmp_path / "work" / "runs" / "pcl-v2_seed0", []
    command = [str(six_classes), "-a", replicate.ARCH, *replicate.BASE.split(), *extra, "--warmup-epoch", "1", "--seed", "0"]
    monkeypatch.setattr(sys, "argv", ["main_pcl.py", *command, "--exp-dir", str(tmp_path / "again")])
    replicate.main_pcl.main()
    trained = tmp_path / "again" / "checkpoint_0001.pth.tar"
    for weight in ("0", "1"):
        ratios.append(replicate.gradient_ratio([*command, "--proto-weight", weight], trained, batches=2))
    assert ratios[0] == 1
    assert ratios[1] != pytest.approx(1)
    # What has served is removed; the backbone that was measured is the trained one.
    assert not list(folder.glob("*.pth.tar"))
    kept = torch.load(folder / "backbone.pth", weights_only=True)
    assert kept["conv1.weight"].shape == (64, 3, 7, 7)


@pytest.mark.slow
def test_the_oracle_takes_the_classes_for_clusters(six_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(oracle.main_pcl, "cluster_all", oracle.main_pcl.cluster_all)  # put back at the end
    folder = tmp_path / "run"
    options = "-b 6 --epochs 2 --warmup-epoch 1 --pcl-r 12 --num-cluster 6 --mask-duplicates".split()  # noqa: SIM905
    run_script(oracle, six_classes, "--exp-dir", folder, "-a", replicate.ARCH, *replicate.BASE.split(), *options)
    last = torch.load(folder / "e_step.pth.tar", weights_only=True)
    (found,) = last["granularities"]
    labels, features = torch.as_tensor(last["labels"]), torch.as_tensor(last["features"])
    assert torch.equal(found["im2cluster"], labels)
    means = torch.stack([features[labels == label].mean(dim=0) for label in range(6)])
    torch.testing.assert_close(found["prototypes"], torch.nn.functional.normalize(means, dim=1))
    assert found["concentration"].mean() == pytest.approx(0.2)
    agreement = replicate.agreement_of_clusters(folder / "e_step.pth.tar")
    assert agreement == {"K = 6": pytest.approx({"nmi": 100, "ami": 100, "purity": 100})}


@pytest.mark.slow
def test_a_script_trains_the_resnet8(six_classes, tmp_path, registry):
    folder = tmp_path / "run"
    options = "-b 6 --epochs 1 --warmup-epoch 0 --pcl-r 12 --num-cluster 6".split()  # noqa: SIM905
    base = ["-a", resnet8.RESNET8, *replicate.BASE.split()]
    run_script(resnet8, "main_pcl.py", six_classes, "--exp-dir", folder, *base, *options)
    network, arch = replicate.checkpoint.load_backbone(folder / "checkpoint_0000.pth.tar")
    assert arch == "resnet8"
    assert sum(weight.numel() for weight in network.parameters()) == 77_392
    shapes = []
    for layer in (network.layer1, network.layer2, network.layer3):
        layer.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape[1:])))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 64)
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_the_resnet8_has_runs_of_its_own(six_classes, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(replicate, "script", lambda *words: started.append(words))
    for plan in (replicate.FULL, replicate.TINY):
        run = next(run for run in replicate.queue(plan, {}) if run.name == "moco-v2_seed0")
        replicate.run_script("main_pcl.py", *replicate.command_of(run, plan, []).split()[:2])
    assert started == [("main_pcl.py", "-a", "resnet18"), ("benchmarks/resnet8.py", "main_pcl.py", "-a", "resnet8")]
    methods = [run.method for run in replicate.queue(replicate.TINY, {}) if run.data == "final" and run.seed == 4]
    assert methods == ["pixels", "random", "moco-v2", "pcl-v2", "moco-v2-lr", "pcl-v2-lr"]

    args = Namespace(data=six_classes, work=tmp_path, out=tmp_path)
    for _ in range(2):
        replicate.prepare(replicate.get_parser(), replicate.FULL, args, tmp_path)
    with pytest.raises(SystemExit):
        replicate.prepare(replicate.get_parser(), replicate.TINY, args, tmp_path)


def test_images_behind_a_link_have_the_same_names(six_classes, tmp_path):
    (tmp_path / "a/b/c/d/e/f/g/h").mkdir(parents=True)
    (tmp_path / "a/b/c/d/e/f/g/h/link").symlink_to(six_classes)
    found = []
    for number, data in enumerate((six_classes, tmp_path / "a/b/c/d/e/f/g/h/link")):
        work = tmp_path / f"work {number}"
        work.mkdir()
        replicate.prepare(replicate.get_parser(), replicate.FULL, Namespace(data=data, work=work, out=work), tmp_path)
        found.append(sorted((str(path.relative_to(work)), path.resolve()) for path in work.rglob("*.png")))
    assert found[0] == found[1]
    assert found[0]


def test_a_class_without_an_image_is_told_before_the_work(six_classes, tmp_path, capsys):
    root = shutil.copytree(six_classes, tmp_path / "six")
    for split in ("train", "val"):
        (root / split / "empty").mkdir()
    with pytest.raises(SystemExit):
        replicate.prepare(replicate.get_parser(), replicate.FULL, Namespace(data=root, work=tmp_path, out=tmp_path), tmp_path)
    assert "the same class folders, five at least, with images in each" in capsys.readouterr().err
