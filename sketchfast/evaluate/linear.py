"""A linear classifier on frozen embeddings: how much of the classes a single layer can read off them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from ..ops._contract import check_integer, check_number
from .fewshot import Accuracy, mean_accuracy

_ROWS_AT_ONCE = 16_384  # bounds the logits in memory


def linear_accuracy(
    train_vectors: ArrayLike | Tensor,
    train_labels: ArrayLike,
    test_vectors: ArrayLike | Tensor,
    test_labels: ArrayLike,
    *,
    l2: float = 1e-3,
    max_iter: int = 200,
    tops: Sequence[int] = (1,),
    device: torch.device | str = "cpu",
) -> dict[int, Accuracy]:
    """Top-k accuracy on test rows of a linear classifier fitted to the training rows, with 95% intervals.

    Multinomial logistic regression: the mean cross-entropy plus l2 / 2 times the sum of the squared weights
    (the biases are free), at its minimum by L-BFGS from zero; scikit-learn's `C` is 1 / (l2 * N). Each
    dimension is first brought to mean 0 and deviation 1 over the training rows: still a linear classifier of
    the embedding, whose penalty does not depend on the embedding's scale. Nothing in it is random. The
    interval is 1.96 standard errors over the test rows.

    Args:
        train_vectors, test_vectors: [N, D] and [M, D], any floating dtype; computed with in float32.
        train_labels, test_labels: [N] and [M] integers; each test label is one of the training labels.
        l2: weight of the penalty, at least 0; without it separable rows have no minimum, and max_iter ends.
        max_iter: iterations at most.
        tops: the ks, each at least 1.
        device: where to fit.

    Raises TypeError or ValueError that names the argument.
    """
    x, rows = _vectors("train_vectors", train_vectors), _vectors("test_vectors", test_vectors)
    if x.shape[1] != rows.shape[1]:
        raise ValueError(
            f"test_vectors must have the {x.shape[1]} columns of train_vectors, got shape {tuple(rows.shape)}"
        )
    classes, y = np.unique(_labels("train_labels", train_labels, len(x)), return_inverse=True)
    wanted = _labels("test_labels", test_labels, len(rows))
    if not np.isin(wanted, classes).all():
        raise ValueError(
            f"test_labels must be among the {len(classes)} classes of train_labels, got "
            f"{np.setdiff1d(wanted, classes)[:3].tolist()} beside them"
        )
    if len(classes) < 2:
        raise ValueError(f"train_labels must hold two classes or more, got {len(classes)}")
    check_number("l2", l2, at_least=0)
    check_integer("max_iter", max_iter, 1)
    for i, top in enumerate(tops):
        check_integer(f"tops[{i}]", top, 1)
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
    scale = torch.where(deviation > 1e-6 * deviation.max().clamp_min(1e-30), 1 / deviation, 0.0)
    x, rows = (((part - mean) * scale).to(device) for part in (x, rows))
    targets = torch.from_numpy(y.reshape(-1)).to(device)
    weight, bias = fit_logistic(x, targets, len(classes), l2=l2, max_iter=max_iter)
    true = torch.from_numpy(np.searchsorted(classes, wanted)).to(device)
    ranks = torch.cat(
        [
            _ranks(part @ weight.T + bias, labels)
            for part, labels in zip(rows.split(_ROWS_AT_ONCE), true.split(_ROWS_AT_ONCE), strict=True)
        ]
    ).cpu()
    return {top: mean_accuracy((ranks < top).double().numpy()) for top in tops}


def fit_logistic(
    x: Tensor, targets: Tensor, classes: int, *, l2: float, max_iter: int
) -> tuple[Tensor, Tensor]:
    """Weights [classes, D] and biases [classes] at the minimum of `linear_accuracy`'s objective."""
    weight = x.new_zeros(classes, x.shape[1]).requires_grad_()
    bias = x.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS(
        (weight, bias), max_iter=max_iter, tolerance_grad=1e-5, history_size=10, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        total = 0.5 * l2 * weight.square().sum()
        total.backward()
        for rows, labels in zip(x.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True):
            loss = F.cross_entropy(rows @ weight.T + bias, labels, reduction="sum") / len(x)
            loss.backward()
            total = total.detach() + loss.detach()
        return total

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _ranks(scores: Tensor, true: Tensor) -> Tensor:
    """How many other classes score as high as the true one or higher: ties count against it."""
    return (scores >= scores.gather(1, true[:, None])).sum(dim=1) - 1


def _vectors(name: str, value: Any) -> Tensor:
    vectors = torch.as_tensor(value).detach().cpu()
    if not vectors.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {vectors.dtype}")
    if vectors.dim() != 2 or not vectors.numel():
        raise ValueError(f"{name} must have shape [N, D], both at least 1, got {tuple(vectors.shape)}")
    if not torch.isfinite(vectors).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return vectors.float()


def _labels(name: str, value: ArrayLike, count: int) -> np.ndarray:
    labels = np.asarray(value)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{name} must have an integer dtype, got {labels.dtype}")
    if labels.shape != (count,):
        raise ValueError(f"{name} must have shape [{count}], one a vector, got {labels.shape}")
    return labels
