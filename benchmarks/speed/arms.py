"""The arms of a comparison: this app through ``flwr run``, other Flower apps, and a plain loop; each run by run."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from safetensors.torch import load_file

from benchmarks.speed.arm_run import ROUNDS, ArmRun, mean_of_each
from benchmarks.speed.processor import RoundWatch
from benchmarks.speed.settings import Setting
from task.config import task_to_json
from task.errors import PetalwiseError
from task.model import canonical_name
from tools.processes import MarkedProcesses
from tools.simulation import SimulationSuperLink

APP = Path(__file__).resolve().parents[2]
RUN_SECONDS = 3600.0
"""How long a run may take; minutes on two cores, and thrice as long where three arms share them."""
SHARED = ("task", "strategies", "conf")
"""Folders of the app that the others' bundles take along."""
WHOLE = (*SHARED, "client_app", "server_app", "tools", "benchmarks/speed")
"""Those that the plain loop needs."""

PYPROJECT = """
[project]
name = "{name}"
version = "1.0.0"
description = "An arm of a benchmark"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41.0"]

[tool.flwr.app]
publisher = "petalwise"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["**/*.py", "task/weights/*.json", "conf/**/*.yaml", "LICENSE"]

[tool.flwr.app.components]
serverapp = "{name}_app:server"
clientapp = "{name}_app:client"

[tool.flwr.app.config]
{entries}
"""


class Arm(Protocol):
    """One way to run a setting."""

    @property
    def processes(self) -> MarkedProcesses:
        """All that it runs in."""
        ...

    def run(self, setting: Setting, folder: Path) -> ArmRun:
        """Run it once, from the start; rounds that have ended are told in an empty folder."""
        ...


class FloorArm:
    """The plain loop, in processes of its own."""

    def __init__(self) -> None:
        self.processes = MarkedProcesses("PETALWISE_ARM", uuid4().hex)

    def run(self, setting: Setting, folder: Path) -> ArmRun:
        """Run it once, from the start."""
        command = [sys.executable, "-m", "benchmarks.speed.floor", setting.to_json(), str(folder)]
        environment = {**os.environ, self.processes.name: self.processes.value}
        try:
            done = subprocess.run(command, cwd=APP, env=environment, capture_output=True, encoding="utf-8", check=False)
        finally:
            self.processes.kill()  # its own, should it have been ended
        if done.returncode:
            raise PetalwiseError(f"The plain loop ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        return ArmRun.read(folder)


class LinkArm:
    """An arm that runs on a SuperLink of its own.

    Parameters
    ----------
    link : SimulationSuperLink
        Where it runs.
    """

    def __init__(self, link: SimulationSuperLink) -> None:
        self._link = link

    @property
    def processes(self) -> MarkedProcesses:
        """The SuperLink and all that it has started."""
        return self._link.processes


class AppArm(LinkArm):
    """The app, through ``flwr run``."""

    def run(self, setting: Setting, folder: Path) -> ArmRun:
        """Run it once, from the start."""
        with RoundWatch(self.processes, folder, (1, setting.rounds - 1)) as watch:
            _completed(self._link, APP, setting.run_config, setting.clients, folder)
        (run_folder,) = folder.iterdir()
        reports = [json.loads(line) for line in (run_folder / ROUNDS).read_text(encoding="utf-8").splitlines()]
        saved = load_file(run_folder / "adapter" / "adapter_model.safetensors")
        seconds = [report["seconds"] for report in reports[1:]][setting.steady]
        adapter = {canonical_name(name): value for name, value in saved.items()}
        rounds = [taken["total"] + taken["keep"] for taken in seconds]
        return ArmRun(rounds, mean_of_each(seconds), adapter, watch.cores_used())


class TutorialArm(LinkArm):
    """The Flower app in :mod:`benchmarks.speed.apps.tutorial`."""

    def run(self, setting: Setting, folder: Path) -> ArmRun:
        """Run it once, from the start."""
        run = setting.compose()
        config: dict[str, str | float] = {
            "task": task_to_json(run.settings),
            "rounds": setting.rounds,
            "clients": setting.clients,
            "fraction-train": run.strategy.fraction_train,
        }
        out = run_other_app(self._link, "tutorial", config, setting.clients, folder)
        ended: list[float] = json.loads((out / "ended.json").read_text(encoding="utf-8"))
        return ArmRun([b - a for a, b in pairwise(ended[1:])], {}, load_file(out / "adapter.safetensors"))


class BareArm(LinkArm):
    """The Flower app in :mod:`benchmarks.speed.apps.bare`."""

    def run(self, setting: Setting, folder: Path) -> ArmRun:
        """Run it once, from the start."""
        config = {"setting": setting.to_json()}
        return ArmRun.read(run_other_app(self._link, "bare", config, setting.clients, folder, WHOLE))


class EmptyArm(LinkArm):
    """The Flower app in :mod:`benchmarks.speed.apps.empty`, with as many values and clients."""

    def __init__(self, link: SimulationSuperLink, size: int) -> None:
        super().__init__(link)
        self._size = size

    def run(self, setting: Setting, folder: Path) -> ArmRun:
        """Run it once, from the start."""
        cohort = round(setting.compose().strategy.fraction_train * setting.clients)
        config = {"size": self._size, "rounds": 10, "clients": setting.clients, "cohort": cohort}
        out = run_other_app(self._link, "empty", config, setting.clients, folder)
        rounds = json.loads((out / "rounds.json").read_text(encoding="utf-8"))[1:]
        if setting.one_phase:
            rounds = [{"train": taken["train"], "evaluate": 0.0} for taken in rounds]
        return ArmRun([sum(taken.values()) for taken in rounds], mean_of_each(rounds), {})


def run_alone(arm: Arm, setting: Setting) -> ArmRun:
    """Run an arm once, with the machine to itself."""
    with tempfile.TemporaryDirectory(prefix="plw-") as folder:
        return arm.run(setting, Path(folder))


def run_other_app(
    link: SimulationSuperLink,
    name: str,
    config: Mapping[str, str | float],
    clients: int,
    scratch: Path,
    packages: Sequence[str] = SHARED,
) -> Path:
    """Put an app of :mod:`benchmarks.speed.apps` and what it imports into a folder of its own, and run it.

    Parameters
    ----------
    link : SimulationSuperLink
        Where it runs.
    name : str
        Its module.
    config : Mapping[str, str or float]
        Its run config; ``runs-dir`` is added.
    clients : int
        Number of simulated nodes.
    scratch : Path
        An empty folder.
    packages : Sequence[str], default :data:`SHARED`
        Folders that it takes along.

    Returns
    -------
    Path
        The folder in which the app has written what it found.
    """
    out = scratch / "out"
    out.mkdir()
    app = write_app(name, {**config, "runs-dir": str(out)}, scratch / "app", packages)
    _completed(link, app, [], clients, out)
    return out


def write_app(name: str, config: Mapping[str, str | float], folder: Path, packages: Sequence[str] = SHARED) -> Path:
    """Put an app of :mod:`benchmarks.speed.apps`, what it imports and its run config into a folder; return it."""
    for package in packages:
        shutil.copytree(APP / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).parent / "apps" / f"{name}.py", folder / f"{name}_app.py")
    shutil.copy(APP / "LICENSE", folder)
    entries = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
    (folder / "pyproject.toml").write_text(PYPROJECT.format(name=name, entries=entries), encoding="utf-8")
    return folder


def _completed(link: SimulationSuperLink, app: Path, run_config: list[str], clients: int, runs_dir: Path) -> None:
    """Run an app to its end, or raise a PetalwiseError with the end of its log."""
    outcome = link.run(app, run_config=run_config, clients=clients, runs_dir=runs_dir, timeout=RUN_SECONDS, output=None)
    if not outcome.completed:
        raise PetalwiseError(outcome.summary)
