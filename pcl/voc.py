"""VOC2007 classification: labels as the devkit keeps them, images by name, low-shot draws.

Any folder of this shape will do; its classes are those that ImageSets/Main lists:

    DIR/VOCdevkit/VOC2007/JPEGImages/000005.jpg                           or another ending
    DIR/VOCdevkit/VOC2007/ImageSets/Main/{trainval,test}.txt              a name in each line
    DIR/VOCdevkit/VOC2007/ImageSets/Main/<class>_{trainval,test}.txt      a name and 1, -1 or 0 (difficult)

Letters: N images.
"""

from __future__ import annotations

import codecs
import http.client
import os
import re
import tarfile
import unicodedata
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

from pcl.images import find_images, read_image


class VOCError(ValueError):
    """Files that are missing or do not say what they must; the message names file and remedy."""


class VOCSplit(Dataset):
    """One split of a VOC-shaped folder.

    Args:
        root: DIR, the folder that holds VOCdevkit (`find_folder` tells which others will do).
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
        folder, self.transform = find_folder(Path(root), split), transform
        lists, images = folder / "ImageSets" / "Main", _images_by_name(folder / "JPEGImages")
        self.names = _lines(lists / f"{split}.txt")
        if not self.names:
            raise VOCError(f"{lists / f'{split}.txt'} names no image")
        # A class may be called "train": "train_trainval.txt" is its list.
        names = find_folder(Path(root), "trainval") / "ImageSets" / "Main"
        self.classes = sorted(path.name.removesuffix("_trainval.txt") for path in names.glob("?*_trainval.txt"))
        if not self.classes:
            raise VOCError(f"{names} holds no <class>_trainval.txt")
        meant = [images.get(name, [name]) for name in self.names]
        self._paths = [paths[0] for paths in meant]
        if len(set(self._paths)) < len(meant):
            raise VOCError(f"{lists / f'{split}.txt'} names an image twice")
        columns = [_read_labels(lists / f"{name}_{split}.txt", self._paths, images) for name in self.classes]
        self.labels = np.stack(columns, axis=1)
        if several := [paths for paths in meant if len(paths) > 1]:
            raise VOCError(f"{several[0][0]} and {several[0][1]} have one name in the lists; remove or rename one of them")
        if absent := [name for name in self.names if name not in images]:
            first = folder / "JPEGImages" / absent[0]
            raise VOCError(
                f"{len(absent)} images of {split} are missing, the first {first}.jpg (or another ending); put them there{HINT}"
            )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(read_image(self._paths[index])), index


def find_folder(root: Path, split: str) -> Path:
    """The folder such as VOCdevkit/VOC2007 that has this split's list: in `root`, `root` itself, or a few folders deeper.

    Of the archives, unpacked apart, one has the training images and the other one the test images.

    Raises:
        VOCError: none or several, with what lies near.
    """
    name = f"ImageSets/Main/{split}.txt"
    for place in ("VOCdevkit/VOC2007/", "", "VOC2007/", "*/VOC2007/", "*/VOCdevkit/VOC2007/", "*/*/VOCdevkit/VOC2007/"):
        found = [path.parents[2] for path in sorted(root.glob(place + name))]
        if len(found) > 1:
            raise VOCError(f"{split}.txt lies in {' and '.join(map(str, found))}; name one of them instead")
        if found:
            return found[0]
    hint = HINT
    near = {path.parent for place in ("", "VOC*/", "*/VOC*/", "*/VOCdevkit/VOC*/") for path in root.glob(f"{place}ImageSets")}
    if other := sorted(str(folder) for folder in near if re.fullmatch("VOC20(?!07)..", folder.resolve().name)):
        hint = f"; there is {', '.join(other)}, but only the test labels of VOC2007 are public: give a folder that holds it"
    for above in root.resolve().parents[:3]:
        if any(path for place in ("", "*/VOCdevkit/VOC2007/") for path in above.glob(place + name)):
            hint = f"; give {above} instead, which has it"
            break
    raise VOCError(f"{root / 'VOCdevkit' / 'VOC2007' / name}: no such file{hint}")


HINT = "; --download fetches VOC2007"
HAS_FILTER = hasattr(tarfile, "data_filter")  # Python 3.11.2 (Debian 12) has none


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
            if HAS_FILTER:
                tar.extractall(root, filter="data")
            for member in () if HAS_FILTER else tar:
                if not (member.isreg() or member.isdir()) or {"", ".."} & {*member.name.split("/")}:
                    raise tarfile.TarError(f"{member.name} is no file inside the folder")
                tar.extract(member, root)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise VOCError(f"{archive} cannot be unpacked: {error}") from error


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in _text(path.read_bytes()).splitlines() if line.strip()]
    except FileNotFoundError:
        raise VOCError(f"{path}: no such file{HINT}") from None
    except OSError as error:
        raise VOCError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise VOCError(f"{path} is not a text file in UTF-8, UTF-16 or Latin-1") from None


def _text(content: bytes) -> str:
    """Of a list or a file's name, as programs on any system write them."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
    return unicodedata.normalize("NFC", text)  # macOS may take letters and their accents apart


def _images_by_name(folder: Path) -> dict[str, list[str]]:
    """Paths of the images by their names below the folder, with and without the ending."""
    found: dict[str, list[str]] = {}
    try:
        paths = find_images(str(folder))
    except OSError as error:
        raise VOCError(f"{folder} cannot be read: {error.strerror}") from None
    for path in paths:
        name = _text(os.fsencode(os.path.relpath(path, folder)))
        for key in (name, os.path.splitext(name)[0]):
            found.setdefault(key, []).append(path)
    return found


def _read_labels(path: Path, paths: list[str], images: dict[str, list[str]]) -> np.ndarray:
    """The labels of these images, (N,)."""
    labels = {}
    for number, line in enumerate(_lines(path), start=1):
        fields = line.rsplit(maxsplit=1)
        if len(fields) != 2 or fields[1] not in ("-1", "0", "1"):
            raise VOCError(f"{path}, line {number}: {line.strip()!r} is not a name and 1, -1 or 0")
        labels[images.get(fields[0], [fields[0]])[0]] = int(fields[1])
    without = [image for image in paths if image not in labels]
    if without:
        raise VOCError(f"{path} lacks {len(without)} of the {len(paths)} images, the first {Path(without[0]).stem}")
    return np.array([labels[image] for image in paths], dtype=np.int8)
