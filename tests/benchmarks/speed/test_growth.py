"""The server over clients that answer at once; how it grows is no matter of a test."""

import pytest

from benchmarks.speed.growth import FIGURES, STRATEGIES, exponent, grow, per_client


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_round_counts_for_every_strategy(strategy):
    found = grow(strategy, 12)
    assert found.keys() == FIGURES.keys()
    assert found["checkpoint_kb"] > 0
    assert found["cohort_kb"] > 0


def test_the_exponent_and_what_a_client_adds():
    assert exponent({10: 3.0, 100: 30.0, 1000: 300.0}) == pytest.approx(1.0)
    assert exponent({10: 3.0, 100: 3.0}) == pytest.approx(0.0)
    assert per_client({10: 100.0, 1010: 2100.0}) == 2.0
