"""What must hold of every strategy that goes with schedules, on each of them, with every wire."""

import numpy as np
import pytest

from strategies import SCHEDULES, STRATEGIES, Calibration, CalibrationConfig, FedLama, FedLamaConfig
from task.wire import EXACT, WireConfig
from tests.strategies.scripted import LAYOUT, Script, ShufflingGrid, final_flat, initial_arrays, make_strategy
from tests.strategies.scripted import scripted_app as app_of
from tests.strategies.test_fedlama import NAMES, by_unit

WIRES = {"float32": EXACT, "float16": WireConfig("float16"), "int8": WireConfig("int8", "tensor")}
OPTIONS = {"fedluar": {"recycled": 1}}
WITH_SCHEDULES = sorted(name for name, kind in STRATEGIES.items() if not kind.plans_exchanges)
together = pytest.mark.parametrize(
    ("strategy", "schedule"),
    [
        (strategy, schedule)
        for strategy in WITH_SCHEDULES
        for schedule in sorted(SCHEDULES)
        if schedule != "fedluar" or not STRATEGIES[strategy].merges_products
    ],
)
wires = pytest.mark.parametrize("wire", sorted(WIRES))


def drifting(client, server_round, received):
    generator = np.random.default_rng([server_round, int(client)])
    return received + 0.1 * generator.normal(size=received.shape)


def run(strategy, schedule, wire, shuffle=None, rounds=5, values=drifting):
    kind = SCHEDULES[schedule]
    made = make_strategy(strategy, schedule=kind(kind.Config(**OPTIONS.get(schedule, {}))), wire=WIRES[wire])
    grid, reports = ShufflingGrid(app_of(Script(values=values)), NAMES, shuffle), []
    result = made.start(grid, initial_arrays(), num_rounds=rounds, on_round=reports.append)
    return final_flat(result.arrays), made, reports


@together
@wires
def test_order_changes_no_bit_and_a_bad_reply_costs_only_its_client(strategy, schedule, wire):
    def values(client, server_round, received):
        update = drifting(client, server_round, received)
        if (client, server_round) == ("3", 1):
            update[-1] = np.nan
        return update

    expected, _, reports = run(strategy, schedule, wire, values=values)
    assert "not finite, in head" in reports[1].clients_dropped["3"]
    assert all(report.merged for report in reports[1:])
    assert np.isfinite(expected).all()
    for shuffle in range(2):
        np.testing.assert_array_equal(run(strategy, schedule, wire, shuffle, values=values)[0], expected)


@together
def test_a_short_wire_brings_nearly_the_same(strategy, schedule):
    if schedule == "fedluar":
        pytest.skip("a draw may fall out another way")
    exact, _, full = run(strategy, schedule, "float32", rounds=3)
    for wire, tolerance in (("float16", 2e-3), ("int8", 3e-2)):
        short, _, reports = run(strategy, schedule, wire, rounds=3)
        np.testing.assert_allclose(short, exact, atol=tolerance)
        ratio = sum(reports[1].bytes_up_by_unit.values()) / sum(full[1].bytes_up_by_unit.values())
        assert ratio == 0.5 if wire == "float16" else 0.25 < ratio < 0.6  # tiny tensors: a scale weighs much


def test_the_server_never_loses_what_the_way_down_rounds_away():
    """Clients that change nothing leave the model as it is, to the bit, however coarse the wire."""
    flat, _, _ = run("fedavg", "every_round", "int8", values=lambda client, number, received: received)
    np.testing.assert_array_equal(flat, final_flat(initial_arrays()))


def test_counted_bytes_are_those_sent():
    for wire in WIRES:
        _, _, reports = run("fedavg", "fedlama", wire, values=by_unit)
        for report in reports[1:]:
            assert 0 < sum(report.bytes_up_by_unit.values()) < report.bytes_up
            assert 0 < sum(report.bytes_down_by_unit.values()) < report.bytes_down


def test_a_calibration_waits_for_the_end_of_a_window():
    strategy = make_strategy("fedavg", schedule=FedLama(FedLamaConfig(factor=2)))
    strategy.calibration = Calibration(CalibrationConfig(name="ccvr", every_round=True, epochs=1, draws_per_class=4))
    reports = []
    strategy.start(
        ShufflingGrid(app_of(Script(values=drifting)), NAMES), initial_arrays(), num_rounds=5, on_round=reports.append
    )
    assert [report.details.get("calibrated") for report in reports[1:]] == [None, True, None, True, True]


def test_the_state_of_a_schedule_is_in_the_strategys():
    _, strategy, _ = run("livar", "fedlama", "float32", rounds=3)
    other = make_strategy("livar", schedule=FedLama())
    other.schedule.begin(LAYOUT, 3, 0)
    other.load_state_dict(strategy.state_dict())
    assert other.state_dict()["schedule"] == strategy.state_dict()["schedule"]
