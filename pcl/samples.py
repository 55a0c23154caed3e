"""Write Fashion-MNIST images (28 x 28, ten classes), which come with the package, as data for all three scripts.

    python -m pcl.samples DIR

DIR/train/<class>/ gets 400 images of each class, DIR/val/<class>/ 100. DIR/VOCdevkit gets collages in the form of VOC2007:
1,000 of training and 500 of validation images. License: samples.LICENSE beside this file.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from pcl import cli
from pcl.errors import RunError
from pcl.loader import IndexedFolder
from pcl.terminal import leave_on_signals, tell

SOURCE = Path(__file__).with_name("samples.npz")


def refuse_other_data(root: Path) -> None:
    """Raise RunError if `root` holds data of other classes, to which the samples would be added."""
    with np.load(SOURCE) as samples:
        known = set(samples["classes"])
    found = {path.name for split in ("train", "val") for path in (root / split).glob("[!.]*")}
    found |= {path.name.rpartition("_")[0] for path in (root / "VOCdevkit/VOC2007/ImageSets/Main").glob("*_*.txt")}
    if other := sorted(found - known):
        raise RunError(f"DIR {root}: it holds data of another kind, such as {other[0]}; name a new folder")


def write_image_folder(root: Path) -> None:
    """Write train/ and val/ below `root` as PNG; overwrite files of the same names."""
    with np.load(SOURCE) as samples:
        for split in ("train", "val"):
            for name in samples["classes"]:
                (root / split / name).mkdir(parents=True, exist_ok=True)
            names = samples["classes"][samples[f"{split}_labels"]]  # (N,)
            for number, (image, name) in enumerate(zip(samples[f"{split}_images"], names, strict=True)):
                Image.fromarray(image).save(root / split / name / f"{number:04d}.png")


def write_voc(data: Path, root: Path, cell: int = 28) -> None:
    """Write collages of an image folder as a VOC-shaped set, for `eval_svm_voc.py`.

    Writes 1,000 collages of training and 500 of validation images, or more if there are over 50 classes. Each has four
    places; one to four hold an image of an evenly drawn class. One image in ten has half its size and counts as difficult
    (0), unless its class is also there at full size.

    Args:
        data: holds train/<class>/ and val/<class>/ with the same classes.
        root: gets VOCdevkit/VOC2007; files of the same names are overwritten.
        cell: side of a place, pixels.
    """
    lists, jpeg = root / "VOCdevkit/VOC2007/ImageSets/Main", root / "VOCdevkit/VOC2007/JPEGImages"
    for folder in (lists, jpeg):
        folder.mkdir(parents=True, exist_ok=True)
    classes = IndexedFolder(data / "train", lambda image: image).classes
    first, several = 1, max(500, 10 * len(classes))
    for split, part, count in (("trainval", "train", 2 * several), ("test", "val", several)):
        images = IndexedFolder(data / part, lambda image: image.resize((cell, cell)))
        generator = np.random.default_rng((0, count))
        names = [f"{number:06d}" for number in range(first, first + count)]
        labels = np.full((count, len(classes)), -1)
        for name, row in zip(names, labels, strict=True):
            collage = Image.new("RGB", (2 * cell, 2 * cell))
            for place in generator.permutation(4)[: generator.integers(1, 5)]:
                label = generator.integers(len(classes))
                image, _ = images[int(generator.choice(np.flatnonzero(images.labels == label)))]
                if difficult := generator.random() < 0.1:
                    image = image.resize((cell // 2, cell // 2))
                row[label] = max(row[label], 0 if difficult else 1)
                collage.paste(image, (int(place % 2) * cell, int(place // 2) * cell))
            collage.save(jpeg / f"{name}.jpg", quality=95)
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for column, class_name in zip(labels.T, classes, strict=True):
            lines = [f"{name} {value:2d}\n" for name, value in zip(names, column, strict=True)]
            (lists / f"{class_name}_{split}.txt").write_text("".join(lines))
        first += count


def get_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(__doc__, "python -m pcl.samples")
    parser.add_argument("root", type=cli.path, metavar="DIR", help="the folder to write; made if need be")
    return parser


def main() -> None:
    parser = get_parser()
    root = parser.parse_args().root
    with parser.telling(2):
        refuse_other_data(root)
        write_image_folder(root)
        write_voc(root, root)
        train, val = (len(IndexedFolder(root / split, lambda image: image)) for split in ("train", "val"))
    tell(f"{train} images in {root / 'train'}, {val} images in {root / 'val'}; collages in {root / 'VOCdevkit'}")


if __name__ == "__main__":
    with leave_on_signals():
        main()
