"""Find image files in folders and decode them."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

from pcl.errors import RunError

Image.init()  # every plugin of Pillow
# Only what decodes pixels by itself: Pillow hands EPS to Ghostscript, for one. The last has no magic number.
FORMATS: list[str] = [
    name
    for name in ("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "PCX", "QOI", "TGA")
    if name in Image.OPEN
]
# An MPO is opened as the JPEG that it begins with. A PFM holds floating-point numbers of no known range.
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in [*FORMATS, "MPO"]} - {".pfm"}
# What systems put among a user's files without a dot (Linux, macOS, Windows, the storage of Synology and QNAP); in lower case.
SYSTEM = {
    "lost+found", "__macosx", "icon\r", "network trash folder", "temporary items",
    "system volume information", "$recycle.bin", "thumbs.db", "ehthumbs.db", "desktop.ini",
    "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot",
}  # fmt: skip

# Pillow's limits are for files from strangers: they refuse whole pixels and warn of large images, also when a part is cut
# out. It knows no others than those of the whole process, so that they hold beside this package too.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB
# Instead, what memory would not hold: decoding and conversion take up to 8 bytes a pixel.
MOST_PIXELS = min(2**30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)


class UnreadableImageError(RunError, OSError):
    """An image file that cannot be decoded; the message names it."""

    def __str__(self) -> str:
        # A loader's worker puts its traceback before the message, up to the class's name.
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class Listing(NamedTuple):
    """What a folder holds, without what is hidden."""

    folders: list[str]  # paths, sorted
    images: list[str]  # names, sorted; a link to nowhere that is called like an image counts as one
    others: Counter[str]  # how many files of each other ending, in lower case


def list_folder(folder: str | Path) -> Listing:
    """List a folder. What begins with a dot (macOS leaves `._photo.jpg` beside photos) or is a system's is hidden."""
    folders, images, others = [], [], Counter[str]()
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.lower()
            if name.startswith(".") or name in SYSTEM:
                continue
            _, dot, ending = name.rpartition(".")
            if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                folders.append(entry.path)
            elif dot + ending in ENDINGS:
                images.append(entry.name)
            else:
                others[f".{ending}" if dot else "without ending"] += 1
    return Listing(sorted(folders), sorted(images), others)


def holds_images(folder: str | Path) -> bool:
    """Whether an image lies in the folder or below."""
    return any(listing.images for _, listing in _walk(str(folder)))


def find_images(folder: str | Path, others: Counter[str] | None = None) -> list[str]:
    """Paths of the images in the folder and below, in torchvision's order; other files are added to `others`.

    Links are followed, but not back to a folder that they lie in.
    """
    found = sorted(_walk(str(folder)), key=lambda pair: pair[0])
    if others is not None:
        for _, listing in found:
            others.update(listing.others)
    return [os.path.join(place, name) for place, listing in found for name in listing.images]


def _walk(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, Listing]]:
    """The folder and each below it, with what it holds."""
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in above:  # a link in a circle
        return
    listing = list_folder(folder)
    yield folder, listing
    for path in listing.folders:
        yield from _walk(path, above | {identity})


def in_words(others: Counter[str]) -> str:
    """Files by ending, the most frequent first: "12 .heic, 3 .txt"."""
    words = [f"{number} {ending}" for ending, number in others.most_common(8)]
    rest = others.total() - sum(number for _, number in others.most_common(8))
    return ", ".join(words + [f"{rest} of other endings"] * bool(rest))


def tell_left_out(others: Counter[str]) -> str:
    """The end of an error about a folder without images: what was found instead, and what is read."""
    return f"; {in_words(others)} there are left out: what is read ends in {', '.join(sorted(ENDINGS))}" if others else ""


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
def _opened(path: str | Path) -> Iterator[ImageFile.ImageFile]:
    """The opened file; whatever goes wrong inside is an UnreadableImageError."""
    try:
        if not stat.S_ISREG(kind := os.stat(path).st_mode) and not stat.S_ISDIR(kind):  # reading a pipe would wait for ever
            raise ValueError("it is a pipe, a socket or a device, not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than memory could hold")
            yield image
    except Exception as error:  # Pillow's decoders raise errors of many kinds, the same remedy for all
        raise UnreadableImageError(f"cannot read the image {path}: {_reason(error)}; mend or remove the file") from error


def bits_used(path: str | Path) -> int:
    """Of an image that stores 16 bits for each channel: how many its largest value needs. 0 for another."""
    with _opened(path) as image:
        if ";16" not in str(image.tile):
            return 0
        pixels = np.asarray(image)
        if pixels.ndim == 3:  # Pillow keeps the high byte of each channel
            return 8 + int(pixels[..., :3].max()).bit_length()
        return int(pixels.max()).bit_length()


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
    white = 4095 if "I;12" in str(getattr(image, "tile", "")) else 65535  # a TIFF may say that it has 12 bits
    image.load()
    with suppress(Exception):  # EXIF data that make no sense turn nothing
        ImageOps.exif_transpose(image, in_place=True)
    # Pillow's own conversion of these cuts off at 255, which leaves white. A PGM, or an older Pillow's PNG, has 16 bits in I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        image = Image.fromarray(np.rint(np.asarray(image) / (white / 255)).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are signed, 32-bit or floating-point numbers of no known range; save it with 8 or 16 bits")
    image.info.pop("transparency", None)  # is dropped, as published; Pillow would warn of that
    return image.convert("RGB")
