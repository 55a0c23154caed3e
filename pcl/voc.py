"""VOC2007 classification: labels as the devkit keeps them, images by name, low-shot draws.

Any folder of this shape will do; its classes are those that ImageSets/Main lists:

    DIR/VOCdevkit/VOC2007/JPEGImages/000005.jpg
    DIR/VOCdevkit/VOC2007/ImageSets/Main/{trainval,test}.txt              a name in each line
    DIR/VOCdevkit/VOC2007/ImageSets/Main/<class>_{trainval,test}.txt      a name and 1, -1 or 0 (difficult)

Letters: N images.
"""

from __future__ import annotations

import http.client
import tarfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.utils import check_integrity
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

from pcl.images import read_image


class VOCError(ValueError):
    """Files that are missing or do not say what they must; the message names file and remedy."""


class VOCSplit(Dataset):
    """One split of a VOC-shaped folder.

    Args:
        root: DIR, the folder that holds VOCdevkit.
        split: "trainval" or "test".
        transform: from a PIL image (RGB) to what is returned with the image's index.

    Attributes:
        classes: names, sorted.
        names: of the N images.
        labels: (N, classes) int8: 1 shown, -1 not, 0 difficult.

    Raises:
        VOCError: a list, a label or an image is missing or wrong.
    """

    def __init__(self, root: str | Path, split: str, transform: Callable[[Image.Image], Any]) -> None:
        folder = Path(root) / "VOCdevkit" / "VOC2007"
        lists, self._images, self.transform = folder / "ImageSets" / "Main", folder / "JPEGImages", transform
        self.names = [line.split()[0] for line in _lines(lists / f"{split}.txt")]
        if len(set(self.names)) < len(self.names):
            raise VOCError(f"{lists / f'{split}.txt'} names an image twice")
        if not self.names:
            raise VOCError(f"{lists / f'{split}.txt'} names no image")
        # A class may be called "train": "train_trainval.txt" is its list.
        self.classes = sorted(path.name.removesuffix("_trainval.txt") for path in lists.glob("?*_trainval.txt"))
        if not self.classes:
            raise VOCError(f"{lists} holds no <class>_trainval.txt")
        columns = [_read_labels(lists / f"{name}_{split}.txt", self.names) for name in self.classes]
        self.labels = np.stack(columns, axis=1)
        have = {path.name for path in self._images.glob("*.jpg")}
        absent = [name for name in self.names if f"{name}.jpg" not in have]
        if absent:
            raise VOCError(f"{len(absent)} images of {split} are missing, the first {self._images / f'{absent[0]}.jpg'}{HINT}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(read_image(self._images / f"{self.names[index]}.jpg")), index


HINT = "; --download fetches VOC2007"


def draw_low_shot(labels: np.ndarray, k: int, seed: int, draw: int) -> np.ndarray:
    """For each class k random images that show it; their union, with an image drawn for two classes standing there twice.

    Args:
        labels: (N, classes), above 0 where the image shows the class.
        k: images for each class.
        seed, draw: other numbers, other images.

    Returns:
        (classes * k,) indices of images.

    Raises:
        VOCError: a class with fewer than k images.
    """
    generator = np.random.default_rng((seed, k, draw))
    shows = [np.flatnonzero(column > 0) for column in labels.T]
    if min(map(len, shows)) < k:
        raise VOCError(f"a class with {min(map(len, shows))} images cannot give {k} of them")
    return np.concatenate([generator.choice(images, k, replace=False) for images in shows])


def download(root: str | Path) -> None:
    """Fetch the archives of VOC2007 and unpack them into `root`/VOCdevkit; a broken download goes on where it broke.

    The two that hold images and labels; the third official one holds MATLAB programs, which nothing here needs.

    Raises:
        VOCError: an archive that cannot be fetched, or that does not have its checksum.
    """
    Path(root).mkdir(parents=True, exist_ok=True)
    for name in ("2007", "2007-test"):
        source = DATASET_YEAR_DICT[name]  # torchvision's addresses and checksums
        archive = Path(root) / source["filename"]
        if not check_integrity(str(archive), source["md5"]):
            try:
                _fetch(source["url"], archive)
            except (OSError, http.client.HTTPException) as error:
                raise VOCError(f"{source['url']} cannot be fetched: {error}; the same command goes on from here") from error
            if not check_integrity(str(archive), source["md5"]):
                archive.unlink()
                raise VOCError(f"{source['url']} did not give the file of checksum {source['md5']}; it was removed, try again")
        unpack(archive, Path(root))


def _fetch(url: str, path: Path) -> None:
    """Download into `path`, going on at its end if a part is there (torchvision's own helper starts anew)."""
    start = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        goes_on = answer.status == 206  # partial content; a server may send the whole file all the same
        total = (start if goes_on else 0) + int(answer.headers.get("Content-Length", 0))
        with path.open("ab" if goes_on else "wb") as file, tqdm(desc=path.name, total=total, unit="B", unit_scale=True) as bar:
            bar.update(file.tell())
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if path.stat().st_size < total:
        raise OSError("the connection broke")


def unpack(archive: Path, root: Path) -> None:
    """Extract a tar archive below `root`; a member that would leave it is an error (VOCError) and is not written."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise VOCError(f"{archive} cannot be unpacked: {error}") from error


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise VOCError(f"{path}: no such file{HINT}") from None
    except OSError as error:
        raise VOCError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise VOCError(f"{path} is not a text file in UTF-8") from None


def _read_labels(path: Path, names: list[str]) -> np.ndarray:
    labels = {}
    for number, line in enumerate(_lines(path), start=1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in ("-1", "0", "1"):
            raise VOCError(f"{path}, line {number}: {line.strip()!r} is not a name and 1, -1 or 0")
        labels[fields[0]] = int(fields[1])
    without = [name for name in names if name not in labels]
    if without:
        raise VOCError(f"{path} lacks {len(without)} of the {len(names)} images, the first {without[0]}")
    return np.array([labels[name] for name in names], dtype=np.int8)
