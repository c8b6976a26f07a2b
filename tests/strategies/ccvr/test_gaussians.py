"""Gaussians per class from clients' moments, against the moments of all samples taken together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from strategies.ccvr import Gaussian, draw, gaussians, pooled

GARBAGE = 7.0
"""Stands where too few samples leave a moment without meaning."""
seeds = st.integers(0, 2**31)
counts = st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def moments_of(samples, full):
    """Count, mean and unbiased (co)variances of samples [n, d], by NumPy."""
    n, d = samples.shape
    mean = samples.mean(0) if n else np.full(d, GARBAGE)
    covariance = np.cov(samples, rowvar=False).reshape(d, d) if n > 1 else np.full((d, d), GARBAGE)
    return n, mean, covariance if full else covariance.diagonal()


def reported(samples, full):
    """What clients report of their samples, given as [client][class] arrays."""
    found = [[moments_of(of_class, full) for of_class in client] for client in samples]
    return tuple(
        torch.tensor(np.array([[moments[i] for moments in client] for client in found]), dtype=torch.float64)
        for i in range(3)
    )


def spread_over_clients(numbers, d, seed, offset=0.0):
    """Random samples [client][class], each client with a mean of its own."""
    generator = np.random.default_rng(seed)
    return [[offset + generator.normal(size=d) + generator.normal(size=(n, d)) for n in client] for client in numbers]


@given(counts, st.booleans(), st.integers(1, 3), seeds)
def test_pooled_moments_are_those_of_all_samples_together(numbers, full, d, seed):
    samples = spread_over_clients(numbers, d, seed)
    for label in range(3):
        total, centre, spread = pooled(*(moments[:, label] for moments in reported(samples, full)))
        together = np.concatenate([client[label] for client in samples])
        n, mean, expected = moments_of(together, full)
        assert total == n
        if n:
            np.testing.assert_allclose(centre.numpy(), mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(spread.numpy(), expected if n > 1 else 0 * expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("full", [True, False])
def test_a_mean_far_above_the_deviation_does_no_harm(full):
    samples = spread_over_clients([[4, 3, 5], [2, 5, 1]], 3, 0, offset=1e7)
    for label in range(3):
        _, _, spread = pooled(*(moments[:, label] for moments in reported(samples, full)))
        together = np.concatenate([client[label] for client in samples])
        np.testing.assert_allclose(spread.numpy(), moments_of(together, full)[2], rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else [result]:
            if isinstance(found, torch.Tensor):
                self.elements = max(self.elements, found.numel())
        return result


@pytest.mark.parametrize("mixture", [True, False])
def test_the_diagonal_form_never_makes_a_matrix_of_dimensions(mixture):
    clients, classes, d, draws = 3, 2, 500, 10
    with Largest() as largest:
        found = gaussians(
            torch.full((clients, classes), 4.0),
            torch.ones(clients, classes, d),
            torch.ones(clients, classes, d),
            mixture,
        )
        draw(found, draws, seeded())
    assert len(found) == classes * (clients if mixture else 1)
    assert draws * d <= largest.elements <= max(clients * classes, draws) * d < d * d


def test_one_gaussian_per_covered_class_has_the_pooled_moments():
    samples = spread_over_clients([[4, 0, 3], [2, 0, 0]], 2, 1)
    found = gaussians(*reported(samples, full=True), mixture=False)
    assert [(component.label, component.share) for component in found] == [(0, 1.0), (2, 1.0)]
    for component in found:
        _, mean, covariance = moments_of(np.concatenate([client[component.label] for client in samples]), full=True)
        np.testing.assert_allclose(component.mean.numpy(), mean, rtol=1e-5)
        np.testing.assert_allclose((component.factor @ component.factor.T).numpy(), covariance, rtol=1e-4, atol=1e-5)


def test_a_mixture_keeps_the_clients_apart_weighted_by_their_samples():
    samples = spread_over_clients([[4, 0, 3], [2, 0, 0], [6, 1, 1]], 2, 2)
    found = gaussians(*reported(samples, full=False), mixture=True)
    labels_and_shares = [(component.label, component.share) for component in found]
    assert labels_and_shares == [(0, 4 / 12), (0, 2 / 12), (0, 6 / 12), (1, 1.0), (2, 3 / 4), (2, 1 / 4)]
    owners = [(0, 0), (1, 0), (2, 0), (2, 1), (0, 2), (2, 2)]
    for component, (client, label) in zip(found, owners, strict=True):
        n, mean, variances = moments_of(samples[client][label], full=False)
        np.testing.assert_allclose(component.mean.numpy(), mean, rtol=1e-5)
        expected = np.sqrt((variances if n > 1 else np.zeros(2)) + 1e-8)
        np.testing.assert_allclose(component.factor.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("mixture", [True, False])
@pytest.mark.parametrize("full", [True, False])
def test_a_single_sample_is_drawn_again_and_again(mixture, full):
    (found,) = gaussians(*reported([[np.array([[3.0, -2.0]])], [np.empty((0, 2))]], full), mixture)
    drawn, _ = draw([found], 50, seeded())
    np.testing.assert_allclose(drawn.numpy(), np.tile([3.0, -2.0], (50, 1)), atol=1e-3)


def test_without_any_sample_there_are_no_gaussians():
    nothing = (torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    assert gaussians(*nothing, mixture=False) == gaussians(*nothing, mixture=True) == []


def test_negative_variances_and_eigenvalues_count_as_zero():
    count, mean = torch.full((1, 1), 9.0), torch.zeros(1, 1, 2)
    (found,) = gaussians(count, mean, torch.tensor([[[4.0, -9.0]]]), mixture=True)
    torch.testing.assert_close(found.factor, torch.tensor([2.0, 1e-4]))
    (found,) = gaussians(count, mean, torch.tensor([[[[0.0, 3.0], [3.0, 0.0]]]]), mixture=True)
    torch.testing.assert_close(found.factor @ found.factor.T, torch.full((2, 2), 1.5))
    (found,) = gaussians(count, mean, torch.full((1, 1, 2, 2), 0.0), mixture=True)
    torch.testing.assert_close(found.draw(5, seeded()), torch.zeros(5, 2))


FULL = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [-1.0, 0.5, 0.3]])


@pytest.mark.parametrize("factor", [FULL, FULL[:, :2], torch.tensor([2.0, 0.1, 0.5])])
def test_draws_have_the_mean_and_the_covariance(factor):
    mean, count = torch.tensor([5.0, -3.0, 0.0]), 40_000
    drawn, labels = draw([Gaussian(4, 1.0, mean, factor)], count, seeded())
    assert drawn.shape == (count, 3)
    assert set(labels.tolist()) == {4}
    covariance = factor.diag().square() if factor.dim() == 1 else factor @ factor.T
    deviation = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - mean).abs() < 5 * deviation / count**0.5).all()
    error = 5 * (2 / count) ** 0.5 * deviation[:, None] * deviation
    assert ((drawn.T.cov() - covariance).abs() < error).all()


def corner(label, share, place):
    """A component far from all others, so that a draw tells which it came from."""
    return Gaussian(label, share, torch.tensor([place, -place]), torch.full((2,), 0.1))


def test_classes_are_uniform_over_those_covered_and_components_follow_their_shares():
    components = [corner(1, 0.9, 10.0), corner(1, 0.1, 20.0), corner(6, 1.0, 30.0)]
    count = 30_000
    drawn, labels = draw(components, count, seeded())
    source = (drawn[:, 0] / 10).round().int() - 1
    assert torch.equal(labels, torch.tensor([1, 1, 6])[source])
    shares = torch.bincount(source) / count
    expected = torch.tensor([0.45, 0.05, 0.5])
    assert ((shares - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()
    assert len(drawn) == len(labels) == count


def test_draws_follow_the_generator_alone():
    components = [corner(0, 1.0, 10.0), corner(1, 1.0, 20.0)]
    first, again, other = (draw(components, 20, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_fewer_draws_than_components_are_possible():
    drawn, labels = draw([corner(label, 1.0, 10.0 * label) for label in range(1, 9)], 2, seeded())
    assert drawn.shape == (2, 2)
    assert torch.equal(labels, (drawn[:, 0] / 10).round().long())
