"""The store of all clients' models, and what is computed from it."""

import numpy as np
import pytest
import torch

from strategies.pfedla import ModelStore
from strategies.pfedla.store import COLUMNS, exchange_unit, mixed_unit
from tests.strategies.scripted import LAYOUT

INITIAL = torch.linspace(-1, 1, LAYOUT.size)


def filled(dtype=torch.float32, clients=4):
    store = ModelStore(LAYOUT, INITIAL, dtype)
    store.grow(clients)
    generator = torch.Generator().manual_seed(0)
    for rows in store.units.values():
        rows.copy_(torch.randn(rows.shape, generator=generator))
    return store


def whole(store):
    return torch.cat([rows.float() for rows in store.units.values()], 1)


def test_one_hot_weights_give_that_clients_model_to_the_bit():
    store = filled()
    for client in range(4):
        alpha = torch.nn.functional.one_hot(torch.full((3,), client), 4).float()
        assert torch.equal(store.mixed(alpha[None])[0], whole(store)[client])


def test_a_mixed_model_by_hand():
    store, alpha = filled(), torch.rand(3, 4).softmax(1)
    expected = np.concatenate(
        [row @ rows.numpy() for row, rows in zip(alpha.numpy(), store.units.values(), strict=True)]
    )
    np.testing.assert_allclose(store.mixed(alpha[None])[0], expected, rtol=1e-5, atol=1e-6)


def test_rows_of_both_kinds_go_together():
    rows, alpha = torch.randn(4, 6), torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    found = mixed_unit(alpha, rows)
    assert torch.equal(found[0], rows[1])
    torch.testing.assert_close(found[1], (rows[0] + rows[1]) / 2)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("dim", [6, 2 * COLUMNS + 3])
def test_gains_are_inner_products_with_the_change_and_new_values_take_over(cosine, dim):
    generator = torch.Generator().manual_seed(0)
    rows, new = torch.randn(4, dim, generator=generator), torch.randn(2, dim, generator=generator)
    alpha, before = torch.rand(2, 4, generator=generator).softmax(1), rows.double()
    delta = new.double() - alpha.double() @ before
    expected = delta @ before.T
    if cosine:
        expected /= delta.norm(dim=1)[:, None] * before.norm(dim=1)[None]
    gain = exchange_unit(rows, list(new), [3, 1], alpha, cosine)
    torch.testing.assert_close(gain, expected.float(), rtol=1e-4, atol=1e-2 if dim > COLUMNS and not cosine else 1e-5)
    assert torch.equal(rows[[3, 1]], new)
    assert torch.equal(rows[[0, 2]], before[[0, 2]].float())


def test_no_change_is_no_gain():
    rows, alpha = torch.randn(3, 5), torch.tensor([[0.0, 1.0, 0.0]])
    for cosine in (True, False):
        assert not exchange_unit(rows.clone(), [rows[1].clone()], [1], alpha, cosine).any()


def test_a_store_grows_by_the_initial_model():
    store = filled(clients=2)
    before = whole(store)
    store.grow(4)
    assert torch.equal(whole(store)[:2], before)
    assert torch.equal(whole(store)[2:], INITIAL.expand(2, -1))
    store.grow(3)
    assert len(store) == 4


def test_halves_hold_nearly_the_same():
    exact, short, alpha = filled(), filled(torch.float16), torch.rand(3, 4).softmax(1)
    torch.testing.assert_close(short.mixed(alpha[None]), exact.mixed(alpha[None]), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(short.mean(), exact.mean(), rtol=2e-3, atol=2e-3)
    assert short.units["head"].dtype == torch.float16
