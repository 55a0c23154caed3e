import re
import sys

import numpy as np
import pytest
from conftest import write_voc_shaped
from PIL import Image

from pcl import samples
from pcl.voc import VOCSplit


@pytest.mark.slow
def test_the_images_are_written_as_a_balanced_folder_and_as_collages(tmp_path, monkeypatch, capsys):
    root = tmp_path / "new folder"
    monkeypatch.setattr(sys, "argv", ["samples", str(root)])
    samples.main()
    assert re.findall(r"\d+ images", capsys.readouterr().out) == ["4000 images", "1000 images"]
    with np.load(samples.SOURCE) as source:
        for split, each in (("train", 400), ("val", 100)):
            folders = sorted((root / split).iterdir())
            assert [f.name for f in folders] == sorted(source["classes"])
            assert [len(list(f.iterdir())) for f in folders] == [each] * 10
            image, label = source[f"{split}_images"][7], source["classes"][source[f"{split}_labels"][7]]
            np.testing.assert_array_equal(np.asarray(Image.open(root / split / label / "0007.png")), image)

    train, test = (VOCSplit(root, split, np.asarray) for split in ("trainval", "test"))
    assert (len(train), len(test)) == (1000, 500)
    for collages in (train, test):
        assert (collages.labels > 0).sum(axis=0).min() >= 16  # enough for every low-shot draw
        assert (collages.labels == 0).any(axis=0).all()  # difficult ones of every class
        shown = (collages.labels >= 0).sum(axis=1)
        assert shown.min() == 1
        assert shown.max() == 4
        assert {collages[i][0].shape for i in range(5)} == {(56, 56, 3)}
    assert not set(train.names) & set(test.names)


def a_file(root):
    root.write_text("mine")


def other_classes(root):
    (root / "train/class 1").mkdir(parents=True)


def voc(root):
    write_voc_shaped(root)


def a_file_inside(root):
    root.mkdir()
    (root / "train").write_text("mine")


@pytest.mark.parametrize(("spoil", "message"), [
    (a_file, "Not a directory"),
    (a_file_inside, "Not a directory"),
    (other_classes, "such as class 1; name a new folder"),
    (voc, "such as dog; name a new folder"),
])  # fmt: skip
def test_a_folder_that_will_not_do_is_one_line_and_stays_as_it_is(spoil, message, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    spoil(root)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    monkeypatch.setattr(sys, "argv", ["samples", str(root)])
    with pytest.raises(SystemExit) as stop:
        samples.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
