"""What a study has found so far, and the tuned values that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.study.cells import Cell, Values, clients_of, config_of, tuning_cells
from benchmarks.study.results import CellResult
from benchmarks.study.study import Study
from tools.configs import same_config
from tools.results import Store


@dataclass(frozen=True)
class Choice:
    """The tuned values of a method.

    Parameters
    ----------
    values : Values
        Those of the highest final accuracy, of equal ones the first in the grid.
    tried : tuple of (Values, float or None)
        Final accuracy of all that were tried, in the order of the grid; None for a run that did not finish.
    edges : tuple of str
        Keys whose chosen value is the smallest or the largest of at least two tried: a better one may lie beyond.
    """

    values: Values
    tried: tuple[tuple[Values, float | None], ...]
    edges: tuple[str, ...]


class Ledger:
    """A study together with what is kept of its cells.

    Parameters
    ----------
    study : Study
        The study.
    store : Store
        Where its results are kept.
    """

    def __init__(self, study: Study, store: Store[CellResult]) -> None:
        self.study = study
        self.store = store

    def result(self, cell: Cell) -> CellResult | None:
        """Return what is kept of a cell, finished or not, if it comes from the config that the cell has now."""
        kept = self.store.read(cell.key)
        if kept is None or kept.clients != clients_of(self.study, cell):
            return None
        return kept if same_config(kept.config, config_of(self.study, cell)) else None

    def choice(self, method: str) -> Choice | None:
        """Choose the tuned values of a method; None before all have been tried, or if none could finish.

        A method that is not tuned has an empty choice.
        """
        cells = [cell for cell in tuning_cells(self.study) if cell.method == method]
        if not cells:
            return Choice((), (), ())
        results = [self.result(cell) for cell in cells]
        finals = [result.final if result is not None and result.finished else None for result in results]
        if None in results or not any(final is not None for final in finals):
            return None
        best = max(range(len(cells)), key=lambda i: -1.0 if (final := finals[i]) is None else final)
        values = cells[best].values
        tried = tuple((cell.values, final) for cell, final in zip(cells, finals, strict=True))
        grid = self.study.grid_of(method)
        return Choice(values, tried, tuple(key for key, value in values if _at_edge(value, grid[key])))

    def resolved(self, cell: Cell) -> Cell | None:
        """Fill in the tuned values of a compared cell; None while they are not known."""
        if cell.tuning:
            return cell
        choice = self.choice(cell.method)
        return None if choice is None else replace(cell, values=choice.values)

    def done(self, cell: Cell) -> bool:
        """Tell whether a cell is finished under the config that it has now."""
        known = self.resolved(cell)
        result = None if known is None else self.result(known)
        return result is not None and result.finished


def _at_edge(value: Any, tried: Sequence[Any]) -> bool:
    numbers = [other for other in tried if isinstance(other, int | float)]
    return len(numbers) > 1 and value in (min(numbers), max(numbers))
