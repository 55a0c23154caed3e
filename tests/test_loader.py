import contextlib
import errno
import gc
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from pcl import loader
from pcl.augment import DeferredView, GaussianBlur, TwoViews, center_view, crop_view, normalize, random_view
from pcl.checkpoint import save
from pcl.errors import RunError
from pcl.images import UnreadableImageError
from pcl.loader import EpochSampler, IndexedFolder, indices_of_rank, make_loader, random_numbers_of


def in_group(monkeypatch, rank, world):
    monkeypatch.setattr(loader, "get_rank", lambda: rank)
    monkeypatch.setattr(loader, "get_world_size", lambda: world)


def test_a_folder_gives_images_in_torchvision_s_order_with_their_index(image_folder):
    folder = IndexedFolder(image_folder / "train", np.asarray)
    assert len(folder) == 25
    assert folder.classes == ["a", "b"]
    assert folder.labels.tolist() == [0] * 10 + [1] * 15
    for i in (0, 9, 10, 24):
        pixels, index = folder[i]
        path = image_folder / "train" / ("a" if i < 10 else "b") / f"{i if i < 10 else i - 10:02d}.png"
        assert index == i
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(path)))


def test_images_without_class_folders_are_one_set_without_labels(image_folder, tmp_path):
    for folder, names in (("", ("b.JPG", "a.jpg")), ("deeper/below", ("c.jpg",))):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.new("RGB", (8, 8)).save(tmp_path / folder / name, "jpeg")
    (tmp_path / "notes.txt").write_text("no image")
    folder = IndexedFolder(tmp_path, np.asarray)
    assert [Path(folder.path(i)).relative_to(tmp_path).as_posix() for i in range(3)] == ["a.jpg", "b.JPG", "deeper/below/c.jpg"]
    assert (folder.classes, folder.labels.tolist()) == ([], [0, 0, 0])
    assert len(IndexedFolder(image_folder / "train" / "a", np.asarray)) == 10


def test_a_file_that_vanishes_is_named(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for workers in (0, 1):
        folder = IndexedFolder(tmp_path, np.array)
        (tmp_path / "b.jpg").rename(tmp_path / "moved")
        with pytest.raises(UnreadableImageError) as error:
            list(make_loader(folder, range(2), 1, workers))
        assert str(error.value) == (
            f"cannot read the image {tmp_path}/b.jpg: no such file (removed meanwhile, or a broken link); "
            "repair or remove the file"
        )
        (tmp_path / "moved").rename(tmp_path / "b.jpg")


def write(root, *names):
    for name in names:
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "png")


def names_in(folder, root):
    return [os.path.relpath(folder.path(i), root) for i in range(len(folder))]


STRANGE = [
    "b c/ä ö.png",
    "b/x.png",
    "b/deep/x.PNG",
    "b/deep-er/x.png",
    "b/deep/a.png",
    "ほ/猫 1.jpeg",
    "É/a\tb.png",
    "b/' \".png",
]


@pytest.mark.parametrize("flat", [False, True])
def test_names_of_any_alphabet_come_in_torchvision_s_order(tmp_path, flat):
    write(tmp_path / "set", *STRANGE, "é/caf\udce9.png")  # the last one is no UTF-8
    expected = ImageFolder(tmp_path if flat else tmp_path / "set").samples
    if flat:
        write(tmp_path, "z.png")
        expected.append((str(tmp_path / "z.png"), 0))
    folder = IndexedFolder(tmp_path if flat else tmp_path / "set", np.asarray)
    found = [(folder.path(i), int(folder.labels[i])) for i in range(len(folder))]
    assert found == sorted(expected, key=lambda s: s[0] != str(tmp_path / "z.png")) if flat else found == expected
    assert all(folder[i][0].shape == (8, 8, 3) for i in range(len(folder)))


HIDDEN = ["._x.png", ".thumbnails/x.png", "a/._x.png", "a/.ipynb_checkpoints/x.png", ".git/a/x.png"]


def test_hidden_files_and_folders_hold_no_images(tmp_path):
    home = tmp_path / ".cache"  # one that lies in a hidden folder is not hidden itself
    write(home, "a/x.png", "b/x.png", *HIDDEN)
    (home / ".DS_Store").write_bytes(b"\0")
    folder = IndexedFolder(home, np.asarray)
    assert (folder.classes, names_in(folder, home)) == (["a", "b"], ["a/x.png", "b/x.png"])
    write(home, "x.png")
    assert names_in(IndexedFolder(home, np.asarray), home) == ["x.png", "a/x.png", "b/x.png"]


def test_links_are_followed_but_not_in_a_circle(tmp_path):
    write(tmp_path, "store/1.png", "store/deep/2.png", "set/a/0.png", "set/b/0.png")
    root = tmp_path / "set"
    (root / "a" / "link.png").symlink_to(tmp_path / "store" / "1.png")
    (root / "c").symlink_to(tmp_path / "store")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "here").symlink_to(".")
    (tmp_path / "store" / "deep" / "back").symlink_to(tmp_path / "store")
    (root / "b" / "none.png").symlink_to("nothing")
    folder = IndexedFolder(root, np.asarray)
    assert folder.classes == ["a", "b", "c"]
    once = ["a/0.png", "a/link.png", "b/0.png", "b/none.png", "c/1.png", "c/deep/2.png"]
    # From a, the way up leads to b and c, but not to a again.
    around = ["a/up/b/0.png", "a/up/b/none.png", "a/up/c/1.png", "a/up/c/deep/2.png"]
    assert sorted(names_in(folder, root)) == sorted(once + around)
    with pytest.raises(UnreadableImageError, match=r"b/none\.png: no such file"):
        folder[names_in(folder, root).index("b/none.png")]


def test_images_can_be_left_out(tmp_path):
    write(tmp_path, *STRANGE)
    whole = IndexedFolder(tmp_path, np.asarray)
    names = names_in(whole, tmp_path)
    folder = IndexedFolder(tmp_path, np.asarray, skip=[whole.path(1), whole.path(4), "elsewhere.png"])
    assert names_in(folder, tmp_path) == [name for i, name in enumerate(names) if i not in (1, 4)]
    assert folder.labels.tolist() == np.delete(whole.labels, [1, 4]).tolist()
    assert folder.classes == whole.classes
    assert folder.fingerprint() != whole.fingerprint()


def test_the_fingerprint_is_of_the_names_below_the_root(tmp_path):
    for root in ("one", "another place"):
        write(tmp_path / root, *STRANGE)
    write(tmp_path / "third", *STRANGE[:-1], "b/another.png")
    fingerprints = [IndexedFolder(tmp_path / root, np.asarray).fingerprint() for root in ("one", "another place", "third")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize(
    ("names", "remark"),
    [
        (["a/1.png", "b/2.png"], ""),
        (["a/1.png", "b/deeper/2.png"], ""),
        (["1.png", "2.png"], ""),
        (["a/b/1.png", "c/d/2.png"], "the classes are the folders of {root} (2); all images lie deeper, in folders below them"),
        (
            ["1.png", "a/2.png"],
            "images lie in {root} itself: they and those in the folders below it are one set without labels",
        ),
    ],
)
def test_labels_that_may_be_meant_otherwise_are_remarked_on(tmp_path, names, remark):
    root = tmp_path / "deep" / "set"
    write(root, *names)
    assert IndexedFolder(root, np.asarray).layout_notes() == [f"note: {remark.format(root=root)}"] * bool(remark)


SYSTEMS = [
    "lost+found/1.png",
    "a/@eaDir/0.png/SYNOPHOTO_THUMB_S.png",
    "__MACOSX/a/0.png",
    "$RECYCLE.BIN/S-1/x.png",
    "a/b/#recycle/x.png",
]


def test_folders_of_systems_hold_no_images_and_are_not_listed(tmp_path, monkeypatch):
    def scandir(path):
        assert not any(name in str(path) for name in ("lost+found", "@eaDir", "__MACOSX", "RECYCLE", "Volume"))
        return listed(path)

    write(tmp_path, "a/0.png", "b/0.png", *SYSTEMS)
    write(tmp_path, "System Volume Information/x.txt", "a/Thumbs.db", "a/desktop.ini", "b/.DS_Store")
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    folder = IndexedFolder(tmp_path, np.asarray)
    assert (folder.classes, names_in(folder, tmp_path), folder.layout_notes()) == (["a", "b"], ["a/0.png", "b/0.png"], [])


def test_files_that_are_left_out_are_counted_by_ending(tmp_path):
    write(tmp_path, "a/0.jfif", "a/1.GIF", "b/2.png", "b/c/3.Jpe")
    assert IndexedFolder(tmp_path, np.asarray).layout_notes() == []
    write(tmp_path, "a/1.heic", "a/2.HEIC", "b/c/3.heic", "labels.csv", "b/README", "b/.hidden.heic", "a/x.tar.gz")
    (told,) = IndexedFolder(tmp_path, np.asarray).layout_notes()
    assert told.startswith(f"data: left out of {tmp_path}: 3 .heic, ")
    assert sorted(told.partition(".heic, ")[2].split(", ")) == ["1 .csv", "1 .gz", "1 without extension"]
    write(tmp_path, *[f"b/{i}.{i}" for i in range(20)])
    (told,) = IndexedFolder(tmp_path, np.asarray).layout_notes()
    assert told.startswith(f"data: left out of {tmp_path}: 3 .heic, ")
    assert told.endswith(", 16 with other extensions")
    write(tmp_path, "x.png", "y.heic")  # one set without labels
    assert IndexedFolder(tmp_path, np.asarray).left_out[".heic"] == 4


def test_few_of_16_bits_are_remarked_on(tmp_path):
    for i in range(40):
        pixels = np.full((4, 6), 4095 if i == 39 else 900, np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    (note,) = IndexedFolder(tmp_path, np.asarray).layout_notes()
    assert note.startswith(
        f"note: images of {tmp_path} use 12 of their 16 bits (32 looked at), so that the network sees about 16 "
    )
    assert "mogrify -evaluate multiply 16 " in note
    Image.new("L", (4, 6)).save(tmp_path / "00.png")  # the first has 8 bits
    Image.fromarray(np.full((4, 6), 4095, np.uint16)).save(tmp_path / "39.jp2")
    (tmp_path / "39.png").unlink()
    assert "use 12 of their 16 bits" in IndexedFolder(tmp_path, np.asarray).layout_notes()[0]
    (tmp_path / "39.jp2").unlink()
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "39.png")
    assert IndexedFolder(tmp_path, np.asarray).layout_notes() == []
    (tmp_path / "39.png").write_bytes(b"")  # training tells
    assert IndexedFolder(tmp_path, np.asarray).layout_notes() == []


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\x00\x00"], ids=["empty", "text", "cut off"])
def test_an_unreadable_image_is_named(tmp_path, content):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "broken ü.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"broken ü\.png"):
        IndexedFolder(tmp_path, np.asarray)[0]
    with pytest.raises(UnreadableImageError, match=r"broken ü\.png"):
        next(iter(make_loader(IndexedFolder(tmp_path, np.asarray), range(1), 1, workers=1)))


def test_views_depend_on_seed_epoch_and_index_alone(image_folder):
    def views(seed, epoch, workers):
        folder = IndexedFolder(image_folder / "train", TwoViews(random_view(32, aug_plus=True)), seed)
        sampler = EpochSampler(folder, seed=3)
        sampler.set_epoch(epoch)
        torch.manual_seed(epoch + workers)  # the process's generator has no say
        batches = list(make_loader(folder, sampler, 5, workers, persistent_workers=False))  # an option replaces a default
        order = torch.cat([index for _, index in batches]).argsort()
        return torch.cat([torch.cat([im_q, im_k], 1) for (im_q, im_k), _ in batches])[order]

    first = views(0, 0, workers=0)
    assert torch.equal(first, views(0, 0, workers=2))
    for other in (views(0, 1, 0), views(1, 0, 0)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[:, :3], first[:, 3:])


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_process_s_random_numbers_alone(image_folder, workers):
    folder = IndexedFolder(image_folder / "train", random_view(32, aug_plus=True), seed=5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    for _ in make_loader(folder, range(len(folder)), 5, workers):
        pass
    assert torch.equal(torch.rand(3), expected)


def test_random_numbers_of_puts_the_generator_back_after_an_error():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with contextlib.suppress(KeyError), random_numbers_of(4, 2):
        raise KeyError(torch.rand(9))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 4), (3, 2), (4, 6)])
def test_an_epoch_s_shares_are_disjoint_and_change(image_folder, monkeypatch, world, batch):
    def epoch_of(epoch):
        keys = []
        for rank in range(world):
            in_group(monkeypatch, rank, world)
            sampler = EpochSampler(folder, seed=0)
            sampler.set_epoch(epoch)
            share = list(sampler)
            assert len(share) == len(folder) // world
            keys += share
        return keys

    folder = IndexedFolder(image_folder / "train", np.asarray)
    keys = epoch_of(3)
    assert {epoch for epoch, _ in keys} == {3}
    indices = [index for _, index in keys]
    assert len(set(indices)) == len(indices) == len(folder) // world * world
    assert indices != [index for _, index in epoch_of(4)]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 30])
def test_the_e_step_sees_each_image_exactly_once(monkeypatch, world):
    seen = []
    for rank in range(world):
        in_group(monkeypatch, rank, world)
        seen += indices_of_rank(25)
    assert sorted(seen) == list(range(25))


def names_of(view):
    return [type(t).__name__ for t in view.transforms]


def test_the_views_are_the_published_ones():
    v1, v2, center = random_view(224, aug_plus=False), random_view(224, aug_plus=True), center_view(224)
    tail = ["RandomHorizontalFlip", "PILToTensor"]
    assert names_of(v1) == ["RandomResizedCrop", "RandomGrayscale", "ColorJitter", *tail]
    assert names_of(v2) == ["RandomResizedCrop", "RandomApply", "RandomGrayscale", "RandomApply", *tail]
    assert names_of(center) == ["MiddleOfThin", "Resize", "CenterCrop", "PILToTensor"]
    assert v1.transforms[0].scale == v2.transforms[0].scale == (0.2, 1.0)
    for jitter, hue in ((v1.transforms[2], 0.4), (v2.transforms[1].transforms[0], 0.1)):
        assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (*[(0.6, 1.4)] * 3, (-hue, hue))
    assert (v1.transforms[1].p, v1.transforms[3].p) == (0.2, 0.5)
    assert [t.p for t in v2.transforms[1:5]] == [0.8, 0.2, 0.5, 0.5]
    probe = crop_view(224)
    assert names_of(probe) == ["RandomResizedCrop", *tail]
    assert (probe.transforms[0].scale, probe.transforms[1].p) == ((0.08, 1.0), 0.5)
    assert center.transforms[1].size == 256
    assert center_view(32).transforms[1].size == 37


def test_the_blur_is_pillow_s_of_a_radius_between_a_tenth_and_two(monkeypatch):
    radii = []
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda radius: radii.append(radius) or ImageFilter.BLUR)
    for _ in range(2000):
        GaussianBlur()(Image.new("RGB", (5, 5)))
    assert 0.1 <= min(radii) < 0.12
    assert 1.98 < max(radii) <= 2.0
    assert np.mean(radii) == pytest.approx(1.05, abs=0.05)


def test_the_center_view_is_the_middle_of_the_image():
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[:, 40:80] = 255
    view = center_view(70)(Image.fromarray(pixels))
    assert (view.shape, view.dtype) == ((3, 70, 70), torch.uint8)
    assert view[:, :, 16:54].unique().tolist() == [255]
    assert view[:, :, 0].unique().tolist() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("tensors", [False, True])
def test_the_center_of_a_thin_image_is_that_of_the_whole(tensors):
    def whole(size):
        scaled = round(size * 8 / 7)
        if tensors:
            return v2.Compose([v2.Resize(scaled), v2.CenterCrop(size)])
        return transforms.Compose([transforms.Resize(scaled), transforms.CenterCrop(size), transforms.PILToTensor()])

    generator = np.random.default_rng(0)
    for size in (32, 35, 224):
        for short in (1, 2, 3, 7, 40, 64, 300):
            for ratio in (1, 1.5, 4.1, 15.9, 16, 17, 20.3, 33, 100 if size < 100 else 40):
                long = int(short * ratio)
                for shape in ((short, long, 3), (long, short, 3))[: 1 + (short * long < 10**5)]:
                    image = Image.fromarray(generator.integers(0, 256, shape, np.uint8))
                    image = pil_to_tensor(image) if tensors else image
                    apart = (whole(size)(image).int() - center_view(size, tensors)(image).int()).abs().max()
                    assert apart <= (ratio > 16), (size, shape)


@pytest.mark.parametrize("shape", [(20000, 1, 3), (1, 1_000_001, 3), (3, 65000, 3)])
def test_views_of_a_thin_image_take_little_memory(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    views = [center_view(224)(image), center_view(224, tensors=True)(pil_to_tensor(image))]
    views += [random_view(224, True)(image), crop_view(224)(image), DeferredView(224, True)(pil_to_tensor(image))[0]]
    assert {(view.shape, view.dtype) for view in views} == {((3, 224, 224), torch.uint8)}
    assert torch.equal(views[0], views[1])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; on macOS bytes


def test_batches_are_normalized_to_the_bit_as_torchvision_does():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), np.uint8)
    slow = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    expected = torch.stack([transforms.Compose(slow)(Image.fromarray(image)) for image in pixels])
    assert torch.equal(normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2)), expected)


class TakenApart:
    """Cyclic garbage whose end would be noticed, as that of a group of processes of which a fork has no threads."""

    def __init__(self, path):
        self.cycle, self.path, self.owner = self, path, os.getpid()

    def __del__(self):
        if os.getpid() != self.owner:
            self.path.touch()


class Collecting:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        gc.collect()
        return index


def test_a_worker_leaves_the_garbage_of_its_process_alone(tmp_path):
    gc.disable()
    try:
        TakenApart(tmp_path / "taken apart")
        assert torch.cat(list(make_loader(Collecting(), range(4), 2, workers=1))).tolist() == [0, 1, 2, 3]
    finally:
        gc.enable()
    assert not list(tmp_path.iterdir())


class Shows:
    """Whether a thread of the process had done its work before this worker was forked."""

    def __init__(self):
        self.done = []

    def __len__(self):
        return 1

    def __getitem__(self, number):
        return len(self.done)


def test_in_a_group_a_worker_is_forked_once_other_threads_have_let_go(monkeypatch):
    monkeypatch.setattr("pcl.loader.dist", SimpleNamespace(is_initialized=lambda: True))
    shows = Shows()
    batches = make_loader(shows, range(1), 1, workers=1)
    threading.Timer(0.04, shows.done.append, [True]).start()
    assert next(iter(batches)).tolist() == [1]


class Fails:
    """Of two images: the second ends in the way that it is given."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 2

    def __getitem__(self, number):
        return self.how() if number else torch.zeros(1)


class Unsendable(str):
    def __reduce__(self):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def run_out_of_shared_memory():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def run_out_of_files():
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def run_out_of_memory():
    raise MemoryError


FAILURES = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "a loader process has ended, usually for lack of memory"),
    "shared memory": (run_out_of_shared_memory, r"/dev/shm, .* --shm-size=8g\), or use fewer .*-j 0"),
    "open files": (run_out_of_files, "ulimit -n 4096"),
    "open files while a batch is sent": (Unsendable, "ulimit -n 4096"),
    "memory": (run_out_of_memory, "out of memory while loading"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "told"), FAILURES.values(), ids=FAILURES)
def test_what_a_worker_runs_out_of_is_one_line_with_its_remedy(how, told):
    with pytest.raises(RunError, match=told):
        list(make_loader(Fails(how), range(2), 1, workers=1))


@pytest.mark.filterwarnings("ignore:This process")  # Python 3.12 and later warn of forks
def test_a_second_worker_that_cannot_be_started_is_one_line_with_its_remedy(monkeypatch):
    errors, forks, fork = [], iter(range(2)), os.fork

    def second_fails():
        if next(forks):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", second_fails)
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    with pytest.raises(RunError, match=r"no more processes or threads: raise the limit \(ulimit -u"):
        list(make_loader(range(2), range(2), 1, workers=2, multiprocessing_context="fork"))
    gc.collect()
    assert not errors


def test_the_end_of_the_thread_that_pins_batches_is_one_line_with_its_remedy(monkeypatch):
    def end(self):
        raise RuntimeError("Pin memory thread exited unexpectedly")  # torch's words; its thread tells the cause

    monkeypatch.setattr(loader.DataLoader, "__iter__", end)
    with pytest.raises(RunError, match="a loader process has ended, usually for lack of memory"):
        list(make_loader(range(2), range(2), 1, workers=0))


def test_a_worker_that_dies_is_not_told_in_the_middle_of_other_things(tmp_path):
    folder = make_loader(Fails(lambda: time.sleep(60)), range(2), 1, workers=1)
    next(iter(folder))
    (worker,) = folder.workers
    worker.kill()
    worker.join()
    save(tmp_path / "c.pth.tar", {"epoch": 1})


def test_an_image_named_like_a_fault_is_an_unreadable_image(tmp_path):
    (tmp_path / "shared memory.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match="cannot read the image"):
        list(make_loader(IndexedFolder(tmp_path, np.asarray), range(1), 1, workers=0))


def test_an_epoch_s_order_depends_on_the_seed(image_folder):
    folder = IndexedFolder(image_folder / "train", np.asarray)
    assert list(EpochSampler(folder, seed=0)) == list(EpochSampler(folder, seed=0)) != list(EpochSampler(folder, seed=1))


def test_random_numbers_of_neighboring_keys_differ():
    drawn = set()
    for key in itertools.product(range(4), repeat=3):
        with random_numbers_of(*key):
            drawn.add(float(torch.rand((), dtype=torch.float64)))
    assert len(drawn) == 4**3


def test_a_subset_has_the_labels_of_its_images(image_folder):
    whole = IndexedFolder(image_folder / "train", np.asarray)
    part = whole.subset(np.array([12, 3, 24]))
    assert part.labels.tolist() == whole.labels[[12, 3, 24]].tolist()
    assert [part.path(i) for i in range(3)] == [whole.path(i) for i in (12, 3, 24)]


def test_a_folder_is_the_same_by_any_name_and_an_index_may_be_a_tensor(image_folder, monkeypatch):
    monkeypatch.chdir(image_folder)
    plain, odd = (IndexedFolder(name, np.asarray) for name in ("train", "./train//"))
    assert plain.fingerprint() == odd.fingerprint()
    assert plain.layout_notes() == odd.layout_notes()
    np.testing.assert_array_equal(plain[torch.tensor(3)][0], plain[3][0])


FOREIGN = """
import multiprocessing, signal, sys, time
import numpy as np
from pcl.loader import IndexedFolder, indices_of_rank, make_loader

def wait(ready):
    signal.signal(signal.SIGTERM, lambda *_: (print("goodbye", flush=True), sys.exit()))
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    context.Process(target=wait, args=(ready,), daemon=True).start()
    ready.wait()
    folder = IndexedFolder(sys.argv[1], np.asarray)
    next(iter(make_loader(folder, range(4), 2, 2)))
"""


def test_only_a_loader_s_own_workers_are_killed_at_exit(image_folder, tmp_path):
    (tmp_path / "script.py").write_text(FOREIGN)
    command = [sys.executable, str(tmp_path / "script.py"), str(image_folder / "train")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "goodbye\n"
