"""One cell: one real run, and what is kept of it."""

import shutil

from benchmarks.study.cells import Cell, clients_of, config_of, run_config_of
from benchmarks.study.results import CellResult
from benchmarks.study.study import Study
from tools.results import FAILED, Store, run_folder_in
from tools.running import Runner


def run_cell(runner: Runner, study: Study, cell: Cell, store: Store[CellResult]) -> CellResult:
    """Run a cell and say how it ended.

    Parameters
    ----------
    runner : Runner
        Carries runs out.
    study : Study
        The study.
    cell : Cell
        The cell, with its tuned values.
    store : Store
        Where the run folder goes. Its adapter is deleted in the end: running the cell again makes the same one.

    Returns
    -------
    CellResult
        What to keep.
    """
    runs_dir = store.new_runs_dir(cell.key)
    result = runner.run(_planned(study, cell), run_config_of(study, cell), runs_dir)
    if result.finished and (folder := run_folder_in(runs_dir)) is not None:
        shutil.rmtree(folder / "adapter", ignore_errors=True)
    return result


def _planned(study: Study, cell: Cell) -> CellResult:
    """Note what is known of a cell before its run."""
    return CellResult(
        key=cell.key,
        setting=cell.setting,
        method=cell.method,
        seed=cell.seed,
        clients=clients_of(study, cell),
        values=dict(cell.values),
        config=config_of(study, cell),
        status=FAILED,
    )
