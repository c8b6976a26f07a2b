"""RegMean: every layer by least squares on the clients' own inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from strategies.arithmetic import sample_weights
from strategies.base import LayerwiseStrategy
from strategies.merging import merge_others, part_of, product_svd
from strategies.options import StrategyConfig
from strategies.replies import Update
from task.config import bounded
from task.errors import MessageError
from task.signals import SignalRequest
from task.units import HEAD, LoraLayer, head_specs, lora_layers

RIDGE = 1e-6
"""Added to the diagonal of a Gram matrix, in units of its mean."""

SLACK = 1e-3
"""How far a Gram matrix may be from one by rounding, relatively."""


@dataclass
class RegMeanConfig(StrategyConfig):
    """Options of :class:`RegMean`."""

    off_diagonal: float = bounded(0.9, at_least=0.0, at_most=1.0)
    """Factor on the Gram matrices' elements off the diagonal (the paper's alpha); 0 leaves an average by the inputs'
    energy."""


class RegMean(LayerwiseStrategy):
    """W* = argmin_W sum_m ||X_m W^T - X_m W_m^T||^2 for every adapted layer and the head, from G_m = X_m^T X_m.

    The frozen weight drops out, so that for adapters sum_m B_m A_m G_m (sum_m G_m)^-1 is the solution. Of the
    adapter's rank those factors are kept whose outputs are nearest to its outputs on the clients' inputs: by the
    nearest weights instead, directions that no input has would take the places of others.

    References
    ----------
    Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023,
    equation 2 and section 3.3.
    """

    Config: ClassVar[type[StrategyConfig]] = RegMeanConfig
    lora_merges: ClassVar[tuple[str, ...]] = ("factors",)
    merges_products: ClassVar[bool] = True
    config: RegMeanConfig

    def request(self) -> SignalRequest:
        """Ask for the Gram matrices."""
        return SignalRequest(gram=True)

    def check(self, update: Update) -> None:
        """Refuse what no inputs have as their Gram matrix: by its diagonal, and by |g_ij|^2 <= g_ii g_jj."""
        for name, values in update.signals.items():
            if not name.startswith("gram:"):  # measured for recording
                continue
            if not bool(torch.isfinite(values).all()):
                raise MessageError(f"its {name} is not finite.")
            gram = self._gram(update, name.removeprefix("gram:"), int((2 * len(values)) ** 0.5), off_diagonal=1.0)
            energy = gram.diagonal()
            bound = (energy.clamp_min(0)[:, None] * energy.clamp_min(0)).sqrt() * (
                1 + SLACK
            ) + SLACK * energy.abs().max()
            if bool((energy < 0).any()) or bool((gram.abs() > bound).any()):
                raise MessageError(f"its {name} is no Gram matrix of any inputs.")

    def merge(self, server_round: int, updates: Sequence[Update]) -> Tensor:
        """Merge layer by layer; a single client's update is taken as it is."""
        if len(updates) == 1:
            return updates[0].flat.clone()
        layout, vectors = self.codec.layout, [update.flat for update in updates]
        merged = self.flat.clone()
        merge_others(merged, vectors, sample_weights([update.num_examples for update in updates]), layout)
        residuals = [self._merge_layer(merged, vectors, updates, layer) for layer in lora_layers(layout)]
        self._merge_head(merged, vectors, updates)
        self.report.details["product_residual"] = [round(residual, 6) for residual in residuals]
        return merged

    def _merge_layer(
        self, merged: Tensor, vectors: Sequence[Tensor], updates: Sequence[Update], layer: LoraLayer
    ) -> float:
        """Merge one adapted layer; returns the relative residual of its factors."""
        grams = [self._gram(update, layer.name, layer.inputs) for update in updates]
        b = [vector[part_of(layer.b)].view(layer.b.shape) for vector in vectors]
        if layer.a is None:
            merged[part_of(layer.b)] = least_squares(b, grams).flatten().float()
            return 0.0
        a = [vector[part_of(layer.a)].view(layer.a.shape) for vector in vectors]
        root, mean = gram_root(grams)
        seen = [_solved(root.T, x.double() @ (g / mean), upper=True) for x, g in zip(a, grams, strict=True)]
        outputs_a, new_b, residual = product_svd(seen, b, [1.0] * len(b))
        new_a = _solved(root, outputs_a.double(), upper=False).float()
        merged[part_of(layer.a)], merged[part_of(layer.b)] = new_a.flatten(), new_b.flatten()
        return float(residual)

    def _merge_head(self, merged: Tensor, vectors: Sequence[Tensor], updates: Sequence[Update]) -> None:
        weight, bias = head_specs(self.codec.layout)
        grams = [self._gram(update, HEAD, weight.shape[1] + 1) for update in updates]
        columns = [vector[part_of(weight)].view(weight.shape) for vector in vectors]
        if bias is None:
            grams = [gram[:-1, :-1] for gram in grams]
        else:
            columns = [torch.cat([w, v[part_of(bias)][:, None]], 1) for w, v in zip(columns, vectors, strict=True)]
        solved = least_squares(columns, grams).float()
        merged[part_of(weight)] = solved[:, : weight.shape[1]].flatten()
        if bias is not None:
            merged[part_of(bias)] = solved[:, -1]

    def _gram(self, update: Update, name: str, width: int, off_diagonal: float | None = None) -> Tensor:
        """Unpack a Gram matrix, float64 [width, width], its elements off the diagonal scaled down."""
        gram = torch.zeros(width, width, dtype=torch.float64)
        gram[tuple(torch.triu_indices(width, width))] = update.signals[f"gram:{name}"].double()
        diagonal = gram.diagonal().clone()
        gram = (gram + gram.T) * (self.config.off_diagonal if off_diagonal is None else off_diagonal)
        gram.diagonal().copy_(diagonal)
        return gram


def least_squares(weights: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """Solve W* = (sum_m W_m G_m) (sum_m G_m)^-1.

    Parameters
    ----------
    weights : Sequence[Tensor], each [out, in]
        W_m.
    grams : Sequence[Tensor], float64, each [in, in]
        G_m, symmetric.

    Returns
    -------
    Tensor, float64, [out, in]
        W*.
    """
    numerator = torch.zeros(weights[0].shape, dtype=torch.float64)
    for w, g in zip(weights, grams, strict=True):
        numerator.addmm_(w.double(), g)
    return _right_divided(numerator, grams)


def gram_root(grams: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return L with L L^T = sum_m G_m / g, g being the mean of the diagonal: ||W L||_F is the size of W's outputs.

    Parameters
    ----------
    grams : Sequence[Tensor], float64, each [in, in]
        G_m, symmetric. Where their sum is not positive definite, as no inputs can make it, the ridge is raised.

    Returns
    -------
    Tensor, float64, [in, in]
        L, lower triangular; the identity where no client had any input.
    Tensor, float64, []
        g; 1 where no client had any input.
    """
    total = torch.zeros_like(grams[0])
    for gram in grams:
        total.add_(gram)
    mean = total.diagonal().mean()
    eye = torch.eye(len(total), dtype=torch.float64)
    if not mean > 0:
        return eye, torch.ones_like(mean)
    total /= mean
    ridge = RIDGE
    while True:
        root, failed = torch.linalg.cholesky_ex(total + ridge * eye)
        if not failed:
            return root, mean
        ridge *= 10


def _solved(root: Tensor, right: Tensor, *, upper: bool) -> Tensor:
    """Return X with X root = right, root being triangular."""
    found: Tensor = torch.linalg.solve_triangular(root, right, upper=upper, left=False)
    return found


def _right_divided(numerator: Tensor, grams: Sequence[Tensor]) -> Tensor:
    """Return numerator (sum_m G_m)^-1 with a small ridge; zero where no client had any input."""
    total = torch.zeros_like(grams[0])
    for gram in grams:
        total.add_(gram)
    ridge = (RIDGE * total.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    total.diagonal().add_(ridge)
    solved: Tensor = torch.linalg.solve(total, numerator, left=False)
    return solved
