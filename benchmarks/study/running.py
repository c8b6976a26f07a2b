"""One cell: one run through ``flwr run``, and what is kept of how it ended."""

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from benchmarks.study.cells import Cell, clients_of, config_of, run_config_of, without_folder
from benchmarks.study.results import FAILED, FINISHED, REFUSED, CellResult, Store, measured, run_folder_in
from benchmarks.study.study import Study
from task.errors import ConfigError, PetalwiseError
from tools.simulation import RunOutcome

APP = Path(__file__).resolve().parents[2]
APP_FILES = ("client_app", "server_app", "strategies", "task", "conf", "pyproject.toml")
"""What a run executes; a change elsewhere does not make it dirty."""
RUN_SECONDS = 3600.0
"""How long a run may take; those of the studies here take some minutes on two cores."""
STOPS = "The run stops: "


class Link(Protocol):
    """What is used of :class:`tools.simulation.SimulationSuperLink`."""

    def run(
        self,
        app: Path,
        *,
        run_config: Sequence[str],
        clients: int,
        runs_dir: Path,
        timeout: float | None,
        output: None,
    ) -> RunOutcome:
        """Run an app to its end."""
        ...


def run_cell(link: Link, study: Study, cell: Cell, store: Store) -> tuple[CellResult, bool]:
    """Run a cell and say how it ended.

    Parameters
    ----------
    link : Link
        A SuperLink.
    study : Study
        The study.
    cell : Cell
        The cell, with its tuned values.
    store : Store
        Where the run folder goes. Its adapter is deleted in the end: running the cell again makes the same one.

    Returns
    -------
    result : CellResult
        What to keep.
    lost : bool
        Whether the SuperLink is of no use any more.
    """
    runs_dir, began = store.new_runs_dir(cell.key), time.monotonic()
    result = _blank(study, cell)
    config = _write_run_config(study, cell, runs_dir)
    try:
        outcome = link.run(
            APP, run_config=[str(config)], clients=result.clients, runs_dir=runs_dir, timeout=RUN_SECONDS, output=None
        )
    except PetalwiseError as error:
        refused = isinstance(error, ConfigError)
        seconds = round(time.monotonic() - began, 1)
        status = REFUSED if refused else FAILED
        return replace(result, status=status, reason=str(error), seconds=seconds), not refused
    ended = _finished if outcome.completed else _unfinished
    return replace(result, seconds=round(outcome.seconds, 1), **ended(outcome, runs_dir)), False


def git_state() -> tuple[str, bool]:
    """Return the checkout's commit, and whether files of the app differ from it; ("", True) without git."""
    git = shutil.which("git") or "git"
    try:
        answers = [
            subprocess.run([git, *command], cwd=APP, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *APP_FILES])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "", True
    return answers[0], bool(answers[1])


def _blank(study: Study, cell: Cell) -> CellResult:
    """Note what is known of a cell before its run."""
    commit, dirty = git_state()
    return CellResult(
        key=cell.key,
        setting=cell.setting,
        method=cell.method,
        seed=cell.seed,
        clients=clients_of(study, cell),
        values=dict(cell.values),
        config=config_of(study, cell),
        status=FAILED,
        commit=commit,
        dirty=dirty,
    )


def _write_run_config(study: Study, cell: Cell, runs_dir: Path) -> Path:
    """Write a cell's run config as a file, which takes quotes of any kind."""
    pairs = {**run_config_of(study, cell), "runs-dir": str(runs_dir.resolve())}
    text = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in pairs.items())
    path = runs_dir / "run-config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _finished(outcome: RunOutcome, runs_dir: Path) -> dict[str, Any]:
    """Read what a completed run has measured and delete its adapter."""
    folder = run_folder_in(runs_dir)
    if folder is None:
        return {"reason": f"Run {outcome.run_id} completed but left no run folder in {runs_dir}."}
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, dict)
    ran = without_folder({str(key): value for key, value in config.items()})
    found = {**measured(folder / "metrics.jsonl"), "config": ran}
    if found["final"] is None:
        return {**found, "reason": "The server evaluated nothing after the last round."}
    return {**found, "status": FINISHED}


def _unfinished(outcome: RunOutcome, runs_dir: Path) -> dict[str, Any]:
    """Keep the log of a run that did not complete, and find the reason in it."""
    (runs_dir / "log.txt").write_text(outcome.log, encoding="utf-8")
    stopped = outcome.log.partition(STOPS)[2].splitlines()
    folder = run_folder_in(runs_dir)
    started = folder is not None and (folder / "metrics.jsonl").exists()
    status = REFUSED if stopped and not started else FAILED
    return {"status": status, "reason": stopped[0] if stopped else outcome.summary}
