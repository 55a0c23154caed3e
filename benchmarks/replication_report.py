"""The results of benchmarks/replicate.py: choices.json, table.md and low_shot.png, from the JSON files of its runs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pcl.figures import DPI, Figure
from pcl.plots import COLORS, MARKERS

Scores = dict[str, dict[int, dict[str, float]]]  # of each method and seed the figures in percent


def results_in(out: Path) -> dict[str, dict]:
    """What the finished runs have written, by name."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    return {result["run"]: result for result in found if "run" in result}


def report(
    out: Path, results: dict[str, dict], settings: dict[str, Any], order: list[str], pairs: Sequence[tuple[str, str]]
) -> None:
    """Write choices, table and figure of the runs that are finished, and print the table.

    Args:
        out: the folder.
        results: from `results_in`.
        settings: those that were chosen.
        order: of the methods in the table.
        pairs: methods to subtract, the second from the first.
    """
    tried = {name: result for name, result in results.items() if result["data"] == "choose"}
    lines = [f"{len(results)} runs, {sum(r['seconds'] for r in results.values()) / 3600:.1f} hours together."]
    lines += [f"Machine: {machine}" for machine in sorted({result["machine"] for result in results.values()})]
    scores: Scores = {method: {} for method in order}
    for result in results.values():
        if result["data"] == "final":
            scores[result["method"]][result["seed"]] = result["figures"]
    scores = {method: seeds for method, seeds in scores.items() if seeds}
    if scores:
        lines += [*table_of_scores(scores), *table_of_differences(scores, pairs), *table_of_clusters(results)]
        draw(scores).savefig(out / "low_shot.png", dpi=DPI)
    if tried:
        rows = [[name, f"{r['figures']['kNN']:.2f}"] for name, r in tried.items() if "figures" in r]
        for name, r in tried.items():
            rows += [[f"{name}, learning rate {lr}", f"{score:.2f}"] for lr, score in r.get("accuracy", {}).items()]
        choices = {"chosen": settings, "validation": dict(rows)}
        (out / "choices.json").write_text(json.dumps(choices, indent=1) + "\n")
        lines += ["", f"Chosen on the validation split: {settings}. Tried there (kNN, or accuracy of the probe):", ""]
        lines += table(["run", "%"], rows)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join([*lines, "", f"{out}/table.md"]))


def table_of_scores(scores: Scores) -> list[str]:
    """Mean and standard deviation of each method."""
    names, rows = measures(scores), []
    for method, seeds in scores.items():
        spreads = [spread(figures[name] for figures in seeds.values() if name in figures) for name in names]
        cells = [cell(f"{mean:.1f}", f" ± {std:.1f}", count, len(seeds)) for mean, std, _, count in spreads]
        rows.append([method, len(seeds), *cells])
    title = "Scores on the test set in percent: mean ± standard deviation over the seeds (in brackets how many, if fewer)."
    return ["", title, "", *table(["method", "seeds", *names], rows)]


def table_of_differences(scores: Scores, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Of each pair of methods, over the seeds that both have."""
    names, rows = measures(scores), []
    for one, other in pairs:
        seeds = sorted(scores.get(one, {}).keys() & scores.get(other, {}).keys())
        if not seeds:
            continue
        cells = []
        for name in names:
            a, b = ([scores[method][seed].get(name, np.nan) for seed in seeds] for method in (one, other))
            mean, _, half, count = spread(x - y for x, y in zip(a, b, strict=True) if not np.isnan(x - y))
            cells.append(cell(f"{mean:+.1f}", f" [{mean - half:.1f}, {mean + half:.1f}]", count, len(seeds)))
        rows.append([f"{one} minus {other}", len(seeds), *cells])
    title = (
        "Paired differences over the seeds that both have, with 95 % intervals (Student's t, not corrected for their number). "
        "The images are the same for all seeds: the intervals cover initial weights, order, augmentation and draws of labels."
    )
    return ["", title, "", *table(["difference", "seeds", *names], rows)] if rows else []


def table_of_clusters(results: dict[str, dict]) -> list[str]:
    """Mean agreement of the clusters of the last E-step with the classes of the images that were clustered."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for result in (result for result in results.values() if result["data"] == "final"):
        for k, agreement in result.get("clusters", {}).items():
            found.setdefault((result["method"], k), []).append(agreement)
    if not found:
        return []
    names = ["purity", "nmi", "ami"]
    rows = [[*key, len(seen), *(f"{np.mean([each[n] for each in seen]):.1f}" for n in names)] for key, seen in found.items()]
    lines = ["", "Clusters of the last E-step and the classes of its images, in percent, mean over the seeds.", ""]
    return lines + table(["method", "clusters", "seeds", "purity", "NMI", "AMI"], rows)


def measures(scores: Scores) -> list[str]:
    """Names of all that was measured, in order."""
    return list(dict.fromkeys(name for seeds in scores.values() for figures in seeds.values() for name in figures))


def cell(mean: str, rest: str, count: int, seeds: int) -> str:
    """Of a table, for a figure of `count` runs in a row of `seeds` runs; nothing is known of the spread of one run."""
    fewer = f" ({count})" if count < seeds else ""
    return mean + (rest if count > 1 else "") + fewer if count else ""


def spread(values: Iterable[float]) -> tuple[float, float, float, int]:
    """Mean, standard deviation of the sample, half the width of the mean's 95 % interval, number; NaN where there is none."""
    from scipy.stats import t  # slow to import

    sample = np.array(list(values))
    if len(sample) < 2:
        return float(sample[0]) if len(sample) else np.nan, np.nan, np.nan, len(sample)
    std = float(sample.std(ddof=1))
    return float(sample.mean()), std, float(t.ppf(0.975, len(sample) - 1)) * std / len(sample) ** 0.5, len(sample)


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in [head, ["---"] * len(head), *rows]]


def draw(scores: Scores) -> Figure:
    """Low-shot curves with 95 % intervals, v2 beside v1."""
    versions = [v for v in ("v2", "v1") if f"pcl-{v}" in scores or f"moco-{v}" in scores] or ["v2"]
    shots = [name for name in measures(scores) if name.startswith("k = ")]
    k = [int(name[4:]) for name in shots]
    figure = Figure(figsize=(1 + 5 * len(versions), 5), layout="constrained")
    grid = figure.subplots(1, len(versions), sharey=True, squeeze=False)
    for axes, version in zip(grid[0], versions, strict=True):
        for method, color, marker in zip(
            (f"pcl-{version}", f"moco-{version}", "random", "pixels"), COLORS, MARKERS, strict=False
        ):
            if method in scores:
                seeds = scores[method].values()
                mean, _, half, _ = zip(*(spread(figures[name] for figures in seeds) for name in shots), strict=True)
                bars = np.nan_to_num(half)  # none for one seed
                axes.errorbar(k, mean, bars, color=color, marker=marker, capsize=3, label=f"{method} ({len(seeds)})")
        axes.set_xscale("log", base=2)
        axes.set_xticks(k, map(str, k))
        axes.set(title=f"Linear SVMs with few labels, {version} (number of seeds)", xlabel="labeled images of each class, k")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left")
    grid[0][0].set_ylabel("mean average precision (%), 95 % interval of the mean")
    return figure
