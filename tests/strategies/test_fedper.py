"""FedPer and training alone: what stays with the client, and who lost what it kept."""

import numpy as np
import pytest

from task.messages import NOT_KEPT
from tests.strategies.pfedla.test_strategy import INITIAL, drifting, run, starts
from tests.strategies.scripted import LAYOUT
from tests.strategies.test_fedlama import NAMES

HEAD = LAYOUT.slices["head"]


def test_the_head_stays_with_its_client_and_the_rest_is_averaged():
    flat, _, reports, script = run(name="fedper")
    np.testing.assert_array_equal(flat[HEAD], INITIAL[HEAD])
    left = {name: drifting(name, 2, starts(script)[name, 2]).astype(np.float32) for name in NAMES}
    shares = np.array([10 * (int(name) + 1) for name in NAMES]) / 100
    mean = np.average([left[name] for name in NAMES], axis=0, weights=shares)
    for name in NAMES:
        np.testing.assert_array_equal(starts(script)[name, 3][HEAD], left[name][HEAD])
        np.testing.assert_allclose(starts(script)[name, 3][: HEAD.start], mean[: HEAD.start], rtol=1e-4, atol=1e-5)
    assert "head" not in reports[2].bytes_up_by_unit
    assert "head" not in reports[2].bytes_down_by_unit


def test_alone_nothing_travels_and_every_client_goes_on_from_its_own():
    flat, _, reports, script = run(name="local")
    np.testing.assert_array_equal(flat, INITIAL)
    assert reports[2].bytes_up_by_unit == reports[2].bytes_down_by_unit == {}
    for name in NAMES:
        left = drifting(name, 2, starts(script)[name, 2]).astype(np.float32)
        np.testing.assert_array_equal(starts(script)[name, 3], left)


def test_a_client_that_sat_out_goes_on_from_its_last_round():
    clients = [str(i) for i in range(8)]
    _, strategy, reports, script = run(name="local", clients=clients, rounds=5, fraction_train=0.4)
    last = {}
    for report in reports[1:]:
        for name in report.clients_used:
            start = INITIAL if name not in last else drifting(name, last[name], starts(script)[name, last[name]])
            np.testing.assert_array_equal(starts(script)[name, report.server_round], start.astype(np.float32))
            last[name] = report.server_round
    assert strategy.last_round == last


def test_fedrep_is_fedper_but_for_the_epochs_of_the_head():
    flat, strategy, _, script = run(name="fedrep", head_epochs=3)
    expected, _, _, plain = run(name="fedper")
    np.testing.assert_array_equal(flat, expected)
    assert {instruction.head_epochs for _, instruction, _ in script.heard} == {3}
    assert strategy.without_training(1).head_epochs == 3
    for client_and_round, start in starts(plain).items():
        np.testing.assert_array_equal(starts(script)[client_and_round], start)


@pytest.mark.parametrize("strategy", ["fedper", "pfedla"])
def test_a_client_that_lost_what_it_kept_starts_afresh_the_next_time(strategy):
    def values(client, server_round, received):
        if (client, server_round) == ("2", 2):
            raise ValueError(f"This client {NOT_KEPT} 1; it has: none.")
        return drifting(client, server_round, received)

    _, _, reports, script = run(name=strategy, values=values, **({"retained": 1} if strategy == "pfedla" else {}))
    assert NOT_KEPT in reports[2].clients_dropped["2"]
    third = {name: i for name, i, _ in script.heard if i.server_round == 3}
    assert third["2"].exchange.start == 0
    assert third["2"].exchange.down is None
    assert third["1"].exchange.start == 2
