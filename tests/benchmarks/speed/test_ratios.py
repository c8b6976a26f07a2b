"""The arithmetic of paired measurements."""

import itertools

import pytest

from benchmarks.speed.ratios import Ratio, in_turn


def test_a_ratio_is_taken_pair_by_pair():
    """Of the sums it would be 1.2, of the medians 0.5: a slow moment of the machine is in both sides of its pair."""
    ratio = Ratio.between([1.0, 2.0, 9.0], [2.0, 4.0, 4.0], target=0.9)
    assert ratio == Ratio(median=0.5, min=0.5, max=2.25, pairs=3, target=0.9)
    assert str(ratio) == "0.500 (0.500 to 2.250)"


def test_pairs_must_be_complete():
    with pytest.raises(ValueError, match="shorter"):
        Ratio.between([1.0, 2.0], [1.0])


def test_actions_are_measured_in_turn_and_every_other_time_in_reverse():
    clock, order = itertools.count(), []

    def action(name):
        def run():
            order.append(name)
            return float(next(clock))

        return run

    found = in_turn([action("a"), action("b")], pairs=3)
    assert "".join(order) == "ab" + "ba" + "ab" + "ba"
    assert found == [[3.0, 4.0, 7.0], [2.0, 5.0, 6.0]]  # what came of warming up, 0 and 1, is not in it
