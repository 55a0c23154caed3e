"""Pictures of a run, into EXP_DIR/figures.

    python -m pcl.figures EXP_DIR
    python -m pcl.figures EXP_DIR --results A.json B.json

From what the folder holds (log, last E-step, results of eval_svm_voc.py --output) and from results that lie elsewhere.
Letters: N images, K prototypes, S images whose features were kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

try:
    import matplotlib
except (OSError, ValueError):  # of MPLBACKEND as a notebook sets it, or of a broken matplotlibrc: a file needs neither
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        del sys.modules[name]
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)
    here = os.getcwd()
    os.chdir("/")  # the current folder's matplotlibrc would come first
    import matplotlib

    os.chdir(here)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from pcl import checkpoint
from pcl.checkpoint import LAST_E_STEP
from pcl.errors import USER_ERRORS, RunError, reason_of
from pcl.images import UnreadableImageError, read_image
from pcl.loader import IndexedFolder
from pcl.terminal import leave_on_signals, printable, tell

# Okabe and Ito's colors without the yellow, and Tol's wine and olive: told apart by the color-blind. Each goes with a
# marker of its own, for print.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933", "#777777"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p"]
STYLES = ["-", "--", "-.", ":"]
GRAY = "#D0D0D0"  # of what stands behind
ROWS, COLUMNS = 12, 10  # of the picture of the prototypes
DPI = 150


def draw(exp_dir: Path, results: Sequence[Path] = ()) -> list[Path]:
    """Draw everything that the folder has the data for, in matplotlib's own style.

    A file may be damaged or of something else: what cannot be drawn from it is left out, with a line that names it.

    Args:
        exp_dir: of a run of `main_pcl.py`, finished or not.
        results: JSON files of `eval_svm_voc.py --output` besides those in `exp_dir`.

    Returns:
        the files written.

    Raises:
        RunError: nothing could be drawn.
    """
    written: list[Path] = []
    failures: dict[Path, str] = {}

    @contextmanager
    def using(path: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many kinds, since the file may hold anything
            reason = f"{path} does not hold what it should ({type(error).__name__}: {error})"
            failures.setdefault(path, " ".join((reason_of(error) if isinstance(error, USER_ERRORS) else reason).split()))

    def picture(name: str, source: Path, make: Callable[..., Figure], *data: Any) -> None:
        path = exp_dir / "figures" / f"{name}.png"
        with using(source):
            figure = make(*data)
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=DPI)
            written.append(path)

    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        arguments: dict[str, Any] = {}
        if (source := exp_dir / "log.jsonl").exists():
            with using(source):
                arguments, epochs = read_log(source)
                if any("seconds" in figures for figures in epochs.values()):  # an epoch has come to its end
                    picture("training_curves", source, training_curves, epochs, arguments)
                    picture("seconds", source, seconds, epochs)
        if (source := exp_dir / LAST_E_STEP).exists():
            with using(source):
                last = checkpoint.load(source)
                picture("tsne", source, tsne, last)
                if granularities := last["granularities"]:
                    picture("concentration", source, concentration_against_size, last)
                    if images := training_images(arguments, last):
                        for granularity in granularities:
                            name = f"prototypes_{len(granularity['prototypes'])}"
                            picture(name, source, nearest_images, granularity, last, images)
        full: dict[str, dict] = {}
        low_shot: dict[str, dict] = {}
        for source in [*sorted(exp_dir.glob("*.json")), *results]:
            with using(source):
                result = json.loads(source.read_text())
                if source not in results and not (isinstance(result, dict) and "checkpoint" in result):
                    continue
                name = name_of(result)
                for kind, found, make in (("full", full, ap_per_class), ("low_shot", low_shot, low_shot_curves)):
                    if kind in result:
                        make({name: result[kind]})  # one that cannot be drawn must not spoil the picture of all
                        found[name if name not in found else f"{name} ({source.stem})"] = result[kind]
        if full:
            picture("ap_per_class", exp_dir, ap_per_class, full)
        if low_shot:
            picture("low_shot", exp_dir, low_shot_curves, low_shot)
    if not written:
        reasons = "; ".join(failures.values()) or "it holds no log.jsonl with figures and no result of eval_svm_voc.py"
        raise RunError(f"{exp_dir}: nothing can be drawn: {reasons}")
    for failure in failures.values():
        tell(f"left out: {failure}")
    return written


def read_log(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, float]]]:
    """The arguments of the last start of a run, and each epoch's figures (of a repeated epoch the last ones)."""
    arguments: dict[str, Any] = {}
    epochs: dict[int, dict[str, float]] = {}
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError):  # cut off where the machine stopped
            records.append(json.loads(line))
    if not records:
        raise ValueError("no line is a record")
    for record in records:
        arguments = dict(record.get("args", arguments))
        if "epoch" in record and "step" not in record:
            epochs.setdefault(record["epoch"], {}).update(record)
    return arguments, dict(sorted(epochs.items()))


def name_of(result: dict[str, Any]) -> str:
    """What a result of `eval_svm_voc.py` is of."""
    source = result["checkpoint"]
    names = {"none": "raw pixels", "random": f"random {source['arch']}"}
    file = Path(source["weights"])
    name = names.get(source["weights"]) or f"{source['arch']}, {file.parent.name}/{file.name.partition('.')[0]}"
    return f"{name}, {result['settings']['image_size']} pixels"


def training_images(arguments: dict[str, Any], last: dict[str, Any]) -> IndexedFolder | None:
    """The images that the run trained on; None, with a line that says so, if they are no longer there."""
    folder = arguments.get("images", "")
    try:
        images = IndexedFolder(folder, lambda image: image, skip=arguments.get("unreadable", {}))
    except OSError:
        images = None
    if images is None or len(images) != len(last["labels"]):
        tell(f"the images of {folder} are no longer those of the run: no picture of the prototypes")
        return None
    return images


def training_curves(epochs: dict[int, dict[str, float]], arguments: dict[str, Any]) -> Figure:
    """Losses, accuracies, and what the monitor saw, by epoch."""
    clusters = sorted({int(n.split("/")[0].removeprefix("clusters_")) for f in epochs.values() for n in f if "clusters_" in n})
    # What is measured before an epoch stands where the one before it ended.
    panels = [
        ("Loss", "nats", 1, 1, {"loss_instance": "InfoNCE", "loss_prototype": "prototype term"}),
        ("Views nearest to their own", "% of views", 100, 1, {"acc_instance": "key", "acc_prototype": "prototype"}),
        ("kNN accuracy, each image left out in turn", "% of images", 100, 0, {
            "knn_train": "training images, momentum features", "knn_val": "validation images, backbone"}),
        ("Clusters and labels", "adjusted mutual information", 1, 0, {f"clusters_{k}/ami": f"K = {k:,}" for k in clusters}),
        ("Clusters and those of the last E-step", "adjusted mutual information", 1, 0, {
            f"clusters_{k}/ami_previous": f"K = {k:,}" for k in clusters}),
        ("Images that left their old cluster", "% of images", 100, 0, {
            f"clusters_{k}/changed": f"K = {k:,}" for k in clusters}),
        ("Learning rate", "", 1, 1, {"lr": "of the epoch"}),
    ]  # fmt: skip
    found = {name for figures in epochs.values() for name in figures}
    panels = [panel for panel in panels if found & panel[-1].keys()]  # without labels there are fewer
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3 * rows), layout="constrained")
    images = "/".join(Path(arguments.get("images", "its images")).parts[-3:]).replace("//", "/")
    figure.suptitle(plain(f"Training of {arguments.get('arch', 'the encoder')} on {images}", 99))
    warmup = int(arguments.get("warmup_epoch", 0))
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, (title, unit, factor, later, names) in zip(grid, panels, strict=False):
        if min(epochs) < warmup <= max(epochs):
            axes.axvline(warmup, color=GRAY, lw=4, zorder=0, label="first prototypes")
        curves(axes, epochs, names, factor, later)
        axes.set(title=title, xlabel="epochs done", ylabel=unit, xlim=(min(epochs) - 0.5, max(epochs) + 1.5))
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


def seconds(epochs: dict[int, dict[str, float]]) -> Figure:
    """Where each epoch's time went."""
    parts = {
        "compute_seconds": "M-step: computing",
        "data_seconds": "M-step: waiting for data",
        "features_seconds": "E-step: features",
        "kmeans_seconds": "E-step: k-means",
        "monitor_seconds": "monitor",
    }
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    finished = {epoch: figures for epoch, figures in epochs.items() if "seconds" in figures}
    taken = {name: np.array([f.get(name, 0) for f in finished.values()]) for name in parts}
    everything = max(sum(float(values.sum()) for values in taken.values()), 1e-9)
    bottom = np.zeros(len(finished))
    for (name, values), color, hatch in zip(taken.items(), COLORS, ["", "//", "", "..", "xx"], strict=False):
        label = f"{parts[name]} ({100 * values.sum() / everything:.1f} %)"
        numbers = np.array(list(finished)) + 1
        axes.bar(numbers, values, 0.9, bottom, label=label, color=color, hatch=hatch, edgecolor="white", linewidth=0)
        bottom += values
    axes.set(
        title="Time of each epoch (share of the whole run)",
        xlabel="epoch",
        ylabel="seconds",
        ylim=(0, 1.45 * max(bottom.max(), 1e-9)),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(ncols=2, fontsize=8, loc="upper left")
    return figure


def curves(axes: Axes, epochs: dict[int, dict[str, float]], names: dict[str, str], factor: float, later: int) -> None:
    """A curve for each of the figures called `names`, with its label, `later` epochs after the record's."""
    for (name, label), color, marker, style in zip(names.items(), COLORS * 9, MARKERS * 9, STYLES * 18, strict=False):
        points = [(epoch + later, factor * figures[name]) for epoch, figures in epochs.items() if name in figures]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=color,
                marker=marker,
                ms=4,
                markevery=max(1, len(points) // 12),
                label=label,
            )
    axes.legend(fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def nearest_images(granularity: dict[str, Any], last: dict[str, Any], images: IndexedFolder) -> Figure:
    """A dozen prototypes from the smallest to the largest concentration, each a row of its nearest images."""
    im2cluster, phi = granularity["im2cluster"].numpy(), granularity["concentration"].numpy()
    size, seen = np.bincount(im2cluster, minlength=len(phi)), last["seen"].numpy()  # (K,), (n,)
    several = np.flatnonzero(size >= min(2, size.max()))
    ranked = several[np.argsort(phi[several], kind="stable")]
    rows = ranked[np.unique(np.linspace(0, len(ranked) - 1, ROWS).round().astype(int))]
    figure = Figure(figsize=(COLUMNS + 2.6, len(rows) + 1), layout="constrained")
    figure.suptitle(
        f"{len(rows)} of {len(phi):,} prototypes before epoch {last['epoch'] + 1}, of rising concentration $\\phi$:\n"
        f"the images of the cluster that lie nearest to the prototype, nearest first"
        + (f" (of {len(seen):,} of {len(im2cluster):,} images)" if len(seen) < len(im2cluster) else "")
    )
    grid = figure.subplots(len(rows), COLUMNS, squeeze=False)
    for places, prototype in zip(grid, rows, strict=True):
        members = np.flatnonzero(im2cluster == prototype)
        near = np.flatnonzero(im2cluster[seen] == prototype)
        near = seen[near[np.argsort(-granularity["cosine"].numpy()[near], kind="stable")]]
        for axes in places:
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)
        for axes, image in zip(places, near, strict=False):
            axes.imshow(thumbnail(images.path(int(image))), interpolation="nearest")
        text = f"$\\phi$ = {phi[prototype]:.3f}\n{len(members)} image{'s' * (len(members) != 1)}"
        if len(last["classes"]) > 1:
            labels = np.bincount(last["labels"].numpy()[members])
            text += f"\n{100 * labels.max() / len(members):.0f} % {plain(last['classes'][labels.argmax()])}"
        places[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def plain(text: str, longest: int = 24) -> str:
    """Text as matplotlib shows it: no formulas between dollars, no name in no encoding; a first underscore would hide it."""
    text = text[:longest].encode("utf-8", "replace").decode()
    return (" " * text.startswith("_") + text).replace("$", r"\$")


def thumbnail(path: str, side: int = 96) -> Image.Image:
    """The image, its longer side scaled down to `side` pixels; a gray square if it cannot be read any more."""
    try:
        image = read_image(path)
    except UnreadableImageError:
        return Image.new("RGB", (side, side), GRAY)
    image.thumbnail((side, side))
    return image


def tsne(last: dict[str, Any]) -> Figure:
    """The kept features in two dimensions, colored by class, or without classes by the clusters of the fewest.

    Ten of those are shown, evenly chosen classes or the largest clusters; the others are gray.
    """
    from sklearn.manifold import TSNE  # slow to import

    features, group, names = last["features"].numpy(), last["labels"], last["classes"]  # (S, C), (N,)
    shown: np.ndarray = np.arange(0)
    kind = "class"
    if len(names) > 1:
        shown = np.unique(np.linspace(0, len(names) - 1, len(COLORS)).astype(int))
    elif last["granularities"]:
        coarse = min(last["granularities"], key=lambda granularity: len(granularity["prototypes"]))
        group, size = coarse["im2cluster"], np.bincount(coarse["im2cluster"].numpy(), minlength=len(coarse["prototypes"]))
        kind, names, shown = "cluster", [f"cluster of {n:,} images" for n in size], np.argsort(-size)[: len(COLORS)]
    label = group[last["sample"]].numpy()  # (S,)
    count, total = len(features), len(last["labels"])
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    title = f"t-SNE of the momentum features before epoch {last['epoch'] + 1}\n({count:,} of {total:,} images)"
    if count > 2:
        init = "pca" if features.shape[1] > 1 and features.std(axis=0).max() > 1e-6 else "random"
        place = TSNE(perplexity=min(30, (count - 1) / 3), init=init, random_state=0).fit_transform(features)
    else:  # t-SNE has nothing to choose
        place = np.stack([np.arange(count), np.zeros(count)], axis=1)
    area = float(np.clip(20_000 / count, 4, 60))
    others = ~np.isin(label, shown)
    if others.any():
        rest = len(names) - len(shown)
        name = f"{rest:,} other {kind}{'es' if kind == 'class' else 's'}" if len(shown) else None
        color = GRAY if len(shown) else COLORS[0]
        axes.scatter(place[others, 0], place[others, 1], area, color=color, linewidths=0, label=name)
    for number, color, marker in zip(shown, COLORS, MARKERS, strict=False):
        x, y = place[label == number].T
        axes.scatter(x, y, area, color=color, marker=marker, linewidths=0, label=plain(names[number]))
    if len(shown):
        axes.legend(fontsize=8, markerscale=max(1, (30 / area) ** 0.5), loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(title=title, xlabel="t-SNE 1 (no unit)", ylabel="t-SNE 2 (no unit)", xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    return figure


def concentration_against_size(last: dict[str, Any]) -> Figure:
    """Each cluster's concentration by the number of its images, one panel for each granularity."""
    granularities = last["granularities"]
    figure = Figure(figsize=(1 + 4 * len(granularities), 4.5), layout="constrained")
    rows = "rows of dots at top and bottom: clipped, as published, to the 10th and 90th percentile"
    figure.suptitle(f"Concentration and size of the clusters before epoch {last['epoch'] + 1}\n({rows})", fontsize=11)
    grid = figure.subplots(1, len(granularities), sharey=True, squeeze=False)
    for axes, granularity in zip(grid[0], granularities, strict=True):
        phi = granularity["concentration"].numpy()
        size = np.bincount(granularity["im2cluster"].numpy(), minlength=len(phi))
        alpha = float(np.clip(300 / len(phi), 0.02, 0.6))
        axes.scatter(size, phi, 12, color=COLORS[0], alpha=alpha, linewidths=0, rasterized=True)
        axes.axhline(float(phi.mean()), color=COLORS[1], ls="--", lw=1, label=f"mean {phi.mean():.3g}, the temperature")
        axes.set(title=f"K = {len(phi):,}", xlabel="images in the cluster")
        if size.max() > 20 * max(float(np.median(size)), 1.0):
            axes.set_xscale("symlog", linthresh=10)
        axes.xaxis.get_major_locator().set_params(**({"integer": True} if axes.get_xscale() == "linear" else {}))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    grid[0][0].set_ylabel("concentration $\\phi$ (no unit)")
    return figure


def ap_per_class(full: dict[str, dict]) -> Figure:
    """Average precision of each class, classes in the order of the last result."""
    *_, last = full.values()
    classes = sorted(last["ap"], key=last["ap"].__getitem__)
    figure = Figure(figsize=(8, 1.8 + 0.3 * len(classes) * max(1, len(full) / 3)), layout="constrained")
    axes = figure.subplots()
    for (name, result), color, marker in zip(full.items(), COLORS * 9, MARKERS * 9, strict=False):
        points = [100 * result["ap"][c] if c in result["ap"] else np.nan for c in classes]
        axes.plot(points, range(len(classes)), marker, color=color, label=f"{plain(name, 80)}: mAP {100 * result['map']:.1f}")
    axes.set_yticks(range(len(classes)), [plain(name) for name in classes])
    axes.set(title="Linear SVMs with all labels", xlabel="average precision (%)", xlim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.9 / figure.get_figheight()))
    return figure


def low_shot_curves(low_shot: dict[str, dict]) -> Figure:
    """Mean average precision by number of labelled images of each class, with its spread over the draws."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    shots: list[int] = []
    for (name, result), color, marker, style in zip(low_shot.items(), COLORS * 9, MARKERS * 9, STYLES * 18, strict=False):
        shots = sorted(map(int, result))
        mean, std = (np.array([100 * result[str(k)][figure_name] for k in shots]) for figure_name in ("mean", "std"))
        axes.plot(shots, mean, style, marker=marker, color=color, label=plain(name, 80))
        axes.fill_between(shots, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, map(str, shots))
    title = "Linear SVMs with few labels (mean over the draws ± standard deviation)"
    axes.set(title=title, xlabel="labelled images of each class, k", ylabel="mean average precision (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m pcl.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exp_dir", type=Path, metavar="EXP_DIR", help="of a run of main_pcl.py")
    parser.add_argument("--results", type=Path, nargs="*", default=[], metavar="FILE.json", help="of eval_svm_voc.py --output")
    return parser


def main() -> None:
    parser = get_parser()
    args = parser.parse_args()
    try:
        written = draw(args.exp_dir, args.results)
    except RunError as error:
        parser.exit(2, f"{parser.prog}: error: {printable(str(error))}\n")
    for path in written:
        tell(str(path))


if __name__ == "__main__":
    with leave_on_signals():
        main()
