import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.livar import class_merge_weights, lora_merge_weights

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


def test_equal_scores_give_uniform_weights():
    weights = lora_merge_weights(torch.ones(4, 3), torch.ones(4, 3))
    torch.testing.assert_close(weights, torch.full((4, 3), 0.25, dtype=torch.float64))


def test_class_weights_follow_the_variance():
    variance = torch.tensor([[1.0, 3.0, float("nan")], [3.0, 5.0, 0.0], [9.0, float("nan"), 0.0]])
    count = torch.tensor([[2, 9, 0], [50, 1, 0], [1, 0, 1]])
    expected = torch.tensor([[0.25, 1.0, 0.0], [0.75, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(class_merge_weights(variance, count), expected)


@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 2**31))
def test_class_weights_sum_to_one_where_a_class_is_covered(clients, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    variance = 10 ** torch.empty(clients, classes).uniform_(-20, 20, generator=generator)
    count = torch.randint(0, 5, (clients, classes), generator=generator)
    total = class_merge_weights(variance, count).sum(0)
    assert total.tolist() == pytest.approx((count >= 2).any(0).double().tolist())
