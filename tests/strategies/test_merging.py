"""Merging part by part, and the best factors of a sum of products, against dense NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from strategies.merging import (
    merge_adapter,
    merge_head,
    merge_others,
    merge_products,
    product_svd,
    same_for_all_layers,
)
from task.units import make_layout

LAYOUT = make_layout(
    {
        "pos": (5,),
        "blocks.0.fc.lora_A.weight": (2, 4),
        "blocks.0.fc.lora_B.weight": (6, 2),
        "blocks.0.norm.weight": (4,),
        "blocks.1.fc.lora_B.weight": (3, 2),
        "head.weight": (3, 4),
        "head.bias": (3,),
    }
)
WEIGHTS = torch.tensor([[0.2, 1.0], [0.3, 0.0], [0.5, 0.0]], dtype=torch.float64)
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 7)


def vectors_of(layout=LAYOUT, clients=3, seed=0):
    return list(torch.randn(clients, layout.size, generator=torch.Generator().manual_seed(seed)))


def untouched(merged, names):
    """Tensors of those names still hold the NaN they were filled with, and no others do."""
    for name, view in LAYOUT.views(merged).items():
        assert bool(torch.isnan(view).all()) == (name in names), name
        assert bool(torch.isnan(view).any()) == (name in names), name


def blank():
    return torch.full((LAYOUT.size,), torch.nan)


def test_every_layer_is_merged_by_its_own_weights():
    merged, vectors = blank(), vectors_of()
    before = torch.stack(vectors)
    merge_adapter(merged, vectors, WEIGHTS, LAYOUT)
    views, clients = LAYOUT.views(merged), [LAYOUT.views(vector) for vector in vectors]
    for name in ("blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight"):
        expected = 0.2 * clients[0][name] + 0.3 * clients[1][name] + 0.5 * clients[2][name]
        torch.testing.assert_close(views[name], expected)
    assert torch.equal(views["blocks.1.fc.lora_B.weight"], clients[0]["blocks.1.fc.lora_B.weight"])
    untouched(merged, ["pos", "blocks.0.norm.weight", "head.weight", "head.bias"])
    assert torch.equal(torch.stack(vectors), before)


@pytest.mark.parametrize("bias", [True, False])
def test_every_class_is_merged_by_its_own_weights_and_one_without_keeps_its_row(bias):
    layout = make_layout({"head.weight": (3, 4)} | ({"head.bias": (3,)} if bias else {}))
    previous, vectors = torch.arange(float(layout.size)), vectors_of(layout)
    weights = torch.tensor([[0.25, 0.0, 1.0], [0.75, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    merged = torch.full_like(previous, torch.nan)
    merge_head(merged, vectors, weights, previous, layout)
    for name, view in layout.views(merged).items():
        first, second, _ = (layout.views(vector)[name] for vector in vectors)
        torch.testing.assert_close(view[0], 0.25 * first[0] + 0.75 * second[0])
        assert torch.equal(view[1], layout.views(previous)[name][1])
        assert torch.equal(view[2], first[2])


def test_what_is_neither_adapter_nor_head_is_merged_by_samples():
    merged, vectors = blank(), vectors_of()
    merge_others(merged, vectors, [0.2, 0.3, 0.5], LAYOUT)
    for name in ("pos", "blocks.0.norm.weight"):
        expected = sum(w * LAYOUT.views(v)[name] for w, v in zip((0.2, 0.3, 0.5), vectors, strict=True))
        torch.testing.assert_close(LAYOUT.views(merged)[name], expected)
    adapter = ["blocks.0.fc.lora_A.weight", "blocks.0.fc.lora_B.weight", "blocks.1.fc.lora_B.weight"]
    untouched(merged, [*adapter, "head.weight", "head.bias"])


def test_the_parts_together_cover_the_whole_model():
    merged, vectors = blank(), vectors_of()
    merge_others(merged, vectors, [0.2, 0.3, 0.5], LAYOUT)
    merge_products(merged, vectors, WEIGHTS, LAYOUT)
    merge_head(merged, vectors, torch.full((3, 3), 1 / 3, dtype=torch.float64), torch.zeros(LAYOUT.size), LAYOUT)
    assert bool(torch.isfinite(merged).all())


def test_the_same_weights_can_be_given_to_all_layers():
    found = same_for_all_layers([0.25, 0.75], LAYOUT)
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.25], [0.75, 0.75]], dtype=torch.float64))


def test_products_are_merged_layer_by_layer_and_a_frozen_factor_leaves_a_sum():
    merged, vectors = blank(), vectors_of()
    residual = merge_products(merged, vectors, WEIGHTS, LAYOUT)
    clients = [LAYOUT.views(vector) for vector in vectors]
    a, b = ([client[f"blocks.0.fc.lora_{which}.weight"] for client in clients] for which in "AB")
    new_a, new_b, first = product_svd(a, b, [0.2, 0.3, 0.5])
    views = LAYOUT.views(merged)
    assert torch.equal(views["blocks.0.fc.lora_A.weight"], new_a)
    assert torch.equal(views["blocks.0.fc.lora_B.weight"], new_b)
    assert torch.equal(views["blocks.1.fc.lora_B.weight"], clients[0]["blocks.1.fc.lora_B.weight"])
    assert residual.tolist() == [first, 0.0]
    assert first > 0
    untouched(merged, ["pos", "blocks.0.norm.weight", "head.weight", "head.bias"])


def factors(clients, rank, inputs, outputs, seed):
    generator = np.random.default_rng(seed)
    a = generator.normal(size=(clients, rank, inputs)).astype(np.float32)
    b = generator.normal(size=(clients, outputs, rank)).astype(np.float32)
    return a, b, generator.random(clients)


def dense_sum(a, b, weights):
    return sum(w * y.astype(float) @ x.astype(float) for w, x, y in zip(weights, a, b, strict=True))


@given(st.integers(1, 5), st.integers(1, 4), sizes, sizes, seeds)
def test_product_svd_is_as_near_as_the_truncated_dense_svd(clients, rank, inputs, outputs, seed):
    a, b, weights = factors(clients, rank, inputs, outputs, seed)
    new_a, new_b, residual = product_svd(torch.from_numpy(a), torch.from_numpy(b), weights.tolist())
    assert (new_a.dtype, new_a.shape, new_b.shape) == (torch.float32, (rank, inputs), (outputs, rank))
    dense = dense_sum(a, b, weights)
    singular = np.linalg.svd(dense, compute_uv=False)
    norm, least = np.linalg.norm(dense), np.linalg.norm(singular[rank:])
    missed = np.linalg.norm(dense - new_b.double().numpy() @ new_a.double().numpy())
    assert missed == pytest.approx(least, abs=3e-6 * norm)
    assert residual.item() == pytest.approx(least / norm, abs=1e-10)


@given(st.integers(1, 5), st.integers(1, 4), sizes, sizes, seeds)
def test_the_singular_values_are_split_evenly(clients, rank, inputs, outputs, seed):
    a, b, weights = factors(clients, rank, inputs, outputs, seed)
    new_a, new_b, _ = product_svd(torch.from_numpy(a), torch.from_numpy(b), weights.tolist())
    torch.testing.assert_close(new_a @ new_a.T, new_b.T @ new_b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", ["a", "b"])
def test_a_sum_of_no_higher_rank_is_met_exactly(shared):
    a, b, weights = factors(5, 3, 9, 8, 0)
    (a if shared == "a" else b)[:] = (a if shared == "a" else b)[0]
    new_a, new_b, residual = product_svd(torch.from_numpy(a), torch.from_numpy(b), weights.tolist())
    np.testing.assert_allclose(new_b.numpy() @ new_a.numpy(), dense_sum(a, b, weights), rtol=1e-4, atol=1e-5)
    assert residual < 1e-12


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 9), (9, 2), (1, 1)])
def test_layers_narrower_than_the_rank_are_met_exactly_and_filled_up_with_zeros(inputs, outputs):
    a, b, weights = factors(3, 4, inputs, outputs, 0)
    new_a, new_b, residual = product_svd(torch.from_numpy(a), torch.from_numpy(b), weights.tolist())
    np.testing.assert_allclose(new_b.numpy() @ new_a.numpy(), dense_sum(a, b, weights), rtol=1e-4, atol=1e-5)
    assert residual == 0
    narrow = min(inputs, outputs)
    assert not new_a[narrow:].any()
    assert not new_b[:, narrow:].any()


def test_a_single_client_keeps_its_product():
    a, b, _ = factors(1, 3, 6, 5, 0)
    new_a, new_b, residual = product_svd(torch.from_numpy(a), torch.from_numpy(b), [1.0])
    np.testing.assert_allclose(new_b.numpy() @ new_a.numpy(), b[0] @ a[0], rtol=1e-4, atol=1e-5)
    assert residual < 1e-12


def test_a_client_without_weight_leaves_no_trace():
    a, b, _ = factors(3, 2, 6, 5, 0)
    with_it = product_svd(torch.from_numpy(a), torch.from_numpy(b), [0.25, 0.75, 0.0])
    without = product_svd(torch.from_numpy(a[:2]), torch.from_numpy(b[:2]), [0.25, 0.75])
    torch.testing.assert_close(with_it[1] @ with_it[0], without[1] @ without[0])


def test_of_a_sum_that_is_zero_a_keeps_the_weighted_mean_so_that_training_can_go_on():
    a, b, _ = factors(2, 2, 6, 5, 0)
    new_a, new_b, residual = product_svd(torch.from_numpy(a), torch.from_numpy(0 * b), [0.25, 0.75])
    np.testing.assert_allclose(new_a.numpy(), 0.25 * a[0] + 0.75 * a[1], rtol=1e-5)
    assert not new_b.any()
    assert residual == 0


def test_of_products_that_cancel_a_keeps_the_weighted_mean_too():
    a, b, _ = factors(1, 2, 6, 5, 0)
    pair = torch.from_numpy(a[0])
    new_a, new_b, residual = product_svd([pair, pair], [torch.from_numpy(b[0]), torch.from_numpy(-b[0])], [0.5, 0.5])
    torch.testing.assert_close(new_a, pair)
    assert not new_b.any()
    assert residual == 0


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else [result]:
            if isinstance(found, torch.Tensor):
                self.elements = max(self.elements, found.numel())
        return result


def test_the_dense_product_is_never_formed():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 2, 300, generator=generator), torch.randn(3, 200, 2, generator=generator)
    with Largest() as largest:
        product_svd(a, b, [0.2, 0.3, 0.5])
    assert 3 * 2 * 300 <= largest.elements < 300 * 200 / 8
