"""Curves and points of a run, for `pcl.figures`: losses, time, concentrations, average precision."""

import os
import sys
import warnings
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

try:
    import matplotlib
except (OSError, ValueError):  # a notebook's MPLBACKEND or a broken matplotlibrc; files need neither
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        del sys.modules[name]
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull)
    here = os.getcwd()
    os.chdir("/")  # matplotlib reads the current folder's matplotlibrc first
    import matplotlib

    os.chdir(here)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colors without the yellow, and Tol's wine and olive: the color-blind tell them apart. Markers are for print.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933", "#777777"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p"]
STYLES = ["-", "--", "-.", ":"]
LINES: list[dict[str, Any]] = [{"color": COLORS[i % 10], "marker": MARKERS[i % 10], "ls": STYLES[i % 4]} for i in range(20)]
GRAY = "#D0D0D0"  # of the background

Epochs = dict[int, dict[str, float]]  # the metrics of each epoch
warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # boxes stand for what matplotlib's font lacks
default_style = partial(matplotlib.rc_context, matplotlib.rcParamsDefault)  # a context without the user's settings


def finish(axes: Axes, legend: dict[str, Any] | None = None, **labels: Any) -> None:
    """Add title, labels, grid and legend."""
    axes.set(**labels)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, **legend or {})


def training_curves(epochs: Epochs, arguments: dict[str, Any]) -> Figure:
    """Losses, accuracies and what the monitor measured, by epoch."""
    found = {name for metrics in epochs.values() for name in metrics}
    clusters = sorted({int(name.split("/")[0].removeprefix("clusters_")) for name in found if "clusters_" in name})
    ami, previous, changed = (
        {f"clusters_{k}/{name}": f"K = {k:,}" for k in clusters} for name in ("ami", "ami_previous", "changed")
    )
    knn = {"knn_train": "training images, momentum features", "knn_val": "validation images, backbone"}
    panels = [  # title, unit, factor, epochs done at that time less the record's number, metrics and their labels
        ("Loss", "nats", 1, 1, {"loss_instance": "InfoNCE", "loss_prototype": "prototype term"}),
        ("Views nearest to their own", "% of views", 100, 1, {"acc_instance": "key", "acc_prototype": "prototype"}),
        ("kNN accuracy, each image left out in turn", "% of images", 100, 0, knn),
        ("Clusters and labels", "adjusted mutual information", 1, 0, ami),
        ("Clusters and those of the last E-step", "adjusted mutual information", 1, 0, previous),
        ("Images that left their old cluster", "% of images", 100, 0, changed),
        ("Learning rate", "", 1, 1, {"lr": "of the epoch"}),
    ]
    panels = [panel for panel in panels if found & panel[-1].keys()]  # there are fewer without labels
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3 * rows), layout="constrained")
    images = "/".join(Path(arguments.get("images", "its images")).parts[-3:]).replace("//", "/")
    figure.suptitle(plain(f"Training of {arguments.get('arch', 'the encoder')} on {images}", 99))
    warmup, start, end = int(arguments.get("warmup_epoch", 0)), min(epochs), max(epochs)
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, (title, unit, factor, later, names) in zip(grid, panels, strict=False):
        if start < warmup <= end:
            axes.axvline(warmup, color=GRAY, lw=4, zorder=0, label="first prototypes")
        for (name, label), line in zip(names.items(), cycle(LINES), strict=False):
            points = [(epoch + later, factor * metrics[name]) for epoch, metrics in epochs.items() if name in metrics]
            if points:
                every = max(1, len(points) // 12)
                axes.plot(*zip(*points, strict=True), **line, ms=4, markevery=every, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        finish(axes, title=title, xlabel="epochs done", ylabel=unit, xlim=(start - 0.5, end + 1.5))
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


def seconds(epochs: Epochs) -> Figure:
    """The time of each epoch by activity."""
    parts = {"compute": "M-step: computing", "data": "M-step: waiting for data", "features": "E-step: features"}
    parts |= {"kmeans": "E-step: k-means", "monitor": "monitor"}
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    finished = {epoch: metrics for epoch, metrics in epochs.items() if "seconds" in metrics}
    span = range(min(finished), max(finished) + 1)
    taken = [np.array([finished.get(epoch, {}).get(f"{name}_seconds", 0) for epoch in span]) for name in parts]
    edges, everything, bottom = np.arange(span.start, span.stop + 1) + 0.5, max(np.sum(taken), 1e-9), np.zeros(len(span))
    for name, values, color, hatch in zip(parts.values(), taken, COLORS, ["", "//", "", "..", "xx"], strict=False):
        look: dict[str, Any] = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        label = f"{name} ({100 * values.sum() / everything:.1f} %)"
        axes.stairs(bottom + values, edges, baseline=bottom, fill=True, label=label, **look)
        bottom = bottom + values
    title, top = "Time of each epoch (share of the whole run)", 1.45 * max(bottom.max(), 1e-9)
    axes.set(title=title, xlabel="epoch", ylabel="seconds", ylim=(0, top))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(ncols=2, fontsize=8, loc="upper left")
    return figure


def plain(text: str, longest: int = 24) -> str:
    """Text for matplotlib, which takes dollars for formulas, hides labels that begin with _, and shows no lone surrogates."""
    if len(text) > longest:  # names of files differ at the end, of folders at the start
        text = f"{text[: longest // 2]}…{text[-(longest // 2) :]}"
    text = text.encode("utf-8", "replace").decode()
    return (" " * text.startswith("_") + text).replace("$", r"\$")


def concentration_against_size(last: dict[str, Any]) -> Figure:
    """Each cluster's concentration by its number of images, one panel per granularity."""
    granularities = last["granularities"]
    figure = Figure(figsize=(max(7, 1 + 4 * len(granularities)), 4.5), layout="constrained")
    rows = "rows of dots at top and bottom: clipped, as published, to the 10th and 90th percentile"
    figure.suptitle(f"Concentration and size of the clusters before epoch {last['epoch'] + 1}\n({rows})", fontsize=11)
    (grid,) = figure.subplots(1, len(granularities), sharey=True, squeeze=False)
    for axes, granularity in zip(grid, granularities, strict=True):
        phi = granularity["concentration"].numpy()
        size = np.bincount(granularity["im2cluster"].numpy(), minlength=len(phi))
        alpha = float(np.clip(300 / len(phi), 0.02, 0.6))
        axes.scatter(size, phi, 12, color=COLORS[0], alpha=alpha, linewidths=0, rasterized=True)
        axes.axhline(float(phi.mean()), color=COLORS[1], ls="--", lw=1, label=f"mean {phi.mean():.3g}, the temperature")
        if size.max() > 20 * max(float(np.median(size)), 1.0):
            axes.set_xscale("symlog", linthresh=10)
        else:
            axes.locator_params("x", integer=True)
        finish(axes, title=f"K = {len(phi):,}", xlabel="images in the cluster")
    grid[0].set_ylabel("concentration $\\phi$ (no unit)")
    return figure


def ap_per_class(full: dict[str, dict]) -> Figure:
    """Average precision of each class; the last result sorts the classes."""
    *_, last = full.values()
    classes = sorted(last["ap"], key=last["ap"].__getitem__)
    figure = Figure(figsize=(8, 1.8 + 0.3 * len(classes) * max(1, len(full) / 3)), layout="constrained")
    axes = figure.subplots()
    for (name, result), line in zip(full.items(), cycle(LINES), strict=False):
        points = [100 * result["ap"][c] if c in result["ap"] else np.nan for c in classes]
        label = f"{plain(name, 80)}: mAP {100 * result['map']:.1f}"
        axes.plot(points, range(len(classes)), **line | {"ls": ""}, label=label)
    axes.set_yticks(range(len(classes)), [plain(name) for name in classes])
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.9 / figure.get_figheight())}
    finish(axes, below, title="Linear SVMs with all labels", xlabel="average precision (%)", xlim=(0, 100))
    return figure


def low_shot_curves(low_shot: dict[str, dict]) -> Figure:
    """Mean average precision by number of labeled images per class, with its spread over the draws."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (name, result), line in zip(low_shot.items(), cycle(LINES), strict=False):
        shots = sorted(map(int, result))
        mean, std = (np.array([100 * result[str(k)][value] for k in shots]) for value in ("mean", "std"))
        axes.plot(shots, mean, **line, label=plain(name, 80))
        axes.fill_between(shots, mean - std, mean + std, color=line["color"], alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, map(str, shots))
    title = "Linear SVMs with few labels (mean over the draws ± standard deviation)"
    finish(axes, title=title, xlabel="labeled images of each class, k", ylabel="mean average precision, or accuracy (%)")
    return figure
