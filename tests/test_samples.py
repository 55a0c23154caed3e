import re
import runpy
import sys

import numpy as np
from PIL import Image

from pcl.samples import SOURCE


def test_the_images_are_written_as_a_balanced_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["samples", str(tmp_path / "new folder")])
    runpy.run_module("pcl.samples", run_name="__main__")
    assert re.findall(r"\d+ images", capsys.readouterr().out) == ["4000 images", "1000 images"]
    with np.load(SOURCE) as samples:
        for split, each in (("train", 400), ("val", 100)):
            folders = sorted((tmp_path / "new folder" / split).iterdir())
            assert [f.name for f in folders] == sorted(samples["classes"])
            assert [len(list(f.iterdir())) for f in folders] == [each] * 10
            image, label = samples[f"{split}_images"][7], samples["classes"][samples[f"{split}_labels"][7]]
            written = Image.open(tmp_path / "new folder" / split / label / "0007.png")
            np.testing.assert_array_equal(np.asarray(written), image)
