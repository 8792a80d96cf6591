"""Few-shot episodes: what they hold, that they repeat, and accuracies with a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from sketchfast.evaluate import fewshot
from sketchfast.evaluate.fewshot import Accuracy, episodes_of, few_shot_accuracy

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(12) * 7, 9))


def test_episodes_hold_what_they_should() -> None:
    for episode in episodes_of(LABELS, way=4, shot=2, episodes=20, seed=1):
        rows = np.concatenate((episode.support, episode.query))
        assert len(rows) == 4 * 9 == len(set(rows.tolist()))  # the query is all the rest of each class
        assert episode.support_targets.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        for rows, targets in (
            (episode.support, episode.support_targets),
            (episode.query, episode.query_targets),
        ):
            pairs = {(int(LABELS[row]), int(target)) for row, target in zip(rows, targets, strict=True)}
            assert len(pairs) == 4


def test_episodes_are_seeded_and_differ() -> None:
    draw = lambda seed: [e.support.tolist() for e in episodes_of(LABELS, 3, 1, 5, seed)]  # noqa: E731
    assert draw(0) == draw(0) != draw(1)
    assert len({tuple(support) for support in draw(0)}) > 1


def test_classes_without_a_query_are_left_out() -> None:
    labels = np.array([0] * 5 + [1] * 5 + [2] * 3)
    for episode in episodes_of(labels, way=2, shot=3, episodes=10):
        assert not set(labels[episode.support].tolist()) & {2}
    with pytest.raises(ValueError, match="way must be at most 2, the classes with 4 or more images, got 3"):
        list(episodes_of(labels, way=3, shot=3, episodes=1))


@pytest.mark.parametrize(("name", "value"), [("way", 1), ("shot", 0), ("episodes", 0)])
def test_sizes_are_checked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        few_shot_accuracy(np.eye(len(LABELS)), LABELS, **{"way": 3, "shot": 1, "episodes": 2, name: value})


def test_separable_embeddings_score_one_and_meaningless_ones_score_chance() -> None:
    rng = np.random.default_rng(1)
    one_hot = np.eye(12)[LABELS // 7] * 5 + rng.normal(size=(len(LABELS), 12)) * 1e-3
    assert few_shot_accuracy(one_hot, LABELS, way=5, shot=1, episodes=20).mean == 1.0
    noise = rng.normal(size=(12 * 60, 16))
    chance = few_shot_accuracy(noise, np.repeat(np.arange(12), 60), way=4, shot=1, episodes=100)
    assert chance.mean == pytest.approx(0.25, abs=3 * chance.half_width)
    assert 0 < chance.half_width < 0.02


def test_length_of_embeddings_does_not_count() -> None:
    rng = np.random.default_rng(2)
    vectors = np.eye(12)[LABELS // 7] + rng.normal(size=(len(LABELS), 12)) * 0.3
    kwargs = {"way": 5, "shot": 2, "episodes": 10}
    plain = few_shot_accuracy(vectors, LABELS, **kwargs)
    scaled = few_shot_accuracy(vectors * rng.uniform(0.1, 10, (len(LABELS), 1)), LABELS, **kwargs)
    assert plain.mean == pytest.approx(scaled.mean, abs=1e-9)
    assert 0.2 < plain.mean < 1


@pytest.mark.parametrize(("way", "shot"), [(5, 1), (3, 4)])
def test_the_basis_changes_no_answer(monkeypatch, way: int, shot: int) -> None:
    rng = np.random.default_rng(3)
    vectors = np.eye(40)[:, :32][LABELS // 7] + rng.normal(size=(len(LABELS), 32)) * 0.4
    kwargs = {"way": way, "shot": shot, "episodes": 20}
    fast = few_shot_accuracy(vectors, LABELS, **kwargs)
    monkeypatch.setattr(fewshot, "_row_space", lambda rows: np.eye(rows.shape[1]))
    assert few_shot_accuracy(vectors, LABELS, **kwargs).mean == pytest.approx(fast.mean, abs=2e-3)


def test_the_interval_is_that_of_the_mean() -> None:
    rng = np.random.default_rng(4)
    vectors = np.eye(12)[LABELS // 7] + rng.normal(size=(len(LABELS), 12))
    normal = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    got = few_shot_accuracy(vectors, LABELS, way=3, shot=1, episodes=30, seed=9)
    scores = [fewshot._episode_accuracy(normal, e) for e in episodes_of(LABELS, 3, 1, 30, 9)]
    assert got.mean == pytest.approx(np.mean(scores))
    assert got.half_width == pytest.approx(1.96 * np.std(scores, ddof=1) / 30**0.5)
    assert Accuracy(0.827, 0.0052, 600).percent() == "82.70 ± 0.52"


def test_processes_change_nothing() -> None:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(len(LABELS), 8))
    kwargs = {"way": 3, "shot": 1, "episodes": 60}
    assert few_shot_accuracy(vectors, LABELS, jobs=2, **kwargs) == few_shot_accuracy(
        vectors, LABELS, **kwargs
    )


def test_embeddings_are_checked() -> None:
    with pytest.raises(ValueError, match="embeddings must have shape"):
        few_shot_accuracy(np.zeros(5), LABELS, way=2, shot=1)
    with pytest.raises(ValueError, match="embeddings must be finite"):
        few_shot_accuracy(np.full((len(LABELS), 2), np.nan), LABELS, way=2, shot=1)
