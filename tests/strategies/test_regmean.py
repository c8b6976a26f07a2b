"""RegMean against dense least squares by NumPy."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

from strategies import RegMean, RegMeanConfig, TaskContext
from strategies.regmean import gram_root, least_squares
from task.arrays import FLAT, flat_to_array
from task.signals import signal_layout
from task.units import make_layout
from tests.strategies.scripted import BASE, CLASSES, Script, ShufflingGrid, final_flat, scripted_app

NAMES = ["0", "1", "2"]
A, B = "blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight"
WIDE = make_layout({A: (3, 3), B: (5, 3), "head.weight": (2, 4), "head.bias": (2,)})
NARROW = make_layout({A: (2, 6), B: (5, 2), "head.weight": (2, 4), "head.bias": (2,)})
FROZEN_A = make_layout({B: (5, 2), "norm.weight": (4,), "head.weight": (2, 4)})


def inputs_of(name, width, key=0):
    """Inputs that a client saw, [samples, width]; of the head the last column is one."""
    x = np.random.default_rng([int(name), width, key]).normal(size=(30, width))
    return np.hstack([x[:, :-1], np.ones((30, 1))]) if key else x


def gram_of(name, width, key=0):
    x = inputs_of(name, width, key)
    return x.T @ x


def update_of(name, layout):
    values = np.random.default_rng([9, int(name)]).normal(size=layout.size).astype(np.float32)
    return values, {key: view.double().numpy() for key, view in layout.views(torch.tensor(values)).items()}


def run(layout, edit=None, values=None, clients=NAMES, **options):
    def signals(name, instruction):
        index = signal_layout(instruction.signals, layout)
        flat = torch.empty(index.size)
        for key, view in index.views(flat).items():
            width = round((2 * len(view)) ** 0.5 - 0.5)
            gram = gram_of(name, width, int(key == "gram:head"))
            view.copy_(torch.tensor(gram[np.triu_indices(width)]))
            if edit:
                edit(name, key, view)
        return ArrayRecord({FLAT: flat_to_array(flat.numpy())})

    script = Script(
        layout=layout, signals=signals, values=values or (lambda name, n, received: update_of(name, layout)[0])
    )
    strategy, reports = RegMean(RegMeanConfig(**options), TaskContext("{}", layout, BASE, CLASSES)), []
    initial = ArrayRecord({FLAT: flat_to_array(np.zeros(layout.size, np.float32))})
    result = strategy.start(
        ShufflingGrid(scripted_app(script), clients), initial, num_rounds=1, on_round=reports.append
    )
    return {k: v.numpy() for k, v in layout.views(torch.tensor(final_flat(result.arrays))).items()}, reports[1]


def solved(weights, grams):
    """(sum_m W_m G_m) (sum_m G_m)^-1."""
    return sum(w @ g for w, g in zip(weights, grams, strict=True)) @ np.linalg.inv(sum(grams))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_least_squares_are_those_of_all_inputs_stacked(clients, inputs, outputs, seed):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(clients, 25, inputs))
    weights = generator.normal(size=(clients, outputs, inputs))
    answers = np.concatenate([x_m @ w_m.T for x_m, w_m in zip(x, weights, strict=True)])
    expected = np.linalg.lstsq(np.concatenate(x), answers)[0].T
    grams = [torch.from_numpy(x_m.T @ x_m) for x_m in x]
    found = least_squares(list(torch.from_numpy(weights)), grams)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_of_fewer_inputs_than_dimensions_the_answers_are_met():
    generator = np.random.default_rng(0)
    x, weights = generator.normal(size=(2, 2, 6)), generator.normal(size=(2, 3, 6))
    found = least_squares(list(torch.from_numpy(weights)), [torch.from_numpy(x_m.T @ x_m) for x_m in x]).numpy()
    for x_m, w_m in zip(x, weights, strict=True):
        np.testing.assert_allclose(x_m @ found.T, x_m @ w_m.T, atol=1e-4)


def test_without_any_input_the_outcome_is_zero():
    found = least_squares([torch.ones(2, 3)] * 2, [torch.zeros(3, 3, dtype=torch.float64)] * 2)
    assert torch.equal(found, torch.zeros(2, 3, dtype=torch.float64))


def test_the_merged_product_minimises_the_error_on_the_clients_inputs():
    """The rank allows the solution of the dense weights, whatever the clients' factors."""
    merged, report = run(WIDE, off_diagonal=1.0)
    grams, clients = [gram_of(name, 3) for name in NAMES], [update_of(name, WIDE)[1] for name in NAMES]
    products = [client[B] @ client[A] for client in clients]
    found = merged[B] @ merged[A]
    np.testing.assert_allclose(found, solved(products, grams), rtol=1e-4, atol=1e-4)
    slope = sum((found - product) @ gram for product, gram in zip(products, grams, strict=True))
    assert np.abs(slope).max() < 1e-4 * np.abs(sum(grams)).max()
    assert report.details["product_residual"] == [0.0]


def test_where_clients_share_a_and_the_rank_allows_it_the_solution_is_exact():
    """Every client's product has rank one and the same A, so that three clients together stay within rank two."""
    shared = update_of("7", NARROW)[1][A]
    column = update_of("7", NARROW)[1][B][:, :1]

    def values(name, n, received):
        flat = torch.tensor(update_of(name, NARROW)[0])
        views = NARROW.views(flat)
        views[A].copy_(torch.tensor(shared))
        views[B].copy_(torch.tensor(column @ np.array([[1.0 + int(name), -2.0 * int(name)]])))
        return flat.numpy()

    merged, report = run(NARROW, values=values, off_diagonal=1.0)
    grams = [gram_of(name, 6) for name in NAMES]
    products = [column @ np.array([[1.0 + int(name), -2.0 * int(name)]]) @ shared for name in NAMES]
    np.testing.assert_allclose(merged[B] @ merged[A], solved(products, grams), rtol=1e-4, atol=1e-4)
    assert report.details["product_residual"][0] < 1e-5


def test_beyond_the_rank_the_factors_are_kept_whose_outputs_are_nearest():
    merged, report = run(NARROW, off_diagonal=1.0)
    clients, grams = [update_of(name, NARROW)[1] for name in NAMES], [gram_of(name, 6) for name in NAMES]
    dense = solved([client[B] @ client[A] for client in clients], grams)
    root = np.linalg.cholesky(sum(grams))
    singular = np.linalg.svd(dense @ root, compute_uv=False)
    missed, least = np.linalg.norm((dense - merged[B] @ merged[A]) @ root), np.linalg.norm(singular[2:])
    assert least > 0.1
    assert missed == pytest.approx(least, rel=1e-4)
    assert report.details["product_residual"] == [pytest.approx(least / np.linalg.norm(dense @ root), abs=2e-6)]


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 2**31))
def test_a_sum_that_no_inputs_can_make_has_a_root_all_the_same(width, negative, seed):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(width, width))
    gram = torch.from_numpy(values @ values.T - negative * np.eye(width))
    root, mean = gram_root([gram, gram])
    assert bool(torch.isfinite(root).all())
    if negative == 0:
        np.testing.assert_allclose((root @ root.T * mean).numpy(), 2 * gram.numpy(), atol=1e-4 * float(mean) + 1e-9)


def test_elements_off_the_diagonal_are_scaled_down():
    merged, _ = run(WIDE, off_diagonal=0.25)
    grams = [gram_of(name, 3) for name in NAMES]
    scaled = [0.25 * gram + 0.75 * np.diag(gram.diagonal()) for gram in grams]
    products = [client[B] @ client[A] for client in (update_of(name, WIDE)[1] for name in NAMES)]
    np.testing.assert_allclose(merged[B] @ merged[A], solved(products, scaled), rtol=1e-4, atol=1e-4)


def test_of_the_diagonal_alone_every_column_is_an_average_by_the_inputs_energy():
    merged, _ = run(WIDE, off_diagonal=0.0)
    energy = np.array([gram_of(name, 5, 1).diagonal() for name in NAMES])
    shares = energy / energy.sum(0)
    clients = [update_of(name, WIDE)[1] for name in NAMES]
    expected = sum(share[:4] * client["head.weight"] for share, client in zip(shares, clients, strict=True))
    np.testing.assert_allclose(merged["head.weight"], expected, rtol=1e-4, atol=1e-5)
    assert shares[:, 4] == pytest.approx([1 / 3] * 3)
    bias = sum(client["head.bias"] for client in clients) / 3
    np.testing.assert_allclose(merged["head.bias"], bias, rtol=1e-4, atol=1e-5)


def test_the_bias_is_the_heads_last_column():
    merged, _ = run(WIDE, off_diagonal=1.0)
    clients = [update_of(name, WIDE)[1] for name in NAMES]
    weights = [np.hstack([client["head.weight"], client["head.bias"][:, None]]) for client in clients]
    expected = solved(weights, [gram_of(name, 5, 1) for name in NAMES])
    np.testing.assert_allclose(merged["head.weight"], expected[:, :4], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(merged["head.bias"], expected[:, 4], rtol=1e-4, atol=1e-4)


def test_where_a_is_frozen_b_is_solved_for_and_a_head_may_have_no_bias():
    merged, report = run(FROZEN_A, off_diagonal=1.0)
    clients = [update_of(name, FROZEN_A)[1] for name in NAMES]
    expected = solved([client[B] for client in clients], [gram_of(name, 2) for name in NAMES])
    np.testing.assert_allclose(merged[B], expected, rtol=1e-4, atol=1e-4)
    assert report.details["product_residual"] == [0.0]
    grams = [gram_of(name, 5, 1)[:4, :4] for name in NAMES]
    expected = solved([client["head.weight"] for client in clients], grams)
    np.testing.assert_allclose(merged["head.weight"], expected, rtol=1e-4, atol=1e-4)
    by_samples = sum((i + 1) / 6 * client["norm.weight"] for i, client in enumerate(clients))
    np.testing.assert_allclose(merged["norm.weight"], by_samples, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", ["gram:blocks.0.fc", "gram:head"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_matrix_that_is_not_finite_is_refused_by_name(key, value):
    def edit(name, found, view):
        if (name, found) == ("1", key):
            view[2] = value

    merged, report = run(WIDE, edit)
    assert report.clients_dropped == {"1": f"its {key} is not finite."}
    expected, _ = run(WIDE, clients=["0", "2"])
    for name, values in merged.items():
        np.testing.assert_array_equal(values, expected[name])


@pytest.mark.parametrize(("element", "value"), [(0, -1.0), (1, 1e6)])
def test_what_no_inputs_have_as_their_gram_matrix_is_refused(element, value):
    def edit(name, found, view):
        if (name, found) == ("1", "gram:head"):
            view[element] = value

    _, report = run(WIDE, edit)
    assert report.clients_dropped == {"1": "its gram:head is no Gram matrix of any inputs."}
    assert report.clients_used == ["0", "2"]
