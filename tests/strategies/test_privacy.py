"""Differential privacy by Flower's own parts: what is clipped, what is added, and that faults end no round."""

import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord

from strategies.privacy import Privacy
from strategies.replies import Update
from task.errors import MessageError
from task.privacy import NORM_BIT, PrivacyConfig
from tests.strategies.scripted import Script, ShufflingGrid, scripted_app

SIZE = 20_000


@pytest.fixture(autouse=True)
def task_of_flower():
    """Flower's messages want to know their task; a grid tells them."""
    ShufflingGrid(scripted_app(Script()), [])


def update(values, client="0", num_examples=10, **metrics):
    return Update(
        client, torch.as_tensor(values, dtype=torch.float32), num_examples, MetricRecord(metrics), ConfigRecord()
    )


def updates(count, **metrics):
    return [update(torch.zeros(SIZE), str(i), i + 1, **metrics) for i in range(count)]


@pytest.mark.parametrize("kind", ["central_fixed", "central_adaptive"])
@pytest.mark.parametrize("clients", [2, 8])
def test_the_noise_in_the_mean_is_norm_times_multiplier_by_clients(kind, clients):
    privacy = Privacy(PrivacyConfig(kind, clipping_norm=3.0, noise_multiplier=0.5, clip_norm_lr=0.2))
    found = privacy.released(1, torch.ones(SIZE), updates(clients, **{NORM_BIT: 1}))
    multiplier = 0.5
    if kind == "central_adaptive":  # part of the budget goes into the clients' bits (Andrew et al. 2021, theorem 1)
        multiplier = (0.5**-2 - (2 * max(clients / 20, 0.5)) ** -2) ** -0.5
    deviation = multiplier * 3.0 / clients
    assert float(found.std()) == pytest.approx(deviation, rel=0.03)
    assert float(found.mean()) == pytest.approx(1.0, abs=5 * deviation / math.sqrt(SIZE))
    assert found.dtype == torch.float32


def test_the_noise_is_another_one_each_time_whatever_the_seed():
    found = []
    for _ in range(2):
        np.random.seed(0)
        found.append(Privacy(PrivacyConfig("central_fixed")).released(1, torch.zeros(9), updates(2)))
    assert not torch.equal(*found)


@pytest.mark.parametrize("kind", ["none", "local"])
def test_without_central_noise_the_model_stays_as_it_is(kind):
    merged = torch.ones(5)
    privacy = Privacy(PrivacyConfig(kind))
    assert privacy.released(1, merged, updates(2)) is merged
    assert [one.num_examples for one in privacy.counted(updates(3))] == [1, 2, 3]


def test_all_clients_count_alike_since_the_noise_is_made_for_that():
    assert [one.num_examples for one in Privacy(PrivacyConfig("central_fixed")).counted(updates(3))] == [1, 1, 1]


@pytest.mark.parametrize(("within", "factor"), [(1, math.exp(-0.2 * 0.5)), (0, math.exp(0.2 * 0.5))])
def test_the_norm_shrinks_while_more_than_the_quantile_is_within_it(within, factor):
    privacy = Privacy(PrivacyConfig("central_adaptive", clipping_norm=2.0, noise_multiplier=0.0))
    privacy.released(1, torch.zeros(4), updates(5, **{NORM_BIT: within}))
    assert privacy.clipping_norm == pytest.approx(2.0 * factor)


@pytest.mark.parametrize(
    ("kind", "found", "reason"),
    [
        ("central_fixed", update([3.0, 4.0]), r"norm 5, more than privacy\.clipping_norm=1"),
        ("central_adaptive", update([3.0, 4.0], **{NORM_BIT: 0}), "norm 5, more than"),
        ("central_adaptive", update([0.3, 0.4]), "does not say by 'norm_bit'"),
        ("central_adaptive", update([0.3, 0.4], **{NORM_BIT: 7}), "does not say by 'norm_bit'"),
    ],
)
def test_an_update_that_was_not_clipped_is_refused(kind, found, reason):
    with pytest.raises(MessageError, match=reason):
        Privacy(PrivacyConfig(kind)).check(found, torch.zeros(2))


def test_a_clipped_update_is_taken():
    received = torch.tensor([1.0, 1.0])
    Privacy(PrivacyConfig("central_fixed")).check(update([1.6, 1.8]), received)
    Privacy(PrivacyConfig("local")).check(update([1e6, 1.8]), received)
