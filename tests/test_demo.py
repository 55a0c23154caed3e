import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import demo


@pytest.mark.slow
def test_the_demo_runs_on_a_folder_of_one_s_own(image_folder, tmp_path, monkeypatch, capfd):
    options = ["-b", "8", "--pcl-r", "20", "--num-cluster", "3,5", "--warmup-epoch", "1"]
    arguments = ["--data", str(image_folder), "--out", str(tmp_path), "--epochs", "2", *options]
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    demo.main()
    out = capfd.readouterr().out
    assert "prototype" in out
    for row in ("raw pixels", "random backbone", "PCL backbone"):
        assert row in out
    checkpoint = next(tmp_path.rglob("checkpoint_0001.pth.tar"))
    assert str(checkpoint) in out
