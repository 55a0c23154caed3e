import hashlib
import http.server
import io
import os
import re
import shutil
import tarfile
import threading
import unicodedata
from typing import ClassVar

import numpy as np
import pytest
from conftest import write_voc_shaped

from pcl import voc
from pcl.voc import VOCError, VOCSplit, draw_low_shot


@pytest.fixture
def root(tmp_path):
    return write_voc_shaped(tmp_path / "a" / "b" / "data")  # three folders up, where a search ends, nothing of others lies


def lists(root):
    return root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"


def test_labels_and_images_are_read_as_the_devkit_keeps_them(root):
    train, test = (VOCSplit(root, split, np.asarray) for split in ("trainval", "test"))
    assert train.classes == test.classes == ["dog", "train"]  # a class may be called train
    assert train.names[0] == "000001"
    assert (len(train), len(test)) == (40, 20)
    for split, name in ((train, "trainval"), (test, "test")):
        for column, label in enumerate(split.classes):
            lines = (lists(root) / f"{label}_{name}.txt").read_text().splitlines()
            assert split.labels[:, column].tolist() == [int(line.split()[1]) for line in lines]
    assert set(np.unique(train.labels)) == {-1, 0, 1}
    pixels, index = test[3]
    assert (pixels.shape, index) == ((20, 20, 3), 3)


def test_line_ends_and_the_order_of_labels_do_not_matter(root):
    expected = VOCSplit(root, "trainval", np.asarray).labels
    for path in list(lists(root).glob("*.txt")):
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")  # as macOS leaves them
        lines = path.read_text().splitlines()
        if path.name == "dog_trainval.txt":
            lines.reverse()
        path.write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    np.testing.assert_array_equal(VOCSplit(root, "trainval", np.asarray).labels, expected)


def cut(path, keep):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:keep]))


def relabel(path, label):
    path.write_text(path.read_text().replace(" -1", f" {label}", 1))


WRONG = {
    "no folder": (lambda root: (lists(root) / "trainval.txt").unlink(), r"trainval\.txt: no such file; --download"),
    "an image is missing": (
        lambda root: (root / "VOCdevkit/VOC2007/JPEGImages/000007.jpg").unlink(),
        r"trainval\.txt: no image in .*/JPEGImages is called 000007 \(1 such names\); correct the list.*; --download",
    ),
    "names are whole paths": (
        lambda root: (lists(root) / "trainval.txt").write_text(f"000002\n{root}/VOCdevkit/VOC2007/JPEGImages/000001.jpg\n"),
        r"trainval\.txt: no image in .*/JPEGImages is called /.*/JPEGImages/000001\.jpg \(1 such names\)",
    ),
    "a class file is short": (
        lambda root: cut(lists(root) / "dog_trainval.txt", 38),
        r"dog_trainval\.txt lacks 2 of the 40 images, the first 000039",
    ),
    "a label is 2": (
        lambda root: relabel(lists(root) / "dog_trainval.txt", 2),
        r"dog_trainval\.txt, line \d+: '.* 2' is not a name and 1, -1 or 0",
    ),
    "two labels": (
        lambda root: relabel(lists(root) / "dog_trainval.txt", "-1\n000001 0\n000001 1"),
        r"dog_trainval\.txt, line \d+: 000001 has two labels",
    ),
    "a label is missing": (lambda root: relabel(lists(root) / "dog_trainval.txt", ""), r"dog_trainval\.txt, line"),
    "a split is empty": (lambda root: cut(lists(root) / "trainval.txt", 0), r"trainval\.txt names no image"),
    "an image twice": (
        lambda root: (lists(root) / "trainval.txt").write_text("000001\n000001\n"),
        r"trainval\.txt names .*/000001\.jpg twice",
    ),
    "no classes": (lambda root: [p.unlink() for p in lists(root).glob("*_trainval.txt")], r"holds no <class>_trainval"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(root, spoil, message):
    spoil(root)
    with pytest.raises(VOCError, match=message):
        VOCSplit(root, "trainval", np.asarray)


def test_a_folder_that_may_not_be_listed_is_named(root, monkeypatch):
    closed = root / "VOCdevkit"
    lists(root).rename(root / "away")  # no permission: what lies in it is not found
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed)
    with pytest.raises(VOCError, match=rf"^{closed} cannot be listed: Permission denied; make it readable$"):
        VOCSplit(root, "trainval", np.asarray)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_lists_are_read_as_other_systems_write_them(root, encoding):
    train = VOCSplit(root, "trainval", np.asarray)
    expected, pixels = train.labels, train[0][0]
    for path in lists(root).glob("*.txt"):
        text = path.read_text().replace("000001", "é 1").replace("\n", " \r\n")
        path.write_bytes(text.encode(encoding))
    images = root / "VOCdevkit/VOC2007/JPEGImages"
    (images / "000001.jpg").rename(images / unicodedata.normalize("NFD", "é 1.jpg"))
    ours = VOCSplit(root, "trainval", np.asarray)
    np.testing.assert_array_equal(ours.labels, expected)
    np.testing.assert_array_equal(ours[0][0], pixels)
    assert ours.names[0] == "é 1"


@pytest.mark.parametrize("ending", [".JPG", ".jpeg", ".png", ".webp"])
@pytest.mark.parametrize("listed", [False, True])
def test_images_may_have_any_ending_in_the_lists_too(root, ending, listed):
    expected = VOCSplit(root, "test", np.asarray).labels
    for path in (root / "VOCdevkit/VOC2007/JPEGImages").iterdir():
        path.rename(path.with_suffix(ending))
    for path in lists(root).glob("*test.txt") if listed else ():
        path.write_text(re.sub(r"^\d+", lambda name: name[0] + ending, path.read_text(), flags=re.MULTILINE))
    test = VOCSplit(root, "test", np.asarray)
    np.testing.assert_array_equal(test.labels, expected)
    assert test[7][0].shape == (20, 20, 3)


def test_two_images_of_one_name_are_told_apart_by_the_list_or_not_at_all(root):
    images = root / "VOCdevkit/VOC2007/JPEGImages"
    shutil.copy(images / "000003.jpg", images / "000003.png")
    with pytest.raises(VOCError, match=r"000003\.jpg and .*000003\.png have the same name"):
        VOCSplit(root, "trainval", np.asarray)
    for path in lists(root).glob("*trainval.txt"):
        path.write_text(path.read_text().replace("000003", "000003.jpg"))
    assert len(VOCSplit(root, "trainval", np.asarray)) == 40


@pytest.mark.parametrize("place", [".", "VOCdevkit", "VOCdevkit/VOC2007", "..", "../.."])
def test_the_folder_may_be_given_too_high_or_too_deep(tmp_path, place):
    root = write_voc_shaped(tmp_path / "a" / "data")
    assert len(VOCSplit(root / place, "test", np.asarray)) == 20


def in_two_halves(root):
    """As the archives are, each unpacked into a folder of its own."""
    for half, others in (("VOCtrainval_06-Nov-2007", "test"), ("VOCtest_06-Nov-2007", "trainval")):
        shutil.copytree(root / "VOCdevkit", root / half / "VOCdevkit")
        for path in lists(root / half).glob(f"*{others}.txt"):
            path.unlink()
    shutil.rmtree(root / "VOCdevkit")
    return root


def test_two_halves_are_read_together(root):
    expected = [VOCSplit(root, split, np.asarray).labels for split in ("trainval", "test")]
    in_two_halves(root)
    for split, labels in zip(("trainval", "test"), expected, strict=True):
        ours = VOCSplit(root, split, np.asarray)
        np.testing.assert_array_equal(ours.labels, labels)
        assert ours.classes == ["dog", "train"]


NEAR = {
    "one half": (in_two_halves, "VOCtrainval_06-Nov-2007", "give {root} instead"),
    "the images": (lambda root: root, "VOCdevkit/VOC2007/JPEGImages", "give {root}/VOCdevkit/VOC2007 instead"),
    "two copies": (
        lambda root: shutil.copytree(root / "VOCdevkit", root.parent / "b" / "VOCdevkit"),
        "..",
        "test.txt lies in .*/b/VOCdevkit/VOC2007 and .*/data/VOCdevkit/VOC2007; name one of them instead",
    ),
    "another year": (
        lambda root: (root / "VOCdevkit/VOC2007").rename(root / "VOCdevkit/VOC2012"),
        ".",
        "there is {root}/VOCdevkit/VOC2012, but only the test labels of VOC2007 are public",
    ),
    "another year alone": (
        lambda root: (lists(root) / "test.txt").unlink() or (root / "VOCdevkit/VOC2007").rename(root / "VOC2012"),
        "VOC2012",
        "there is {root}/VOC2012, but only",
    ),
}


@pytest.mark.parametrize(("change", "place", "message"), NEAR.values(), ids=NEAR)
def test_the_folder_to_give_is_named(root, change, place, message):
    change(root)
    with pytest.raises(VOCError, match=message.format(root=root)) as error:
        VOCSplit(root / place, "test", np.asarray)
    assert "--download" not in str(error.value)


def test_a_folder_above_that_does_not_settle_it_is_not_named(root):
    shutil.copytree(root / "VOCdevkit", root.parent / "whole" / "VOCdevkit")
    (lists(root) / "test.txt").unlink()
    with pytest.raises(VOCError, match=r"test\.txt: no such file; --download"):
        VOCSplit(root, "test", np.asarray)
    with pytest.raises(VOCError, match=r"trainval\.txt lies in"):
        VOCSplit(root.parent, "trainval", np.asarray)


def test_low_shot_draws_k_images_that_show_each_class():
    labels = np.where(np.random.default_rng(0).random((200, 5)) < 0.2, 1, -1)
    labels[:50, 2] = 0  # difficult: does not show it
    for k in (1, 2, 8):
        drawn = draw_low_shot(labels, k, seed=0, draw=0).reshape(5, k)
        for column, images in enumerate(drawn):
            assert (labels[images, column] == 1).all()
            assert len(set(images)) == k
        np.testing.assert_array_equal(drawn.ravel(), draw_low_shot(labels, k, seed=0, draw=0))
        for other in ((1, 0), (0, 1)):
            assert not np.array_equal(drawn.ravel(), draw_low_shot(labels, k, *other))
    least = int((labels == 1).sum(0).min())
    with pytest.raises(VOCError, match=f"a class with {least} images cannot give {least + 1}"):
        draw_low_shot(labels, least + 1, 0, 0)


def test_an_image_drawn_for_two_classes_stands_there_twice():
    labels = np.array([[1, 1], [-1, -1]])
    assert draw_low_shot(labels, 1, 0, 0).tolist() == [0, 0]


def archive(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


ESCAPES = {
    "up": [("../outside.txt", tarfile.REGTYPE, "")],
    "down and up": [("VOCdevkit/../../outside.txt", tarfile.REGTYPE, "")],
    "through a link up": [("link", tarfile.SYMTYPE, ".."), ("link/outside.txt", tarfile.REGTYPE, "")],
    "through an absolute link": [("link", tarfile.SYMTYPE, "{outside}"), ("link/outside.txt", tarfile.REGTYPE, "")],
    "a link to a file": [("link", tarfile.SYMTYPE, "../precious.txt"), ("link", tarfile.REGTYPE, "")],
    "a hard link": [("link", tarfile.LNKTYPE, "../precious.txt"), ("link", tarfile.REGTYPE, "")],
    "a device": [("null", tarfile.CHRTYPE, "")],
    "a pipe": [("pipe", tarfile.FIFOTYPE, "")],
}


@pytest.mark.parametrize("has_filter", [voc.HAS_FILTER, False])
@pytest.mark.parametrize("members", ESCAPES.values(), ids=ESCAPES)
def test_an_archive_cannot_write_outside_its_folder(tmp_path, members, has_filter, monkeypatch):
    monkeypatch.setattr(voc, "HAS_FILTER", has_filter)
    (tmp_path / "data").mkdir()
    (tmp_path / "precious.txt").write_text("precious")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target.format(outside=tmp_path)
            info.size = kind == tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(VOCError, match="cannot be unpacked"):
        voc.unpack(tmp_path / "a.tar", tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "data", "precious.txt"]
    assert (tmp_path / "precious.txt").read_text() == "precious"
    assert not any((tmp_path / "data").iterdir())


@pytest.mark.parametrize("has_filter", [voc.HAS_FILTER, False])
def test_files_of_an_archive_are_unpacked(tmp_path, has_filter, monkeypatch):
    monkeypatch.setattr(voc, "HAS_FILTER", has_filter)
    archive(tmp_path / "a.tar", {"VOCdevkit/VOC2007/a.txt": b"x", "VOCdevkit/b..txt": b"y"})
    voc.unpack(tmp_path / "a.tar", tmp_path / "data")
    assert (tmp_path / "data/VOCdevkit/VOC2007/a.txt").read_bytes() == b"x"


def test_an_absolute_name_in_an_archive_is_one_below_its_folder(tmp_path):
    archive(tmp_path / "a.tar", {f"{tmp_path}/outside.txt": b"x"})
    voc.unpack(tmp_path / "a.tar", tmp_path / "data")
    assert not (tmp_path / "outside.txt").exists()
    assert (tmp_path / "data" / tmp_path.relative_to("/") / "outside.txt").read_bytes() == b"x"


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b cut"])
def test_what_is_no_archive_is_named(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(VOCError, match=r"a\.tar cannot be unpacked"):
        voc.unpack(tmp_path / "a.tar", tmp_path)


class Archives(http.server.BaseHTTPRequestHandler):
    """Serves `files`; goes on where asked to, if it `can_go_on`; breaks off after `limit` bytes."""

    files: ClassVar[dict[str, bytes]] = {}
    limit, can_go_on = 10**9, True
    sent: ClassVar[list[tuple[str, int]]] = []  # name and first byte of each request

    def do_GET(self):
        content, start = self.files[self.path], 0
        if "Range" in self.headers and self.can_go_on:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            return self.send_error(416)
        self.sent.append((self.path, start))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Two small archives on this machine in place of the official ones."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Archives) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        sources, files = {}, {}
        for name in ("2007", "2007-test"):
            archive(tmp_path / "a.tar", {f"VOCdevkit/{name}.txt": name.encode() * 5000})
            content = files[f"/{name}.tar"] = (tmp_path / "a.tar").read_bytes()
            url = f"http://127.0.0.1:{httpd.server_port}/{name}.tar"
            sources[name] = {"url": url, "filename": f"{name}.tar", "md5": hashlib.md5(content).hexdigest()}
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(voc, "DATASET_YEAR_DICT", sources)
        monkeypatch.setattr(Archives, "files", files)
        monkeypatch.setattr(Archives, "sent", [])
        yield Archives
        httpd.shutdown()


@pytest.mark.parametrize("can_go_on", [True, False])
def test_a_broken_download_goes_on_where_it_broke_if_the_server_can(can_go_on, tmp_path, server, monkeypatch):
    root = tmp_path / "new"
    monkeypatch.setattr(server, "can_go_on", can_go_on)
    with monkeypatch.context() as patch:
        patch.setattr(server, "limit", 1000)
        with pytest.raises(VOCError, match="the connection broke; the same command continues from here"):
            voc.download(root)
    assert not (root / "VOCdevkit").exists()
    voc.download(root)
    voc.download(root)
    assert server.sent == [("/2007.tar", 0), ("/2007.tar", 1000 * can_go_on), ("/2007-test.tar", 0)]
    for name in ("2007", "2007-test"):
        assert (root / "VOCdevkit" / f"{name}.txt").read_text() == name * 5000


def test_a_download_with_another_checksum_is_not_used(tmp_path, server):
    server.files["/2007.tar"] = server.files["/2007.tar"][::-1]
    with pytest.raises(VOCError, match="gave a file whose checksum is not"):
        voc.download(tmp_path / "new")
    assert not any((tmp_path / "new").iterdir())


def test_a_whole_archive_with_wrong_bytes_is_fetched_anew(tmp_path, server):
    (tmp_path / "2007.tar").write_bytes(server.files["/2007.tar"][::-1])
    with pytest.raises(VOCError, match="was complete but damaged, and was removed; try again"):
        voc.download(tmp_path)
    voc.download(tmp_path)
    assert (tmp_path / "VOCdevkit" / "2007.txt").exists()


def test_a_server_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    source = {"url": "http://127.0.0.1:9/a.tar", "filename": "a.tar", "md5": "0"}
    monkeypatch.setattr(voc, "DATASET_YEAR_DICT", {"2007": source, "2007-test": source})
    with pytest.raises(VOCError, match=r"http://127\.0\.0\.1:9/a\.tar cannot be fetched"):
        voc.download(tmp_path)
