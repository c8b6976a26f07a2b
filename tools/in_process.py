"""Runs without Ray and a SuperLink: each a process of its own with one thread, as ``make debug`` runs them.

The adapters are those of ``flwr run`` bit for bit (``tests/test_e2e.py``); Flower's start-up, about 50 s, is saved, but
clients train one after another. The libraries are imported once, by a process from which those of the runs are forked.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from client_app.kept import STATE_VARIABLE
from task.backbone import BACKBONES_VARIABLE
from task.data.sources import DATA_VARIABLE
from tools import debug
from tools.simulation import COMPLETED, RunOutcome

IMPORTED = ("server_app.app", "client_app.app", "tools.check", "task.libraries", "task.data.images")
"""What every run imports."""


@dataclass(frozen=True)
class InProcessLink:
    """Runs an app by :mod:`tools.debug`; a context manager like a SuperLink.

    Parameters
    ----------
    data, backbones : Path or None
        Where the clients find data and backbones.
    """

    data: Path | None = None
    backbones: Path | None = None

    def __enter__(self) -> "InProcessLink":
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        return False

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
        """Run an app to its end; ``runs_dir`` is in the run config, which is one TOML file."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="plw-") as state:
            found = {DATA_VARIABLE: self.data, BACKBONES_VARIABLE: self.backbones, STATE_VARIABLE: state}
            environment = {name: str(value) for name, value in found.items() if value}
            log = Path(state, "log.txt")
            arguments = ["--clients", str(clients), "--run-config", run_config[0]]
            code = _run_forked(app, arguments, environment, log, timeout)
            seconds, text = time.monotonic() - began, log.read_text(encoding="utf-8", errors="replace")
        if code is None:
            return RunOutcome(0, "finished:failed", "it took too long", seconds, text)
        if code == 0:
            return RunOutcome(0, COMPLETED, "", seconds, text)
        return RunOutcome(0, "finished:failed", (text.strip().splitlines() or [""])[-1], seconds, text)


def _run_forked(
    app: Path, arguments: Sequence[str], environment: Mapping[str, str], log: Path, timeout: float | None
) -> int | None:
    """Run :func:`tools.debug.main` in a process of its own; return its exit code, or None if it took too long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    log.touch()
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = context.Process(target=_debug, args=(app, list(arguments), variables, log))
    with _one_thread():
        process.start()
    try:
        process.join(timeout)
        return process.exitcode
    finally:
        process.kill()
        process.join()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have libraries that read it when they are imported, as in the process that is started now, use one thread."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _debug(app: Path, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """Be ``python -m tools.debug`` in an environment of its own, with its output in a file."""
    os.chdir(app)
    os.environ.clear()  # it was that of the first run
    os.environ.update(environment)
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # in order with what goes to stderr
    debug.main(arguments)
