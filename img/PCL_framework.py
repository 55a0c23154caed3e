"""Draw PCL_framework.png, the picture of the method in the README: python img/PCL_framework.py"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from PIL import Image
from sklearn.cluster import KMeans

from pcl.augment import random_view
from pcl.figures import COLORS
from pcl.samples import SOURCE

QUERY, KEY, INK, GRADIENT = COLORS[0], COLORS[4], "#222222", COLORS[1]
PALE = {QUERY: "#DCEBF5", KEY: "#FBEFD5", COLORS[2]: "#DDF1EA", INK: "#F2F2F2"}
WIDTH, HEIGHT = 16, 10.05


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, color: str, size: float = 11) -> None:
    shape = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0.02,rounding_size=0.12", fc=PALE[color], ec=color, lw=1.8)
    axes.add_patch(shape)
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK)


def encoder(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """A network: a trapezium that narrows to the feature."""
    corners = [(x, y), (x, y + 1.3), (x + 1.9, y + 1.0), (x + 1.9, y + 0.3)]
    axes.add_patch(Polygon(corners, fc=PALE[color], ec=color, lw=1.8, joinstyle="round"))
    axes.text(x + 0.95, y + 0.65, text, ha="center", va="center", fontsize=10.5, color=INK)


def arrow(
    axes: Axes, *points: tuple[float, float], color: str = INK, style: str = "-", bend: float = 0, width: float = 1.6
) -> None:
    """Through the points; the head stands at the last."""
    for start, end in pairwise(points[:-1]):
        axes.plot(*zip(start, end, strict=True), color=color, ls=style, lw=width, solid_capstyle="round")
    axes.add_patch(
        FancyArrowPatch(
            points[-2], points[-1], arrowstyle="-|>", mutation_scale=15, color=color, ls=style, lw=width,
            shrinkA=0, shrinkB=0, connectionstyle=f"arc3,rad={bend}",
        )
    )  # fmt: skip


def note(axes: Axes, x: float, y: float, text: str, size: float = 10, **more) -> None:
    axes.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": size, "color": INK} | more)


def picture(axes: Axes, pixels: np.ndarray, x: float, y: float, side: float, color: str = INK) -> None:
    axes.imshow(pixels, cmap="gray", extent=(x, x + side, y, y + side), vmin=0, vmax=255, zorder=2)
    axes.add_patch(Rectangle((x, y), side, side, fill=False, ec=color, lw=1.5, zorder=3))


def views(image: np.ndarray, count: int) -> list[np.ndarray]:
    """Random views as the query and the key encoder see them, (64, 64, 3) uint8."""
    torch.manual_seed(8)
    view = random_view(64, aug_plus=True)
    large = Image.fromarray(image).convert("RGB").resize((112, 112))
    return [view(large).permute(1, 2, 0).numpy() for _ in range(count)]


def m_step(axes: Axes, image: np.ndarray) -> None:
    axes.add_patch(
        FancyBboxPatch((0.15, 4.3), 15.7, 4.65, boxstyle="round,pad=0,rounding_size=0.2", fc="white", ec="#BBBBBB", lw=1.2)
    )
    note(axes, 0.4, 8.68, "2  M-step: train the encoder", 13, ha="left", weight="bold")
    note(axes, 4.1, 8.68, "an epoch of SGD, believing those clusters", 11, ha="left")

    picture(axes, image, 0.45, 5.85, 1.2)
    note(axes, 1.05, 5.62, "an image")
    query, key = views(image, 2)
    picture(axes, query, 2.45, 6.85, 1.1, QUERY)
    picture(axes, key, 2.45, 4.85, 1.1, KEY)
    arrow(axes, (1.7, 6.6), (2.4, 7.35))
    arrow(axes, (1.7, 6.3), (2.4, 5.5))
    note(axes, 3.0, 6.4, "two random views")
    arrow(axes, (3.6, 7.4), (4.1, 7.4))
    arrow(axes, (3.6, 5.4), (4.1, 5.4))

    encoder(axes, 4.15, 6.75, "query encoder\n$f_\\theta$", QUERY)
    encoder(axes, 4.15, 4.75, "key encoder\n$f_{\\theta'}$", KEY)
    arrow(axes, (4.9, 6.78), (4.9, 6.0), color=KEY, style="--")
    note(axes, 5.0, 6.38, "momentum, each step:\n$\\theta' \\leftarrow m\\,\\theta' + (1-m)\\,\\theta$", 9.5, ha="left")

    arrow(axes, (6.1, 7.4), (7.0, 7.4))
    note(axes, 6.5, 7.62, "$v$", 13, color=QUERY)
    arrow(axes, (6.1, 5.4), (7.55, 5.4))
    note(axes, 6.5, 5.62, "$v'$", 13, color=KEY)

    for i in range(7):  # the queue
        axes.add_patch(Rectangle((7.6 + 0.3 * i, 5.2), 0.26, 0.4, fc=PALE[KEY], ec=KEY, lw=1.2))
    note(axes, 8.65, 4.92, "queue: the last $r$ keys")
    arrow(axes, (6.85, 5.4), (6.85, 6.4), (7.4, 6.4), (7.4, 6.9), color=KEY)
    arrow(axes, (8.65, 5.65), (8.65, 6.9), color=KEY)
    note(axes, 6.95, 6.2, "positive", 9, ha="left")
    note(axes, 8.72, 6.25, "$r$ negatives", 9, ha="left")

    box(axes, 7.05, 6.95, 2.6, 0.9, "InfoNCE: $v$ to $v'$,\naway from the queue's keys", INK, 10)
    box(
        axes,
        10.35,
        6.95,
        3.05,
        0.9,
        "prototype term (mean over\ngranularities): $v$ to its own $c_s$,\naway from other prototypes",
        INK,
        10,
    )
    arrow(axes, (6.6, 7.4), (6.6, 8.1), (10.9, 8.1), (10.9, 7.9), color=QUERY)
    note(axes, 9.3, 8.22, "$v$", 12, color=QUERY)

    box(axes, 14.0, 6.95, 1.65, 0.9, "ProtoNCE\n= their sum", INK, 11)
    arrow(axes, (13.45, 7.4), (13.95, 7.4))
    arrow(axes, (9.7, 7.2), (10.0, 7.2), (10.0, 6.65), (14.4, 6.65), (14.4, 6.9))
    arrow(axes, (15.2, 7.9), (15.2, 8.42), (5.1, 8.42), (5.1, 7.93), color=GRADIENT, width=2.2)
    note(axes, 13.2, 8.6, "gradient, to the query encoder alone", 10, color=GRADIENT)
    note(axes, 4.15, 4.6, "no gradient", 9.5, color=GRADIENT, ha="left")


def e_step(axes: Axes, images: np.ndarray, figure: Figure) -> None:
    axes.add_patch(
        FancyBboxPatch((0.15, 0.15), 15.7, 3.95, boxstyle="round,pad=0,rounding_size=0.2", fc="white", ec="#BBBBBB", lw=1.2)
    )
    note(axes, 0.4, 3.82, "1  E-step: cluster all images", 13, ha="left", weight="bold")
    note(axes, 5.4, 3.82, "before each epoch, the encoder held fixed: guess each image's cluster", 11, ha="left")
    for i in range(28):
        picture(axes, images[i], 0.45 + 0.42 * (i % 7), 1.05 + 0.42 * (i // 7), 0.38)
    note(axes, 1.9, 0.75, "all $N$ images, center-cropped")
    arrow(axes, (3.5, 1.9), (4.1, 1.9))
    encoder(axes, 4.15, 1.25, "key encoder\n$f_{\\theta'}$", KEY)
    arrow(axes, (6.1, 1.9), (6.6, 1.9))
    note(axes, 6.55, 2.45, "features\n$v'_1 \\dots v'_N$", 10, color=KEY, ha="right")

    rng = np.random.default_rng(3)
    middles = np.array([[-1.5, 0.9], [-0.6, 1.4], [1.2, 1.2], [1.9, 0.2], [-1.3, -1.0], [0.2, -1.3], [1.2, -1.1]])
    spread = np.array([0.16, 0.34, 0.18, 0.38, 0.34, 0.16, 0.26])
    points = np.concatenate([rng.normal(m, s, (26, 2)) for m, s in zip(middles, spread, strict=True)])
    for panel, k in enumerate((2, 4, 7)):
        x = 6.75 + 2.35 * panel
        inner = figure.add_axes((x / WIDTH, 0.95 / HEIGHT, 2.2 / WIDTH, 2.0 / HEIGHT))
        run = KMeans(k, n_init=10, random_state=0).fit(points)
        order = run.cluster_centers_[:, 0].argsort().argsort()  # colors from left to right
        for c in range(k):
            members = points[run.labels_ == c]
            color = COLORS[[2, 3, 5, 0, 7, 8, 6][order[c]]]
            distance = np.linalg.norm(members - run.cluster_centers_[c], axis=1).mean()
            inner.scatter(*members.T, s=7, color=color, alpha=0.7, linewidths=0)
            inner.add_patch(Circle(run.cluster_centers_[c], 1.5 * distance, fill=False, ec=color, lw=1.4, ls="--"))
            inner.scatter(*run.cluster_centers_[c], s=110, marker="*", color=color, ec="white", lw=0.8, zorder=3)
        inner.set(xticks=[], yticks=[], xlim=(-2.9, 3.2), ylim=(-2.3, 2.4))
        note(axes, x + 1.1, 3.12, f"k-means, $K_{panel + 1}$ clusters", 10.5)
    note(axes, 10.2, 0.62, "the same features at several granularities:  coarse  $\\rightarrow$  fine", 10)

    axes.scatter([13.98], [2.72], s=140, marker="*", color=INK)
    note(axes, 14.25, 2.72, "prototype $c$:\nthe centroid", 10, ha="left")
    axes.add_patch(Circle((13.98, 1.72), 0.17, fill=False, ec=INK, lw=1.4, ls="--"))
    note(
        axes,
        14.25,
        1.62,
        "concentration $\\phi$:\nits temperature, from\nmean distance (ring)\nand size",
        10,
        ha="left",
    )
    box(axes, 10.5, 5.05, 2.75, 0.75, "the image's own prototype $c_s$\nand $r$ others, each with its $\\phi$", COLORS[2], 10)
    for panel in range(3):
        axes.plot([7.85 + 2.35 * panel] * 2, [3.3, 3.5], color=COLORS[2], lw=2.2)
    axes.plot([7.85, 12.55], [3.5, 3.5], color=COLORS[2], lw=2.2)
    arrow(axes, (11.9, 3.5), (11.9, 5.0), color=COLORS[2], width=2.2)
    arrow(axes, (11.9, 5.85), (11.9, 6.9), color=COLORS[2], width=2.2)
    arrow(axes, (5.1, 4.85), (5.1, 2.45), color=KEY, style=":")
    note(axes, 5.0, 3.2, "the trained\nencoder", 9.5, ha="right")
    note(axes, 12.1, 4.55, "prototypes and concentrations", 10, ha="left", color=COLORS[2])


def main() -> None:
    with np.load(SOURCE) as samples:
        images = samples["train_images"]
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    m_step(axes, images[46])
    e_step(axes, images[20:48], figure)
    note(axes, WIDTH / 2, 9.75, "Prototypical Contrastive Learning", 17, weight="bold")
    text = "Hidden are the clusters that the images belong to. EM: 1 guess them, 2 train on the guess, 1, 2, …"
    note(axes, WIDTH / 2, 9.3, f"{text}   (Warm-up: 2 with InfoNCE alone.)", 11)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    axes.set_axis_off()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
