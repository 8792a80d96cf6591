"""The linear classifier against scikit-learn's, and what it must not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sketchfast.evaluate import linear
from sketchfast.evaluate.linear import fit_logistic, linear_accuracy


def blobs(per_class: int, spread: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of five classes around centres that do not depend on the seed."""
    centres = np.random.default_rng(99).standard_normal((5, 12))
    labels = np.repeat(np.arange(5), per_class)
    noise = np.random.default_rng(seed).standard_normal((len(labels), 12))
    return (centres[labels] + spread * noise).astype(np.float32), labels


@pytest.mark.parametrize("l2", [1e-3, 0.1])
def test_the_minimum_is_scikit_learns(l2: float) -> None:
    x, y = blobs(30, 2.0)
    weight, bias = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), 5, l2=l2, max_iter=500)
    # scikit-learn minimises C * sum of losses + |W|^2 / 2
    model = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(x.astype(np.float64), y)
    np.testing.assert_allclose(weight.numpy(), model.coef_, atol=3e-3)
    found = torch.softmax(torch.from_numpy(x) @ weight.T + bias, 1).numpy()
    np.testing.assert_allclose(found, model.predict_proba(x.astype(np.float64)), atol=2e-3)


def test_chunks_change_nothing(monkeypatch) -> None:
    x, y = (torch.from_numpy(part) for part in blobs(30))
    whole = fit_logistic(x, y, 5, l2=0.01, max_iter=100)
    monkeypatch.setattr(linear, "_ROWS_AT_ONCE", 7)
    for part, other in zip(fit_logistic(x, y, 5, l2=0.01, max_iter=100), whole, strict=True):
        torch.testing.assert_close(part, other, atol=2e-3, rtol=0)
    data = (*blobs(30), *blobs(20, seed=1))
    few = linear_accuracy(*data)
    monkeypatch.undo()
    assert few[1].mean == pytest.approx(linear_accuracy(*data)[1].mean, abs=0.011)


def test_accuracy_and_its_interval() -> None:
    train, test = blobs(60), blobs(200, seed=1)
    found = linear_accuracy(*train, *test, tops=(1, 2, 5))
    assert 0.8 < found[1].mean < found[2].mean < found[5].mean == 1
    assert found[1].episodes == 1000
    binomial = math.sqrt(found[1].mean * (1 - found[1].mean) / 1000)
    assert found[1].half_width == pytest.approx(1.96 * binomial, rel=1e-3)
    assert linear_accuracy(*train, *test)[1] == found[1]


def test_classes_that_cannot_be_told_apart_score_by_chance() -> None:
    generator = np.random.default_rng(0)
    x, rows = generator.standard_normal((400, 6)), generator.standard_normal((2000, 6))
    y, wanted = generator.integers(0, 4, 400), generator.integers(0, 4, 2000)
    assert abs(linear_accuracy(x, y, rows, wanted, l2=1.0)[1].mean - 0.25) < 0.05
    # equal scores are no recognition
    assert linear_accuracy(np.ones((4, 3)), [0, 0, 1, 1], np.ones((4, 3)), [0, 0, 1, 1])[1].mean == 0


def test_scale_shift_and_dead_dimensions_change_nothing() -> None:
    train, test = blobs(60, 2.0), blobs(100, 2.0, seed=1)
    want = linear_accuracy(*train, *test)[1].mean
    grow = np.array([100.0, 0.01] * 6)
    scaled = [(x * grow + 7, y + 10) for x, y in (train, test)]
    assert linear_accuracy(*scaled[0], *scaled[1])[1].mean == pytest.approx(want, abs=0.005)
    dead = [(np.concatenate((x, np.full((len(x), 2), 3.3)), 1), y) for x, y in (train, test)]
    assert linear_accuracy(*dead[0], *dead[1])[1].mean == pytest.approx(want, abs=0.005)


def test_the_penalty_shrinks() -> None:
    x, y = (torch.from_numpy(part) for part in blobs(10))
    sizes = [fit_logistic(x, y, 5, l2=l2, max_iter=100)[0].norm() for l2 in (1e-3, 1e-2, 1e-1)]
    assert sizes[0] > 1.5 * sizes[1] > 2 * sizes[2]


X = np.zeros((4, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "flags", "error", "words"),
    [
        ((X.astype(int), [0, 1, 0, 1], X, [0, 1, 0, 1]), {}, TypeError, "train_vectors must have a floating"),
        ((X[0], [0], X, [0] * 4), {}, ValueError, r"train_vectors must have shape \[N, D\]"),
        ((X, [0, 1, 0, 1], X[:0], []), {}, ValueError, r"test_vectors must have shape \[N, D\]"),
        ((X + np.nan, [0, 1, 0, 1], X, [0] * 4), {}, ValueError, "train_vectors must be finite"),
        ((X, [0, 1, 0, 1], X[:, :2], [0] * 4), {}, ValueError, "test_vectors must have the 3 columns"),
        ((X, [0, 1], X, [0] * 4), {}, ValueError, r"train_labels must have shape \[4\]"),
        ((X, [0.0, 1, 0, 1], X, [0] * 4), {}, TypeError, "train_labels must have an integer dtype"),
        (
            (X, [0, 1, 0, 1], X, [0, 1, 2, 1]),
            {},
            ValueError,
            r"test_labels must be among the 2 classes.*\[2\]",
        ),
        ((X, [1] * 4, X, [1] * 4), {}, ValueError, "train_labels must hold two classes or more, got 1"),
        ((X, [0, 1, 0, 1], X, [0] * 4), {"l2": -1.0}, ValueError, "l2 must be at least 0"),
        ((X, [0, 1, 0, 1], X, [0] * 4), {"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ((X, [0, 1, 0, 1], X, [0] * 4), {"tops": (0,)}, ValueError, r"tops\[0\] must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, flags, error, words) -> None:
    with pytest.raises(error, match=words):
        linear_accuracy(*arguments, **flags)
