"""In which config keys runs differ."""

from collections.abc import Sequence

from tools.report.plots import Table
from tools.report.reading import Run

ABSENT = "(not there)"


def differences(runs: Sequence[Run]) -> Table:
    """List the keys whose values are not the same in all runs, with the value of each run.

    Parameters
    ----------
    runs : Sequence[Run]
        The runs.

    Returns
    -------
    Table
        A row per key, in the order of the first config that has it.
    """
    keys = dict.fromkeys(key for run in runs for key in run.options)
    values = {key: [str(run.options.get(key, ABSENT)) for run in runs] for key in keys}
    rows = [[key, *row] for key, row in values.items() if len(set(row)) > 1]
    return Table(["key", *(run.name for run in runs)], rows)
