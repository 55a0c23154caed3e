"""The results of benchmarks/replicate.py: choices.json, table.md and low_shot.png, from the JSON files of its runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pcl.figures import COLORS, DPI, MARKERS

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
        lines += [*table_of_scores(scores), *table_of_differences(scores, pairs)]
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
        cells = [f"{mean:.1f}" + ("" if np.isnan(std) else f" ± {std:.1f}") for mean, std, _ in spreads]
        rows.append([method, len(seeds), *cells])
    title = "Scores on the test set in percent: mean ± standard deviation over the seeds."
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
            mean, _, half = spread(x - y for x, y in zip(a, b, strict=True) if not np.isnan(x - y))
            cells.append(f"{mean:+.1f}" + ("" if np.isnan(half) else f" [{mean - half:.1f}, {mean + half:.1f}]"))
        rows.append([f"{one} minus {other}", len(seeds), *cells])
    title = "Paired differences over the seeds that both have, with 95 % intervals (Student's t)."
    return ["", title, "", *table(["difference", "seeds", *names], rows)] if rows else []


def measures(scores: Scores) -> list[str]:
    """Names of all that was measured, in order."""
    return list(dict.fromkeys(name for seeds in scores.values() for figures in seeds.values() for name in figures))


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Mean, standard deviation of the sample, and half the width of the mean's 95 % interval; NaN where there is none."""
    from scipy.stats import t  # slow to import

    sample = np.array(list(values))
    if len(sample) < 2:
        return float(sample[0]) if len(sample) else np.nan, np.nan, np.nan
    std = float(sample.std(ddof=1))
    return float(sample.mean()), std, float(t.ppf(0.975, len(sample) - 1)) * std / len(sample) ** 0.5


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in [head, ["---"] * len(head), *rows]]


def draw(scores: Scores) -> Figure:
    """Low-shot curves with 95 % intervals, v2 beside v1."""
    versions = [v for v in ("v2", "v1") if f"pcl-{v}" in scores or f"moco-{v}" in scores] or ["v2"]
    figure = Figure(figsize=(1 + 5 * len(versions), 5), layout="constrained")
    grid = figure.subplots(1, len(versions), sharey=True, squeeze=False)
    for axes, version in zip(grid[0], versions, strict=True):
        methods = [f"pcl-{version}", f"moco-{version}", "random", "pixels"]
        for method, color, marker in zip(methods, COLORS, MARKERS, strict=False):
            seeds = scores.get(method, {})
            names = [name for name in measures({method: seeds}) if name.startswith("k = ")]
            points = [spread(figures[name] for figures in seeds.values()) for name in names]
            shots, mean, half = ([int(n[4:]) for n in names], *([p[i] for p in points] for i in (0, 2)))
            axes.errorbar(
                shots, mean, np.nan_to_num(half), color=color, marker=marker, capsize=3, label=f"{method} ({len(seeds)})"
            )
            axes.set_xscale("log", base=2)
            axes.set_xticks(shots, map(str, shots)) if shots else None
        axes.set(title=f"Linear SVMs with few labels, {version} (number of seeds)", xlabel="labelled images of each class, k")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    grid[0][0].set_ylabel("mean average precision (%), 95 % interval over seeds")
    return figure
