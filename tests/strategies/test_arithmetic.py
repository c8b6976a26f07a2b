import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.arithmetic import BLOCK, sample_weights, weighted_sum
from task.errors import MessageError

counts = st.lists(st.integers(1, 10**9), min_size=1, max_size=50)


@given(counts)
def test_sample_weights_sum_to_one_and_keep_the_ratio(num_examples):
    weights = sample_weights(num_examples)
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    assert weights[0] * num_examples[-1] == pytest.approx(weights[-1] * num_examples[0], rel=1e-9)


@pytest.mark.parametrize("num_examples", [[], [0, 3], [-1]])
def test_sample_weights_refuse_what_cannot_be_weighed(num_examples):
    with pytest.raises(MessageError):
        sample_weights(num_examples)


@given(counts, st.integers(0, 2**32 - 1))
def test_weighted_sum_agrees_with_float64(num_examples, seed):
    vectors = torch.randn(len(num_examples), 17, generator=torch.Generator().manual_seed(seed))
    weights = sample_weights(num_examples)
    expected = (torch.tensor(weights, dtype=torch.float64)[:, None] * vectors.double()).sum(0)
    before = vectors.clone()
    torch.testing.assert_close(weighted_sum(list(vectors), weights).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(vectors, before)


def test_weighted_sum_wants_one_weight_per_vector():
    with pytest.raises(ValueError, match="2 weights"):
        weighted_sum([torch.zeros(3)], [0.5, 0.5])
    with pytest.raises(ValueError, match="at least one"):
        weighted_sum([], [])


def test_weighted_sum_by_blocks_has_the_bits_of_one_by_one():
    vectors = torch.randn(3, 2 * BLOCK + 5, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(vectors.shape[1])
    for vector, weight in zip(vectors, (0.2, 0.5, 0.3), strict=True):
        total.add_(vector, alpha=weight)
    assert torch.equal(weighted_sum(list(vectors), [0.2, 0.5, 0.3]), total)
