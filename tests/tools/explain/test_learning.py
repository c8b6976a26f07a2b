"""Learned weights find the better client, and say nothing where there is nothing to say."""

import pytest
import torch

from strategies.merging import part_of
from task.data.batches import Normaliser
from task.data.images import ImageSet
from task.errors import DataError
from task.units import lora_layers
from tests.conftest import NUM_CLASSES
from tools.explain.learning import LearnOptions, learn_weights
from tools.explain.merging import MergedModel

NORMALISER = Normaliser.of([0.5] * 3, [0.5] * 3)
OPTIONS = LearnOptions(steps=60)


@pytest.fixture(scope="module")
def task(built_model):
    """Images that client 1 was trained on, and updates of three clients; the B of the other two are large noise."""
    model, initial = built_model
    model.load(initial)
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(50) % NUM_CLASSES
    shades = 40 * labels[:, None, None, None] + torch.randint(0, 40, (50, 3, 16, 16), generator=generator)
    data = ImageSet(shades.to(torch.uint8), labels)
    train(model, data)
    updates = torch.from_numpy(model.read()).repeat(3, 1)
    for spec in model.layout.tensors:
        if ".lora_B." in spec.name:
            size = 3 * updates[1, part_of(spec)].std()
            for client in (0, 2):
                updates[client, part_of(spec)] = size * torch.randn(spec.size, generator=generator)
    return updates, data


def train(model, data, steps=40):
    optimizer = torch.optim.Adam([model.flat], lr=0.01)
    for _ in range(steps):
        model.flat.grad.zero_()
        torch.nn.functional.cross_entropy(model(NORMALISER(data.images)), data.labels).backward()
        optimizer.step()


def learn(model, updates, data, options=OPTIONS):
    merged = MergedModel(model, updates, [1] * len(updates), NORMALISER, batch_size=64)
    shape = (len(updates), len(lora_layers(model.layout)))
    return merged, learn_weights(merged, shape, data, options)


def test_the_client_whose_factors_are_right_gets_the_weight(tiny_model, task):
    updates, data = task
    merged, weights = learn(tiny_model, updates, data)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1], dtype=torch.float64))
    assert (weights.argmax(0) == 1).float().mean() > 0.8
    assert weights[1].mean() > 0.5
    assert merged.loss(weights, data) < 0.4 * merged.loss(torch.full_like(weights, 1 / 3), data)


def test_permuting_clients_permutes_weights(tiny_model, task):
    updates, data = task
    order, options = [2, 0, 1], LearnOptions(steps=3)
    _, weights = learn(tiny_model, updates, data, options)
    _, permuted = learn(tiny_model, updates[order], data, options)
    torch.testing.assert_close(permuted, weights[order], rtol=1e-3, atol=1e-4)


def test_equal_clients_stay_uniform(tiny_model, task):
    updates, data = task
    _, weights = learn(tiny_model, updates[:1].expand(3, -1), data, LearnOptions(steps=5))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3), rtol=0, atol=0.02)


def test_a_strong_pull_keeps_weights_uniform(tiny_model, task):
    updates, data = task
    _, weights = learn(tiny_model, updates, data, LearnOptions(steps=20, pull=1e4))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3), rtol=0, atol=0.02)


def test_the_loss_never_ends_above_that_of_uniform_weights(tiny_model, task):
    updates, data = task
    merged, weights = learn(tiny_model, updates, data, LearnOptions(steps=3, learning_rate=50.0))
    assert merged.loss(weights, data) <= merged.loss(torch.full_like(weights, 1 / 3), data) + 1e-6


def test_every_step_is_told(tiny_model, task):
    updates, data = task
    merged, told = MergedModel(tiny_model, updates, [1, 1, 1], NORMALISER, 64), []
    learn_weights(merged, (3, 8), data, LearnOptions(steps=3), told.append)
    assert told == [1, 2, 3]


def test_a_loss_that_is_not_finite_is_refused(tiny_model, task):
    updates, data = task
    with pytest.raises(DataError, match="not finite"):
        learn(tiny_model, updates * torch.inf, data)
