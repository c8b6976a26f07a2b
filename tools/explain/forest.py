"""A forest that predicts target weights from signals, how well it does, and what SHAP says it goes by."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestRegressor
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold

from task.seeding import derive_seed
from tools.explain.rows import TABLE_FEATURES, Rows

MAX_FOLDS = 5
"""Most parts that the groups are split into."""
NUM_TREES = 100
MAX_DEPTH = 8
"""Bounds the time of TreeSHAP, which grows with leaves and the square of the depth."""
MIN_LEAF = 10
"""Fewest rows of a leaf: targets are noisy."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """A forest's R2, and its SHAP values on all rows."""

    r2: float
    """R2 of predictions for groups that the forest was not fitted on, over all rows; may be negative."""
    r2_by_fold: tuple[float, ...]
    """R2 within each part left out."""
    r2_scores: float
    """The same as ``r2``, by s_A and s_B alone, which is all that a merge table goes by."""
    r2_fitted: float
    """R2 on the rows that the forest was fitted on."""
    base: float
    """SHAP's expected value."""
    values: NDArray[np.float64]
    """SHAP values, [rows, features]."""

    def importance(self, names: tuple[str, ...]) -> dict[str, float]:
        """Mean |SHAP value| by feature, the largest first."""
        mean = np.abs(self.values).mean(axis=0)
        return {names[i]: float(mean[i]) for i in np.argsort(-mean, kind="stable")}


def make_forest(seed: int) -> RandomForestRegressor:
    """Make the regressor: trees that average noise away, and that need no scaling of signals."""
    return RandomForestRegressor(
        n_estimators=NUM_TREES,
        max_depth=MAX_DEPTH,
        min_samples_leaf=MIN_LEAF,
        max_features=1 / 2,
        random_state=derive_seed(seed, "explain", "forest") % 2**32,
    )


def held_out_predictions(
    rows: Rows, features: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
    """Predict every row by a forest that saw nothing of its group.

    Parameters
    ----------
    rows : Rows
        Rows of at least two groups.
    features : ndarray, float64, [rows, features]
        What to predict by.
    seed : int
        Seed of the forests.

    Returns
    -------
    tuple[ndarray, list[ndarray]]
        Predictions, float64 [rows], and the indices of the rows of each part left out.
    """
    splitter = GroupKFold(min(MAX_FOLDS, len(np.unique(rows.groups))))
    predicted, parts = np.empty_like(rows.target), []
    for fitted, left_out in splitter.split(features, rows.target, rows.groups):
        forest = make_forest(seed).fit(features[fitted], rows.target[fitted])
        predicted[left_out] = forest.predict(features[left_out])
        parts.append(left_out)
    return predicted, parts


def explain(rows: Rows, seed: int) -> Explanation:
    """Fit a forest on all rows, measure it on rows left out, and take its SHAP values.

    Parameters
    ----------
    rows : Rows
        Signals and targets.
    seed : int
        Seed of the forests.

    Returns
    -------
    Explanation
        R2 and SHAP values.
    """
    import shap  # takes seconds, and comes with an extra only

    predicted, parts = held_out_predictions(rows, rows.features, seed)
    by_scores, _ = held_out_predictions(rows, np.stack([rows.column(name) for name in TABLE_FEATURES], axis=1), seed)
    forest = make_forest(seed).fit(rows.features, rows.target)
    explainer = shap.TreeExplainer(forest)
    values = np.asarray(explainer.shap_values(rows.features), dtype=np.float64)
    return Explanation(
        r2=float(r2_score(rows.target, predicted)),
        r2_by_fold=tuple(float(r2_score(rows.target[part], predicted[part])) for part in parts),
        r2_scores=float(r2_score(rows.target, by_scores)),
        r2_fitted=float(r2_score(rows.target, forest.predict(rows.features))),
        base=float(np.ravel(explainer.expected_value)[0]),
        values=values,
    )
