"""The published class splits: whole, disjoint, in the readers' spelling."""

from __future__ import annotations

import pytest

from sketchfast.data import splits as S
from sketchfast.data.tuberlin import normal_class_name

WHOLE = {
    "sketchy-21": (S.SKETCHY_CLASSES, 125, 21),
    "sketchy-25": (S.SKETCHY_CLASSES, 125, 25),
    "tuberlin-30": (S.TUBERLIN_CLASSES, 250, 30),
}


@pytest.mark.parametrize("split", WHOLE)
def test_published_splits_are_whole(split):
    classes, count, tested = WHOLE[split]
    test = S.zero_shot_test_classes(split, classes)
    assert len(classes) == len(set(classes)) == count
    assert len(test) == len(set(test)) == tested
    assert set(test) < set(classes)
    assert list(classes) == sorted(classes)
    assert test == sorted(test)


def test_known_members():
    assert {"bat", "songbird", "wheelchair"} <= set(S.SKETCHY_TEST_21)
    assert {"cup", "harp", "bell"} <= set(S.SKETCHY_TEST_25)
    assert {"t_shirt", "hot_air_balloon", "frying_pan"} <= set(S.TUBERLIN_TEST_30)
    assert {"car_(sedan)", "jack-o-lantern", "hot-air_balloon"} <= set(S.SKETCHY_CLASSES)


def test_tuberlin_names_are_normal():
    assert [normal_class_name(name) for name in S.TUBERLIN_CLASSES] == list(S.TUBERLIN_CLASSES)


def test_random_splits_are_named_by_their_seed():
    drawn = S.zero_shot_test_classes("random-30-seed4", S.TUBERLIN_CLASSES)
    assert len(set(drawn)) == 30
    assert drawn == S.random_test_classes(S.TUBERLIN_CLASSES[::-1], 30, 4)
    assert drawn != S.random_test_classes(S.TUBERLIN_CLASSES, 30, 5)
    with pytest.raises(ValueError, match="count"):
        S.random_test_classes(["a", "b"], 2)


def test_unknown_splits_and_classes_are_refused():
    with pytest.raises(ValueError, match=r"split must be one of sketchy-21, .* or random-<count>-seed<seed>"):
        S.zero_shot_test_classes("imagenet", S.SKETCHY_CLASSES)
    with pytest.raises(ValueError, match="classes must be among the 125 found"):
        S.zero_shot_test_classes("tuberlin-30", S.SKETCHY_CLASSES)
