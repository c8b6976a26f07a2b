"""The differentiable merge is the strategies' merge, and its gradient is that of the loss."""

from dataclasses import replace

import pytest
import torch

from strategies.arithmetic import sample_weights, weighted_sum
from strategies.merging import merge_adapter
from task.data.batches import Normaliser
from task.data.images import ImageSet
from task.evaluation import evaluate
from task.model import build_model
from task.units import lora_layers
from tests.conftest import NUM_CLASSES
from tools.explain.merging import MergedModel, merged_factors, stacked_factors

NORMALISER = Normaliser.of([0.5] * 3, [0.5] * 3)
NUM_EXAMPLES = [10, 30, 20]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.randint(0, NUM_CLASSES, (12,), generator=generator))


@pytest.fixture
def updates(tiny_model):
    return 0.2 * draw(3, tiny_model.layout.size)


@pytest.fixture
def weights(tiny_model):
    return draw(3, len(lora_layers(tiny_model.layout)), seed=1).double().softmax(0)


def by_strategy(updates, weights, layout):
    """The strategies' merge: adapter by weights, all else by numbers of examples."""
    merged = weighted_sum(updates.unbind(), sample_weights(NUM_EXAMPLES))
    merge_adapter(merged, updates.unbind(), weights, layout)
    return merged


def test_factors_are_merged_as_strategies_do(tiny_model, updates, weights):
    layout = tiny_model.layout
    views = layout.views(by_strategy(updates, weights, layout))
    merged = merged_factors(weights, stacked_factors(updates, layout))
    assert merged.keys() == {spec.name for layer in lora_layers(layout) for spec in layer.specs}
    for name, factor in merged.items():
        torch.testing.assert_close(factor, views[name], rtol=1e-5, atol=1e-6)


def test_where_a_is_frozen_only_b_is_merged(tiny_task):
    model = build_model(replace(tiny_task, lora=replace(tiny_task.lora, freeze_a=True)), NUM_CLASSES)
    layers = stacked_factors(draw(2, model.layout.size), model.layout)
    assert all(name.endswith("lora_B.weight") for layer in layers for name in layer)


def test_the_loss_is_that_of_the_model_that_strategies_merge(tiny_model, updates, weights, data):
    found = MergedModel(tiny_model, updates, NUM_EXAMPLES, NORMALISER, batch_size=5).loss(weights, data)
    tiny_model.load(by_strategy(updates, weights, tiny_model.layout).numpy())
    assert found == pytest.approx(evaluate(tiny_model, data, NORMALISER).loss, rel=1e-5)


def test_the_models_own_values_are_left_alone(tiny_model, updates, weights, data):
    before = tiny_model.read()
    logits = weights.log().requires_grad_()
    MergedModel(tiny_model, updates, NUM_EXAMPLES, NORMALISER, 5).loss_backward(logits.softmax(0), data)
    assert (tiny_model.read() == before).all()
    assert not tiny_model.flat.grad.any()


@pytest.mark.parametrize("batch_size", [4, 12])
def test_the_gradient_is_the_slope_of_the_loss(tiny_model, updates, weights, data, batch_size):
    merged = MergedModel(tiny_model, updates, NUM_EXAMPLES, NORMALISER, batch_size)
    logits = weights.log().requires_grad_()
    value = merged.loss_backward(logits.softmax(0), data)
    assert value == pytest.approx(merged.loss(weights, data), rel=1e-5)
    direction = draw(*weights.shape, seed=3).double()
    up, down = (merged.loss((logits.detach() + step * direction).softmax(0), data) for step in (0.05, -0.05))
    assert float((logits.grad * direction).sum()) == pytest.approx((up - down) / 0.1, rel=0.02)
