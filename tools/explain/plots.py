"""shap's own plots, into files."""

from pathlib import Path

import numpy as np

from strategies.livar import MergeTable
from tools.explain.forest import Explanation
from tools.explain.rows import Rows

DOTS_PER_INCH = 120


def draw_plots(folder: Path, rows: Rows, explanation: Explanation, table: MergeTable) -> list[Path]:
    """Draw the beeswarm of all features, and the dependence of the SHAP values of s_A and s_B.

    Parameters
    ----------
    folder : Path
        Where the files go.
    rows : Rows
        Signals.
    explanation : Explanation
        SHAP values of the rows.
    table : MergeTable
        Its quantiles are drawn as lines.

    Returns
    -------
    list[Path]
        ``beeswarm.png``, ``dependence-s_A.png`` and ``dependence-s_B.png``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import shap
    from matplotlib import pyplot

    base = np.full(len(rows.target), explanation.base)
    told = shap.Explanation(explanation.values, base, rows.features, feature_names=list(rows.names))
    state = np.random.get_state()
    np.random.seed(0)
    paths = [folder / "beeswarm.png"]
    shap.plots.beeswarm(told, max_display=len(rows.names), show=False)
    pyplot.savefig(paths[-1], dpi=DOTS_PER_INCH, bbox_inches="tight")
    pyplot.close("all")
    for name, other, bounds in (("s_A", "s_B", table.quantiles_a), ("s_B", "s_A", table.quantiles_b)):
        paths.append(folder / f"dependence-{name}.png")
        shap.plots.scatter(told[:, name], color=told[:, other], show=False)
        for bound in bounds:
            pyplot.gca().axvline(bound, color="0.5", linestyle="--", linewidth=0.8)
        pyplot.savefig(paths[-1], dpi=DOTS_PER_INCH, bbox_inches="tight")
        pyplot.close("all")
    np.random.set_state(state)
    return paths
