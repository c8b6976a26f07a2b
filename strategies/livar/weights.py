"""LIVAR's merge weights: by variance for the head, by update scores for the adapter; pure functions.

References
----------
Fiorini, Mosconi, Buzzega, Salami, Calderara, "Intrinsic Training Signals for Federated Learning Aggregation",
arXiv 2507.06813 (ICIAP 2025).
"""

import torch
from torch import Tensor

from strategies.livar.table import PUBLISHED_TABLE, MergeTable

TINY = torch.finfo(torch.float64).tiny


def class_merge_weights(variance: Tensor, count: Tensor) -> Tensor:
    """Weigh clients per class by the variance of their features: w[m,c] = v[m,c] / sum_m' v[m',c].

    Only clients with at least two samples of a class, in whole numbers, behind a finite variance above zero take part
    in it; sample counts play no further part.

    Parameters
    ----------
    variance : Tensor, [clients, classes]
        v: mean over feature dimensions of the per-class variance.
    count : Tensor, [clients, classes]
        n: number of samples behind each variance.

    Returns
    -------
    Tensor, float64, [clients, classes]
        Weights that sum to one over clients for every class that a client covers, and are zero for all others.
    """
    known = whole(count) & (count >= 2) & torch.isfinite(variance) & (variance > 0)
    v = torch.where(known, variance, 0.0).double()
    v = v / v.amax(0).clamp_min(TINY)
    total = v.sum(0)
    return torch.where(total > 0, v / total.clamp_min(TINY), 0.0)


def whole(count: Tensor) -> Tensor:
    """Tell which counts are whole numbers from 0 on; of the same shape, bool."""
    return torch.isfinite(count) & (count >= 0) & (count == count.floor())


def lora_merge_weights(score_a: Tensor, score_b: Tensor, table: MergeTable = PUBLISHED_TABLE) -> Tensor:
    """Weigh clients per layer by the bins of their update scores: W[m,l] = u[m,l] / sum_m' u[m',l].

    The bins are bounded by quantiles over all clients and layers (linear interpolation); a score equal to a bound falls
    into the middle bin. A client whose score of a layer does not count (:func:`scores_that_count`) has no say in
    that layer and none in the quantiles; a layer without any score that counts is merged uniformly.

    Parameters
    ----------
    score_a, score_b : Tensor, [clients, layers]
        s_A and s_B: accumulated |<gradient, move>| of the matrices A and B of every layer.
    table : MergeTable
        Quantiles, and the raw weight u of every bin.

    Returns
    -------
    Tensor, float64, [clients, layers]
        Weights that sum to one over clients for every layer.
    """
    counting = scores_that_count(score_a, score_b)
    column = score_bins(score_a.double(), counting, table.quantiles_a)
    row = score_bins(score_b.double(), counting, table.quantiles_b)
    u = torch.where(counting, table.tensor[row, column], 0.0)
    total = u.sum(0)
    return torch.where(total > 0, u / total.clamp_min(TINY), 1 / len(u))


def scores_that_count(score_a: Tensor, score_b: Tensor) -> Tensor:
    """Tell where s_A and s_B are both finite and, as sums of absolute values, not negative; bool, of their shape."""
    return torch.isfinite(score_a) & torch.isfinite(score_b) & (score_a >= 0) & (score_b >= 0)


def score_bounds(score: Tensor, counting: Tensor, quantiles: list[float]) -> Tensor:
    """Take the quantiles of the pool of scores, by linear interpolation: the paper's A25, A50, B60 and B80.

    Parameters
    ----------
    score : Tensor, float64, [clients, layers]
        Scores.
    counting : Tensor, bool, [clients, layers]
        Which of them are in the pool; at least one.
    quantiles : list[float]
        In (0, 1).

    Returns
    -------
    Tensor, float64, [quantiles]
        Bounds of the bins.
    """
    return torch.quantile(score[counting], torch.tensor(quantiles, dtype=score.dtype))


def score_bins(score: Tensor, counting: Tensor, quantiles: list[float]) -> Tensor:
    """Index the bin of every score: 0 below the first bound, len(quantiles) above the last, ties to the middle.

    Parameters
    ----------
    score : Tensor, float64, [clients, layers]
        Scores.
    counting : Tensor, bool, [clients, layers]
        Which of them the quantiles are taken over.
    quantiles : list[float]
        Ascending, in (0, 1); none makes one bin.

    Returns
    -------
    Tensor, int64, [clients, layers]
        Bins.
    """
    if not counting.any() or not quantiles:
        return torch.zeros_like(score, dtype=torch.int64)
    bounds = score_bounds(score, counting, quantiles)
    middle = len(quantiles) / 2
    return torch.stack([score > b if i + 1 > middle else score >= b for i, b in enumerate(bounds)]).sum(0)


def per_layer_scores(score: Tensor, steps: Tensor) -> Tensor:
    """Make scores comparable between layers and between clients: per step, in units of the layer's median.

    Not of the paper: there, scores differ more between layers than between clients, and follow a client's number of
    steps.

    Parameters
    ----------
    score : Tensor, [clients, layers]
        s_A or s_B of a round.
    steps : Tensor, [clients]
        Number of optimizer steps behind them, positive.

    Returns
    -------
    Tensor, float64, [clients, layers]
        Scores per step over the median over clients of their layer; a median of zero is taken as one.
    """
    per_step = score.double() / steps.double()[:, None]
    median = torch.nanquantile(torch.where(torch.isfinite(per_step), per_step, torch.nan), 0.5, dim=0)
    return per_step / torch.where(median > 0, median, 1.0)
