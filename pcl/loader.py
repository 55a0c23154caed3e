"""An indexed folder of images, and loaders of it whose random numbers can be repeated.

The random numbers of an image depend on the seed, the epoch and its index alone: runs do not depend on the number of
loader workers, and an epoch can be repeated.
"""

import copy
import errno
import gc
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
import uuid
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import active_children, connection, current_process, parent_process, util
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pcl import images
from pcl.augment import center_view, random_view  # noqa: F401  people look for views and readers here too
from pcl.distributed import derive_seed, get_rank, get_world_size
from pcl.errors import RunError
from pcl.images import read_image, read_tensor, why_unreadable  # noqa: F401
from pcl.terminal import shielded

LET_GO = 0.1  # seconds that gloo's threads have for what they do in microseconds
FEWER = "fewer loader processes, or none (-j 0)"
REMEDIES = {  # by the words of an error in loading, which may be a worker's
    "shared memory|No space left|Bus error": (
        f"/dev/shm, through which loader processes send batches, is full: enlarge it (docker run --shm-size=8g), or use {FEWER}"
    ),
    "Too many open files|ancdata": f"too many open files: raise the limit (ulimit -n 4096), or use {FEWER}",
    "allocate memory|MemoryError": f"out of memory while loading: use {FEWER}",
    "DataLoader worker .pid|^Connection|^EOFError|Pin memory thread": (
        f"a loader process has ended, usually for lack of memory or of shared memory (docker run --shm-size=8g): use {FEWER}"
    ),
    "Resource temporarily unavailable|can't start new thread": (
        f"the system allows no more processes or threads: raise the limit (ulimit -u, docker run --pids-limit), or use {FEWER}"
    ),
    "AF_UNIX path too long": "the path in TMPDIR is too long for sockets; set another, such as TMPDIR=/tmp",
}


class IndexedFolder(Dataset):
    """Images of `root/<class>/...`, in torchvision's order, each with its index.

    If images lie in `root` itself, all images below it are one set without classes. Links are followed; hidden files and
    folders are left out. `left_out` counts other files by ending.

    Args:
        root: the folder.
        transform: maps what `read` returns to an item.
        seed: of the transform's random numbers.
        read: maps a path to an image; by default a PIL image in RGB.
        skip: paths of images to leave out, as `path` gives them.

    `folder[epoch, i]` is (transform(image i), i) with the random numbers of that epoch; `folder[i]` means epoch 0. Read it
    from one thread at a time (loader processes may be many): the random numbers are those of the process's one generator.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        OSError: a folder that cannot be listed.
        UnreadableImageError: on reading an image.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Any], Any],
        seed: int = 0,
        read: Callable[[str], Any] = read_image,
        skip: Collection[str] = (),
    ) -> None:
        self.root, self.transform, self.seed, self.read = Path(root), transform, seed, read
        listing = images.list_folder(self.root)
        flat = bool(listing.images)
        self.classes = [] if flat else [os.path.basename(folder) for folder in listing.folders]
        self.left_out = Counter() if flat else listing.others
        found = [images.find_images(folder, self.left_out) for folder in ([self.root] if flat else listing.folders)]
        if not any(found):
            told = f"no image in {root}/<class>/; put JPEG, PNG or other images there"
            raise FileNotFoundError(told + images.tell_left_out(self.left_out))
        self.labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found])  # (N,)
        # Not a list: reading its strings would copy them all into each worker's memory.
        self._paths = np.array([os.fsencode(path) for paths in found for path in paths])  # (N,) bytes
        if skip:
            kept = ~np.isin(self._paths, [os.fsencode(path) for path in skip])
            self._paths, self.labels = self._paths[kept], self.labels[kept]

    def with_transform(self, transform: Callable[[Any], Any]) -> "IndexedFolder":
        """The same images with another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def subset(self, index: np.ndarray) -> "IndexedFolder":
        """The images of these indices, counted anew from 0."""
        other = copy.copy(self)
        other._paths, other.labels = self._paths[index], self.labels[index]
        return other

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with random_numbers_of(self.seed, epoch, int(index)):
            return self.transform(self.read(self.path(index))), index

    def path(self, index: int) -> str:
        """Path of an image's file."""
        return os.fsdecode(self._paths[index])

    def names(self, folder: str | Path | None = None) -> list[str]:
        """Each image's file relative to `folder`, by default the root."""
        relative = os.path.relpath(self.path(0), folder or self.root)
        if relative.startswith(".."):
            raise ValueError(f"folder {folder} does not hold the images of {self.root}")
        start = len(self.path(0)) - len(relative)
        return [os.fsdecode(path)[start:] for path in self._paths.tolist()]

    def fingerprint(self) -> int:
        """CRC-32 of the paths below the root and some files' sizes: equal numbers mean the same images."""
        names = b"\0".join(self._paths.tolist()).replace(os.fsencode(self.root) + b"/", b"")
        some = self._paths[:: -(-len(self) // 1000)].tolist()  # asking a network's disk for a million takes minutes
        sizes = [os.path.exists(path) and os.path.getsize(path) for path in some]
        return zlib.crc32(repr(sizes).encode(), zlib.crc32(names))

    def layout_notes(self) -> list[str]:
        """Lines for the log on files, folders and pixel values that may not be what the user meant."""
        lines = [f"data: left out of {self.root}: {images.in_words(self.left_out)}"] if self.left_out else []
        depth = np.char.count(self._paths, b"/") - os.fsencode(self.root).count(b"/")  # (N,) 1: in the root itself
        if not self.classes and depth.max() > 1:
            told = f"images lie in {self.root} itself: they and those in the folders below it are one set without labels"
            lines.append(f"note: {told}")
        if self.classes and depth.min() > 2:
            folders = f"the folders of {self.root} ({len(self.classes)})"
            lines.append(f"note: the classes are {folders}; all images lie deeper, in folders below them")
        looked = np.unique(np.linspace(0, len(self) - 1, 32).astype(int))
        with suppress(images.UnreadableImageError):  # training reports it
            bits = max(images.bits_used(self.path(i)) for i in looked)
            if 0 < bits < 15:
                factor = 2 ** (16 - bits)
                lines.append(
                    f"note: images of {self.root} use {bits} of their 16 bits ({len(looked)} looked at), so that the network "
                    f"sees about {max(1, 2 ** (bits - 8))} of 256 levels; multiply the values of all images by {factor}, "
                    f"with ImageMagick: mogrify -evaluate multiply {factor} FILE ..."
                )
        return lines


@contextmanager
def random_numbers_of(*key: int) -> Iterator[None]:
    """Seed torch's CPU generator from `key` inside; restore it afterwards. GPU generators are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*key))
        yield


class EpochSampler(DistributedSampler):
    """This rank's part of an epoch's permutation, as (epoch, index): workers that live on learn the epoch from it.

    If the ranks do not divide the images, the last few sit the epoch out rather than count twice. `skip` images of this
    rank are left out at the start, to go on in the middle of an epoch.
    """

    skip = 0

    def __init__(self, dataset: IndexedFolder, seed: int) -> None:
        super().__init__(dataset, get_world_size(), get_rank(), shuffle=True, seed=derive_seed(seed), drop_last=True)

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        return ((self.epoch, index) for index in islice(super().__iter__(), self.skip, None))


def indices_of_rank(num_images: int) -> range:
    """Indices rank, rank + W, rank + 2W, ...: each image belongs to exactly one rank."""
    return range(get_rank(), num_images, get_world_size())


def make_loader(dataset: Dataset, sampler: Sampler | range, batch_size: int, workers: int, **options: Any) -> DataLoader:
    """A DataLoader with these `options` that leaves the process's random generators alone. RunError: what the user can fix."""
    defaults = {"pin_memory": torch.cuda.is_available(), "persistent_workers": workers > 0, "generator": torch.Generator()}
    options = {**defaults, "worker_init_fn": _start_worker, **options}
    return _Loader(dataset, batch_size, sampler=sampler, num_workers=workers, **options)


# Otherwise an iterator that failed to start, or to start all its workers, prints another error when it is deleted.
_MultiProcessingDataLoaderIter._shutdown = True
_MultiProcessingDataLoaderIter._workers_status = defaultdict(lambda: True)  # type: ignore[assignment]


class _Loader(DataLoader):
    """Its workers end with this process, however that ends, and not before: signals to the group do not reach them."""

    workers: tuple[Any, ...] = ()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from self._start() if self.num_workers else super().__iter__()
        except (Exception, KeyboardInterrupt) as error:
            for worker in self.workers:
                worker.join(0.5 / len(self.workers))  # it may be about to end
            codes = [worker.exitcode for worker in self.workers]
            for worker in self.workers:
                worker.kill()  # torch would wait for it to finish its work, such as an SVM
            if self._iterator is not None:  # left to the garbage collector, its queues may be closed while they are used
                self._iterator._shutdown_workers()  # type: ignore[attr-defined]
                self._iterator = None
            # The exit code of a worker that could not send a batch says why.
            told = f"{type(error).__name__}: {error} {[os.strerror(code) for code in codes if code and code > 0]}"
            remedy = next((text for words, text in REMEDIES.items() if re.search(words, told)), "")
            if not remedy or (isinstance(error, RunError) and "Too many open files" not in told):
                raise
            raise RunError(remedy) from error

    def _start(self) -> Iterator[Any]:
        earlier, handler = active_children(), signal.getsignal(signal.SIGCHLD)
        multiprocessing.set_forkserver_preload(["__main__", "torchvision"])  # import what is slow once, not in each worker
        # gloo's threads are about to drop the tensors of the last collective, which takes a lock inside Python. Up to 3.11,
        # a worker that is forked in that moment waits for the lock for ever.
        time.sleep(LET_GO if dist.is_initialized() else 0)
        try:
            with shielded():
                try:
                    return super().__iter__()
                finally:
                    started = set(active_children()) - set(earlier)
                    self.workers += tuple(started)
                    for worker in started:  # Python would end them by a signal at exit, and wait
                        util.Finalize(None, worker.kill, exitpriority=0)
        finally:
            # torch's handler raises an error anywhere, even inside a save. The next batch raises it too.
            if signal.getsignal(signal.SIGCHLD) != handler:
                signal.signal(signal.SIGCHLD, handler)


def _start_worker(worker: int) -> None:
    # Do not collect what the fork copied: destroying an earlier run's process group would wait for threads that are not here.
    gc.freeze()
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]
    if util.abstract_sockets_supported:  # batches pass through sockets; these leave no file, and no path is too long
        connection.arbitrary_address = lambda _: f"\0pcl-{uuid.uuid4()}"  # type: ignore[attr-defined]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_unsent(error: Exception, _: Any) -> None:
    """End a worker that cannot send a batch, or its process would wait for ever. The exit code says what was used up."""
    os._exit(next((code for code in (errno.EMFILE, errno.ENOSPC) if os.strerror(code) in str(error)), 1))


def _end_with_parent() -> None:
    """End this worker when the process that it loads for is gone."""
    parent, above = parent_process(), os.getppid()  # under a fork server they differ
    assert parent
    while parent.is_alive() and os.getppid() == above:
        parent.join(1)
    # The parent's temporary folder, which it could not remove.
    shutil.rmtree(current_process()._config.get("tempdir") or "", ignore_errors=True)  # type: ignore[attr-defined]
    os._exit(1)
