"""The jobs of a sweep: what is run, what is kept, what is run again."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from server_app.compose import FIRST_CLASS_KEYS, check_composed
from server_app.resuming import container
from task.errors import ConfigError
from tools.configs import composed_config, same_config, without_folder
from tools.results import FAILED, REFUSED, RunResult, Store
from tools.running import Runner

NAME_LENGTH = 80
"""How much of the overrides the name of a job's files shows."""


@dataclass(kw_only=True)
class JobResult(RunResult):
    """How the run of a job ended."""

    overrides: list[str] = field(default_factory=list)
    """The job's Hydra overrides."""


class Sweep:
    """Runs the jobs that a sweeper hands out, or takes what is kept of them.

    Parameters
    ----------
    runner : Runner
        Carries runs out.
    store : Store
        Where results and run folders are kept; other sweeps may have theirs there too.
    clients : int
        Number of simulated clients.
    """

    def __init__(self, runner: Runner, store: Store[JobResult], clients: int) -> None:
        self.results: list[JobResult] = []
        self._runner, self._store, self._clients = runner, store, clients
        self._default = composed_config({})

    def job(self, composed: DictConfig, choice: str, overrides: list[str]) -> float:
        """Do a job, unless it is done.

        Parameters
        ----------
        composed : DictConfig
            The config of the job.
        choice : str
            What ``strategy=`` was given.
        overrides : list of str
            The job's overrides.

        Returns
        -------
        float
            The final accuracy on the server's test images; NaN of a run that did not finish.
        """
        planned = self._planned(overrides)
        try:
            planned.config = without_folder(container(check_composed(composed, choice).yaml))
        except ConfigError as error:
            result = planned
            result.status, result.reason = REFUSED, str(error)
        else:
            kept = self._kept(planned)
            result = kept or self._run(planned)
        self.results.append(result)
        print(_line(len(self.results), result), flush=True)
        return math.nan if result.final is None or not result.finished else result.final

    def _planned(self, overrides: list[str]) -> JobResult:
        seed = int(values_of(overrides).get("seed", self._default["seed"]))
        key = job_key(overrides, self._clients)
        return JobResult(key=key, seed=seed, clients=self._clients, config={}, status=FAILED, overrides=overrides)

    def _kept(self, planned: JobResult) -> JobResult | None:
        """Return the finished result of the job's config, if there is one."""
        kept = self._store.read(planned.key)
        same = kept is not None and kept.finished and same_config(kept.config, planned.config, self._default)
        return kept if same else None

    def _run(self, planned: JobResult) -> JobResult:
        run_config = run_config_of(planned.overrides)
        result = self._runner.run(planned, run_config, self._store.new_runs_dir(planned.key))
        self._store.write(result)
        return result


def values_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse overrides to values by key or group."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.key_or_group: override.value() for override in parsed}


def run_config_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Put a job's overrides into Flower's run config: the first-class keys by name, all else as ``overrides``."""
    run_config: dict[str, Any] = {}
    others = []
    for override, (name, value) in zip(overrides, values_of(overrides).items(), strict=True):
        key = name.replace("_", "-")
        if key in FIRST_CLASS_KEYS and isinstance(value, str | int):
            run_config[key] = value
        else:
            others.append(override)
    return {**run_config, "overrides": " ".join(others)}


def job_key(overrides: Sequence[str], clients: int) -> str:
    """Name a job's files: the beginning of its overrides, and a digest of all and of the number of clients."""
    ordered = sorted(overrides)
    digest = hashlib.sha256(json.dumps([ordered, clients]).encode()).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9.=,-]+', '-', ','.join(overrides))[:NAME_LENGTH]}-{digest}"


def _line(number: int, result: JobResult) -> str:
    what = f"[{number}] {' '.join(result.overrides)}"
    if not result.finished:
        return f"{what}: {result.status}: {result.reason}"
    dropped = f", dropped replies: {result.dropped}" if result.dropped else ""
    return f"{what}: {100 * (result.final or 0.0):.1f} %, took {result.seconds:.0f} s{dropped}"
