"""One row per record, client and adapted layer: its signals, and the weight that it should have had."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from strategies.livar import MergeTable
from strategies.livar.weights import score_bins, scores_that_count
from task.errors import ConfigError
from task.units import lora_layers
from tools.explain.records import MIN_RECORDS, Record, Run, layer_place

POOLED = {"s_A": "score-a", "s_B": "score-b", "norm_A": "norm-a", "norm_B": "norm-b", "norm_BA": "norm-product"}
"""Features that are positions in the pool of a record, and the signals behind them."""
FEATURES = {name: f"position of {signal} in its record's pool, 0 to 1" for name, signal in POOLED.items()} | {
    "examples": "training examples of the client over the mean of its record's clients",
    "label_entropy": "entropy of the client's labels, nats",
    "depth": "index of the layer's block",
    "kind": "kind of the layer, numbered in the model's order",
    "clients": "number of clients in the record",
}
"""All features and what they are. Scores and norms are taken by position, as the bins of a merge table are: their
scale changes with round, learning rate and number of steps."""
TABLE_FEATURES = ("s_A", "s_B")
"""Features that a merge table is of."""
NO_SPREAD = 1e-6
"""A target with a smaller standard deviation counts as constant."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The data that is explained."""

    features: NDArray[np.float64]
    """[rows, features]."""
    names: tuple[str, ...]
    """Names of the features: of :data:`FEATURES` those that are not constant."""
    constant: tuple[str, ...]
    """Names of those that are, and are left out."""
    target: NDArray[np.float64]
    """Learned weight times number of clients, [rows]; 1 is a uniform share."""
    groups: NDArray[np.int64]
    """What is left out together to measure R2, [rows]: federations (:attr:`Run.federation`), or of one its rounds."""
    grouped_by: str
    """``federations`` or ``rounds``."""
    bins: NDArray[np.int64]
    """Row and column of the merge table, [rows, 2]."""
    origins: tuple[tuple[str, str, str], ...]
    """Record, client and layer of every row."""
    not_finite: int
    """Number of rows left out as a signal is not finite, or a score negative."""

    def column(self, name: str) -> NDArray[np.float64]:
        """Values of a feature, [rows]."""
        values: NDArray[np.float64] = self.features[:, self.names.index(name)]
        return values


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of one record whose signals are all finite."""

    features: NDArray[np.float64]
    target: NDArray[np.float64]
    bins: NDArray[np.int64]
    origins: list[tuple[str, str, str]]
    not_finite: int


def check_signals(runs: Sequence[Run]) -> None:
    """Refuse signals that can explain nothing, before anything is learned.

    Parameters
    ----------
    runs : Sequence[Run]
        Runs with their records.

    Raises
    ------
    ConfigError
        If a score is constant in a record, or too few records have finite signals.
    """
    records = [record for run in runs for record in run.records]
    for record in records:
        finite = _finite(record)
        for signal in (POOLED[name] for name in TABLE_FEATURES):
            if len(record.signals[signal][finite].unique()) == 1:
                raise ConfigError(
                    f"The signal {signal} is constant in {record.label}: it cannot explain anything; leave that run "
                    "out, or record it anew with A and B trained (lora.freeze_a=false)."
                )
    if (usable := sum(bool(_finite(record).any()) for record in records)) < MIN_RECORDS:
        raise ConfigError(
            f"{usable} of {len(records)} records have finite signals and {MIN_RECORDS} are needed: record more rounds "
            "or runs (num_server_rounds, seed), at a lower train.lr where training diverges."
        )


def make_rows(runs: Sequence[Run], targets: Mapping[str, Tensor], table: MergeTable) -> Rows:
    """Join signals and targets.

    Parameters
    ----------
    runs : Sequence[Run]
        Runs with their records.
    targets : Mapping[str, Tensor]
        Learned weights, float64 [clients, layers], by the digest of their record.
    table : MergeTable
        Its quantiles bound the bins; its weights are not used.

    Returns
    -------
    Rows
        Ordered by run, record, client and layer; of signals that :func:`check_signals` lets through.

    Raises
    ------
    ConfigError
        If the target is constant.
    """
    federations = list(dict.fromkeys(run.federation for run in runs))
    federation_of = [federations.index(run.federation) for run in runs for _ in run.records]
    parts = [_part(run, record, targets[record.digest], table) for run in runs for record in run.records]
    sizes = [len(part.target) for part in parts]
    features, target = (np.concatenate([getattr(part, name) for part in parts]) for name in ("features", "target"))
    if target.std() < NO_SPREAD:
        raise ConfigError("The target is constant: all learned weights are uniform, so there is nothing to explain.")
    varies = np.ptp(features, axis=0) > 0
    groups, grouped_by = np.repeat(federation_of, sizes), "federations"
    if len(np.unique(groups)) == 1:
        groups, grouped_by = np.repeat(np.arange(len(parts)), sizes), "rounds"
    return Rows(
        features=features[:, varies],
        names=tuple(name for name, kept in zip(FEATURES, varies, strict=True) if kept),
        constant=tuple(name for name, kept in zip(FEATURES, varies, strict=True) if not kept),
        target=target,
        groups=groups,
        grouped_by=grouped_by,
        bins=np.concatenate([part.bins for part in parts]),
        origins=tuple(origin for part in parts for origin in part.origins),
        not_finite=sum(part.not_finite for part in parts),
    )


def pool_positions(signal: Tensor, finite: Tensor) -> NDArray[np.float64]:
    """Place values in the pool of those that count: (rank - 1/2) / number, equal values at their mean rank.

    Parameters
    ----------
    signal : Tensor, [clients, layers]
        A signal.
    finite : Tensor, bool, [clients, layers]
        Which values count.

    Returns
    -------
    ndarray, float64, [values that count]
        Positions in (0, 1).
    """
    pool = signal[finite].numpy()
    positions: NDArray[np.float64] = (rankdata(pool) - 0.5) / max(1, len(pool))
    return positions


def _part(run: Run, record: Record, weights: Tensor, table: MergeTable) -> _Part:
    """Make the rows of a record, clients first."""
    signals, finite = record.signals, _finite(record)
    chosen = finite.numpy()
    columns = [pool_positions(signals[signal], finite) for signal in POOLED.values()]
    columns += [np.broadcast_to(values, chosen.shape)[chosen] for values in _broad_features(run, record)]
    score_a, score_b = signals["score-a"].double(), signals["score-b"].double()
    pool = scores_that_count(score_a, score_b)  # as in lora_merge_weights
    bins = torch.stack([score_bins(score_b, pool, table.quantiles_b), score_bins(score_a, pool, table.quantiles_a)], -1)
    names = [layer.name for layer in lora_layers(run.layout)]
    origins = [(record.label, client, name) for client in record.clients for name in names]
    return _Part(
        features=np.stack(columns, axis=1).astype(np.float64),
        target=(weights * len(record.clients)).numpy()[chosen],
        bins=bins.numpy()[chosen],
        origins=[origin for origin, kept in zip(origins, chosen.ravel(), strict=True) if kept],
        not_finite=int((~chosen).sum()),
    )


def _finite(record: Record) -> Tensor:
    """Tell where a record's signals are all finite and no score is negative, bool [clients, layers]."""
    finite = scores_that_count(record.signals["score-a"], record.signals["score-b"])
    for signal in (*POOLED.values(), "label-entropy"):
        finite = finite & torch.isfinite(record.signals[signal])
    return finite


def _broad_features(run: Run, record: Record) -> list[NDArray[np.float64]]:
    """Features that are the same for all layers, or for all clients; each broadcasts to [clients, layers]."""
    places = [layer_place(layer.name) for layer in lora_layers(run.layout)]
    kinds = list(dict.fromkeys(kind for _, kind in places))
    counts = np.array(record.num_examples, dtype=np.float64)[:, None]
    return [
        counts / counts.mean(),
        record.signals["label-entropy"].double().numpy(),
        np.array([float(depth) for depth, _ in places]),
        np.array([float(kinds.index(kind)) for _, kind in places]),
        np.array([float(len(record.clients))]),
    ]
