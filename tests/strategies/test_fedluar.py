"""FedLUAR: scores, draws, and what a recycled unit becomes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies import FedLuar, FedLuarConfig
from strategies.fedluar import draw_recycled, relative_changes
from task.errors import ConfigError
from tests.strategies.scripted import LAYOUT, Script, ShufflingGrid, final_flat, initial_arrays, make_strategy
from tests.strategies.scripted import scripted_app as app_of
from tests.strategies.test_fedlama import NAMES, UNITS, by_unit


def run(rounds=4, seed=0, **options):
    strategy = make_strategy("fedavg", seed=seed, schedule=FedLuar(FedLuarConfig(**options)), evaluate_clients="off")
    models, reports = [final_flat(initial_arrays()).copy()], []

    def note(report):
        reports.append(report)
        if report.server_round:
            models.append(strategy.flat.numpy().copy())

    grid = ShufflingGrid(app_of(Script(values=by_unit)), NAMES)
    strategy.start(grid, initial_arrays(), num_rounds=rounds, on_round=note)
    return models, reports[1:]


def test_a_recycled_unit_repeats_its_last_change():
    models, reports = run(recycled=2)
    assert reports[0].details["schedule"]["recycled"] == []
    for k in (2, 3, 4):
        recycled = reports[k - 1].details["schedule"]["recycled"]
        assert len(recycled) == 2
        for unit, part in LAYOUT.slices.items():
            repeated = models[k - 1][part] + (models[k - 1][part] - models[k - 2][part])
            assert np.allclose(models[k][part], repeated, rtol=1e-4, atol=1e-4) == (unit in recycled)


@pytest.mark.parametrize(("strategy", "lora_merge"), [("fedavg", "product_svd"), ("regmean", "factors")])
def test_factors_that_are_new_in_every_round_are_refused(strategy, lora_merge):
    """The difference of two bases that an SVD found is no update; repeated, it diverges."""
    made = make_strategy(strategy, lora_merge=lora_merge, schedule=FedLuar(FedLuarConfig(recycled=1)))
    with pytest.raises(ConfigError, match="repeats the last change of A and B: it does not go with"):
        made.start(ShufflingGrid(app_of(Script(values=by_unit)), NAMES), initial_arrays(), num_rounds=2)


def test_only_the_way_up_is_shorter():
    _, reports = run(recycled=1)
    for report in reports:
        sent = [unit for unit in UNITS if unit not in report.details["schedule"]["recycled"]]
        assert list(report.bytes_up_by_unit) == sent
        assert list(report.bytes_down_by_unit) == list(UNITS)


def test_nothing_recycled_is_the_strategy_without_it():
    models, _ = run(recycled=0)
    strategy = make_strategy("fedavg", evaluate_clients="off")
    result = strategy.start(ShufflingGrid(app_of(Script(values=by_unit)), NAMES), initial_arrays(), num_rounds=4)
    np.testing.assert_array_equal(models[-1], final_flat(result.arrays))


def test_everything_recycled_is_refused():
    with pytest.raises(ConfigError, match="schedule.recycled=3 must be less than the number of units, 3"):
        run(recycled=3)


@pytest.mark.parametrize("choice", ["change", "random"])
def test_draws_follow_the_seed(choice):
    def drawn(seed):
        return [report.details["schedule"]["recycled"] for report in run(8, seed, recycled=1, choice=choice)[1]]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_changes_by_hand():
    values = torch.tensor(np.linspace(1, 2, LAYOUT.size, dtype=np.float32))
    update = values * 0.5
    update[LAYOUT.slices["head"]] = 0.0
    np.testing.assert_allclose(relative_changes(update, values, LAYOUT), [0.5, 0.5, 0.0], rtol=1e-6)
    values[LAYOUT.slices["blocks.0"]] = 0.0
    assert relative_changes(update, values, LAYOUT)[0] == torch.inf


def test_chances_are_those_of_drawing_one_by_one_by_the_inverse_scores():
    """Of scores 1, 2, 4 the chances of the first draw are 4, 2, 1 in 7."""
    generator, scores = np.random.default_rng(0), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    first = np.bincount([draw_recycled(scores, 1, generator)[0] for _ in range(7000)], minlength=3) / 7000
    np.testing.assert_allclose(first, np.array([4, 2, 1]) / 7, atol=0.02)
    pairs = [tuple(draw_recycled(scores, 2, generator)) for _ in range(7000)]
    both_first = np.mean([pair == (0, 1) for pair in pairs])
    assert both_first == pytest.approx(4 / 7 * 2 / 3 + 2 / 7 * 4 / 5, abs=0.02)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.integers(0, 9), st.integers(0, 2**31))
def test_draws_are_distinct_and_unchanged_units_come_first(scores, count, seed):
    found = draw_recycled(torch.tensor(scores, dtype=torch.float64), count, np.random.default_rng(seed))
    assert found == sorted(set(found))
    assert len(found) == min(count, len(scores))
    zero = {index for index, score in enumerate(scores) if score == 0}
    assert zero <= set(found) or set(found) <= zero
