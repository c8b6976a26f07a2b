"""The forest finds what is planted, and owns up to noise."""

from dataclasses import replace

import numpy as np
import pytest

from tools.explain.forest import explain, held_out_predictions, make_forest
from tools.explain.rows import Rows

pytest.importorskip("shap")
NAMES = ("s_A", "s_B", "depth")


@pytest.fixture
def planted():
    """Three federations whose target follows s_B and nothing else."""
    generator = np.random.default_rng(0)
    features = generator.uniform(size=(300, 3))
    return Rows(
        features=features,
        names=NAMES,
        constant=(),
        target=1 + (features[:, 1] > 0.7) + 0.05 * generator.normal(size=300),
        groups=np.repeat([0, 1, 2], 100),
        grouped_by="federations",
        bins=np.zeros((300, 2), dtype=np.int64),
        origins=(("r", "c", "l"),) * 300,
        not_finite=0,
    )


def test_a_planted_signal_is_found(planted):
    found = explain(planted, seed=0)
    assert found.r2 > 0.9
    assert found.r2_scores > 0.9
    assert len(found.r2_by_fold) == 3
    importance = found.importance(NAMES)
    assert next(iter(importance)) == "s_B"
    assert importance["s_B"] > 10 * importance["s_A"]


def test_a_signal_that_no_table_goes_by_is_not_credited_to_the_scores(planted):
    found = explain(replace(planted, target=1.0 + (planted.column("depth") > 0.5)), seed=0)
    assert found.r2 > 0.9
    assert found.r2_scores < 0.05


def test_base_and_shap_values_add_up_to_predictions(planted):
    found = explain(planted, seed=0)
    assert found.base == pytest.approx(planted.target.mean(), abs=0.02)
    predicted = make_forest(0).fit(planted.features, planted.target).predict(planted.features)
    np.testing.assert_allclose(found.base + found.values.sum(axis=1), predicted, atol=1e-6)


def test_noise_gives_no_r2_that_deserves_the_name(planted):
    noise = replace(planted, target=np.random.default_rng(1).normal(size=300))
    found = explain(noise, seed=0)
    assert found.r2 < 0.05
    assert found.r2_fitted > 0.1, "a forest always fits; only the rows left out tell"


def test_what_is_left_out_is_never_fitted(planted):
    """A federation with targets of its own cannot be known from the others."""
    shifted = replace(planted, target=planted.target + 100.0 * (planted.groups == 2))
    predicted, parts = held_out_predictions(shifted, shifted.features, seed=0)
    assert sorted(np.concatenate(parts)) == list(range(300))
    assert all(len(set(planted.groups[part])) == 1 for part in parts)
    assert predicted[planted.groups == 2].max() < 10


def test_the_same_seed_gives_the_same_values(planted):
    first, second = explain(planted, seed=3), explain(planted, seed=3)
    assert first.r2 == second.r2
    np.testing.assert_array_equal(first.values, second.values)
