"""Real runs one after another, and what is kept of how each ended."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from omegaconf import OmegaConf

from task.errors import ConfigError, PetalwiseError
from tools.configs import without_folder
from tools.results import FAILED, FINISHED, REFUSED, R, measured, run_folder_in
from tools.simulation import RunOutcome

APP = Path(__file__).resolve().parents[1]
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


class Runner:
    """Runs on one SuperLink, which is started for the first of them, and anew where it was lost.

    Parameters
    ----------
    open_link : callable
        Makes a SuperLink.
    """

    def __init__(self, open_link: Callable[[], AbstractContextManager[Link]]) -> None:
        self._open_link = open_link
        self._stack = ExitStack()
        self._link: Link | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self._close()
        return False

    def run(self, planned: R, run_config: Mapping[str, Any], runs_dir: Path) -> R:
        """Run to the end and say how that was.

        Parameters
        ----------
        planned : RunResult
            What is known before.
        run_config : Mapping[str, Any]
            Flower's run config, without ``runs-dir``.
        runs_dir : Path
            An empty folder, for the run folder.

        Returns
        -------
        RunResult
            What to keep.

        Raises
        ------
        PetalwiseError
            If no SuperLink can be started.
        """
        if self._link is None:
            self._link = self._stack.enter_context(self._open_link())
        config, began = _write_run_config(run_config, runs_dir), time.monotonic()
        commit, dirty = git_state()
        result = replace(planned, status=FAILED, commit=commit, dirty=dirty)
        try:
            outcome = self._link.run(
                APP,
                run_config=[str(config)],
                clients=result.clients,
                runs_dir=runs_dir,
                timeout=RUN_SECONDS,
                output=None,
            )
        except PetalwiseError as error:
            refused = isinstance(error, ConfigError)
            if not refused:
                self._close()
            seconds = round(time.monotonic() - began, 1)
            return replace(result, status=REFUSED if refused else FAILED, reason=str(error), seconds=seconds)
        ended = _finished if outcome.completed else _unfinished
        return replace(result, seconds=round(outcome.seconds, 1), **ended(outcome, runs_dir))

    def _close(self) -> None:
        self._link = None
        self._stack.close()


def git_state() -> tuple[str, bool]:
    """Return the checkout's commit, and whether files of the app differ from it; ("", True) without git."""
    git = shutil.which("git") or "git"
    try:
        answers = [
            subprocess.run([git, *command], cwd=APP, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", *APP_FILES])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "", True
    return answers[0], bool(answers[1])


def _write_run_config(run_config: Mapping[str, Any], runs_dir: Path) -> Path:
    """Write a run config as a file, which takes quotes of any kind."""
    pairs = {**run_config, "runs-dir": str(runs_dir.resolve())}
    text = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in pairs.items())
    path = runs_dir / "run-config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _finished(outcome: RunOutcome, runs_dir: Path) -> dict[str, Any]:
    """Read what a completed run has measured."""
    folder = run_folder_in(runs_dir)
    if folder is None:
        return {"reason": f"Run {outcome.run_id} completed but left no run folder in {runs_dir}."}
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
