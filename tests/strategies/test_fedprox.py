"""FedProx: FedAvg on the server, one number more for the clients; test_base.py holds that it reaches them."""

import numpy as np
import pytest

from strategies import FedProxConfig
from task.config import typed
from task.errors import ConfigError
from tests.strategies.scripted import Script, ShufflingGrid, final_flat, initial_arrays, make_strategy, scripted_app


def run(name, **options):
    script = Script(
        values=lambda client, n, received: received * 0.9 + np.random.default_rng([n, int(client)]).random()
    )
    strategy = make_strategy(name, **options)
    result = strategy.start(ShufflingGrid(scripted_app(script), ["0", "1", "2"]), initial_arrays(), num_rounds=3)
    return final_flat(result.arrays), script.heard


def test_the_server_merges_as_fedavg_does():
    found, heard = run("fedprox", proximal_mu=7.0)
    expected, plain = run("fedavg")
    np.testing.assert_array_equal(found, expected)
    assert {instruction.proximal_mu for _, instruction, _ in heard} == {7.0}
    for (_, with_term, received), (_, without, same) in zip(heard, plain, strict=True):
        assert with_term.server_round == without.server_round
        np.testing.assert_array_equal(received, same)


def test_without_weight_of_the_term_the_messages_are_those_of_fedavg():
    assert [instruction for _, instruction, _ in run("fedprox", proximal_mu=0.0)[1]] == [
        instruction for _, instruction, _ in run("fedavg")[1]
    ]


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(mu):
    with pytest.raises(ConfigError, match="strategy.proximal_mu"):
        typed(FedProxConfig, {"proximal_mu": mu}, "strategy.")
