"""pFedLA over scripted clients: what is sent, what the server holds, who is absent, late or keeps units."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from server_app.saving import save_personal
from strategies.pfedla import HypernetworkBank
from task.wire import WireConfig
from tests.strategies.scripted import (
    LAYOUT,
    Script,
    ShufflingGrid,
    final_flat,
    initial_arrays,
    make_strategy,
    scripted_app,
)
from tests.strategies.test_fedlama import NAMES

INITIAL = final_flat(initial_arrays())


def drifting(client, server_round, received):
    generator = np.random.default_rng([server_round, int(client)])
    return received + (0.1 + int(client)) * generator.normal(size=received.shape)


def run(rounds=3, values=drifting, clients=NAMES, shuffle=None, name="pfedla", **options):
    strategy, script, reports = make_strategy(name, **options), Script(values=values), []
    grid = ShufflingGrid(scripted_app(script), clients, shuffle)
    result = strategy.start(grid, initial_arrays(), num_rounds=rounds, on_round=reports.append)
    return final_flat(result.arrays), strategy, reports, script


def starts(script):
    return {(name, instruction.server_round): start for name, instruction, start in script.heard}


def stored(strategy, client):
    number = strategy.clients.index(client)
    return np.concatenate([rows[number].float().numpy() for rows in strategy.store.units.values()])


def test_clients_get_their_own_mixture_of_what_all_had():
    _, strategy, reports, script = run(rounds=2)
    left = np.stack([drifting(name, 1, INITIAL) for name in NAMES]).astype(np.float32)
    for name in NAMES:
        np.testing.assert_allclose(starts(script)[name, 1], INITIAL, rtol=1e-5, atol=1e-6)
        alpha = np.array(reports[2].details["alpha"][NAMES.index(name)])
        expected = np.empty(LAYOUT.size)
        for row, part in zip(alpha, LAYOUT.slices.values(), strict=True):
            expected[part] = row @ left[:, part]
        np.testing.assert_allclose(starts(script)[name, 2], expected, atol=5e-3)
        np.testing.assert_array_equal(
            stored(strategy, name), drifting(name, 2, starts(script)[name, 2]).astype(np.float32)
        )


def test_the_global_model_is_the_mean_of_the_clients():
    flat, strategy, _, _ = run()
    np.testing.assert_allclose(flat, np.mean([stored(strategy, name) for name in NAMES], axis=0), rtol=1e-4, atol=1e-5)


def test_the_step_climbs_what_training_gained():
    """After a round, sum <bar_theta, Delta> over the same store is higher than before it."""
    strategy = make_strategy("pfedla", learning_rate=1e-4)
    run_once = ShufflingGrid(scripted_app(Script(values=drifting)), NAMES)
    strategy.start(run_once, initial_arrays(), num_rounds=1)
    store = {unit: rows.clone() for unit, rows in strategy.store.units.items()}
    alpha = torch.stack([strategy.bank.weights([i])[0] for i in range(4)])
    sent = list(strategy.models_for(NAMES))
    new = np.stack([drifting(n, 9, model.numpy()) for n, model in zip(NAMES, sent, strict=True)]).astype(np.float32)
    gain = torch.stack(
        [
            (torch.tensor(new[:, part]) - alpha[:, number] @ store[unit]) @ store[unit].T
            for number, (unit, part) in enumerate(LAYOUT.slices.items())
        ],
        dim=1,
    )
    strategy.bank.step(range(4), gain)
    after = torch.stack([strategy.bank.weights([i])[0] for i in range(4)])
    assert (after * gain).sum() > (alpha * gain).sum()


def test_order_changes_no_bit():
    expected, strategy, _, _ = run(shuffle=None)
    personal = strategy.personal_models()
    assert not torch.equal(personal["0"], personal["1"])
    for shuffle in range(3):
        flat, other, _, _ = run(shuffle=shuffle)
        np.testing.assert_array_equal(flat, expected)
        found = other.personal_models()
        assert found.keys() == personal.keys()
        assert all(torch.equal(found[client], personal[client]) for client in personal)


def test_an_absent_clients_model_stays_and_counts():
    clients = [str(i) for i in range(10)]
    _, strategy, reports, script = run(rounds=4, clients=clients, fraction_train=0.3)
    last = {}
    for report in reports[1:]:
        assert len(report.clients_used) == 3
        last |= dict.fromkeys(report.clients_used, report.server_round)
    assert strategy.last_round == last
    for client in clients:
        expected = drifting(client, last[client], starts(script)[client, last[client]]) if client in last else INITIAL
        np.testing.assert_array_equal(stored(strategy, client), expected.astype(np.float32))


def test_a_client_that_joins_late_starts_from_a_mixture_with_the_initial_model():
    strategy, script = make_strategy("pfedla"), Script(values=drifting)

    class GrowingGrid(ShufflingGrid):
        def get_node_ids(self):
            return list(super().get_node_ids())[: 4 if strategy.server_round < 2 else 5]

    grid = GrowingGrid(scripted_app(script), [*NAMES, "9"])
    strategy.start(grid, initial_arrays(), num_rounds=4)
    assert strategy.clients == [*NAMES, "9"]
    heard = starts(script)
    first = min(number for name, number in heard if name == "9")
    assert first in (2, 3)
    left = [drifting(name, first - 1, heard[name, first - 1]).astype(np.float32) for name in NAMES]
    rows, alpha = np.stack([*left, INITIAL]), HypernetworkBank(5, 3).weights([4])[0].numpy()
    expected = np.concatenate(
        [weights @ rows[:, part] for weights, part in zip(alpha, LAYOUT.slices.values(), strict=True)]
    )
    np.testing.assert_allclose(heard["9", first], expected, rtol=1e-5, atol=1e-6)
    last = drifting("9", 4, heard["9", 4]).astype(np.float32)
    np.testing.assert_array_equal(stored(strategy, "9"), last)


@pytest.mark.parametrize("options", [{}, {"positivity": "relu_sum"}, {"gain": "cosine"}, {"retained": 1}])
@pytest.mark.parametrize("max_age", [1, 2, 9])
def test_models_that_are_too_old_count_for_nobody_else(options, max_age):
    clients, rounds = [str(i) for i in range(10)], 4
    asked = {"clients": clients, "fraction_train": 0.3, "max_age": max_age, **options}
    flat, strategy, reports, script = run(rounds=rounds, **asked)
    left, trained = {}, {}

    def recent():
        return {name for name, number in trained.items() if number > report.server_round - 1 - max_age}

    for report in reports[1:]:
        number, alpha = report.server_round, np.array(report.details["alpha"])
        for client, weights in zip(report.clients_used, alpha, strict=True):
            counted = recent() | ({client} & set(trained)) if trained else set(clients)
            assert (weights[:, [int(name) for name in clients if name not in counted]] == 0).all()
            rows = np.stack([left.get(name, INITIAL) for name in clients])
            expected = np.concatenate(
                [row @ rows[:, part] for row, part in zip(weights, LAYOUT.slices.values(), strict=True)]
            )
            np.testing.assert_allclose(starts(script)[client, number], expected, atol=5e-3)
        left |= {name: drifting(name, number, starts(script)[name, number]) for name in report.clients_used}
        trained |= dict.fromkeys(report.clients_used, number)
    assert 3 < len(trained) < 10
    late = [left[name] for name, number in trained.items() if number > rounds - max_age]
    np.testing.assert_allclose(flat, np.mean(late, axis=0), rtol=1e-4, atol=1e-5)
    other = make_strategy("pfedla", max_age=max_age, **options)
    other.load_state_dict(strategy.state_dict())
    other.codec = strategy.codec
    for name in clients:
        assert torch.equal(*(next(iter(one.models_for([name]))) for one in (other, strategy)))


def test_hypernetworks_learn_nothing_of_models_that_do_not_count():
    clients = [str(i) for i in range(10)]
    asked = {"clients": clients, "fraction_train": 0.3, "max_age": 1, "learning_rate": 1.0}
    _, strategy, reports, _ = run(rounds=2, **asked)
    first, second = (report.clients_used for report in reports[1:])
    drawn = HypernetworkBank(10, len(LAYOUT.units)).parameters["output.weight"]
    moved = (strategy.bank.parameters["output.weight"] - drawn).abs().amax((1, 3))
    others = [int(client) for client in clients if client not in first]
    for client in map(int, set(second) - set(first)):  # in round 1 all models are the same, so that nothing moves
        assert moved[client, list(map(int, first))].max() > 1e-3
        assert moved[client, others].max() < 1e-4


def test_a_late_client_is_sent_what_those_of_late_have():
    strategy, script = make_strategy("pfedla", max_age=1), Script(values=drifting)

    class GrowingGrid(ShufflingGrid):
        def get_node_ids(self):
            return list(super().get_node_ids())[: 4 if strategy.server_round < 2 else 5]

    strategy.start(GrowingGrid(scripted_app(script), [*NAMES, "9"]), initial_arrays(), num_rounds=4)
    heard = starts(script)
    first = min(number for name, number in heard if name == "9")
    left = np.stack([drifting(name, first - 1, heard[name, first - 1]).astype(np.float32) for name in NAMES])
    among = torch.tensor([[True, True, True, True, False]])
    alpha = HypernetworkBank(5, 3).weights([4], among)[0, :, :4].numpy()
    expected = np.concatenate(
        [weights @ left[:, part] for weights, part in zip(alpha, LAYOUT.slices.values(), strict=True)]
    )
    np.testing.assert_allclose(heard["9", first], expected, rtol=1e-4, atol=1e-5)


def test_all_units_retained_is_training_alone():
    _, strategy, _, script = run(rounds=4, retained=3)
    for name in NAMES:
        own = INITIAL
        for number in range(1, 5):
            np.testing.assert_allclose(starts(script)[name, number], own, rtol=1e-5, atol=1e-6)
            own = drifting(name, number, starts(script)[name, number]).astype(np.float32)
        np.testing.assert_array_equal(stored(strategy, name), own)


@pytest.mark.parametrize("retained", [1, 2])
def test_retained_units_do_not_travel_down_and_are_the_clients_own(retained):
    _, strategy, reports, script = run(rounds=3, retained=retained)
    full = sum(reports[1].bytes_down_by_unit.values())
    for name, instruction, start in script.heard:
        if instruction.server_round == 1:
            assert instruction.exchange.down is None
            continue
        kept = set(LAYOUT.units) - set(instruction.exchange.down)
        assert len(kept) == retained
        assert instruction.exchange.up is None
        before = drifting(name, instruction.server_round - 1, starts(script)[name, instruction.server_round - 1])
        for unit in kept:
            part = LAYOUT.slices[unit]
            np.testing.assert_array_equal(start[part], before[part].astype(np.float32))
    train_down = [sum(report.bytes_down_by_unit.values()) for report in reports[2:]]
    assert all(0 < down < full for down in train_down)
    assert np.isfinite(strategy.flat.numpy()).all()


@pytest.mark.parametrize("options", [{"positivity": "relu_sum"}, {"gain": "cosine"}, {"store": "float16"}])
def test_other_options_run(options):
    flat, _, reports, _ = run(**options)
    assert np.isfinite(flat).all()
    alpha = np.array(reports[3].details["alpha"])
    np.testing.assert_allclose(alpha.sum(-1), 1, atol=1e-3)
    assert reports[3].details["alpha_clients"] == NAMES


def test_a_state_goes_on_where_it_was():
    _, strategy, _, _ = run(retained=1)
    other = make_strategy("pfedla", retained=1)
    other.load_state_dict(strategy.state_dict())
    other.codec = strategy.codec
    for name in NAMES:
        assert torch.equal(*(next(iter(one.models_for([name]))) for one in (other, strategy)))
        assert other.exchange(4, name) == strategy.exchange(4, name)


def test_a_state_has_the_large_tensors_themselves():
    """A checkpoint is to cost no second store."""
    _, strategy, _, _ = run()
    state = strategy.state_dict()
    assert all(state["store"][unit] is rows for unit, rows in strategy.store.units.items())
    assert all(state["hypernetworks"][name] is value for name, value in strategy.bank.parameters.items())


def test_personal_models_are_those_that_are_sent_and_the_store_is_read_once_for_many(tmp_path, monkeypatch):
    clients = [str(i) for i in range(20)]
    _, strategy, _, _ = run(clients=clients)
    passes, mixed = [], strategy.store.mixed
    monkeypatch.setattr(strategy.store, "mixed", lambda alpha: passes.append(len(alpha)) or mixed(alpha))
    models = strategy.personal_models()
    assert passes == [16, 4]
    for client, sent in zip(clients, strategy.models_for(clients), strict=True):
        assert torch.equal(models[client], sent)
    (tmp_path / "README.md").touch()
    save_personal(tmp_path, models)
    saved = load_file(tmp_path / "personal.safetensors")
    assert {client: saved[f"client.{client}"].tolist() for client in clients} == {
        client: model.tolist() for client, model in models.items()
    }


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_all_units_retained_is_training_alone_also_with_rounded_numbers(dtype):
    """What the server holds differs from what the client does by one rounding error, which does not grow."""
    _, strategy, _, script = run(rounds=6, retained=3, wire=WireConfig(dtype))
    for name in NAMES:
        own = drifting(name, 6, starts(script)[name, 6])
        np.testing.assert_allclose(stored(strategy, name), own, atol=0.06 * (1 + int(name)))


def test_no_more_units_are_retained_than_asked_for():
    _, _, _, script = run(rounds=3, retained=1, self_bias=200.0)
    for _, instruction, _ in script.heard:
        if instruction.server_round > 1:
            assert len(instruction.exchange.down) == 2


def test_values_that_the_store_cannot_hold_cost_their_client_the_round():
    def values(client, server_round, received):
        return drifting(client, server_round, received) + (1e5 if (client, server_round) == ("1", 2) else 0)

    flat, _, reports, _ = run(values=values, store="float16")
    assert "its largest value is 1e+05; strategy.store=float16 takes 6.55e+04" in reports[2].clients_dropped["1"]
    assert reports[3].clients_used == NAMES
    assert np.isfinite(flat).all()
    flat, _, reports, _ = run(
        values=lambda client, n, received: drifting(client, n, received) * (1e18 if n == 2 else 1)
    )
    assert [report.merged for report in reports[1:]] == [True, False, True]
    assert np.isfinite(flat).all()
