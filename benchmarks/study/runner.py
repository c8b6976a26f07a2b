"""Running what is missing of a study, in an order in which partial results are of use."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase

from benchmarks.study.cells import Cell, compared_cells, config_of, shown, tuning_cells
from benchmarks.study.ledger import Ledger
from benchmarks.study.results import CellResult
from benchmarks.study.running import run_cell
from task.errors import ConfigError
from tools.running import Link, Runner


class StudyRunner:
    """Runs the cells of a study that are not finished, all on one SuperLink.

    Parameters
    ----------
    ledger : Ledger
        The study and its results.
    open_link : callable
        Makes a SuperLink; called for the first cell to run, and again where one was lost.
    only : str, default "*"
        Shell pattern of the keys of the cells to run; tuning cells that these need are run too.
    minutes : float or None, default None
        Start no cell after so many minutes.
    """

    def __init__(
        self,
        ledger: Ledger,
        open_link: Callable[[], AbstractContextManager[Link]],
        only: str = "*",
        minutes: float | None = None,
    ) -> None:
        self.ledger, self.study = ledger, ledger.study
        self._runner, self._only, self._minutes = Runner(open_link), only, minutes
        self._began = time.monotonic()
        self._seconds: list[float] = []

    def cells(self) -> list[Cell]:
        """List the selected cells in the order in which they are run: those that choose options, then by seed.

        Raises
        ------
        ConfigError
            If no cell is selected, or the app refuses the config of one.
        """
        compared = [cell for cell in compared_cells(self.study) if self._selected(cell)]
        needed = {cell.method for cell in compared}
        tuning = [cell for cell in tuning_cells(self.study) if cell.method in needed or self._selected(cell)]
        if not (found := [*tuning, *compared]):
            example = compared_cells(self.study)[0].key
            raise ConfigError(f"--only {self._only!r} matches none of the cells, which are named like {example}.")
        for cell in found:
            config_of(self.study, cell)
        return found

    def run(self) -> bool:
        """Run what is missing, and try again what failed before; a line is printed for every cell.

        Returns
        -------
        bool
            Whether no cell that was tried failed.

        Raises
        ------
        ConfigError
            As :meth:`cells`.
        PetalwiseError
            If no SuperLink can be started.
        """
        _say(f"{self.study.name}: composing the configs of all cells")
        selected, good = self.cells(), True
        left = self._left(selected)
        _say(f"{self.study.name}: {len(selected) - left} of {len(selected)} cells are finished already")
        with self._runner:
            for number, cell in enumerate(selected, start=1):
                if self.ledger.done(cell):  # asked anew, since tuning may turn out otherwise than before
                    continue
                if self._minutes is not None and time.monotonic() - self._began >= 60 * self._minutes:
                    _say(f"Time is over; the same command goes on with the {self._left(selected)} cells left")
                    break
                good &= self._try(cell, f"[{number}/{len(selected)}]", selected[number:])
        return good

    def _selected(self, cell: Cell) -> bool:
        return fnmatchcase(cell.key, self._only)

    def _left(self, cells: Sequence[Cell]) -> int:
        return sum(not self.ledger.done(cell) for cell in cells)

    def _try(self, cell: Cell, number: str, later: Sequence[Cell]) -> bool:
        """Run a cell if its tuned values are known; tell whether it finished."""
        known = self.ledger.resolved(cell)
        if known is None:
            _say(f"{number} {cell.key}: not run, since no tuning run of {cell.method} could finish")
            return False
        result = run_cell(self._runner, self.study, known, self.ledger.store)
        self.ledger.store.write(result)
        self._seconds.append(result.seconds)
        _say(f"{number} {_line(known, result)}{self._time_left(self._left(later))}")
        return result.finished

    def _time_left(self, cells: int) -> str:
        """Say how long as many more cells will take, by the mean of those run so far."""
        hours, minutes = divmod(round(cells * sum(self._seconds) / len(self._seconds) / 60), 60)
        about = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
        return f"; {cells} more, about {about}" if cells else ""


def _say(line: str) -> None:
    print(line, flush=True)


def _line(cell: Cell, result: CellResult) -> str:
    what = f"{cell.key} {shown(cell.values)}" if cell.values and not cell.tuning else cell.key
    if not result.finished:
        return f"{what}: {result.status} after {result.seconds:.0f} s: {result.reason}"
    dropped = f", dropped replies: {result.dropped}" if result.dropped else ""
    return f"{what}: {100 * (result.final or 0.0):.1f} % in {result.seconds:.0f} s{dropped}"
