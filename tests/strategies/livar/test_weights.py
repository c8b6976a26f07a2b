import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.livar import (
    PUBLISHED_TABLE,
    MergeTable,
    class_merge_weights,
    lora_merge_weights,
    per_layer_scores,
    score_bounds,
)

SCORE_A = torch.tensor([[1, 20, 11, 4, 16, 9], [2, 19, 12, 24, 15, 10], [3, 18, 13, 23, 6, 21], [5, 17, 14, 22, 7, 8]])
SCORE_B = torch.tensor([[24, 23, 15, 1, 16, 9], [2, 19, 12, 22, 5, 10], [3, 18, 13, 21, 6, 20], [4, 17, 14, 11, 7, 8]])
GOLDEN = torch.tensor(
    [
        [0.627976, 0.124008, 0.124008, 0.124008],
        [0.284345, 0.238552, 0.238552, 0.238552],
        [0.435131, 0.188290, 0.188290, 0.188290],
        [0.145262, 0.354738, 0.354738, 0.145262],
        [0.405796, 0.198068, 0.198068, 0.198068],
        [0.183754, 0.183754, 0.448739, 0.183754],
    ],
    dtype=torch.float64,
).T
seeds = st.integers(0, 2**31)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def by_hand(score_a, score_b, table):
    """The rule for tables of three rows and columns, one client and layer after the other."""
    finite = np.isfinite(score_a) & np.isfinite(score_b) & (score_a >= 0) & (score_b >= 0)
    (low_a, high_a), (low_b, high_b) = (
        np.quantile(score[finite], quantiles)
        for score, quantiles in ((score_a, table.quantiles_a), (score_b, table.quantiles_b))
    )
    raw = np.zeros(score_a.shape)
    for place in zip(*np.nonzero(finite), strict=True):
        column = 0 if score_a[place] < low_a else 2 if score_a[place] > high_a else 1
        row = 0 if score_b[place] < low_b else 2 if score_b[place] > high_b else 1
        raw[place] = table.weights[row][column]
    heard = finite.any(0)
    return np.where(heard, raw / np.where(heard, raw.sum(0), 1.0), 1 / len(raw))


@pytest.mark.parametrize(
    ("score", "quantiles", "expected"),
    [(SCORE_A, PUBLISHED_TABLE.quantiles_a, [6.75, 12.5]), (SCORE_B, PUBLISHED_TABLE.quantiles_b, [14.8, 19.4])],
)
def test_golden_case_of_the_bounds(score, quantiles, expected):
    bounds = score_bounds(score.double(), torch.isfinite(score), quantiles)
    torch.testing.assert_close(bounds, float64(expected), rtol=1e-12, atol=0)


def test_golden_case_of_the_adapter():
    torch.testing.assert_close(lora_merge_weights(SCORE_A, SCORE_B), GOLDEN, rtol=0, atol=2e-6)


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**31))
def test_adapter_weights_sum_to_one_and_follow_the_clients(clients, layers, seed):
    generator = torch.Generator().manual_seed(seed)
    score_a, score_b = torch.rand(2, clients, layers, generator=generator)
    weights = lora_merge_weights(score_a, score_b)
    torch.testing.assert_close(weights.sum(0), torch.ones(layers, dtype=torch.float64))
    order = torch.randperm(clients, generator=generator)
    torch.testing.assert_close(lora_merge_weights(score_a[order], score_b[order]), weights[order])


@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from([0.0, 0.2, 0.9]), seeds)
def test_adapter_weights_follow_the_rule_with_ties_and_scores_that_do_not_count(clients, layers, share, seed):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 6, (2, clients, layers)).astype(float)  # few values, so that many tie with a bound
    scores[generator.random(scores.shape) < share] = np.nan
    scores[generator.random(scores.shape) < share / 4] = np.inf
    scores[generator.random(scores.shape) < share / 4] = -1.0
    if not (np.isfinite(scores) & (scores >= 0)).all(0).any():
        scores[:, 0, 0] = 1.0
    weights = lora_merge_weights(*torch.from_numpy(scores))
    np.testing.assert_allclose(weights.numpy(), by_hand(*scores, PUBLISHED_TABLE), rtol=1e-12)


def test_a_score_equal_to_a_bound_falls_in_the_middle_bin():
    table = MergeTable([0.25, 0.5], [0.6, 0.8], [[1.0, 2.0, 4.0]] * 3)
    score = torch.arange(5.0)[:, None]  # its quantiles are 1 and 2
    expected = float64([1, 2, 2, 4, 4])[:, None] / 13
    torch.testing.assert_close(lora_merge_weights(score, torch.ones(5, 1), table), expected)


def test_equal_scores_give_uniform_weights():
    weights = lora_merge_weights(torch.ones(4, 3), torch.ones(4, 3))
    torch.testing.assert_close(weights, torch.full((4, 3), 0.25, dtype=torch.float64))


def test_a_client_without_a_finite_score_has_no_say_in_that_layer_alone():
    score_a = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    score_a[2, 3] = torch.nan
    weights = lora_merge_weights(score_a, torch.ones(4, 6))
    assert weights[2, 3] == 0
    assert (weights > 0).sum() == 23
    torch.testing.assert_close(weights.sum(0), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_without_any_score_that_counts_weights_are_uniform(value):
    bad, fine = torch.full((3, 2), value), torch.rand(3, 2, generator=torch.Generator().manual_seed(0))
    for scores in ((bad, fine), (fine, bad)):
        torch.testing.assert_close(lora_merge_weights(*scores), torch.full((3, 2), 1 / 3, dtype=torch.float64))


SIZES = {
    "no bound": ([], [[1.0]], [0] * 8),
    "one bound": ([0.5], [[1.0, 3.0]], [0, 0, 0, 0, 1, 1, 1, 1]),
    "three bounds": ([0.25, 0.5, 0.75], [[1.0, 3.0, 5.0, 9.0]], [0, 0, 1, 1, 2, 2, 3, 3]),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("of_b", [False, True])
def test_tables_of_other_sizes(size, of_b):
    quantiles, weights, bins = SIZES[size]
    table = MergeTable([], quantiles, [[w] for w in weights[0]]) if of_b else MergeTable(quantiles, [], weights)
    table.check("table")
    score, other = torch.arange(8.0)[:, None], torch.rand(8, 1, generator=torch.Generator().manual_seed(0))
    raw = float64([weights[0][index] for index in bins])[:, None]
    scores = (other, score) if of_b else (score, other)
    torch.testing.assert_close(lora_merge_weights(*scores, table), raw / raw.sum())


def test_ties_go_towards_the_middle_of_a_larger_table():
    table = MergeTable([0.25, 0.5, 0.75], [], [[1.0, 10.0, 100.0, 1000.0]])
    score = torch.arange(9.0)[:, None]  # its quantiles are 2, 4 and 6
    weights = lora_merge_weights(score, score, table)[:, 0]
    assert weights[2] == weights[3]
    assert weights[6] == weights[5]
    assert weights[1] < weights[2] < weights[6] < weights[7]


def test_class_weights_follow_the_variance():
    variance = torch.tensor([[1.0, 3.0, float("nan")], [3.0, 5.0, 0.0], [9.0, float("nan"), 0.0]])
    count = torch.tensor([[2, 9, 0], [50, 1, 0], [1, 0, 1]])
    expected = torch.tensor([[0.25, 1.0, 0.0], [0.75, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(class_merge_weights(variance, count), expected)


@pytest.mark.parametrize("value", [-1.0, float("-inf"), float("inf"), float("nan"), 0.0])
def test_a_variance_that_is_none_has_no_say(value):
    weights = class_merge_weights(torch.tensor([[1.0], [value], [3.0]]), torch.full((3, 1), 5))
    torch.testing.assert_close(weights, float64([[0.25], [0.0], [0.75]]))


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -2.0, 2.5])
def test_a_count_that_is_no_whole_number_has_no_say(count):
    weights = class_merge_weights(torch.ones(2, 1), torch.tensor([[count], [4.0]]))
    torch.testing.assert_close(weights, float64([[0.0], [1.0]]))


@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 2**31))
def test_class_weights_sum_to_one_where_a_class_is_covered(clients, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    variance = 10 ** torch.empty(clients, classes).uniform_(-20, 20, generator=generator)
    count = torch.randint(0, 5, (clients, classes), generator=generator)
    total = class_merge_weights(variance, count).sum(0)
    assert total.tolist() == pytest.approx((count >= 2).any(0).double().tolist())


@given(st.integers(1, 6), st.integers(1, 8), seeds)
def test_class_weights_follow_the_clients_and_no_count_from_two_on(clients, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    variance = torch.rand(clients, classes, generator=generator)
    count = torch.randint(0, 5, (clients, classes), generator=generator)
    weights, order = class_merge_weights(variance, count), torch.randperm(clients, generator=generator)
    torch.testing.assert_close(class_merge_weights(variance[order], count[order]), weights[order])
    more = torch.where(count >= 2, count * 1000, count)
    torch.testing.assert_close(class_merge_weights(variance, more), weights, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-37, 1e37])
def test_class_weights_do_not_depend_on_the_unit_of_features(scale):
    variance, count = torch.tensor([[1.0], [3.0]]), torch.full((2, 1), 5)
    torch.testing.assert_close(class_merge_weights(variance * scale, count), class_merge_weights(variance, count))


def test_a_single_client_has_all_the_weight_where_it_covers_a_class():
    count = torch.tensor([[0, 1, 2, 9]])
    weights = class_merge_weights(torch.tensor([[0.3, 0.3, 0.3, 7.0]]), count)
    torch.testing.assert_close(weights, float64([[0.0, 0.0, 1.0, 1.0]]))
    scores = torch.rand(2, 1, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lora_merge_weights(*scores), torch.ones(1, 5, dtype=torch.float64))


def test_scores_per_step_in_units_of_the_layers_median():
    score = torch.tensor([[2.0, 80.0], [6.0, 10.0], [20.0, 5.0]])
    per_step = float64([[1.0, 40.0], [6.0, 10.0], [4.0, 1.0]])  # medians 4 and 10
    expected = per_step / float64([4.0, 10.0])
    torch.testing.assert_close(per_layer_scores(score, torch.tensor([2, 1, 5])), expected)


@given(st.integers(1, 6), st.integers(1, 8), seeds)
def test_per_layer_scores_do_not_change_with_a_layers_unit_or_with_proportional_steps(clients, layers, seed):
    generator = torch.Generator().manual_seed(seed)
    score_a, score_b = torch.rand(2, clients, layers, generator=generator)
    steps = torch.randint(1, 50, (clients,), generator=generator)
    units = 2.0 ** torch.randint(-9, 9, (layers,), generator=generator)  # powers of two: not even a rounding changes
    longer = 2 ** torch.randint(0, 6, (clients,), generator=generator)
    for score in (score_a, score_b):
        expected = per_layer_scores(score, steps)
        assert torch.equal(per_layer_scores(score * units, steps), expected)
        assert torch.equal(per_layer_scores(score * longer[:, None], steps * longer), expected)


def test_the_median_leaves_out_what_is_not_finite_and_a_median_of_zero_is_taken_as_one():
    nan, inf = float("nan"), float("inf")
    score = torch.tensor([[nan, 0.0, nan], [2.0, 0.0, inf], [4.0, 6.0, nan], [inf, 0.0, nan]])
    found = per_layer_scores(score, torch.ones(4))
    torch.testing.assert_close(found[1:3, 0], float64([2 / 3, 4 / 3]))
    torch.testing.assert_close(found[:, 1], float64([0.0, 0.0, 6.0, 0.0]))
    assert not torch.isfinite(found[[0, 3], 0]).any()
    assert not torch.isfinite(found[:, 2]).any()
