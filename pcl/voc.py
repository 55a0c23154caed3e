"""VOC2007 classification: labels in the devkit's files, images by name, low-shot draws.

Reads any folder of this shape, with the classes that ImageSets/Main lists:

    DIR/VOCdevkit/VOC2007/JPEGImages/000005.jpg                           or another ending
    DIR/VOCdevkit/VOC2007/ImageSets/Main/{trainval,test}.txt              one name per line
    DIR/VOCdevkit/VOC2007/ImageSets/Main/<class>_{trainval,test}.txt      name and 1, -1 or 0 (difficult)
"""

import http.client
import os
import re
import shutil
import tarfile
import unicodedata
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.utils import check_integrity
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

from pcl.images import encoding_of, find_images, read_image

HINT = "; --download fetches VOC2007"
HAS_FILTER = hasattr(tarfile, "data_filter")  # Python 3.11.2 (Debian 12) has none


class VOCError(ValueError):
    """A file is missing or wrong; the message names it and the remedy."""


class VOCSplit(Dataset):
    """One split of a VOC-shaped folder; `split[i]` is (transform(image i), i), where images are PIL's in RGB.

    Attributes: `classes`, sorted; `names` of the N images; `labels` (N, classes) int8: 1 shown, -1 not, 0 difficult.

    Args:
        root: DIR, the folder that holds VOCdevkit, or one that `find_folder` accepts.
        split: "trainval" or "test".

    Raises:
        VOCError: a list, a label or an image is missing or wrong.
    """

    def __init__(self, root: str | Path, split: str, transform: Callable[[Image.Image], Any]) -> None:
        folder, self.transform = find_folder(Path(root), split), transform
        lists, images = folder / "ImageSets/Main", _images_by_name(folder / "JPEGImages")
        if not (names := _lines(lists / f"{split}.txt")):
            raise VOCError(f"{lists / split}.txt names no image")
        # The training lists may lie in a folder of their own. A class may be called "train"; hidden files are left out.
        training_lists = find_folder(Path(root), "trainval") / "ImageSets/Main"
        classes = sorted(path.name.removesuffix("_trainval.txt") for path in training_lists.glob("[!.]*_trainval.txt"))
        if not classes:
            raise VOCError(f"{training_lists} holds no <class>_trainval.txt")
        if absent := [name for name in names if name not in images]:
            told = f"no image in {folder / 'JPEGImages'} is called {absent[0]} ({len(absent)} such names)"
            raise VOCError(f"{lists / split}.txt: {told}; correct the list, or put the images there{HINT}")
        found = [images[name] for name in names]
        self._paths = [paths[0] for paths in found]
        path, times = Counter(self._paths).most_common(1)[0]
        if times > 1:
            raise VOCError(f"{lists / split}.txt names {path} twice")
        self.names, self.classes = names, classes
        self.labels = np.stack([_labels(lists / f"{name}_{split}.txt", self._paths, images) for name in classes], axis=1)
        for first, *others in found:
            if others:
                raise VOCError(f"{first} and {others[0]} have the same name in the lists; remove or rename one of them")

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(read_image(self._paths[index])), index


def find_folder(root: Path, split: str) -> Path:
    """The VOC2007 folder that has this split's list: in `root`, `root` itself, or a few folders deeper.

    Raises:
        VOCError: there is none, or more than one; the message names what lies near.
    """
    name, usual = f"ImageSets/Main/{split}.txt", "VOCdevkit/VOC2007/"
    for place in (usual, "", "VOC2007/", "*/VOC2007/", f"*/{usual}", f"*/*/{usual}"):
        found = [path.parents[2] for path in sorted(root.glob(place + name))]
        if len(found) > 1:
            raise VOCError(f"{split}.txt lies in {' and '.join(map(str, found))}; name one of them instead")
        if found:
            return found[0]
    for folder in reversed((root / usual / name).parents):
        if folder.is_relative_to(root) and os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            raise VOCError(f"{folder} cannot be listed: Permission denied; make it readable")
    hint = HINT
    years = [path.parent for place in ("", "VOC*/", "*/VOC*/", "*/VOCdevkit/VOC*/") for path in root.glob(f"{place}ImageSets")]
    if other := {str(folder) for folder in years if re.fullmatch("VOC20(?!07)..", folder.resolve().name)}:
        other_years = ", ".join(sorted(other))
        hint = f"; there is {other_years}, but only the test labels of VOC2007 are public: give a folder that holds it"
    both = [f"ImageSets/Main/{part}.txt" for part in ("trainval", "test")]
    for above in reversed(root.resolve().parents[:3]):
        if all(len([*above.glob(one), *above.glob(usual + one), *above.glob(f"*/{usual}{one}")]) == 1 for one in both):
            hint = f"; give {above} instead, which has it"
    raise VOCError(f"{root / usual / name}: no such file{hint}")


def draw_low_shot(labels: np.ndarray, k: int, seed: int, draw: int) -> np.ndarray:
    """Draw k images that show each class; an image drawn for two classes counts twice.

    Args:
        labels: (N, classes), above 0 where the image shows the class.
        seed, draw: choose the random numbers.

    Returns:
        (classes * k,) image indices. A class with fewer than k images is a VOCError.
    """
    generator = np.random.default_rng((seed, k, draw))
    shows = [np.flatnonzero(column > 0) for column in labels.T]
    if (least := min(map(len, shows))) < k:
        raise VOCError(f"a class with {least} images cannot give {k} of them")
    return np.concatenate([generator.choice(images, k, replace=False) for images in shows])


def download(root: str | Path) -> None:
    """Fetch images and labels and unpack them into `root`/VOCdevkit; resume a broken download.

    Raises:
        VOCError: an archive cannot be fetched, or its checksum is not torchvision's.
    """
    Path(root).mkdir(parents=True, exist_ok=True)
    for name in ("2007", "2007-test"):
        url, md5 = DATASET_YEAR_DICT[name]["url"], DATASET_YEAR_DICT[name]["md5"]
        archive = Path(root) / DATASET_YEAR_DICT[name]["filename"]
        if not check_integrity(str(archive), md5):
            try:
                _fetch(url, archive)
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "code", 0) == 416:
                    archive.unlink()
                    raise VOCError(f"{archive} was complete but damaged, and was removed; try again") from error
                raise VOCError(f"{url} cannot be fetched: {error}; the same command continues from here") from error
            if not check_integrity(str(archive), md5):
                archive.unlink()
                raise VOCError(f"{url} gave a file whose checksum is not {md5}; it was removed, try again")
        unpack(archive, Path(root))


def _fetch(url: str, path: Path) -> None:
    """Download into `path`, resuming a part that is there, which torchvision's own helper would fetch again."""
    start = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        start *= answer.status == 206  # partial content; a server may send the whole file instead
        total = start + int(answer.headers.get("Content-Length", 0))
        bar = {"total": total, "initial": start, "desc": path.name}
        with path.open("ab" if start else "wb") as file, tqdm.wrapattr(file, "write", **bar) as target:
            shutil.copyfileobj(answer, target, 1 << 20)
    if path.stat().st_size < total:
        raise OSError("the connection broke")


def unpack(archive: Path, root: Path) -> None:
    """Extract a tar archive into `root`; VOCError if it is damaged or a member would leave `root`."""
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
    except OSError as error:
        hint = HINT * isinstance(error, FileNotFoundError)
        raise VOCError(f"{path} cannot be read: {error.strerror}{hint}") from None
    except UnicodeDecodeError:
        raise VOCError(f"{path} is not a text file in UTF-8, UTF-16 or Latin-1") from None


def _text(content: bytes) -> str:
    """A list or a file name, as programs on any system write them."""
    encoding = encoding_of(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        if encoding == "utf-16":
            raise
        text = content.decode("latin-1")
    return unicodedata.normalize("NFC", text)  # macOS may separate letters and accents


def _images_by_name(folder: Path) -> dict[str, list[str]]:
    """Image paths by their names below the folder, with and without the ending."""
    try:
        paths = find_images(folder)
    except OSError as error:
        raise VOCError(f"{folder} cannot be read: {error.strerror}") from None
    found: dict[str, list[str]] = {}
    for path in paths:
        name = _text(os.fsencode(os.path.relpath(path, folder)))
        for key in (name, os.path.splitext(name)[0]):
            found.setdefault(key, []).append(path)
    return found


def _labels(path: Path, paths: list[str], images: dict[str, list[str]]) -> np.ndarray:
    """The labels (N,) int8 of the images at these N paths."""
    labels: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        name, *label = line.rsplit(maxsplit=1)
        if label not in (["-1"], ["0"], ["1"]):
            raise VOCError(f"{path}, line {number}: {line!r} is not a name and 1, -1 or 0")
        if labels.setdefault(images.get(name, [name])[0], int(label[0])) != int(label[0]):
            raise VOCError(f"{path}, line {number}: {name} has two labels")
    if without := [image for image in paths if image not in labels]:
        raise VOCError(f"{path} lacks {len(without)} of the {len(paths)} images, the first {Path(without[0]).stem}")
    return np.array([labels[image] for image in paths], dtype=np.int8)
