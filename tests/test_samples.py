import re
import sys

import numpy as np
import pytest
from conftest import write_voc_shaped
from PIL import Image

from pcl import samples
from pcl.loader import IndexedFolder
from pcl.voc import VOCSplit


def assert_shows_what_its_labels_say(collages, images):
    """Look at each place of some collages for the image that it shows, at full size or at half."""
    pixels = {}
    for side in (28, 14):
        pixels[side] = np.stack([np.float32(images[i][0].resize((side, side))) for i in range(len(images))])
    for number in range(20):
        collage, shown = np.float32(collages[number][0]), {}
        for place in (collage[y : y + 28, x : x + 28] for y in (0, 28) for x in (0, 28)):
            if place.mean() < 2:  # black
                continue
            side = 14 if place[15:, 15:].mean() < 2 else 28
            distance = np.abs(pixels[side] - place[:side, :side]).mean(axis=(1, 2, 3))
            assert distance.min() < 3  # JPEG; other images are at 6 or more
            label = images.labels[distance.argmin()]
            shown[label] = max(shown.get(label, 0), int(side == 28))
        assert shown == {label: value for label, value in enumerate(collages.labels[number]) if value >= 0}


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
    for collages, part in ((train, "train"), (test, "val")):
        assert_shows_what_its_labels_say(collages, IndexedFolder(root / part, lambda image: image.resize((28, 28))))


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
