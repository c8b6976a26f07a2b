"""Runs without Ray and a SuperLink: each a process of its own with one thread, as ``make debug`` runs them.

The adapters are those of ``flwr run`` bit for bit (``tests/test_e2e.py``); Flower's start-up, about 50 s, is saved, but
clients train one after another.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from client_app.kept import STATE_VARIABLE
from task.backbone import BACKBONES_VARIABLE
from task.data.sources import DATA_VARIABLE
from tools.simulation import RunOutcome


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
        command = [sys.executable, "-m", "tools.debug", "--clients", str(clients), "--run-config", run_config[0]]
        with tempfile.TemporaryDirectory(prefix="plw-") as state:
            found = {DATA_VARIABLE: self.data, BACKBONES_VARIABLE: self.backbones, STATE_VARIABLE: state}
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in found.items() if v}}
            try:
                ended = subprocess.run(  # noqa: S603 - a command of this environment
                    command, cwd=app, env=environment, capture_output=True, text=True, timeout=timeout
                )
            except subprocess.TimeoutExpired:
                return RunOutcome(0, "finished:failed", "it took too long", time.monotonic() - began, "")
        seconds, log = time.monotonic() - began, ended.stdout + ended.stderr
        if ended.returncode == 0:
            return RunOutcome(0, "finished:completed", "", seconds, log)
        return RunOutcome(0, "finished:failed", (log.strip().splitlines() or [""])[-1], seconds, log)
