import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

from pcl.images import ENDINGS, FORMATS, MOST_PIXELS, UnreadableImageError, bits_used, read_image, read_tensor, why_unreadable

ROWS, COLUMNS = np.mgrid[:40, :60]
PIXELS = np.stack([COLUMNS * 4, ROWS * 6, COLUMNS + ROWS * 2], axis=-1).astype(np.uint8)
GRAY = (ROWS * 6).astype(np.uint8)
DEEP = (ROWS * 1600 + COLUMNS).astype(np.uint16)  # 16 bits: up to 62,459 of 65,535


def rgb(gray):
    return np.stack([gray] * 3, axis=-1)


def with_alpha(pixels):
    return Image.fromarray(np.concatenate([pixels, ((COLUMNS > 30) * 200)[..., None].astype(np.uint8)], axis=-1))


def palette():
    image = Image.fromarray((ROWS // 10).astype(np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
    return image


PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]])[ROWS // 10]
FRAMES = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
WHOLE = {"save_all": True, "append_images": FRAMES[1:]}
CMYK = Image.merge("CMYK", [*(Image.fromarray(255 - PIXELS[..., i]) for i in range(3)), Image.new("L", (60, 40), 0)])
BLACKENED = Image.merge("CMYK", [*CMYK.split()[:3], Image.new("L", (60, 40), 128)])

# How it is saved -> the pixels that a person expects, within so many levels.
KINDS = {
    "a.jpg": (Image.fromarray(PIXELS), {"quality": 95}, PIXELS, 6),
    "A.JPEG": (Image.fromarray(PIXELS), {"quality": 95, "progressive": True}, PIXELS, 6),
    "gray.jpg": (Image.fromarray(GRAY), {"quality": 95}, rgb(GRAY), 3),
    "cmyk.jpg": (CMYK, {"quality": 95}, PIXELS, 6),
    "dark cmyk.jpg": (BLACKENED, {"quality": 95}, PIXELS * (127 / 255), 6),
    "cmyk.tiff": (CMYK, {}, PIXELS, 1),
    "a.png": (Image.fromarray(PIXELS), {}, PIXELS, 0),
    "gray.png": (Image.fromarray(GRAY), {}, rgb(GRAY), 0),
    "two levels.png": (Image.fromarray(GRAY > 99), {}, rgb(255 * (GRAY > 99)), 0),
    "palette.png": (palette(), {}, PALETTE, 0),
    "transparent palette.png": (palette(), {"transparency": b"\x00\x40\xff"}, PALETTE, 0),
    "one transparent gray.png": (Image.fromarray(GRAY), {"transparency": 60}, rgb(GRAY), 0),
    "alpha.png": (with_alpha(PIXELS), {}, PIXELS, 0),
    "gray alpha.png": (with_alpha(GRAY[..., None]), {}, rgb(GRAY), 0),
    "alpha.webp": (with_alpha(PIXELS), {"lossless": True, "exact": True}, PIXELS, 0),
    "16 bits.png": (Image.fromarray(DEEP), {}, rgb(DEEP / 257), 0.5),
    "16 bits.pgm": (Image.fromarray(DEEP), {}, rgb(DEEP / 257), 0.5),
    "16 bits.tif": (Image.fromarray(DEEP), {}, rgb(DEEP / 257), 0.5),
    "16 bits big endian.tif": (Image.frombytes("I;16B", (60, 40), DEEP.astype(">u2").tobytes()), {}, rgb(DEEP / 257), 0.5),
    "moving.png": (FRAMES[0], WHOLE, PIXELS, 0),
    "moving.webp": (FRAMES[0], WHOLE | {"lossless": True}, PIXELS, 0),
    "moving.tif": (FRAMES[0], WHOLE, PIXELS, 0),
    "moving.gif": (palette(), {"save_all": True, "append_images": [palette().rotate(180)]}, PALETTE, 0),
    "transparent.gif": (palette(), {"transparency": 1}, PALETTE, 0),
    "a.jfif": (Image.fromarray(PIXELS), {"quality": 95}, PIXELS, 6),
    "a.jp2": (Image.fromarray(PIXELS), {}, PIXELS, 0),
    "a.tga": (Image.fromarray(PIXELS), {}, PIXELS, 0),
    "12 bits.pgm": (Image.fromarray(DEEP), {}, rgb(DEEP / 257), 0.6),
    "a.bmp": (Image.fromarray(PIXELS), {}, PIXELS, 0),
    "a.ppm": (Image.fromarray(PIXELS), {}, PIXELS, 0),
}

readers = pytest.mark.parametrize("read", [read_image, read_tensor])


def pixels_of(read, path):
    """(H, W, 3) by either reader."""
    if read is read_image:
        image = read(path)
        assert image.mode == "RGB"
        return np.asarray(image).astype(float)
    image = read(path)
    assert image.dtype == torch.uint8
    return image.permute(1, 2, 0).numpy().astype(float)


@readers
@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_looks_as_a_person_expects(tmp_path, name, read):
    image, options, expected, tolerance = KINDS[name]
    if name.endswith("bits.pgm"):  # which Pillow reads, but did not always write
        white = 4095 if name.startswith("12") else 65535
        (tmp_path / name).write_bytes(b"P5 60 40 %d\n" % white + np.rint(DEEP * (white / 65535)).astype(">u2").tobytes())
    else:
        image.save(tmp_path / name, **options)
    found = pixels_of(read, tmp_path / name)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance


@readers
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_an_image_is_turned_upright(tmp_path, kind, read):
    """An EXIF orientation says where row 0 and column 0 of what is stored belong."""
    stored = {
        1: PIXELS,  # top, left
        2: PIXELS[:, ::-1],  # top, right
        3: PIXELS[::-1, ::-1],  # bottom, right
        4: PIXELS[::-1],  # bottom, left
        5: PIXELS.transpose(1, 0, 2),  # left, top
        6: PIXELS.transpose(1, 0, 2)[::-1],  # right, top
        7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: PIXELS.transpose(1, 0, 2)[:, ::-1],  # left, bottom
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{kind}"
        options = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(kind, {})
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, **options)
        found = pixels_of(read, path)
        assert found.shape == PIXELS.shape, orientation
        assert np.abs(found - PIXELS).max() <= (6 if kind == "jpg" else 0), orientation
    deep, exif = Image.fromarray(np.ascontiguousarray(DEEP[::-1])), Image.Exif()
    exif[0x0112] = 4
    deep.save(tmp_path / "deep.png", exif=exif)
    assert np.abs(pixels_of(read, tmp_path / "deep.png") - rgb(DEEP / 257)).max() <= 0.5


@readers
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0MM\0\x2a\0\0\0\x08\0\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_data_that_make_no_sense_turn_nothing(tmp_path, exif, read):
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", quality=95, exif=exif)
    assert np.abs(pixels_of(read, tmp_path / "a.jpg") - PIXELS).max() <= 6


def write_png(path, size, depth, content, color=False):
    """A PNG of rows that each begin with a zero."""
    header = struct.pack(">IIBBBBB", *size, depth, 2 * color, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(content), b"IEND"]
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_12_bits(path, values):
    """A TIFF of 12 bits, two values in three bytes, (H, W), W even."""
    first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()
    tags = {
        256: values.shape[1],
        257: values.shape[0],
        258: 12,
        259: 1,
        262: 1,
        273: 8,
        277: 1,
        278: len(values),
        279: len(packed),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(packed))
    path.write_bytes(head + packed + struct.pack("<H", len(tags)) + entries + bytes(4))


@readers
def test_a_tiff_of_12_bits_is_scaled_by_them(tmp_path, read):
    write_12_bits(tmp_path / "a.tif", DEEP >> 4)
    assert np.abs(pixels_of(read, tmp_path / "a.tif") - rgb((DEEP >> 4) / (4095 / 255))).max() <= 0.5
    assert bits_used(tmp_path / "a.tif") == 0


@readers
@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_in_which_white_is_zero_is_shown_as_a_person_sees_it(tmp_path, read, bits):
    Image.fromarray(DEEP if bits == 16 else (DEEP >> 8).astype(np.uint8)).save(tmp_path / "a.tif")
    content = (tmp_path / "a.tif").read_bytes()
    entry = struct.pack("<HHI", 262, 3, 1)
    assert content.count(entry + b"\1\0") == 1
    (tmp_path / "a.tif").write_bytes(content.replace(entry + b"\1\0", entry + b"\0\0"))
    assert np.abs(pixels_of(read, tmp_path / "a.tif") - rgb(255 - DEEP / 257)).max() <= 1


def test_too_little_memory_is_no_fault_of_the_image(tmp_path, monkeypatch):
    def load(image):
        raise MemoryError

    Image.fromarray(GRAY).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(MemoryError):
        why_unreadable(tmp_path / "a.png")


def test_how_many_of_16_bits_are_used(tmp_path):
    used = {}
    for bits, largest in ((12, 4095), (10, 1000), (16, 65535), (1, 1)):
        values = np.array([[0, largest], [largest // 2, 0]], ">u2")
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / f"{bits}.png")
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / f"{bits}.tif")
        (tmp_path / f"{bits}.pgm").write_bytes(b"P5 2 2 65535\n" + values.tobytes())
        used |= {f"{bits}.{kind}": bits for kind in ("png", "tif", "pgm")}
    write_png(tmp_path / "color.png", (2, 1), 16, b"\0" + np.array([9, 4095, 1, 0, 256, 3], ">u2").tobytes(), color=True)
    Image.fromarray(PIXELS).save(tmp_path / "8.png")
    Image.fromarray(GRAY).save(tmp_path / "8.jpg")
    used |= {"color.png": 12, "8.png": 0, "8.jpg": 0}
    assert {name: bits_used(tmp_path / name) for name in used} == used


@readers
@pytest.mark.filterwarnings("error:.*decompression bomb")
def test_whole_images_beyond_the_limits_of_pillow_are_read(tmp_path, read):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    Image.fromarray(PIXELS).save(tmp_path / "text.png", pnginfo=text)
    np.testing.assert_array_equal(pixels_of(read, tmp_path / "text.png"), PIXELS)
    assert Image.MAX_IMAGE_PIXELS is None  # 200 million take seconds
    assert MOST_PIXELS > 200e6


def test_every_format_decodes_by_itself_and_its_files_are_taken():
    assert not {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS"} & set(FORMATS)
    usual = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".mpo"}
    assert usual <= ENDINGS
    assert not {".eps", ".ps", ".pdf", ".wmf", ".pfm", ".txt", ".npy"} & ENDINGS


def spoilt(folder):
    """Files that are no whole image, and what is to be said of each."""
    grain = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    reasons = {}
    for kind in ("jpg", "png", "bmp", "ppm", "tif", "webp"):
        Image.fromarray(grain).save(folder / f"whole.{kind}")
        content = (folder / f"whole.{kind}").read_bytes()
        for share in (0.02, 0.5, 0.98):
            path = folder / f"{share:.0%}.{kind}"
            path.write_bytes(content[: int(share * len(content))])
            reasons[path.name] = ""
    for name, content in (("empty.jpg", b""), ("text.png", b"not an image")):
        (folder / name).write_bytes(content)
        reasons[name] = "it is empty, or not an image of a known format"
    for name, pixels in (("float.tif", np.float32(DEEP)), ("deeper.tif", np.int32(DEEP))):
        Image.fromarray(pixels).save(folder / name)
        reasons[name] = "its pixels are signed, 32-bit or floating-point numbers of no known range"
    (folder / "nowhere.jpg").symlink_to(folder / "gone.jpg")
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")  # runs Ghostscript
    write_png(folder / "bomb.png", (100000, 100000), 8, bytes(1000))
    return reasons | {
        "nowhere.jpg": "no such file (removed meanwhile, or a broken link)",
        "itself.jpg": "Too many levels of symbolic links",
        "folder.jpg": "Is a directory",
        "pipe.jpg": "it is a pipe, a socket or a device, not a regular file",
        "zero.jpg": "it is a pipe, a socket or a device, not a regular file",
        "postscript.png": "it is empty, or not an image of a known format",
        "bomb.png": "100000 x 100000 pixels are more than memory could hold",
    }


@readers
def test_what_cannot_be_read_whole_is_named_in_one_line(tmp_path, read):
    for name, reason in spoilt(tmp_path).items():
        with pytest.raises(UnreadableImageError) as error:
            read(tmp_path / name)
        told = str(error.value)
        assert told.startswith(f"cannot read the image {tmp_path / name}: {reason}")
        assert told.endswith("; repair or remove the file")
        assert told.count(str(tmp_path)) == 1
        assert "\n" not in told
