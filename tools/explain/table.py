"""A merge table from SHAP values: base value plus mean offset per bin of the scores."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from strategies.livar import PUBLISHED_TABLE, MergeTable, read_table

QUANTILES = MergeTable(quantiles_a=PUBLISHED_TABLE.quantiles_a, quantiles_b=PUBLISHED_TABLE.quantiles_b)
"""Bounds of the bins, those of the published table; without weights."""
FLOOR = 0.01
"""Smallest weight that is written, one hundredth of a uniform share: the weights of a table must be positive."""
TEXT = """# A merge table derived by tools/explain from {origin}.
# Weights in units of 1/number of clients: 1 is a uniform share. Only their ratios matter.
quantiles_a: {a}   # bounds of the columns, as quantiles of all clients' and layers' scores of A
quantiles_b: {b}   # bounds of the rows, as quantiles of the scores of B
weights:                   # rows: s_B below, between, above its bounds; columns: s_A likewise
{weights}
"""


@dataclass(frozen=True, eq=False)
class DerivedTable:
    """A merge table, and how many rows are behind each of its weights."""

    table: MergeTable
    """The table, its weights not below :data:`FLOOR`."""
    counts: NDArray[np.int64]
    """Number of rows by bin, [rows by score of B, columns by score of A]."""
    floored: int
    """How many weights were raised to :data:`FLOOR`."""


def derive_table(
    base: float, offset_a: NDArray[np.float64], offset_b: NDArray[np.float64], bins: NDArray[np.int64]
) -> DerivedTable:
    """Average the SHAP offsets of the scores per bin.

    A bin without rows gets the mean offset of s_A in its column plus that of s_B in its row.

    Parameters
    ----------
    base : float
        SHAP's expected value.
    offset_a, offset_b : ndarray, float64, [rows]
        SHAP values of s_A and of s_B.
    bins : ndarray, int64, [rows, 2]
        Row (by score of B) and column (by score of A) of the table.

    Returns
    -------
    DerivedTable
        Base value plus mean offset per bin, rounded to six digits.
    """
    shape = (len(QUANTILES.quantiles_b) + 1, len(QUANTILES.quantiles_a) + 1)
    weights, counts = np.empty(shape), np.zeros(shape, dtype=np.int64)
    for row, column in np.ndindex(shape):
        in_row, in_column = bins[:, 0] == row, bins[:, 1] == column
        inside = in_row & in_column
        counts[row, column] = inside.sum()
        here = (inside, inside) if inside.any() else (in_column, in_row)
        weights[row, column] = base + _mean(offset_a[here[0]]) + _mean(offset_b[here[1]])
    floored = int((weights < FLOOR).sum())
    values = [[round(float(value), 6) for value in line] for line in np.maximum(weights, FLOOR)]
    return DerivedTable(replace(QUANTILES, weights=values), counts, floored)


def write_table(path: Path, table: MergeTable, origin: str) -> None:
    """Write a table in the form of ``conf/livar_table/published.yaml``, and read it back as ``strategy.table`` would.

    Parameters
    ----------
    path : Path
        Ends in ``.yaml``.
    table : MergeTable
        The table.
    origin : str
        What it was derived from, for its first line.

    Raises
    ------
    ConfigError
        If it is no table.
    """
    weights = "\n".join(f"  - [{', '.join(f'{weight:.6f}' for weight in row)}]" for row in table.weights)
    path.write_text(
        TEXT.format(a=table.quantiles_a, b=table.quantiles_b, weights=weights, origin=origin), encoding="utf-8"
    )
    read_table(str(path))


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0
