"""FFA-LoRA on a real tiny model: with A frozen, averaging B averages the products."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from strategies import FedAvg, FedAvgConfig, FfaLora, FfaLoraConfig, TaskContext
from task.arrays import FLAT, flat_to_array
from task.model import build_model
from task.units import lora_layers
from tests.conftest import NUM_CLASSES
from tests.strategies.scripted import BASE, CLASSES, Script, ShufflingGrid, final_flat, scripted_app

NAMES = ["0", "1", "2"]
SHARES = (1 / 6, 2 / 6, 3 / 6)


@pytest.fixture(scope="module")
def frozen(tiny_task):
    """The tiny task's model whose A stay as they were drawn."""
    return build_model(replace(tiny_task, lora=replace(tiny_task.lora, freeze_a=True)), NUM_CLASSES)


def update_of(name, layout):
    return np.random.default_rng([4, int(name)]).normal(size=layout.size).astype(np.float32)


def run(kind, config, layout, lora_merge="factors"):
    script = Script(layout=layout, values=lambda name, n, received: update_of(name, layout))
    strategy, reports = kind(config, TaskContext("{}", layout, BASE, CLASSES, 0, lora_merge)), []
    initial = ArrayRecord({FLAT: flat_to_array(np.zeros(layout.size, np.float32))})
    grid = ShufflingGrid(scripted_app(script), NAMES)
    result = strategy.start(grid, initial, num_rounds=1, on_round=reports.append)
    return final_flat(result.arrays), reports[1]


def deltas(model, flat):
    """What the adapter adds to the frozen weight of every layer."""
    model.load(flat)
    return [
        model.submodule(layer.name).get_delta_weight("default").detach().clone() for layer in lora_layers(model.layout)
    ]


def mean_deltas(model):
    clients = [deltas(model, update_of(name, model.layout)) for name in NAMES]
    return [
        sum(share * delta for share, delta in zip(SHARES, layer, strict=True)) for layer in zip(*clients, strict=True)
    ]


@pytest.mark.parametrize("lora_merge", ["factors", "product_svd"])
def test_the_average_of_the_products_is_exact(frozen, lora_merge):
    flat, _ = run(FfaLora, FfaLoraConfig(), frozen.layout, lora_merge)
    layers = deltas(frozen, flat)
    assert len(layers) == 8
    for found, expected in zip(layers, mean_deltas(frozen), strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_with_both_factors_trained_it_is_not(tiny_model):
    flat, _ = run(FedAvg, FedAvgConfig(), tiny_model.layout)
    for found, expected in zip(deltas(tiny_model, flat), mean_deltas(tiny_model), strict=True):
        assert (found - expected).norm() > 0.1 * expected.norm()


def test_only_b_and_the_head_travel(frozen, tiny_model):
    assert not any("lora_A" in spec.name for spec in frozen.layout.tensors)
    ffa, fedavg = (run(FfaLora, FfaLoraConfig(), model.layout)[1] for model in (frozen, tiny_model))
    a = 4 * len(NAMES) * sum(spec.size for spec in tiny_model.layout.tensors if "lora_A" in spec.name)
    assert sum(fedavg.bytes_up_by_unit.values()) - sum(ffa.bytes_up_by_unit.values()) == a > 0
    down = sum(fedavg.bytes_down_by_unit.values()) - sum(ffa.bytes_down_by_unit.values())
    assert down == 2 * a, "once to train, once to evaluate"


def test_a_frozen_a_is_drawn_as_one_that_trains(frozen, tiny_model):
    """Every party draws the same from the seed, which is what makes averaging B alone sound."""
    for layer in lora_layers(frozen.layout):
        found, expected = (model.submodule(layer.name).lora_A["default"].weight for model in (frozen, tiny_model))
        assert torch.equal(found, expected)
