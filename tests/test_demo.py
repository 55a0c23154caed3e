import shutil
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
from conftest import ROOT, run_script, write_voc_shaped

sys.path.insert(0, str(ROOT / "benchmarks"))
import demo
import main_pcl
import resnet8


@pytest.mark.slow
def test_the_demo_runs_on_a_folder_of_one_s_own(six_classes, tmp_path, monkeypatch, capfd):
    def in_this_process(command):
        run_script(main_pcl, *command[3:])
        polls = iter([None])  # it runs once more when its last E-step can be seen
        return Namespace(poll=lambda: next(polls, 0), returncode=0, terminate=lambda: None, wait=lambda: None)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resnet8._api, "BUILTIN_MODELS", {**resnet8._api.BUILTIN_MODELS})
    monkeypatch.setattr(demo, "subprocess", Namespace(**vars(subprocess) | {"Popen": in_this_process}))  # of the demo alone
    monkeypatch.setattr(demo, "write_voc", lambda data, root, cell: write_voc_shaped(root))  # not 1,500 collages
    options = ["-b", "8", "--pcl-r", "20", "--num-cluster", "3,5", "--warmup-epoch", "1", "-j", "0", "--monitor-freq", "0"]
    arguments = ["--data", str(six_classes), "--out", str(tmp_path), "--epochs", "2", *options]
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    demo.main()
    out = capfd.readouterr().out
    assert str(next(tmp_path.rglob("checkpoint_0001.pth.tar"))) in out
    picture = next(tmp_path.rglob("first_prototypes.png"))
    assert f"images nearest to the first prototypes: {picture}\n" in out
    head, *rows = out[out.rindex("kNN  1 label") - 16 :].splitlines()[:4]
    assert head.split() == [
        "kNN",
        "1",
        "label",
        "NMI",
        "probe",
        "SVM",
        *(w for k in (1, 2, 4, 8, 16) for w in ("k", "=", str(k))),
    ]
    for row, name in zip(rows, ("raw pixels", "random backbone", "PCL backbone"), strict=True):
        assert row.startswith(name)
        assert len(row.split()) == 2 + 10


WRONG = {
    "another network": ("-a resnet18", "--arch, --small-stem: the demo compares ResNet-8s"),
    "an option that there is not": ("--nonsense", "unrecognized arguments: --nonsense"),
    "an empty class": ("", "a class folder holds no image; remove it from train/ and val/"),
}


@pytest.mark.parametrize(("options", "told"), WRONG.values(), ids=WRONG)
def test_what_cannot_work_is_told_before_the_training(six_classes, tmp_path, monkeypatch, capsys, options, told):
    root = shutil.copytree(six_classes, tmp_path / "six")
    for split in ("train", "val"):
        (root / split / "empty").mkdir()
    monkeypatch.setattr(demo, "pretrain", lambda *_: pytest.fail("it trains"))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--data", str(root), "--out", str(tmp_path / "out"), *options.split()])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_a_demo_that_is_stopped_ends_its_training(tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    started, popen = [], subprocess.Popen
    endless = [sys.executable, "-S", "-c", "import signal; signal.pause()"]
    monkeypatch.setattr(demo.subprocess, "Popen", lambda _: started.append(popen(endless)) or started[0])
    monkeypatch.setattr(demo.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo.pretrain(tmp_path, None)
    assert started[0].returncode == -signal.SIGTERM
