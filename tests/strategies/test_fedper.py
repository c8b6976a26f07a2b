"""FedPer and training alone: what stays with the client, and who lost what it kept."""

import numpy as np
import pytest
import torch

from strategies.merging import merge_products, same_for_all_layers
from task.errors import ConfigError
from task.messages import NOT_KEPT
from tests.strategies.pfedla.test_strategy import INITIAL, drifting, run, starts
from tests.strategies.scripted import LAYOUT
from tests.strategies.test_fedlama import NAMES

HEAD = LAYOUT.slices["head"]


def test_the_head_stays_with_its_client_and_the_rest_is_averaged():
    flat, _, reports, script = run(name="fedper")
    np.testing.assert_array_equal(flat[HEAD], INITIAL[HEAD])
    left = {name: drifting(name, 2, starts(script)[name, 2]).astype(np.float32) for name in NAMES}
    shares = np.array([10 * (int(name) + 1) for name in NAMES]) / 100
    mean = np.average([left[name] for name in NAMES], axis=0, weights=shares)
    for name in NAMES:
        np.testing.assert_array_equal(starts(script)[name, 3][HEAD], left[name][HEAD])
        np.testing.assert_allclose(starts(script)[name, 3][: HEAD.start], mean[: HEAD.start], rtol=1e-4, atol=1e-5)
    assert "head" not in reports[2].bytes_up_by_unit
    assert "head" not in reports[2].bytes_down_by_unit


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_the_shared_adapter_is_merged_by_its_products_where_asked(name):
    flat, _, reports, script = run(name=name, lora_merge="product_svd")
    left = [torch.tensor(drifting(client, 3, starts(script)[client, 3]).astype(np.float32)) for client in NAMES]
    expected = torch.tensor(INITIAL)
    residual = merge_products(expected, left, same_for_all_layers([0.1, 0.2, 0.3, 0.4], LAYOUT), LAYOUT)
    np.testing.assert_array_equal(flat, expected.numpy())
    assert reports[3].details["product_residual"] == [round(value, 6) for value in residual.tolist()]
    for client in NAMES:
        own = drifting(client, 2, starts(script)[client, 2]).astype(np.float32)
        np.testing.assert_array_equal(starts(script)[client, 3][HEAD], own[HEAD])


@pytest.mark.parametrize("name", ["local", "pfedla"])
def test_where_no_adapter_is_averaged_by_one_weight_a_merge_of_products_is_refused(name):
    with pytest.raises(ConfigError, match="merges adapters in its own way"):
        run(name=name, lora_merge="product_svd")


def test_alone_nothing_travels_and_every_client_goes_on_from_its_own():
    flat, _, reports, script = run(name="local")
    np.testing.assert_array_equal(flat, INITIAL)
    assert reports[2].bytes_up_by_unit == reports[2].bytes_down_by_unit == {}
    for name in NAMES:
        left = drifting(name, 2, starts(script)[name, 2]).astype(np.float32)
        np.testing.assert_array_equal(starts(script)[name, 3], left)


def test_a_client_that_sat_out_goes_on_from_its_last_round():
    clients = [str(i) for i in range(8)]
    _, strategy, reports, script = run(name="local", clients=clients, rounds=5, fraction_train=0.4)
    last = {}
    for report in reports[1:]:
        for name in report.clients_used:
            start = INITIAL if name not in last else drifting(name, last[name], starts(script)[name, last[name]])
            np.testing.assert_array_equal(starts(script)[name, report.server_round], start.astype(np.float32))
            last[name] = report.server_round
    assert strategy.last_round == last


def test_fedrep_is_fedper_but_for_the_epochs_of_the_head():
    flat, strategy, _, script = run(name="fedrep", head_epochs=3)
    expected, _, _, plain = run(name="fedper")
    np.testing.assert_array_equal(flat, expected)
    assert {instruction.head_epochs for _, instruction, _ in script.heard} == {3}
    assert strategy.without_training(1).head_epochs == 3
    for client_and_round, start in starts(plain).items():
        np.testing.assert_array_equal(starts(script)[client_and_round], start)


@pytest.mark.parametrize("strategy", ["fedper", "pfedla"])
def test_a_client_that_lost_what_it_kept_starts_afresh_the_next_time(strategy):
    def values(client, server_round, received):
        if (client, server_round) == ("2", 2):
            raise ValueError(f"This client {NOT_KEPT} 1; it has: none.")
        return drifting(client, server_round, received)

    _, _, reports, script = run(name=strategy, values=values, **({"retained": 1} if strategy == "pfedla" else {}))
    assert NOT_KEPT in reports[2].clients_dropped["2"]
    third = {name: i for name, i, _ in script.heard if i.server_round == 3}
    assert third["2"].exchange.start == 0
    assert third["2"].exchange.down is None
    assert third["1"].exchange.start == 2
