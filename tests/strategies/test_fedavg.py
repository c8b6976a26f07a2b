"""FedAvg with the adapters' products merged; test_base.py holds the rest on it."""

import numpy as np
import pytest
import torch

from task.units import lora_layers
from tests.strategies.scripted import (
    LAYOUT,
    Script,
    ShufflingGrid,
    final_flat,
    initial_arrays,
    make_strategy,
    scripted_app,
)

NAMES = ["0", "1", "2"]
SHARES = np.array([1, 2, 3]) / 6
UPDATES = np.random.default_rng(0).normal(size=(3, LAYOUT.size)).astype(np.float32)


def run(lora_merge, updates=UPDATES):
    script = Script(values=lambda name, server_round, received: updates[int(name)])
    strategy, reports = make_strategy("fedavg", lora_merge=lora_merge), []
    grid = ShufflingGrid(scripted_app(script), NAMES)
    result = strategy.start(grid, initial_arrays(), num_rounds=1, on_round=reports.append)
    return final_flat(result.arrays), reports[1]


def product_of(flat, layer):
    views = LAYOUT.views(torch.tensor(flat).double())
    return (views[layer.b.name] @ views[layer.a.name]).numpy()


def test_factors_and_head_are_averaged_apart():
    flat, report = run("factors")
    np.testing.assert_allclose(flat, SHARES @ UPDATES, rtol=1e-5, atol=1e-6)
    assert report.details == {}


def test_the_mean_product_is_met_as_well_as_the_rank_allows():
    flat, report = run("product_svd")
    for layer, residual in zip(lora_layers(LAYOUT), report.details["product_residual"], strict=True):
        dense = sum(share * product_of(update, layer) for share, update in zip(SHARES, UPDATES, strict=True))
        least = np.linalg.norm(np.linalg.svd(dense, compute_uv=False)[2:])
        assert np.linalg.norm(dense - product_of(flat, layer)) == pytest.approx(least, rel=1e-4)
        assert residual == pytest.approx(least / np.linalg.norm(dense), abs=1e-6)
        apart = product_of(SHARES @ UPDATES, layer)
        assert np.linalg.norm(dense - apart) > 1.1 * least, "the mean of the factors would be no worse"
    head = LAYOUT.slices["head"]
    np.testing.assert_allclose(flat[head], (SHARES @ UPDATES)[head], rtol=1e-5, atol=1e-6)


def test_before_any_training_the_products_are_zero_and_a_stays_trainable():
    """All clients return what they received, B still zero."""
    updates = UPDATES.copy()
    for update in updates:
        for name, view in LAYOUT.views(torch.from_numpy(update)).items():
            if ".lora_B." in name:
                view.zero_()
    flat, report = run("product_svd", updates)
    np.testing.assert_allclose(flat, SHARES @ updates, rtol=1e-5, atol=1e-6)
    assert report.details["product_residual"] == [0.0, 0.0]
