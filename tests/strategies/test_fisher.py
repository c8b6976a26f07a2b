"""Fisher-weighted merging against its formula."""

import numpy as np
import pytest
from flwr.app import ArrayRecord

from task.arrays import FLAT, flat_to_array
from task.signals import SignalRequest
from tests.strategies.scripted import (
    LAYOUT,
    Script,
    ShufflingGrid,
    final_flat,
    initial_arrays,
    make_strategy,
    scripted_app,
)

NAMES = ["0", "1", "2"]
SHARES = np.array([1, 2, 3])[:, None] / 6
UPDATES = np.random.default_rng(0).normal(size=(3, LAYOUT.size)).astype(np.float32)
FISHER = np.random.default_rng(1).random((3, LAYOUT.size)).astype(np.float32) ** 8


def run(fisher, clients=NAMES, updates=UPDATES, **options):
    def signals(name, instruction):
        return ArrayRecord({FLAT: flat_to_array(np.asarray(fisher[int(name)], np.float32))})

    script = Script(values=lambda name, n, received: updates[int(name)], signals=signals)
    strategy, reports = make_strategy("fisher", **options), []
    grid = ShufflingGrid(scripted_app(script), clients)
    result = strategy.start(grid, initial_arrays(), num_rounds=1, on_round=reports.append)
    return final_flat(result.arrays), reports[1], script


@pytest.mark.parametrize("floor", [1e-6, 0.3])
def test_every_element_is_weighed_by_information_and_samples(floor):
    flat, _, _ = run(FISHER, floor=floor)
    weights = SHARES * (FISHER.astype(float) + floor)
    np.testing.assert_allclose(flat, (weights * UPDATES).sum(0) / weights.sum(0), rtol=1e-4, atol=1e-6)


def test_where_nobody_has_information_clients_are_weighed_by_samples():
    fisher = FISHER.copy()
    fisher[:, ::2] = 0
    flat, _, _ = run(fisher)
    mean = (SHARES * UPDATES).sum(0)
    np.testing.assert_allclose(flat[::2], mean[::2], rtol=1e-5, atol=1e-6)
    assert np.abs(flat - mean)[1::2].max() > 0.1


def test_an_element_is_that_of_the_one_client_that_is_sure_of_it():
    fisher = np.zeros_like(FISHER)
    fisher[1, :5] = 1e3
    flat, _, _ = run(fisher)
    np.testing.assert_allclose(flat[:5], UPDATES[1, :5], rtol=1e-5, atol=1e-6)


def test_information_without_bounds_leaves_a_finite_model():
    fisher = FISHER.copy()
    fisher[0] = 3e38
    flat, _, _ = run(fisher, updates=100 * UPDATES)
    np.testing.assert_allclose(flat, 100 * UPDATES[0], rtol=1e-5)


@pytest.mark.parametrize("value", [-1e-3, np.nan, np.inf])
def test_information_that_is_none_is_refused_by_name(value):
    fisher = FISHER.copy()
    fisher[1, 7] = value
    flat, report, _ = run(fisher)
    assert report.clients_dropped == {"1": "its Fisher information is negative or not finite."}
    expected, _, _ = run(FISHER, clients=["0", "2"])
    np.testing.assert_array_equal(flat, expected)


def test_clients_are_asked_for_as_many_samples_as_configured():
    _, _, script = run(FISHER, fisher_samples=17)
    assert {instruction.signals for _, instruction, _ in script.heard} == {SignalRequest(fisher_samples=17)}
