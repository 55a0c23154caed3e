"""Draw pictures of a run into EXP_DIR/figures.

    python -m pcl.figures EXP_DIR
    python -m pcl.figures EXP_DIR --results A.json B.json

Draws the log, the last E-step and the results of eval_svm_voc.py --output that lie in the folder, and other results.
Letters: N images, K prototypes, S images whose features were kept, n images whose cosines were kept.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pcl import checkpoint, cli, plots
from pcl.errors import USER_ERRORS, RunError, reason_of
from pcl.images import UnreadableImageError, read_image
from pcl.loader import IndexedFolder
from pcl.plots import COLORS, GRAY, MARKERS, Epochs, Figure, plain, training_curves
from pcl.terminal import leave_on_signals, tell

ROWS, COLUMNS = 12, 10  # of the picture of the prototypes
SIDE = 96  # of its images, in pixels
DPI = 150


def draw(exp_dir: str | Path, results: Sequence[str | Path] = ()) -> list[Path]:
    """Draw everything that the folder of a run, and further `results` of `eval_svm_voc.py`, have data for; the files written.

    Leaves out what cannot be drawn from a damaged or foreign file, and prints a line that names the file.

    Raises:
        RunError: nothing could be drawn.
    """
    exp_dir, given = Path(exp_dir), [Path(path) for path in results]
    written: list[Path] = []
    failures: dict[Path, str] = {}

    @contextmanager
    def using(path: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the file may hold anything
            reason = f"{path} does not hold what it should ({type(error).__name__}: {error})"
            failures.setdefault(path, " ".join((reason_of(error) if isinstance(error, USER_ERRORS) else reason).split()))

    def picture(name: str, source: Path, make: Callable[..., Figure], *data: Any) -> None:
        path = exp_dir / "figures" / f"{name}.png"
        with using(source):
            figure = make(*data)
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=DPI)
            written.append(path)

    with plots.default_style():
        arguments: dict[str, Any] = {}
        if (source := exp_dir / "log.jsonl").exists():
            with using(source):
                arguments, epochs = read_log(source)
                if any("seconds" in metrics for metrics in epochs.values()):  # an epoch has ended
                    picture("training_curves", source, training_curves, epochs, arguments)
                    picture("seconds", source, plots.seconds, epochs)
        if (source := exp_dir / checkpoint.LAST_E_STEP).exists():
            with using(source):
                last = checkpoint.load(source)
                picture("tsne", source, tsne, last)
                if last["granularities"]:
                    picture("concentration", source, plots.concentration_against_size, last)
                    if images := training_images(arguments, last):
                        for g in last["granularities"]:
                            picture(f"prototypes_{len(g['prototypes'])}", source, nearest_images, g, last, images)
        kinds = {"full": ("ap_per_class", plots.ap_per_class), "low_shot": ("low_shot", plots.low_shot_curves)}
        found: dict[str, dict[str, dict]] = {kind: {} for kind in kinds}
        for source in {path.resolve(): path for path in [*sorted(exp_dir.glob("[!.]*.json")), *given]}.values():
            with using(source):
                result = json.loads(source.read_text())
                if source in given or (isinstance(result, dict) and "checkpoint" in result):
                    folder = result.get("settings", {}).get("folder") == "True"  # accuracies, which have no classes
                    drawn = [kind for kind in kinds if kind in result and not (folder and kind == "full")]
                    if source in given and not drawn:
                        raise RunError(f"{source}: it holds neither average precisions nor low-shot scores")
                    name = name_of(result)
                    for kind in drawn:
                        kinds[kind][1]({name: result[kind]})  # a result that cannot be drawn must not spoil the others
                        found[kind][f"{name} ({source})" if name in found[kind] else name] = result[kind]
        for kind, (name, make) in kinds.items():
            if found[kind]:
                picture(name, exp_dir, make, found[kind])
    if not written:
        reasons = "; ".join(failures.values()) or "it holds no log.jsonl of an epoch, no E-step, no result of eval_svm_voc.py"
        raise RunError(f"{exp_dir}: nothing can be drawn: {reasons}")
    for failure in failures.values():
        tell(f"left out: {failure}")
    return written


def read_log(path: Path) -> tuple[dict[str, Any], Epochs]:
    """The arguments of a run's last start, and the metrics of each epoch (the last ones if it was repeated)."""
    arguments: dict[str, Any] = {}
    epochs: Epochs = {}
    for line in path.read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError, AttributeError):  # cut off where the machine stopped
            record = json.loads(line)
            arguments = dict(record.get("args", arguments))
            if "epoch" in record and "step" not in record:
                epochs.setdefault(record["epoch"], {}).update(record)
    if not arguments and not epochs:
        raise ValueError("no line is a record")
    return arguments, dict(sorted(epochs.items()))


def name_of(result: dict[str, Any]) -> str:
    """A name for a result of `eval_svm_voc.py`."""
    arch, weights = result["checkpoint"]["arch"], result["checkpoint"]["weights"]
    file = Path(weights)
    names = {"none": "raw pixels", "random": f"random {arch}"}
    name = names.get(weights, f"{arch}, {Path(file.parent.name, file.name.partition('.')[0])}")
    settings = result["settings"]
    return f"{name}, {settings['image_size']} pixels" + ", accuracy" * (settings.get("folder") == "True")


def training_images(arguments: dict[str, Any], last: dict[str, Any]) -> IndexedFolder | None:
    """The images that the run trained on; None, with a line that says so, if they are gone."""
    folder = arguments.get("images", "")
    with suppress(OSError):
        images = IndexedFolder(folder, lambda image: image, skip=arguments.get("unreadable", {}))
        if len(images) == len(last["labels"]) and last.get("files") in (None, images.names()):
            return images
    tell(f"the images of {folder} are no longer those of the run: no picture of the prototypes")
    return None


def nearest_images(granularity: dict[str, Any], last: dict[str, Any], images: IndexedFolder) -> Figure:
    """Rows of nearest images for a dozen prototypes, from the smallest to the largest concentration."""
    im2cluster, phi = granularity["im2cluster"].numpy(), granularity["concentration"].numpy()
    size, seen = np.bincount(im2cluster, minlength=len(phi)), last["seen"].numpy()  # (K,), (n,)
    several = np.flatnonzero(size >= min(2, int(size.max())))
    ranked = several[np.argsort(phi[several], kind="stable")]
    rows = ranked[np.unique(np.linspace(0, len(ranked) - 1, ROWS).round().astype(int))]
    figure = Figure(figsize=(COLUMNS + 2.6, len(rows) + 1), layout="constrained")
    figure.suptitle(
        f"{len(rows)} of {len(phi):,} prototypes before epoch {last['epoch'] + 1}, of rising concentration $\\phi$:\n"
        f"the images of the cluster that lie nearest to the prototype, nearest first"
        + (f" (of {len(seen):,} of {len(im2cluster):,} images)" if len(seen) < len(im2cluster) else "")
    )
    # A single image of all: axes for each would take seconds to draw.
    step, texts = SIDE + 4, []
    canvas = Image.new("RGB", (COLUMNS * step, len(rows) * step), "white")
    for row, prototype in enumerate(rows):
        near = np.flatnonzero(im2cluster[seen] == prototype)
        near = seen[near[np.argsort(-granularity["cosine"].numpy()[near], kind="stable")]]
        for column, image in enumerate(near[:COLUMNS]):
            canvas.paste(tile(images.path(int(image))), (column * step, row * step))
        count = int(size[prototype])
        text = f"$\\phi$ = {phi[prototype]:.3f}\n{count} image{'s' * (count != 1)}"
        if len(last["classes"]) > 1:
            labels = np.bincount(last["labels"].numpy()[im2cluster == prototype])
            text += f"\n{100 * labels.max() / count:.0f} % {plain(last['classes'][labels.argmax()])}"
        texts.append(text)
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest")
    axes.set(xticks=[], frame_on=False)
    axes.set_yticks(step * np.arange(len(rows)) + SIDE / 2, texts, fontsize=9)
    axes.tick_params(length=0)
    return figure


def tile(path: str) -> Image.Image:
    """The image in the middle of a white square of `SIDE` pixels; a gray square if it cannot be read."""
    try:
        image = read_image(path)
    except UnreadableImageError:
        return Image.new("RGB", (SIDE, SIDE), GRAY)
    image.thumbnail((SIDE, SIDE))
    return ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.NEAREST, color="white")


def tsne(last: dict[str, Any]) -> Figure:
    """The kept features in two dimensions, colored by class or, without classes, by cluster of the coarsest granularity.

    Shows ten evenly chosen classes or the ten largest clusters; the others are gray.
    """
    from sklearn.manifold import TSNE  # slow to import

    features, group, names = last["features"].numpy(), last["labels"], last["classes"]  # (S, C), (N,)
    shown, others_name = np.arange(0), None
    if len(names) > 1:
        shown = np.unique(np.linspace(0, len(names) - 1, len(COLORS)).astype(int))
        others_name = f"{len(names) - len(shown):,} other classes"
    elif last["granularities"]:
        coarse = min(last["granularities"], key=lambda granularity: len(granularity["prototypes"]))
        group, size = coarse["im2cluster"], np.bincount(coarse["im2cluster"].numpy(), minlength=len(coarse["prototypes"]))
        names, shown = [f"cluster of {n:,} images" for n in size], np.argsort(-size)[: len(COLORS)]
        others_name = f"{len(names) - len(shown):,} other clusters"
    label = group[last["sample"]].numpy()  # (S,)
    count = len(features)
    if count > 2:
        init = "pca" if features.shape[1] > 1 and features.std(axis=0).max() > 1e-6 else "random"
        place = TSNE(perplexity=min(30, (count - 1) / 3), init=init, random_state=0).fit_transform(features)
    else:
        place = np.stack([np.arange(count), np.zeros(count)], axis=1)
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    area = float(np.clip(20_000 / count, 4, 60))
    others = ~np.isin(label, shown)
    if others.any():
        color = GRAY if len(shown) else COLORS[0]
        axes.scatter(place[others, 0], place[others, 1], area, color=color, linewidths=0, label=others_name)
    for number, color, marker in zip(shown, COLORS, MARKERS, strict=False):
        x, y = place[label == number].T
        axes.scatter(x, y, area, color=color, marker=marker, linewidths=0, label=plain(names[number]))
    if len(shown):
        axes.legend(fontsize=8, markerscale=max(1, (30 / area) ** 0.5), loc="center left", bbox_to_anchor=(1, 0.5))
    title = f"t-SNE of the momentum features before epoch {last['epoch'] + 1}\n({count:,} of {len(last['labels']):,} images)"
    axes.set(title=title, xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    return figure


def get_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(__doc__, "python -m pcl.figures")
    parser.add_argument("exp_dir", type=cli.path, metavar="EXP_DIR", help="the folder of a run (its --exp-dir)")
    parser.add_argument("--results", type=cli.path, nargs="*", default=[], metavar="FILE", help="from eval_svm_voc.py --output")
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    with parser.telling(2):
        for path in draw(args.exp_dir, args.results):
            tell(str(path))


if __name__ == "__main__":
    with leave_on_signals():
        main()
