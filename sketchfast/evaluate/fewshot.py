"""Few-shot classification of frozen embeddings: N-way K-shot episodes, a logistic regression in each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Accuracy(NamedTuple):
    """Mean accuracy over episodes (or examples), in [0, 1], with its 95% interval."""

    mean: float
    half_width: float
    """1.96 times the standard error of the mean over episodes; NaN for one alone"""
    episodes: int

    def percent(self) -> str:
        """As papers print it: "82.70 ± 0.52"."""
        return f"{100 * self.mean:.2f} ± {100 * self.half_width:.2f}"


class Episode(NamedTuple):
    """Rows of the embeddings; targets count the episode's classes from 0."""

    support: NDArray[np.int64]
    support_targets: NDArray[np.int64]
    query: NDArray[np.int64]
    query_targets: NDArray[np.int64]


def episodes_of(labels: ArrayLike, way: int, shot: int, episodes: int, seed: int = 0) -> Iterator[Episode]:
    """Seeded episodes over `labels` [N]: `way` classes, `shot` support rows of each, its others the query.

    The same labels, sizes and seed give the same episodes, whatever is to be evaluated on them. Classes with
    fewer than shot + 1 rows are never drawn; ValueError where fewer than `way` are left.
    """
    labels = np.asarray(labels)
    for name, value in (("way", way), ("shot", shot), ("episodes", episodes)):
        if value < (2 if name == "way" else 1):
            raise ValueError(f"{name} must be at least {2 if name == 'way' else 1}, got {value!r}")
    order = np.argsort(labels, kind="stable")
    rows_by_class = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    eligible = [rows for rows in rows_by_class if len(rows) > shot]
    if len(eligible) < way:
        raise ValueError(
            f"way must be at most {len(eligible)}, the classes with {shot + 1} or more images, got {way}"
        )
    generator = np.random.default_rng([seed, way, shot])
    for _ in range(episodes):
        chosen = [
            generator.permutation(eligible[index])
            for index in generator.choice(len(eligible), way, replace=False)
        ]
        query = [rows[shot:] for rows in chosen]
        yield Episode(
            np.concatenate([rows[:shot] for rows in chosen]),
            np.repeat(np.arange(way), shot),
            np.concatenate(query),
            np.repeat(np.arange(way), [len(rows) for rows in query]),
        )


def few_shot_accuracy(
    embeddings: ArrayLike,
    labels: ArrayLike,
    *,
    way: int,
    shot: int,
    episodes: int = 2000,
    seed: int = 0,
    jobs: int = 1,
) -> Accuracy:
    """Accuracy of N-way K-shot episodes (SketchEmbedNet section 4.2; 2000 episodes in the authors' code).

    Args:
        embeddings: [N, D], computed once for all episodes; each row is scaled to length 1.
        labels: [N] class of each row.
        way, shot, episodes, seed: see `episodes_of`.
        jobs: processes that share the episodes, -1 for all cores; the result does not depend on it.
    """
    vectors = np.asarray(embeddings, dtype=np.float64)
    labels = np.asarray(labels)
    if vectors.ndim != 2 or labels.shape != (len(vectors),):
        raise ValueError(
            f"embeddings must have shape [N, D] and labels [N], got {vectors.shape} and {labels.shape}"
        )
    if not np.isfinite(vectors).all():
        raise ValueError("embeddings must be finite, got NaN or infinity")
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    drawn = list(episodes_of(labels, way, shot, episodes, seed))
    if jobs == 1:
        from threadpoolctl import threadpool_limits

        # the matrices are tiny: BLAS threads would only wait for each other
        with threadpool_limits(1):
            scored = [_accuracies(vectors, drawn)]
    else:
        from joblib import Parallel, delayed

        chunks = [drawn[start : start + 50] for start in range(0, len(drawn), 50)]
        scored = Parallel(n_jobs=jobs)(delayed(_accuracies)(vectors, chunk) for chunk in chunks)
    return mean_accuracy(np.concatenate(scored))


def mean_accuracy(scores: NDArray[np.float64]) -> Accuracy:
    """The mean of independent scores [n] in [0, 1] and its interval; their order does not matter."""
    scores = np.sort(scores)
    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan
    return Accuracy(float(scores.mean()), 1.96 * spread / math.sqrt(len(scores)), len(scores))


def _accuracies(vectors: NDArray[np.float64], episodes: list[Episode]) -> NDArray[np.float64]:
    return np.array([_episode_accuracy(vectors, episode) for episode in episodes])


def _episode_accuracy(vectors: NDArray[np.float64], episode: Episode) -> float:
    from sklearn.linear_model import LogisticRegression

    support, query = vectors[episode.support], vectors[episode.query]
    # The optimum lies in the span of the support rows: in an orthonormal basis of it the problem is the same
    # and far smaller.
    basis = _row_space(support)
    classifier = LogisticRegression(solver="lbfgs", max_iter=1000)
    classifier.fit(support @ basis, episode.support_targets)
    return float(classifier.score(query @ basis, episode.query_targets))


def _row_space(rows: NDArray[Any]) -> NDArray[Any]:
    """An orthonormal basis [D, r] of the span of rows [n, D]."""
    if len(rows) >= rows.shape[1]:
        return np.eye(rows.shape[1])
    return np.linalg.qr(rows.T)[0]
