"""Images: an indexed folder, the two random views of training, the center crop of the E-step.

What is drawn at random for an image depends on the seed, the epoch and the image's index alone, so that a run does not
depend on the number of loader workers and an epoch can be repeated.
"""

from __future__ import annotations

import copy
import errno
import gc
import multiprocessing
import os
import re
import shutil
import signal
import threading
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import active_children, connection, current_process, parent_process, util
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pcl.distributed import derive_seed, get_rank, get_world_size
from pcl.errors import RunError
from pcl.images import (  # noqa: F401  people look for both readers beside the views
    UnreadableImageError,
    bits_used,
    find_images,
    in_words,
    list_folder,
    read_image,
    read_tensor,
    tell_left_out,
    why_unreadable,
)
from pcl.terminal import shielded

FEWER = "fewer loader processes, or none (-j 0; of eval_svm_voc.py: --num-workers 0)"
REMEDIES = {  # of what goes wrong in loading, by the words of the error, which may be a worker's
    "shared memory|No space left|Bus error": (
        f"/dev/shm, by which loader processes send batches, is full: enlarge it (docker run --shm-size=8g), or take {FEWER}"
    ),
    "Too many open files|ancdata": f"too many open files: raise the limit (ulimit -n 4096), or take {FEWER}",
    "allocate memory|MemoryError": f"out of memory while loading: take {FEWER}",
    "DataLoader worker .pid|^Connection|^EOFError": (
        f"a loader process has ended, mostly for want of memory, or of shared memory (docker run --shm-size=8g): take {FEWER}"
    ),
    "AF_UNIX path too long": "the path in TMPDIR is too long for sockets; set another, such as TMPDIR=/tmp",
}


class IndexedFolder(Dataset):
    """Images of `root/<class>/..`, in torchvision's order, each with its index.

    Where images lie in `root` itself, there are no classes: all images below it are one set without labels. Links are
    followed; hidden files and folders are left out. `left_out` counts the other files, by ending.

    Args:
        root: the folder.
        transform: from what `read` gives to what is returned.
        seed: of what the transform draws.
        read: from a path to an image; by default PIL's, in RGB.
        skip: paths of images to leave out, as `path` gives them.

    `folder[epoch, i]` is (transform(image i), i) with the random numbers of that epoch; `folder[i]` those of epoch 0.

    Raises:
        FileNotFoundError: no folder, or no image in it.
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
        self.root = Path(root)
        self.classes: list[str] = []  # none: without labels
        listing, self.left_out = list_folder(root), Counter[str]()
        if listing.images:
            found = [find_images(root, self.left_out)]
        else:
            self.left_out += listing.others
            self.classes = [os.path.basename(folder) for folder in listing.folders]
            found = [find_images(folder, self.left_out) for folder in listing.folders]
        if not any(found):
            told = f"no image in {root}/<class>/; put JPEG, PNG or other images there"
            raise FileNotFoundError(told + tell_left_out(self.left_out))
        self.labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found])  # (N,)
        # An array, since a worker's reading of a list's strings copies them all into its memory, page by page.
        self._paths = np.array([os.fsencode(path) for paths in found for path in paths])  # (N,) bytes
        if skip:
            kept = ~np.isin(self._paths, [os.fsencode(path) for path in skip])
            self._paths, self.labels = self._paths[kept], self.labels[kept]
        self.transform, self.seed, self.read = transform, seed, read

    def with_transform(self, transform: Callable[[Any], Any]) -> IndexedFolder:
        """The same images, otherwise transformed."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def subset(self, index: np.ndarray) -> IndexedFolder:
        """The images of these indices alone; they are counted anew, from 0."""
        other = copy.copy(self)
        other._paths, other.labels = self._paths[index], self.labels[index]
        return other

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Of the image's file."""
        return os.fsdecode(self._paths[index])

    def digest(self) -> int:
        """A number that is most likely another one for other images: of their names below the root, in order, and sizes.

        Sizes are asked of a thousand files at most: for a million, a network's file system would take minutes.
        """
        names = b"\0".join(self._paths.tolist()).replace(os.fsencode(self.root) + b"/", b"")
        some = self._paths[:: -(-len(self) // 1000)].tolist()
        return zlib.crc32(repr([os.path.exists(path) and os.path.getsize(path) for path in some]).encode(), zlib.crc32(names))

    def remarks(self) -> list[str]:
        """Lines for the log on what may have been meant otherwise: files, folders and values of pixels."""
        lines = [f"data: left out of {self.root}: {in_words(self.left_out)}"] if self.left_out else []
        return lines + [f"note: {note}" for note in (self._note_on_folders(), self._note_on_bits()) if note]

    def _note_on_bits(self) -> str:
        """Whether the images use a small part of their 16 bits, as far as some of them show."""
        looked = np.unique(np.linspace(0, len(self) - 1, 32).astype(int))
        with suppress(UnreadableImageError):  # training tells
            bits = bits_used(self.path(0)) and max(bits_used(self.path(i)) for i in looked)
            if 0 < bits < 15:
                return (
                    f"images of {self.root} use {bits} of their 16 bits ({len(looked)} looked at), so that the network sees "
                    f"about {max(1, 2 ** (bits - 8))} of 256 levels; multiply the values of all images by {2 ** (16 - bits)}, "
                    f"with ImageMagick: mogrify -evaluate multiply {2 ** (16 - bits)} FILE .."
                )
        return ""

    def _note_on_folders(self) -> str:
        """How labels come from folders that one may have meant otherwise."""
        depth = np.char.count(self._paths, b"/") - os.fsencode(self.root).count(b"/")  # (N,) 1: in the root itself
        if not self.classes and depth.max() > 1:
            return f"images lie in {self.root} itself: those in the folders below it are one set with them, without labels"
        if self.classes and depth.min() > 2:
            folders = f"the folders of {self.root} ({len(self.classes)})"
            return f"the classes are {folders}; all images lie deeper, in folders below them"
        return ""

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with random_numbers_of(self.seed, epoch, index):
            try:
                image = self.read(self.path(index))
            except UnreadableImageError as error:
                raise UnreadableImageError(f"{error}, or leave such files out with --skip-unreadable") from error
            return self.transform(image), index


@contextmanager
def random_numbers_of(*key: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from `key`; outside, nothing has happened.

    Only the CPU's: with no loader workers this runs in the training process, whose GPU generator must go on undisturbed.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)


class EpochSampler(DistributedSampler):
    """This rank's share of an epoch's permutation, as (epoch, index), so that workers that live on know the epoch.

    Where the ranks do not divide the images, the last few sit the epoch out rather than count twice. The first `skip` of
    this rank's images are left out, for a run that goes on in the middle of an epoch.
    """

    skip = 0

    def __init__(self, dataset: IndexedFolder, seed: int) -> None:
        super().__init__(dataset, get_world_size(), get_rank(), shuffle=True, seed=derive_seed(seed), drop_last=True)

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        return ((self.epoch, index) for index in islice(super().__iter__(), self.skip, None))


def indices_of_rank(num_images: int) -> range:
    """Images rank, rank + W, ..: each exactly once over the ranks."""
    return range(get_rank(), num_images, get_world_size())


def make_loader(
    dataset: Dataset, sampler: Sampler | range, batch_size: int, workers: int, drop_last: bool = False, in_order: bool = True
) -> DataLoader:
    """A DataLoader that draws nothing from the process's random generators; what a user can mend is a RunError."""
    return _Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=drop_last,
        in_order=in_order,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        generator=torch.Generator(),
        worker_init_fn=_start_worker,
    )


_MultiProcessingDataLoaderIter._shutdown = True  # one that could not be made has nothing to take apart, and would print that


class _Loader(DataLoader):
    """Its workers end with this process, however that ends, and not before: a signal to all is not for them."""

    workers: tuple[Any, ...] = ()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from self._start() if self.num_workers else super().__iter__()
        except (Exception, KeyboardInterrupt) as error:
            codes = []
            for worker in self.workers:
                worker.join(0.5 / len(self.workers))  # one may be just about to end
                codes.append(worker.exitcode)
                worker.kill()  # torch would wait for what it is at, such as an SVM
            # A worker that could not send a batch tells why by its exit code.
            told = f"{type(error).__name__}: {error} {[os.strerror(code) for code in codes if code and code > 0]}"
            remedy = next((text for words, text in REMEDIES.items() if re.search(words, told)), "")
            if not remedy or (isinstance(error, RunError) and "Too many open files" not in told):
                raise
            raise RunError(remedy) from error

    def _start(self) -> Iterator[Any]:
        earlier, handler = active_children(), signal.getsignal(signal.SIGCHLD)
        multiprocessing.set_forkserver_preload(["__main__", "torchvision"])  # slow to import: once, not by each worker
        util.Finalize(None, _kill_workers, exitpriority=0)  # at its exit, Python would ask them by a signal, and wait
        try:
            with shielded():
                return super().__iter__()
        finally:
            self.workers += tuple(set(active_children()) - set(earlier))
            # torch's handler raises an error wherever the process is, such as inside a save. The next batch tells too.
            if signal.getsignal(signal.SIGCHLD) != handler:
                signal.signal(signal.SIGCHLD, handler)


def _kill_workers() -> None:
    for process in active_children():
        if process.daemon:
            process.kill()


def _start_worker(worker: int) -> None:
    # A copy of what is garbage in its process must not be taken apart here: the group of an earlier run would wait for threads
    # that were not copied.
    gc.freeze()
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]
    if util.abstract_sockets_supported:
        # Batches are handed over by sockets. These have no file, which would be left, or have too long a path.
        connection.arbitrary_address = lambda _: f"\0pcl-{uuid.uuid4()}"  # type: ignore[attr-defined]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_unsent(error: Exception, _: Any) -> None:
    """End a worker that cannot send a batch, for which its process would wait; the exit code tells what was used up."""
    os._exit(next((code for code in (errno.EMFILE, errno.ENOSPC) if os.strerror(code) in str(error)), 1))


def _end_with_parent() -> None:
    """End this process when the one that it loads for is gone, which under a fork server is not its parent to the system."""
    parent = parent_process()
    assert parent
    is_child = os.getppid() == parent.pid
    while parent.is_alive() and (os.getppid() == parent.pid) == is_child:
        parent.join(1)
    config = current_process()._config  # type: ignore[attr-defined]
    shutil.rmtree(config.get("tempdir") or "", ignore_errors=True)  # that process's, which cannot remove it any more
    os._exit(1)
