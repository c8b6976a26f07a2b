"""The store of all clients' models, and what is computed from it."""

import numpy as np
import pytest
import torch

from strategies.pfedla import ModelStore
from strategies.pfedla.store import mixed_unit, unit_gain
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
def test_gains_are_inner_products_with_the_change(cosine):
    new, received, rows = torch.randn(2, 6), torch.randn(2, 6), torch.randn(4, 6)
    delta = (new - received).double()
    expected = torch.tensor([[float(r.double() @ d) for r in rows] for d in delta])
    if cosine:
        expected /= delta.norm(dim=1)[:, None] * rows.double().norm(dim=1)[None]
    torch.testing.assert_close(unit_gain(new, received.clone(), rows, cosine), expected.float(), rtol=1e-4, atol=1e-5)
    assert not unit_gain(new, new.clone(), rows, cosine).any(), "no change, no gain"


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
