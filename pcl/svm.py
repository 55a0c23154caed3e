"""The published linear SVMs: one for each class, on frozen features.

Letters: N training and Q test images, C features.
"""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import make_scorer
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits
from torch.utils.data import Dataset

from pcl.metrics import average_precision

FOLDS = 3


@dataclass(frozen=True)
class Features:
    """What the SVMs see."""

    train: np.ndarray  # (N, C) float32, of almost unit length
    train_labels: np.ndarray  # (N, classes): 1, -1 or 0 (difficult)
    test: np.ndarray  # (Q, C)
    test_labels: np.ndarray  # (Q, classes)
    classes: list[str]
    drawn: np.ndarray | None = None  # the training images that `train` holds, sorted; None: all

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The features of some training images."""
        return self.train[rows if self.drawn is None else np.searchsorted(self.drawn, rows)]


class Job(NamedTuple):
    """One class's SVM of one draw of training images."""

    rows: np.ndarray  # training images, possibly the same more than once
    label: int  # number of the class
    cost: float
    cross_validated: bool = False  # average precision in cross-validation, instead of the scores of the test images


@dataclass(frozen=True)
class Scores(Dataset):
    """The scores of each job, as a loader's workers compute them."""

    features: Features
    jobs: list[Job]
    seed: int

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> tuple[int, np.ndarray]:
        return number, svm_scores(self.features, self.jobs[number], self.seed)


def svm_scores(features: Features, job: Job, seed: int) -> np.ndarray:
    """Fit the published SVM; decision values (Q,) of the test images, or (FOLDS,) average precisions in cross-validation.

    Where every image shows the class (a small draw of two that often meet), nothing can be learned: all score alike.
    """
    positive = np.where(features.train_labels[job.rows, job.label] > 0, 1, -1)  # published: difficult is negative
    if positive.min() == 1:
        return np.zeros(FOLDS if job.cross_validated else len(features.test))
    svm = LinearSVC(
        penalty="l2", loss="squared_hinge", dual=True, C=job.cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0,
        tol=1e-4, max_iter=2000, random_state=seed,
    )  # fmt: skip
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the published limit of iterations is meant to be met
        if job.cross_validated:
            folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
            scoring = make_scorer(average_precision, response_method="decision_function")
            return cross_val_score(svm, features.of(job.rows), positive, cv=folds, scoring=scoring)
        return svm.fit(features.of(job.rows), positive).decision_function(features.test)
