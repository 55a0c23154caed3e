"""Write 5,000 real images (Fashion-MNIST, 28 x 28, ten classes) as an image folder; they come with the package.

    python -m pcl.samples DIR

DIR/train/<class>/ gets 400 images of each class, DIR/val/<class>/ 100. Licence: samples.LICENSE beside this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SOURCE = Path(__file__).with_name("samples.npz")


def write_image_folder(root: Path, source: Path = SOURCE) -> dict[str, int]:
    """Write train/ and val/ below `root`, as PNG; files of the same names are overwritten.

    Returns:
        how many images each of the two holds.
    """
    with np.load(source) as samples:
        classes = samples["classes"]
        written = {}
        for split in ("train", "val"):
            images, labels = samples[f"{split}_images"], samples[f"{split}_labels"]  # (N, 28, 28) uint8, (N,)
            for name in classes:
                (root / split / name).mkdir(parents=True, exist_ok=True)
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                Image.fromarray(image).save(root / split / classes[label] / f"{number:04d}.png")
            written[split] = len(images)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR", help="the folder to write; made if need be")
    root = parser.parse_args().root
    written = write_image_folder(root)
    print(", ".join(f"{count} images in {root / split}" for split, count in written.items()))


if __name__ == "__main__":
    main()
