"""Find image files in folders and decode them."""

import codecs
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

from pcl.errors import RunError

Image.init()  # registers every plugin of Pillow
# What Pillow decodes by itself; it hands EPS to Ghostscript, for example. TGA has no magic number and comes last.
FORMATS = ["JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "PCX", "QOI", "TGA"]
FORMATS = [name for name in FORMATS if name in Image.OPEN]  # some builds lack a few
# An MPO opens as the JPEG that it begins with. A PFM holds floating-point numbers of unknown range.
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in [*FORMATS, "MPO"]} - {".pfm"}
# Names without a dot that Linux, macOS, Windows, Synology and QNAP leave among a user's files, in lower case.
SYSTEM = {
    "lost+found", "__macosx", "icon\r", "network trash folder", "temporary items",
    "system volume information", "$recycle.bin", "thumbs.db", "ehthumbs.db", "desktop.ini",
    "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot",
}  # fmt: skip

# Pillow's limits guard against strangers' files, and can be set for the whole process only.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB
# Decoding and conversion take up to 8 bytes a pixel.
MOST_PIXELS = min(2**30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)


class UnreadableImageError(RunError, OSError):
    """An image file that cannot be decoded; the message names it."""

    def __str__(self) -> str:
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()  # without a loader worker's traceback


class Listing(NamedTuple):
    """What a folder holds, without hidden files."""

    folders: list[str]  # paths, sorted
    images: list[str]  # paths; a broken link with an image's ending counts as one
    others: Counter[str]  # number of other files by ending, in lower case


def list_folder(folder: str | Path) -> Listing:
    """List a folder. Names that begin with a dot (macOS's `._photo.jpg`) or that systems leave behind are hidden."""
    _, *found = next(os.walk(folder, onerror=_raise))
    folders, files = ([name for name in names if name[0] != "." and name.lower() not in SYSTEM] for names in found)
    endings = [os.path.splitext(name)[1].lower() for name in files]
    images = [os.path.join(folder, name) for name, ending in zip(files, endings, strict=True) if ending in ENDINGS]
    others = Counter(ending or "without extension" for ending in endings if ending not in ENDINGS)
    return Listing(sorted(os.path.join(folder, name) for name in folders), images, others)


def _raise(error: OSError) -> NoReturn:
    raise error


def holds_images(folder: str | Path) -> bool:
    """Whether an image lies in the folder or below."""
    return any(listing.images for listing in _walk(str(folder)))


def find_images(folder: str | Path, others: Counter[str] | None = None) -> list[str]:
    """Paths of the images in the folder and below, in torchvision's order; counts other files in `others`.

    Follows links, except back to a folder that they lie in.
    """
    paths: list[str] = []
    for listing in _walk(str(folder)):
        paths += listing.images
        if others is not None:
            others.update(listing.others)
    return sorted(paths, key=os.path.split)


def _walk(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Listing]:
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity not in above:  # not a link in a circle
        yield (listing := list_folder(folder))
        for path in listing.folders:
            yield from _walk(path, (*above, identity))


def in_words(others: Counter[str]) -> str:
    """Files by ending, the most frequent first: "12 .heic, 3 .txt"."""
    most = others.most_common(8)
    rest = others.total() - sum(number for _, number in most)
    return ", ".join([f"{number} {ending}" for ending, number in most] + [f"{rest} with other extensions"] * bool(rest))


def tell_left_out(others: Counter[str]) -> str:
    """The end of an error about a folder without images: which files it has, and which endings are read."""
    return f"; {in_words(others)} there are left out: the extensions read are {', '.join(sorted(ENDINGS))}" if others else ""


def encoding_of(content: bytes) -> str:
    """The encoding of a list of names: UTF-16 if it begins with a mark of that, as Windows PowerShell writes it, else UTF-8."""
    return "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def read_image(path: str | Path) -> Image.Image:
    """The first frame as upright RGB; UnreadableImageError if it cannot be decoded whole."""
    with _opened(path) as image:
        return _upright_rgb(image)


def read_tensor(path: str | Path) -> Tensor:
    """The same as (3, H, W) uint8; uses torchvision's faster decoder for JPEG."""
    with _opened(path) as image:
        # Only where both give the same bytes: torchvision turns no WebP upright, for example, and keeps 16 bits.
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            with suppress(Exception):  # EXIF data without sense, or pixels that only Pillow reads, which may say what is wrong
                if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                    return decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)), ImageReadMode.RGB)
        return pil_to_tensor(_upright_rgb(image))


def why_unreadable(path: str | Path) -> str:
    """Why `read_image` fails, in a few words; empty if it does not."""
    try:
        read_image(path)
    except UnreadableImageError as error:
        return _reason(error.__cause__)
    return ""


def bits_used(path: str | Path) -> int:
    """Bits that the largest value of an image with 16 bits a channel needs; 0 for other images."""
    with _opened(path) as image:
        mode = f"{image.mode} {image.tile}"
        if ";16" not in mode or "I;12" in mode:  # a TIFF that says that it has 12 bits is read as such
            return 0
        pixels = np.asarray(image)
        low = 8 if pixels.ndim == 3 else 0  # of colors, Pillow keeps the high byte alone
        return low + int(pixels[..., :3].max() if low else pixels.max()).bit_length()


@contextmanager
def _opened(path: str | Path) -> Iterator[ImageFile.ImageFile]:
    """The opened file. Any error inside becomes an UnreadableImageError."""
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):  # reading a pipe would wait for ever
            raise ValueError("it is a pipe, a socket or a device, not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than memory could hold")
            yield image
    except MemoryError:
        raise  # the file may be whole
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UnreadableImageError(f"cannot read the image {path}: {_reason(error)}; repair or remove the file") from error


def _reason(error: BaseException | None) -> str:
    """One line without the file's name."""
    if isinstance(error, FileNotFoundError):
        return "no such file (removed meanwhile, or a broken link)"
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, or not an image of a known format"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _upright_rgb(image: Image.Image) -> Image.Image:
    white = 4095 if "I;12" in str(getattr(image, "tile", "")) else 65535  # a TIFF may say that it has 12 bits
    white_is_zero = image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(262) == 0  # Pillow inverts 8 bits alone
    image.load()
    with suppress(Exception):  # EXIF data need not make sense
        ImageOps.exif_transpose(image, in_place=True)
    # Pillow's own conversion clips 16 bits at 255. A PGM, or the PNG of an older Pillow, has its 16 bits in mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        image = Image.fromarray(np.rint(np.asarray(image) / (white / 255)).astype(np.uint8))
        image = ImageOps.invert(image) if white_is_zero else image
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are signed, 32-bit or floating-point numbers of no known range; save it with 8 or 16 bits")
    image.info.pop("transparency", None)  # Pillow would warn that it is dropped, as in the published program
    return image.convert("RGB")
