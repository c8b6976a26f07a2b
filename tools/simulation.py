"""Runs of a Flower app in simulation, one after another, each followed to its true end."""

import json
import math
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from task.errors import ConfigError
from tools.processes import MarkedProcesses
from tools.superlink import SuperLinkProcess, superlink_process

COMPLETED = "finished:completed"
POLL_SECONDS = 0.5
LAST_LOG_SECONDS = 30.0
"""How long reading the log of a stopped run may take."""
ERROR_LINES = 5
"""How many error lines of the log the reason of a failure repeats."""

_PAIR = re.compile(r"""(\S+?)=('[^']*'|"[^"]*"|\S+)""")  # what `flwr run` takes for a pair; it ignores all else
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_BLANK = re.compile(r"\s*([A-Z]+\s*:)?\s*")  # nothing, or a level without a message
_ERROR = re.compile(r"(ERROR|CRITICAL)\s*:|[A-Za-z_][\w.]*(Error|Exception)\b")
_TOLD = re.compile(r"(ERROR\s*:\s*The run stops|task\.errors\.\w+): ")
_NOTHING = re.compile(r"Exit Code:|Traceback \(most recent|Simulation raised an exception")


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Parameters
    ----------
    run_id : int
        Flower's id of the run.
    status : str
        Flower's last word, such as ``finished:completed``.
    details : str
        Why it did not complete; empty if it did.
    seconds : float
        Time from the submission to the end.
    log : str
        Everything the run logged, without colours and blank lines.
    """

    run_id: int
    status: str
    details: str
    seconds: float
    log: str

    @property
    def completed(self) -> bool:
        """Whether the run went through to its end."""
        return self.status == COMPLETED

    @property
    def summary(self) -> str:
        """One message that says how the run ended and, if badly, repeats the last error lines of its log."""
        message = f"Run {self.run_id} ended as {self.status} after {self.seconds:.0f} s"
        if self.completed:
            return message
        errors = [line for line in self.log.splitlines() if _ERROR.match(line) and not _NOTHING.search(line)]
        errors = [line for line in errors if _TOLD.sub("", line, count=1) not in self.details]
        once = list(dict.fromkeys(reversed(errors)))[:ERROR_LINES]
        return "\n".join([f"{message}: {self.details}", *reversed(once)])


class SimulationSuperLink:
    """A SuperLink that simulates the nodes of one run after another; use it in a ``with`` statement.

    Parameters
    ----------
    data : Path | None, default None
        Folder in which the simulated nodes find their data; they see it as ``PETALWISE_DATA``.
    backbones : Path | None, default None
        Folder in which the simulated nodes find backbone files; they see it as ``PETALWISE_BACKBONES``.
    keep : bool, default False
        Leave the SuperLink's folder with all log files in place and say on stderr where it is.
    """

    def __init__(self, *, data: Path | None = None, backbones: Path | None = None, keep: bool = False) -> None:
        folders = {"PETALWISE_DATA": data, "PETALWISE_BACKBONES": backbones}
        self._settings = {name: str(folder.resolve()) for name, folder in folders.items() if folder is not None}
        self._keep = keep
        self._stack = ExitStack()
        self._link: SuperLinkProcess

    def __enter__(self) -> Self:
        self._link = self._stack.enter_context(superlink_process(self._settings, keep=self._keep))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    @property
    def processes(self) -> MarkedProcesses:
        """The SuperLink and all that it has started."""
        return self._link.processes

    def run(
        self,
        app: Path,
        *,
        run_config: Sequence[str] = (),
        clients: int = 10,
        cpus_per_client: int = 1,
        gpus_per_client: float = 0.0,
        runs_dir: Path = Path("runs"),
        timeout: float | None = None,
        output: TextIO | None = sys.stdout,
    ) -> RunOutcome:
        """Run `app` to its end.

        Parameters
        ----------
        app : Path
            The folder that holds the app's ``pyproject.toml``.
        run_config : Sequence[str], default ()
            Values of ``flwr run --run-config``: strings of ``key=value`` pairs, or one ``.toml`` file.
        clients : int, default 10
            Number of simulated nodes.
        cpus_per_client : int, default 1
            CPUs that one client occupies while it works; decides how many work side by side.
        gpus_per_client : float, default 0.0
            Share of a GPU that one client occupies.
        runs_dir : Path, default Path("runs")
            Becomes the run config's ``runs-dir``, absolute, unless `run_config` gives one.
        timeout : float | None, default None
            Seconds after which the run is stopped.
        output : TextIO | None, default sys.stdout
            Where the run's log goes while it runs.

        Returns
        -------
        RunOutcome
            How the run ended, whether well or badly.

        Raises
        ------
        ConfigError
            If the run cannot be as asked for, or Flower refuses it.
        PetalwiseError
            If the SuperLink is lost.
        """
        if clients < 1 or cpus_per_client < 1:
            raise ConfigError(
                f"A run needs at least 1 client and 1 CPU per client, not {clients} and {cpus_per_client}."
            )
        pairs = _complete_run_config(run_config, runs_dir.resolve(), self._link.folder)
        federation = f"num-supernodes={clients} client-resources-num-cpus={cpus_per_client}"
        federation += f" client-resources-num-gpus={float(gpus_per_client)}"
        begin = time.monotonic()
        run_id = self._link.submit(app, pairs, federation)
        log = _RunLog(output)
        status, details = self._follow(run_id, log, timeout)
        seconds = time.monotonic() - begin
        self._link.settle()
        return RunOutcome(run_id, status, details, seconds, log.text)

    def _follow(self, run_id: int, log: "_RunLog", timeout: float | None) -> tuple[str, str]:
        """Copy the log until the run has finished, if need be by stopping it; return its last status and details."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            log.copy(self._link.open_log(run_id), deadline)
            status, details = self._link.status(run_id)
            if status.startswith("finished"):
                return status, details
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_SECONDS)
        self._link.stop_run()
        log.copy(self._link.open_log(run_id), time.monotonic() + LAST_LOG_SECONDS)
        status, details = self._link.status(run_id)
        too_long = f"it was stopped because it lasted longer than {timeout:g} seconds"
        return status, details if status == COMPLETED else too_long


class _RunLog:
    """The log of one run: shown as it comes, and kept."""

    def __init__(self, output: TextIO | None) -> None:
        self._output = output
        self._colours = output is not None and output.isatty()
        self._seen = 0
        self._lines: list[str] = []

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)

    def copy(self, stream: subprocess.Popen[str], deadline: float) -> None:
        """Take over what `stream` prints, which begins with what earlier streams printed, until it or time ends."""
        timer = threading.Timer(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX), stream.kill)
        timer.daemon = True
        timer.start()
        known = self._seen
        try:
            for number, line in enumerate(stream.stdout or ()):
                if number == 0 and line.startswith("Using SuperLink:"):  # said by `flwr log` itself
                    continue
                self._take(line[known:])
                known = max(0, known - len(line))
        finally:
            timer.cancel()
            stream.kill()
            stream.wait()

    def _take(self, line: str) -> None:
        self._seen += len(line)
        plain = _COLOUR.sub("", line).rstrip("\n")
        if _BLANK.fullmatch(plain):
            return
        self._lines.append(plain)
        if self._output is not None:
            print(line.rstrip("\n") if self._colours else plain, file=self._output, flush=True)


def run_config_pairs(given: Sequence[str]) -> dict[str, str]:
    """Split values of ``--run-config`` into keys and TOML values.

    Raises
    ------
    ConfigError
        On what Flower would ignore: text that is no pair, or a key given twice.
    """
    values: dict[str, str] = {}
    for line in given:
        if ignored := _PAIR.sub("", line).strip():
            raise ConfigError(
                f"Flower would ignore {ignored!r} in --run-config {line!r}: write key=value without spaces around the "
                "equals sign, and values with spaces in quotes. A .toml file must be the only value."
            )
        for key, value in _PAIR.findall(line):
            if key in values:
                raise ConfigError(
                    f"--run-config gives {key!r} twice, of which Flower would drop one; put both into one."
                )
            values[key] = value
    return values


def _complete_run_config(given: Sequence[str], runs_dir: Path, scratch: Path) -> list[str]:
    """Return the values for ``--run-config`` with an absolute ``runs-dir``, in a file in `scratch` if given as one."""
    if len(given) == 1 and given[0].endswith(".toml"):
        return [str(_complete_run_config_file(Path(given[0]), runs_dir, scratch))]
    values = run_config_pairs(given)
    if "runs-dir" in values:
        _check_absolute(values["runs-dir"].strip("'\""))
        return list(given)
    return [*given, f"runs-dir={json.dumps(str(runs_dir), ensure_ascii=False)}"]


def _complete_run_config_file(file: Path, runs_dir: Path, scratch: Path) -> Path:
    try:
        text = file.expanduser().read_text()
        values: dict[str, Any] = tomllib.loads(text)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The --run-config file {file} cannot be read: {error}") from error
    if "runs-dir" in values:
        _check_absolute(str(values["runs-dir"]))
    else:
        text = f"runs-dir = {json.dumps(str(runs_dir), ensure_ascii=False)}\n{text}"
    complete = scratch / "run-config.toml"
    complete.write_text(text)
    return complete


def _check_absolute(runs_dir: str) -> None:
    if not Path(runs_dir).is_absolute():
        raise ConfigError(
            f"The run config's runs-dir {runs_dir!r} is relative, but the run does not work in your directory: "
            "give an absolute path, or use --runs-dir."
        )
