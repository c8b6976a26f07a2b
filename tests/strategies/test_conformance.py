"""What every strategy must do; a strategy in the registry is checked by being there."""

import numpy as np
import pytest
import torch

from strategies import STRATEGIES
from strategies.codec import Codec
from task.arrays import FLAT, flat_to_array
from task.errors import ConfigError, TooFewClientsError
from task.messages import ARRAYS, SIGNALS
from task.units import lora_layers
from tests.strategies.scripted import (
    LAYOUT,
    Script,
    ShufflingGrid,
    final_flat,
    initial_arrays,
    make_strategy,
    scripted_app,
)

NAMES = ["0", "1", "2", "3", "10"]
every_strategy = pytest.mark.parametrize("name", sorted(STRATEGIES))


PERSONAL = {name for name, kind in STRATEGIES.items() if kind.plans_exchanges}
one_model = pytest.mark.parametrize("name", sorted(set(STRATEGIES) - PERSONAL))
NOT_CONVEX = {"regmean": "least squares weighs by matrices"}


def run(name, script=None, clients=NAMES, shuffle=None, rounds=2, seed=0, lora_merge="factors", **options):
    strategy = make_strategy(name, seed=seed, lora_merge=lora_merge, **options)
    grid = ShufflingGrid(scripted_app(script or Script()), clients, shuffle)
    reports = []
    result = strategy.start(grid, initial_arrays(), num_rounds=rounds, on_round=reports.append)
    return final_flat(result.arrays), strategy, reports


def drifting(client, server_round, received):
    """An update of its own for every client and round, far from the others."""
    generator = np.random.default_rng([server_round, int(client)])
    return received + generator.normal(size=received.shape)


def same(one, other):
    """Whether two states are equal, tensors to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def effective(flat):
    """What a flat vector makes of the model: the products B A, which several factors share, and the head."""
    views, layers = LAYOUT.views(torch.tensor(flat)), lora_layers(LAYOUT)
    products = [(views[layer.b.name] @ views[layer.a.name]).flatten() for layer in layers]
    return torch.cat([*products, views["head.weight"].flatten(), views["head.bias"]]).numpy()


@one_model
@pytest.mark.parametrize("lora_merge", ["factors", "product_svd"])
def test_identical_updates_give_back_that_model(name, lora_merge):
    target = np.random.default_rng(1).normal(size=LAYOUT.size).astype(np.float32)
    if lora_merge not in STRATEGIES[name].lora_merges:
        with pytest.raises(ConfigError, match="in its own way"):
            run(name, lora_merge=lora_merge)
        return
    flat, _, _ = run(name, Script(values=lambda *_: target), rounds=1, lora_merge=lora_merge)
    np.testing.assert_allclose(effective(flat), effective(target), rtol=1e-4, atol=1e-5)


@every_strategy
def test_order_of_nodes_and_replies_changes_no_bit(name):
    expected, _, _ = run(name, Script(values=drifting), rounds=3)
    for shuffle in range(3):
        flat, _, _ = run(name, Script(values=drifting), shuffle=shuffle, rounds=3)
        np.testing.assert_array_equal(flat, expected)


@one_model
def test_one_client_gives_its_own_update(name):
    target = np.random.default_rng(2).normal(size=LAYOUT.size).astype(np.float32)
    flat, _, _ = run(name, Script(values=lambda *_: target), clients=["7"], rounds=1, min_clients=1)
    np.testing.assert_array_equal(flat, target)


@one_model
def test_weights_are_convex(name):
    """With weights that are not negative and sum to one, a merge never leaves the clients' range."""
    if name in NOT_CONVEX:
        pytest.skip(NOT_CONVEX[name])
    script = Script(values=drifting)
    flat, _, _ = run(name, script, rounds=1)
    updates = np.stack([drifting(client, 1, received) for client, _, received in script.heard])
    assert (flat <= updates.max(0) + 1e-5).all()
    assert (flat >= updates.min(0) - 1e-5).all()


@one_model
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reply_that_is_not_finite_is_dropped_and_named(name, value):
    def values(client, server_round, received):
        update = drifting(client, server_round, received)
        if client == "2":
            update[-1] = value
        return update

    flat, _, reports = run(name, Script(values=values), rounds=1)
    others = [client for client in NAMES if client != "2"]
    expected, _, _ = run(name, Script(values=drifting), clients=others, rounds=1)
    np.testing.assert_array_equal(flat, expected)
    assert reports[1].clients_used == others
    assert "not finite, in head" in reports[1].clients_dropped["2"]


@every_strategy
def test_signals_that_are_missing_or_not_numbers_never_end_a_round(name):
    """Without them the client is dropped and named; whatever NaN leads to, there is none in the model."""
    strategy = make_strategy(name)
    strategy.codec = Codec(initial_arrays(), LAYOUT)
    if not strategy.request().anything:
        pytest.skip("asks for no signals")

    def missing(client, server_round, content):
        if client == "2":
            del content[SIGNALS]
        return content

    _, _, reports = run(name, Script(values=drifting, edit=missing), rounds=1)
    assert "signals" in reports[1].clients_dropped["2"]

    def nan(client, server_round, content):
        size = content[SIGNALS][FLAT].shape[0]
        content[SIGNALS][FLAT] = flat_to_array(np.full(size, np.nan if client == "2" else 1.0, np.float32))
        return content

    flat, _, reports = run(name, Script(values=drifting, edit=nan), rounds=2)
    assert [report.merged for report in reports] == [False, True, True]
    assert np.isfinite(flat).all()


@every_strategy
def test_too_few_good_replies_leave_the_model_and_end_the_run(name):
    def edit(client, server_round, content):
        content[ARRAYS][FLAT] = flat_to_array(np.zeros(3, np.float32))
        return content

    strategy = make_strategy(name, max_failed_rounds=2)
    grid = ShufflingGrid(scripted_app(Script(edit=edit)), NAMES)
    reports = []
    with pytest.raises(TooFewClientsError, match="shape"):
        strategy.start(grid, initial_arrays(), num_rounds=5, on_round=reports.append)
    assert [report.merged for report in reports] == [False, False, False]
    np.testing.assert_array_equal(strategy.flat.numpy(), final_flat(initial_arrays()))


@one_model
def test_a_failed_round_is_survived(name):
    def values(client, server_round, received):
        update = drifting(client, server_round, received)
        return update * np.nan if server_round == 1 else update

    flat, strategy, reports = run(name, Script(values=values), rounds=2)
    assert [report.merged for report in reports] == [False, False, True]
    assert strategy.failed_rounds == 0
    assert np.isfinite(flat).all()


@every_strategy
def test_state_dict_round_trips(name):
    _, strategy, _ = run(name, Script(values=drifting), rounds=2)
    state = strategy.state_dict()
    other = make_strategy(name)
    other.load_state_dict(state)
    restored = other.state_dict()
    assert state.keys() == restored.keys()
    assert same(state, restored)
    strategy.flat += 1
    assert torch.equal(other.flat, state["flat"]), "the state must not share memory with the strategy"


@every_strategy
def test_cohorts_follow_the_seed(name):
    def cohort(seed):
        _, _, reports = run(name, clients=[str(i) for i in range(20)], rounds=3, seed=seed, fraction_train=0.3)
        return [report.clients_used for report in reports[1:]]

    first = cohort(1)
    assert cohort(1) == first
    assert cohort(2) != first
    assert all(len(clients) == 6 for clients in first)
    assert first[0] != first[1]
