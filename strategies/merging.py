"""Merging flat vectors part by part: every adapted layer, every class of the head, by weights of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from strategies.arithmetic import weighted_sum
from task.units import HEAD, Layout, TensorSpec, head_specs, lora_layers


def part_of(spec: TensorSpec) -> slice:
    """Return the range of a tensor in the flat array."""
    return slice(spec.offset, spec.offset + spec.size)


def same_for_all_layers(weights: Sequence[float], layout: Layout) -> Tensor:
    """Give every adapted layer the same weights: float64 [clients, layers]."""
    column = torch.tensor(weights, dtype=torch.float64)[:, None]
    return column.expand(-1, len(lora_layers(layout)))


def merge_adapter(merged: Tensor, vectors: Sequence[Tensor], weights: Tensor, layout: Layout) -> None:
    """Overwrite the adapter in ``merged`` by A_l = sum_m W[m,l] A_m,l and B_l = sum_m W[m,l] B_m,l, apart.

    Parameters
    ----------
    merged : Tensor, float32, [n]
        Is written to where the adapter lies.
    vectors : Sequence[Tensor], float32, each [n]
        The clients' adapters and heads; only read.
    weights : Tensor, [clients, layers]
        W; sums to one over clients for every layer.
    layout : Layout
        Index of the flat arrays.
    """
    for layer, column in zip(lora_layers(layout), weights.T.tolist(), strict=True):
        for spec in layer.specs:
            target = merged[part_of(spec)].zero_()
            for vector, weight in zip(vectors, column, strict=True):
                target.add_(vector[part_of(spec)], alpha=weight)


def merge_head(merged: Tensor, vectors: Sequence[Tensor], weights: Tensor, previous: Tensor, layout: Layout) -> None:
    """Overwrite row c of the head in ``merged``, weight and bias, by sum_m w[m,c] head_m[c].

    Parameters
    ----------
    merged : Tensor, float32, [n]
        Is written to where the head lies.
    vectors : Sequence[Tensor], float32, each [n]
        The clients' adapters and heads; only read.
    weights : Tensor, [clients, classes]
        w; sums over clients to one, or to zero for a class that keeps its previous row.
    previous : Tensor, float32, [n]
        The model before the round.
    layout : Layout
        Index of the flat arrays.
    """
    kept = weights.sum(0) == 0
    for spec in head_specs(layout):
        if spec is not None:
            part, across = part_of(spec), (-1,) + (1,) * (len(spec.shape) - 1)
            rows = torch.zeros(spec.shape)
            for vector, row in zip(vectors, weights.float(), strict=True):
                rows.add_(vector[part].view(spec.shape) * row.view(across))
            merged[part] = torch.where(kept.view(across), previous[part].view(spec.shape), rows).flatten()


def merge_others(merged: Tensor, vectors: Sequence[Tensor], weights: Sequence[float], layout: Layout) -> None:
    """Overwrite what is neither adapter nor head in ``merged`` by sum_m w_m x_m."""
    apart = {spec.name for layer in lora_layers(layout) for spec in layer.specs}
    for spec in layout.tensors:
        if spec.name not in apart and spec.unit != HEAD:
            merged[part_of(spec)] = weighted_sum([vector[part_of(spec)] for vector in vectors], weights)


def merge_products(merged: Tensor, vectors: Sequence[Tensor], weights: Tensor, layout: Layout) -> Tensor:
    """Overwrite the adapter in ``merged`` by the best factors of sum_m W[m,l] B_m,l A_m,l; see :func:`product_svd`.

    Where A is frozen, the weighted sum of the B is that product exactly.

    Returns
    -------
    Tensor, float64, [layers]
        Relative residual of every layer.
    """
    residuals = []
    for layer, column in zip(lora_layers(layout), weights.T.tolist(), strict=True):
        if layer.a is None:
            merged[part_of(layer.b)] = weighted_sum([vector[part_of(layer.b)] for vector in vectors], column)
            residuals.append(torch.zeros((), dtype=torch.float64))
            continue
        a = [vector[part_of(layer.a)].view(layer.a.shape) for vector in vectors]
        b = [vector[part_of(layer.b)].view(layer.b.shape) for vector in vectors]
        new_a, new_b, residual = product_svd(a, b, column)
        merged[part_of(layer.a)], merged[part_of(layer.b)] = new_a.flatten(), new_b.flatten()
        residuals.append(residual)
    return torch.stack(residuals) if residuals else torch.zeros(0, dtype=torch.float64)


def product_svd(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best rank-r factors of sum_m w_m B_m A_m, without forming the product.

    By QR of the stacked factors and an SVD of the small core; the singular values are split evenly. If the sum is
    zero, up to rounding, A is the weighted mean, so that training can go on from there.

    Parameters
    ----------
    a : Sequence[Tensor], float32, each [r, in]
        A_m.
    b : Sequence[Tensor], float32, each [out, r]
        B_m.
    weights : Sequence[float]
        w_m.

    Returns
    -------
    tuple[Tensor, Tensor, Tensor]
        A [r, in] and B [out, r], float32, and the residual ||sum - B A||_F / ||sum||_F, float64 [].
    """
    rank = a[0].shape[0]
    stacked_a = torch.cat([*a]).double()
    stacked_b = torch.cat([w * one.double() for w, one in zip(weights, b, strict=True)], dim=1)
    q_b, r_b = torch.linalg.qr(stacked_b)
    q_a, r_a = torch.linalg.qr(stacked_a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    total = s.square().sum()
    if total <= (1e-12 * r_b.norm() * r_a.norm()).square():
        mean = sum((w * one for w, one in zip(weights, a, strict=True)), torch.zeros_like(a[0]))
        return mean, torch.zeros_like(b[0]), torch.zeros_like(total)
    root = s[:rank].sqrt()
    new_b = q_b @ (u[:, :rank] * root)
    new_a = (root[:, None] * vh[:rank]) @ q_a.T
    return _padded(new_a, a[0]), _padded(new_b, b[0]), (s[rank:].square().sum() / total).sqrt()


def _padded(found: Tensor, like: Tensor) -> Tensor:
    """Fill up with zeros where a layer is narrower than the rank."""
    full = torch.zeros_like(like)
    full[: found.shape[0], : found.shape[1]] = found.float()
    return full
