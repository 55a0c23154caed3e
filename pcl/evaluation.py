"""What features are worth: kNN, clusters, logistic regression, written into a folder (`python -m pcl.features`)."""

import csv
import fcntl
import io
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pcl.checkpoint import write_whole
from pcl.clustering import cluster_all
from pcl.errors import RunError
from pcl.loader import IndexedFolder
from pcl.metrics import cluster_agreement, knn_accuracy, leave_one_out_accuracy
from pcl.terminal import tell

RESULTS = "results.json"
MARK = '{\n  "command": "pcl.features"'  # how it begins
WRITTEN = r"\.?((train|val)(\.npy|\.txt|_labels\.npy)|clusters_\d+\.csv|results\.json)(\.part)?"  # names in the folder
KNN = {20: {"momentum": ", as in the paper"}, 200: {"backbone": ", as is usual"}}  # neighbors, and whose protocol it is
TEMPERATURE = 0.1  # of the neighbors' weights
STRENGTHS = [10.0**power for power in range(-5, 1)]  # of logistic regression on standardized features, scikit-learn's C
FOLDS = 5


def check(splits: dict[str, IndexedFolder], num_clusters: Sequence[int], logistic: bool) -> None:
    """Raise RunError if there are too few images or labels for what is asked."""
    train, size = splits["train"], np.bincount(splits["train"].labels)
    if max(num_clusters, default=0) > len(train):
        raise RunError(f"--num-cluster {max(num_clusters)}: more clusters than the {len(train)} images; lower it")
    if logistic and np.count_nonzero(size) < 2:
        raise RunError(f"--logistic needs labels: put the images of {train.root} into two folders <class>/ or more")
    if logistic and not ("val" in splits and splits["val"].classes):
        raise RunError("--logistic needs images to be scored on: put some into DIR/val/<class>/")
    if logistic and 1 in size:
        lone = train.classes[size.tolist().index(1)]
        raise RunError(f"--logistic: class {lone} has one training image, and cross-validation needs two; add one")


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make the folder of the results and keep other runs out of it.

    Raises:
        RunError: it cannot be written to, another run is writing into it, or it holds files of another origin.
    """
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise RunError(f"--out {folder}: it is not a folder, or not writable; name another")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"--out {folder}: another run is writing into it; name another folder") from None
        except OSError:
            pass  # a file system without locks
        names, earlier = sorted(os.listdir(folder)), ""
        with suppress(OSError):
            earlier = (folder / RESULTS).read_text(errors="replace")
        if others := [name for name in names if not (earlier.startswith(MARK) and re.fullmatch(WRITTEN, name))]:
            raise RunError(f"--out {folder} holds other files ({', '.join(others[:3])}); name another folder")
        if names:
            tell(f"note: the earlier results in {folder} will be replaced")
        yield
    finally:
        os.close(lock)


def _write(path: Path, content: str | np.ndarray) -> None:
    if isinstance(content, str):
        write_whole(path, lambda file: file.write(os.fsencode(content)))
    else:
        # A real file NumPy writes by itself, and does not say why that failed.
        write_whole(path, lambda file: np.save(SimpleNamespace(write=file.write), content))


def cluster_table(im2cluster: Tensor, images: IndexedFolder, data: Path) -> str:
    """CSV of file, relative to `data`, cluster and, with classes, label."""
    table = io.StringIO(newline="")
    columns: dict[str, Iterable[Any]] = {"file": images.names(data), "cluster": im2cluster.tolist()}
    columns |= {"label": [images.classes[label] for label in images.labels]} if images.classes else {}
    csv.writer(table, lineterminator="\n").writerows([columns, *zip(*columns.values(), strict=True)])
    return table.getvalue()


def logistic_regression(features: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    """Train on standardized features of train; cross-validation on them chooses the strength. Accuracy on val."""
    from sklearn.exceptions import ConvergenceWarning  # slow to import
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    size = labels["train"].bincount()
    folds = StratifiedKFold(min(FOLDS, int(size[size > 0].min())), shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    search = GridSearchCV(model, {"logisticregression__C": STRENGTHS}, cv=folds)
    rows = {name: features[name].cpu().numpy() for name in ("train", "val")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # where hardly anything holds the weights back
        search.fit(rows["train"], labels["train"].numpy())
    chosen, accuracy = search.best_params_["logisticregression__C"], search.score(rows["val"], labels["val"].numpy())
    return {"C": float(chosen), "cross_validation": float(search.best_score_), "accuracy": float(accuracy)}


def evaluate(
    out: Path, made: dict[str, str | int], features: dict[str, Tensor], splits: dict[str, IndexedFolder], data: Path,
    num_clusters: Sequence[int] = (), logistic: bool = False,
) -> None:  # fmt: skip
    """Write what is asked of features, (N, C) for each of `splits`, into `out` in place of earlier results; tell the results.

    `made` says how the features were made, "features": "backbone" or "momentum" among it; file names are written relative to
    `data`.
    """
    results: dict[str, Any] = {"command": "pcl.features", **made, "classes": splits["train"].classes}
    _write(out / RESULTS, json.dumps(results, indent=2))  # first: by it `claim` knows the folder of a killed run
    for path in out.iterdir():
        if re.fullmatch(WRITTEN, path.name) and path.name != RESULTS:
            path.unlink()
    for name, images in splits.items():
        _write(out / f"{name}.npy", features[name].cpu().numpy())
        _write(out / f"{name}.txt", "".join(f"{file}\n" for file in images.names(data)))
        if images.classes:
            _write(out / f"{name}_labels.npy", images.labels)
    labels = {name: torch.from_numpy(images.labels) for name, images in splits.items() if images.classes}
    train, kind = features["train"], made["features"]
    labeled = "train" in labels and len(labels["train"].unique()) > 1
    if not labeled:
        tell("note: the training images have no labels, or all the same: no kNN, and no classes to compare clusters with")
    how = "val against train" if "val" in labels else "each image left out in turn"
    for k in KNN if labeled else ():
        if "val" in labels:
            accuracy = knn_accuracy(train, labels["train"], features["val"], labels["val"], k, TEMPERATURE)
        else:
            accuracy = leave_one_out_accuracy(train, labels["train"], k, TEMPERATURE)
        tell(f"kNN, {k} neighbors: {100 * accuracy:.1f} %  ({kind} features, {how}{KNN[k].get(str(kind), '')})")
        results.setdefault("knn", {})[k] = {"accuracy": accuracy, "temperature": TEMPERATURE, "how": how}
    found = cluster_all(F.normalize(train, dim=1), num_clusters, TEMPERATURE) if num_clusters else []
    for k, clustering in zip(num_clusters, found, strict=True):
        _write(out / f"clusters_{k}.csv", cluster_table(clustering.im2cluster, splits["train"], data))
        agreement = cluster_agreement(clustering.im2cluster.cpu(), labels["train"]) if labeled else {}
        values = [f"{name.upper() if len(name) == 3 else name} {value:.3f}" for name, value in agreement.items()]
        tell(f"{k} clusters: {'  '.join(values) or 'see the table'}")
        results.setdefault("clusters", {})[k] = agreement
    _write(out / RESULTS, json.dumps(results, indent=2))
    if logistic:
        results["logistic"] = fit = logistic_regression(features, labels)
        tell(f"logistic regression: {100 * fit['accuracy']:.1f} % of val  (C = {fit['C']:g}, chosen on train)")
        _write(out / RESULTS, json.dumps(results, indent=2))
    tell(f"written to {out}")
