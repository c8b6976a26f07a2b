"""FedLAMA: discrepancies, the choice of units, and whole runs against the algorithm written out by hand."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from strategies import FedAvg, FedAvgConfig, FedLama, FedLamaConfig, TaskContext
from strategies.arithmetic import sample_weights
from strategies.fedlama import lengthened_units, unit_discrepancy
from task.arrays import FLAT, flat_to_array
from task.units import make_layout
from tests.strategies.scripted import (
    BASE,
    CLASSES,
    LAYOUT,
    Script,
    ShufflingGrid,
    final_flat,
    initial_arrays,
    make_strategy,
    scripted_app,
)

NAMES = ["0", "1", "2", "3"]
UNITS = LAYOUT.units
SIZES = {unit: part.stop - part.start for unit, part in LAYOUT.slices.items()}
sizes = st.lists(st.integers(1, 50), min_size=1, max_size=12)


def run(script=None, rounds=4, clients=NAMES, shuffle=None, strategy="fedavg", schedule=None, **options):
    made = make_strategy(strategy, schedule=schedule or FedLama(FedLamaConfig()), **options)
    script, reports = script or Script(values=by_unit), []
    grid = ShufflingGrid(scripted_app(script), clients, shuffle)
    result = made.start(grid, initial_arrays(), num_rounds=rounds, on_round=reports.append)
    return final_flat(result.arrays), made, reports, script


def fedlama(**options):
    return FedLama(FedLamaConfig(**options))


def by_unit(client, server_round, received):
    """Clients that disagree most about the head, least about the first block."""
    generator = np.random.default_rng([server_round, int(client)])
    spread = np.empty(LAYOUT.size)
    for number, part in enumerate(LAYOUT.slices.values()):
        spread[part] = (1.0, 1.5, 2.2)[number]
    return received + spread * generator.normal(size=received.shape)


def test_the_case_of_the_specification():
    assert lengthened_units(torch.arange(1.0, 7.0), torch.ones(6)).tolist() == [True] * 4 + [False] * 2
    shuffled = torch.tensor([5.0, 1.0, 6.0, 2.0, 4.0, 3.0])
    assert lengthened_units(shuffled, torch.ones(6)).tolist() == [False, True, False, True, True, True]


def test_the_case_of_the_specification_costs_two_thirds_of_fedavg():
    """Six equal units with d = 1..6 and phi = 2: four wait, so that a window costs (2 x 2 + 4) of 2 x 6 units."""
    six = make_layout({f"blocks.{unit}.attn.qkv.lora_A.weight": (2, 4) for unit in range(6)})
    apart = np.repeat(np.sqrt(np.arange(1, 7)), 8)
    script = Script(
        values=lambda client, server_round, received: received + apart * (1 if client == "0" else -1),
        num_examples=lambda client: 10,
        layout=six,
    )
    context = TaskContext("{}", six, BASE, CLASSES)
    strategy = FedAvg(FedAvgConfig(evaluate_clients="off"), context, schedule=fedlama(factor=2))
    initial, reports = ArrayRecord({FLAT: flat_to_array(np.zeros(six.size, np.float32))}), []
    strategy.start(ShufflingGrid(scripted_app(script), NAMES[:2]), initial, num_rounds=4, on_round=reports.append)
    np.testing.assert_allclose(reports[2].details["schedule"]["discrepancy"], range(1, 7), rtol=1e-5)
    assert reports[2].details["schedule"]["lengthened"] == [f"blocks.{unit}" for unit in range(4)]
    up = [sum(report.bytes_up_by_unit.values()) for report in reports[1:]]
    assert up[0] == up[1] == up[3]
    assert sum(up[2:]) / sum(up[:2]) == 2 / 3


@given(sizes, st.integers(0, 2**31))
def test_the_walk_stops_where_the_curves_cross(dims, seed):
    """By the definition: units are taken while 1 - lambda >= delta, and the one that crosses as well."""
    discrepancy = np.random.default_rng(seed).exponential(size=len(dims))
    found = lengthened_units(torch.tensor(discrepancy), torch.tensor(dims)).numpy()
    expected = np.zeros(len(dims), bool)
    for unit in np.argsort(discrepancy):
        expected[unit] = True
        taken, mass = np.sum(np.array(dims)[expected]), np.array(dims) * discrepancy
        if 1 - taken / sum(dims) < mass[expected].sum() / mass.sum():
            break
    np.testing.assert_array_equal(found, expected)


@given(st.integers(2, 30), st.integers(2, 5), st.integers(0, 2**31))
def test_the_cost_is_within_the_papers_bounds_for_many_equal_units(units, factor, seed):
    """Between 1/phi, all lengthened, and, up to one unit, half of the units lengthened."""
    discrepancy = torch.tensor(np.random.default_rng(seed).exponential(size=units))
    share = lengthened_units(discrepancy, torch.ones(units)).double().mean().item()
    cost = share / factor + 1 - share
    assert 1 / factor - 1e-9 <= cost <= 0.5 + 0.5 / factor


def test_units_that_agree_wholly_count_by_their_size():
    assert lengthened_units(torch.zeros(4), torch.ones(4)).tolist() == [True, True, True, False]
    assert lengthened_units(torch.zeros(1), torch.ones(1)).tolist() == [True]


@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_the_discrepancy_by_hand(clients, dim, interval, seed):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(clients, dim)).astype(np.float32)
    weights = sample_weights(generator.integers(1, 9, clients).tolist())
    mean = np.average(values.astype(np.float64), axis=0, weights=weights)
    expected = sum(w * ((x - mean) ** 2).sum() for w, x in zip(weights, values, strict=True)) / (interval * dim)
    found = unit_discrepancy(list(torch.from_numpy(values)), weights, interval)
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-10)


def by_hand(rounds, factor, change, dropped=()):
    """FedLAMA over the scripted clients, everything held in one place; who drops out is back with the next window."""
    intervals, layout = dict.fromkeys(UNITS, 1), LAYOUT.slices
    flat = final_flat(initial_arrays()).astype(np.float64)
    for k in range(1, rounds + 1):
        if (k - 1) % factor == 0:
            own_values = {name: flat.copy() for name in NAMES}
        there = [name for name in own_values if (name, k) not in dropped]
        own_values = {name: change(name, k, own_values[name].astype(np.float32)) for name in there}
        weights = np.array(sample_weights([10 * (int(name) + 1) for name in there]))
        clients, ends = list(own_values.values()), k % factor == 0 or k == rounds
        discrepancy = []
        for unit in UNITS:
            if ends or k % intervals[unit] == 0:
                values = np.stack([own[layout[unit]] for own in clients])
                mean = weights @ values
                apart = weights @ ((values - mean) ** 2).sum(1)
                discrepancy.append(apart / (intervals[unit] * SIZES[unit]))
                flat[layout[unit]] = mean
                for own in clients:
                    own[layout[unit]] = mean
        if ends:
            longer = lengthened_units(torch.tensor(discrepancy), torch.tensor(list(SIZES.values()))).tolist()
            intervals = {unit: factor if yes else 1 for unit, yes in zip(UNITS, longer, strict=True)}
    return flat, intervals


@pytest.mark.parametrize(("rounds", "factor"), [(1, 2), (2, 2), (6, 2), (7, 2), (8, 4), (9, 3)])
def test_a_run_is_the_algorithm_written_out(rounds, factor):
    flat, strategy, _, _ = run(rounds=rounds, schedule=fedlama(factor=factor))
    expected, intervals = by_hand(rounds, factor, by_unit)
    np.testing.assert_allclose(flat, expected, rtol=2e-4, atol=2e-4)
    assert strategy.schedule.intervals == intervals


@pytest.mark.parametrize("rounds", [8, 9, 12])
def test_who_drops_out_inside_a_window_leaves_the_sums_and_the_others_count_in_full(rounds):
    dropped = {("1", 6), ("3", 7), ("0", 9)}

    def values(client, server_round, received):
        update = by_unit(client, server_round, received)
        return update * np.nan if (client, server_round) in dropped else update

    flat, strategy, reports, _ = run(Script(values=values), rounds=rounds, schedule=fedlama(factor=4))
    expected, intervals = by_hand(rounds, 4, by_unit, dropped)
    np.testing.assert_allclose(flat, expected, rtol=2e-4, atol=2e-4)
    assert strategy.schedule.intervals == intervals
    assert [len(report.clients_used) for report in reports[1:]] == [4, 4, 4, 4, 4, 3, 2, 2, 3, 3, 3, 3][:rounds]


def test_with_factor_one_it_is_the_strategy_without_it():
    flat, _, _, _ = run(schedule=fedlama(factor=1))
    plain = make_strategy("fedavg")
    result = plain.start(ShufflingGrid(scripted_app(Script(values=by_unit)), NAMES), initial_arrays(), num_rounds=4)
    np.testing.assert_array_equal(flat, final_flat(result.arrays))


@pytest.mark.parametrize(("interval", "factor"), [(1, 2), (1, 4), (2, 2), (3, 1)])
def test_traffic_is_what_the_formula_says(interval, factor):
    """Every synchronisation of a unit is once up and once down; the first download is the initial model."""
    rounds = 12
    _, _, reports, _ = run(rounds=rounds, schedule=fedlama(interval=interval, factor=factor), evaluate_clients="off")
    for unit in UNITS:
        synchronised = [unit in report.details["schedule"]["due"] for report in reports[1:]]
        up = [report.bytes_up_by_unit.get(unit, 0) for report in reports[1:]]
        down = [report.bytes_down_by_unit.get(unit, 0) for report in reports[1:]]
        once = len(NAMES) * 4 * SIZES[unit]
        assert up == [once * due for due in synchronised]
        assert down == [once * due for due in [True, *synchronised[:-1]]]
        assert rounds // (interval * factor) <= sum(synchronised) <= rounds // interval
    lengthened = [set(report.details["schedule"].get("lengthened", [])) for report in reports[1:]]
    assert any(lengthened) == (factor > 1)
    assert reports[-1].bytes_up >= sum(reports[-1].bytes_up_by_unit.values())


def test_units_of_great_disagreement_are_synchronised_more_often():
    _, _, reports, _ = run(rounds=4)
    first = reports[2].details["schedule"]
    assert np.argsort(first["discrepancy"]).tolist() == [0, 1, 2]
    assert first["lengthened"] == ["blocks.0", "blocks.1"]
    assert first["lengthened_share"] == (SIZES["blocks.0"] + SIZES["blocks.1"]) / sum(SIZES.values())
    assert reports[3].details["schedule"]["due"] == ["head"]


def test_a_head_that_is_always_due_is_never_lengthened():
    def agreeing_on_the_head(client, server_round, received):
        update = by_unit(client, server_round, received)
        update[LAYOUT.slices["head"]] = received[LAYOUT.slices["head"]]
        return update

    script = Script(values=agreeing_on_the_head)
    _, free, _, _ = run(script, schedule=fedlama())
    _, always, _, _ = run(Script(values=agreeing_on_the_head), schedule=fedlama(head="always"))
    assert free.schedule.intervals["head"] == 2
    assert always.schedule.intervals["head"] == 1
    assert always.schedule.intervals["blocks.0"] == 2


def test_the_cohort_is_fixed_inside_a_window():
    _, _, reports, _ = run(
        rounds=6, clients=[str(i) for i in range(20)], schedule=fedlama(factor=3), fraction_train=0.3
    )
    cohorts = [report.clients_used for report in reports[1:]]
    assert cohorts[0] == cohorts[1] == cohorts[2]
    assert cohorts[3] == cohorts[4] == cohorts[5]
    assert cohorts[0] != cohorts[3]


def test_who_joins_or_leaves_changes_nothing_for_a_window_under_way():
    names, strategy = [str(i) for i in range(12)], make_strategy("fedavg", schedule=fedlama(), fraction_train=0.5)
    reports = []

    class ChangingGrid(ShufflingGrid):
        def get_node_ids(self):
            nodes = list(super().get_node_ids())
            drawn = set(map(int, reports[1].clients_used)) if len(reports) > 1 else set()
            gone = next(i for i in range(10) if i not in drawn)
            return nodes[:10] if not drawn else [node for node in nodes if node != gone + 1]

    grid = ChangingGrid(scripted_app(Script(values=by_unit)), names)
    strategy.start(grid, initial_arrays(), num_rounds=4, on_round=reports.append)
    assert reports[1].clients_used == reports[2].clients_used
    assert len(reports[1].clients_used) == 5
    assert reports[3].cohort == round(0.5 * 11)


def test_who_drops_out_comes_back_with_the_next_window_and_the_others_count_in_full():
    def values(client, server_round, received):
        update = by_unit(client, server_round, received)
        return update * np.nan if (client, server_round) == ("1", 1) else update

    flat, _, reports, script = run(Script(values=values), rounds=4, schedule=fedlama(factor=2))
    assert [report.clients_used for report in reports[1:]] == [["0", "2", "3"], ["0", "2", "3"], NAMES, NAMES]
    assert [report.cohort for report in reports[1:]] == [4, 3, 4, 4]
    back = next(instruction for name, instruction, _ in script.heard if (name, instruction.server_round) == ("1", 3))
    assert back.exchange.down is None
    assert back.exchange.start == 0
    expected, _ = by_hand(4, 2, by_unit, {("1", 1)})
    np.testing.assert_allclose(flat, expected, rtol=2e-4, atol=2e-4)


def test_a_round_that_fails_ends_the_window():
    def values(client, server_round, received):
        update = by_unit(client, server_round, received)
        return update * np.nan if server_round == 3 else update

    flat, strategy, reports, script = run(Script(values=values), rounds=5, schedule=fedlama(factor=2))
    assert [report.merged for report in reports[1:]] == [True, True, False, True, True]
    fourth = [instruction for _, instruction, _ in script.heard if instruction.server_round == 4]
    assert all(instruction.exchange.start == 0 and instruction.exchange.down is None for instruction in fourth)
    assert strategy.schedule.complete, "the last round synchronises"
    assert np.isfinite(flat).all()


def test_clients_keep_what_is_not_due_and_receive_what_was():
    _, _, reports, script = run(rounds=4)
    heard = {(name, instruction.server_round): (instruction, start) for name, instruction, start in script.heard}
    due = reports[3].details["schedule"]["due"]
    assert due
    assert set(due) < set(UNITS)
    for name in NAMES:
        instruction, start = heard[name, 4]
        assert list(instruction.exchange.down) == due
        left = by_unit(name, 3, heard[name, 3][1]).astype(np.float32)
        for unit, part in LAYOUT.slices.items():
            if unit in due:
                np.testing.assert_array_equal(start[part], heard["0", 4][1][part])
            else:
                np.testing.assert_array_equal(start[part], left[part])


def test_the_model_is_evaluated_where_all_units_are_new():
    evaluated = []
    strategy = make_strategy("fedavg", schedule=fedlama(factor=3), evaluate_every=2)
    grid = ShufflingGrid(scripted_app(Script(values=by_unit)), NAMES)
    strategy.start(grid, initial_arrays(), num_rounds=10, evaluate_fn=lambda number, arrays: evaluated.append(number))
    assert evaluated == [0, 3, 6, 9, 10]


def test_a_window_that_fails_in_the_middle_leaves_a_model_that_is_not_complete():
    def values(client, server_round, received):
        return by_unit(client, server_round, received) * (np.nan if server_round == 4 else 1)

    evaluated, reports = [], []
    strategy = make_strategy("fedavg", schedule=fedlama(factor=4))
    grid = ShufflingGrid(scripted_app(Script(values=values)), NAMES)
    strategy.start(
        grid,
        initial_arrays(),
        num_rounds=9,
        evaluate_fn=lambda number, arrays: evaluated.append(number),
        on_round=reports.append,
    )
    assert evaluated == [0, 8, 9]
    assert [report.server_round for report in reports if report.complete] == evaluated


def test_a_discrepancy_that_is_not_finite_lets_no_unit_wait():
    assert not lengthened_units(torch.tensor([1.0, torch.inf]), torch.ones(2)).any()
    assert torch.isfinite(unit_discrepancy([torch.full((2,), 3e38), torch.full((2,), -3e38)], [0.5, 0.5], 1))


def test_state_goes_on_in_the_middle_of_a_window():
    _, strategy, _, _ = run(rounds=3, schedule=fedlama(factor=2))
    other = fedlama(factor=2)
    other.begin(LAYOUT, 3, 0)
    other.load_state_dict(strategy.schedule.state_dict())
    assert other.state_dict() == strategy.schedule.state_dict()
    assert other.exchange(4) == strategy.schedule.exchange(4)
