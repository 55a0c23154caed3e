"""Measure what this project does faster than the published code, both sides in one run on the same machine.

    python benchmarks/bench.py [PART ..]       all parts by default; prints a table and writes benchmarks/results.md

The published side is a plain transcription, in other words, of what the published program does there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pcl.distributed import launch
from pcl.loader import IndexedFolder, center_view, make_loader
from pcl.logs import describe_machine, versions
from pcl.samples import write_image_folder, write_voc

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts

import eval_cls_imagenet  # noqa: E402
import eval_svm_voc  # noqa: E402


class ImagesPassed:
    """Counts the images that eval_svm_voc.py passes through the network."""

    def __init__(self) -> None:
        self.count, extract = 0, eval_svm_voc.features_of

        def counting(network, images, args):
            self.count += len(images)
            return extract(network, images, args)

        eval_svm_voc.features_of = counting

    def pop(self) -> int:
        """The count, which starts anew."""
        count, self.count = self.count, 0
        return count


@dataclass(frozen=True)
class Row:
    """One comparison."""

    part: str
    published: float  # seconds
    ours: float  # seconds
    note: str


def low_shot() -> Row:
    """Low-shot evaluation of a ResNet-18 on 1,000 + 500 collages of 112 pixels, features once or anew for each draw."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        root = Path(folder)
        write_image_folder(root)
        write_voc(root, root)
        options = [folder, "--random-init", "--arch", "resnet18", "--image-size", "112", "--low-shot", "--num-workers", "2"]
        args = eval_svm_voc.get_parser().parse_args(options)
        images_passed = ImagesPassed()

        start = time.perf_counter()
        eval_svm_voc.evaluate(args)
        ours, ours_passed = time.perf_counter() - start, images_passed.pop()

        start = time.perf_counter()
        network, _ = eval_svm_voc.cli.open_backbone(args)
        view = eval_svm_voc.center_view(args.image_size)
        train, test = (eval_svm_voc.voc.VOCSplit(folder, split, view) for split in ("trainval", "test"))
        test_features = eval_svm_voc.features_of(network, test, args)
        for k in eval_svm_voc.SHOTS:
            for draw in range(eval_svm_voc.DRAWS):
                train_features = eval_svm_voc.features_of(network, train, args)
                rows = eval_svm_voc.voc.draw_low_shot(train.labels, k, args.seed, draw)
                features = eval_svm_voc.Features(train_features, train.labels, test_features, test.labels, train.classes)
                eval_svm_voc.precisions(features, [rows], args.cost[0], args)
        published, published_passed = time.perf_counter() - start, images_passed.pop()
    saved = (
        f"{published_passed:,} against {ours_passed:,} images through the network, {published_passed / ours_passed:.1f} times"
    )
    return Row("low-shot evaluation", published, ours, saved)


def linear_probe() -> Row:
    """Ten epochs of the probe of a ResNet-18 on 4,000 + 1,000 images: validation features once, or anew at each epoch."""
    validate, extract, opened = eval_cls_imagenet.validate, eval_cls_imagenet.extract_features, eval_cls_imagenet.open_probe
    passed, calls, seconds = [], [], []

    def open_and_count(*arguments):
        probe = opened(*arguments)
        probe.backbone.register_forward_hook(lambda _, images, __: passed.append(len(images[0])))
        return probe

    def remember(*arguments):
        calls.append(arguments)
        return extract(*arguments)

    def through_the_network(head, _, labels):
        network, _, count, device = calls[-1]
        return validate(head, extract(network, val_loader, count, device), labels)

    eval_cls_imagenet.open_probe, eval_cls_imagenet.extract_features = open_and_count, remember
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        root = Path(folder)
        eval_cls_imagenet.RESULTS = root / "Linear_eval"
        write_image_folder(root)
        val = IndexedFolder(root / "val", center_view(32))
        val_loader = make_loader(val, range(len(val)), 256, workers=2)
        images = []
        for name in ("published", "ours"):
            eval_cls_imagenet.validate = validate if name == "ours" else through_the_network
            options = "--random-init -a resnet18 --image-size 32 --epochs 10 --lr 0.5 --seed 0 --nproc 1 -j 2 --id"
            args = eval_cls_imagenet.get_parser().parse_args([*options.split(), name, folder])
            args.deterministic = True
            start = time.perf_counter()
            launch(eval_cls_imagenet.probe, args)
            seconds.append(time.perf_counter() - start)
            images.append(sum(passed))
            passed.clear()
    # The published side has the first pass on top, which it does not need: it is taken off, images and time in proportion.
    seconds[0] *= 1 - len(val) / images[0]
    images[0] -= len(val)
    saved = f"images through the network: {images[0]:,} against {images[1]:,}, {1 - images[1] / images[0]:.1%} saved"
    return Row("linear probe, 10 epochs", *seconds, saved)


PARTS: dict[str, Callable[[], Row]] = {"low-shot": low_shot, "linear-probe": linear_probe}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    chosen = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    numbers = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [f"Machine: {describe_machine()}.", f"Versions: {numbers}.", ""]
    lines += ["| part | published, s | here, s | ratio | |", "|---|---|---|---|---|"]
    for part in chosen:
        row = PARTS[part]()
        ratio = row.published / row.ours
        lines.append(f"| {row.part} | {row.published:.3g} | {row.ours:.3g} | {ratio:.1f} | {row.note} |")
    print("\n".join(lines))
    if chosen == list(PARTS):
        head = ["# Measured by `make bench`", "", "Both sides in one run on the machine below; what travels is the ratio.", ""]
        (ROOT / "benchmarks" / "results.md").write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
