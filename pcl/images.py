"""Image files: finding them in a folder, decoding them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

from pcl.distributed import RunError


class UnreadableImageError(RunError, OSError):
    """An image file that cannot be decoded; the message names it."""

    def __str__(self) -> str:
        # A loader's worker puts its traceback before the message, up to the class's name.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


def holds_images(folder: str | Path) -> bool:
    """Whether an image lies in the folder itself."""
    return bool(_list_folder(str(folder))[1])


def visible_folders(folder: str | Path) -> list[str]:
    """Names of the folders in the folder, sorted, without hidden ones."""
    return sorted(os.path.basename(path) for path in _list_folder(str(folder))[0])


def find_images(folder: str) -> list[str]:
    """Paths of the images in the folder and below, in torchvision's order.

    Links are followed, but not back to a folder that they lie in. What is hidden (its name starts with a dot) is no image:
    such are the files `._photo.jpg` that macOS leaves beside photos.
    """
    return [os.path.join(place, name) for place, names in sorted(_walk(folder)) for name in names]


def _walk(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """The folder and each below it, with the names of its images."""
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in above:  # a link in a circle
        return
    below, images = _list_folder(folder)
    yield folder, images
    for path in below:
        yield from _walk(path, above | {identity})


def _list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Paths of the folders in it, and names of its images, sorted; a link to nowhere that is called like one counts as one."""
    folders, images = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                folders.append(entry.path)
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                images.append(entry.name)
    return folders, sorted(images)


def read_image(path: str | Path) -> Image.Image:
    """The image as RGB, upright; of several frames the first. UnreadableImageError if it cannot be decoded whole."""
    with _opened(path) as image:
        return _upright_rgb(image)


def read_tensor(path: str | Path) -> Tensor:
    """The same as (3, H, W) uint8; a JPEG by torchvision's decoder, which is faster."""
    with _opened(path) as image:
        # Only where both give the same bytes: torchvision turns no WebP upright, for one, and leaves 16 bits.
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and not _is_turned(image):
            with suppress(RuntimeError):  # PIL may know better, or say what is wrong
                return decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)), ImageReadMode.RGB)
        return pil_to_tensor(_upright_rgb(image))


def why_unreadable(path: str | Path) -> str:
    """Why `read_image` fails, in a few words; empty if it does not."""
    try:
        read_image(path)
    except UnreadableImageError as error:
        return _reason(error.__cause__)
    return ""


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The opened file; whatever goes wrong inside is an UnreadableImageError."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise errors of many kinds, the same remedy for all
        raise UnreadableImageError(f"cannot read the image {path}: {_reason(error)}; mend or remove the file") from error


def _reason(error: BaseException | None) -> str:
    """One line that does not repeat the file's name."""
    if isinstance(error, FileNotFoundError):
        return "no such file (removed meanwhile, or a link to nowhere)"
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, or no image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _is_turned(image: Image.Image) -> bool:
    """Whether its EXIF data ask for it to be turned to stand upright."""
    with suppress(Exception):  # such data need not make sense
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image."""
    image.load()
    with suppress(Exception):  # EXIF data that make no sense turn nothing
        ImageOps.exif_transpose(image, in_place=True)
    # Pillow's own conversion of these cuts off at 255, which leaves white. A PGM, or an older Pillow's PNG, has 16 bits in I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are signed, 32-bit or floating-point numbers of no known range; save it with 8 or 16 bits")
    image.info.pop("transparency", None)  # is dropped, as published; Pillow would warn of that
    return image.convert("RGB")
