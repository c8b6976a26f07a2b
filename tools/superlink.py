"""A simulation SuperLink of our own: started, asked, and stopped without leaving a process or a folder behind."""

import http.client
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from task.errors import ConfigError, PetalwiseError
from tools.commands import HOST, executable, flower_environment, flwr_answer, free_port, tail
from tools.processes import KILL_SECONDS, MarkedProcesses

START_SECONDS = 120.0
"""How long a SuperLink may take until it answers; some 3 seconds on an idle machine."""
STATUS_ATTEMPTS = 5
"""How often a status is asked for before the run is given up; one refusal may be due to a busy machine."""
SETTLE_SECONDS = 15.0
"""How long ``flwr-simulation`` may take to leave, by itself and then when asked to."""
TEMPORARY_LENGTH = 17
"""Longest name of a temporary folder in which the paths of Ray's sockets stay within the system's 104 bytes."""
CONNECTION = "own"
RAY_TIP_IGNORED = "ignore::FutureWarning:ray._private.worker"
SIMULATION = "flwr-simulation"
STAYING = ("flower-superlink", "flower-superexec")
"""The commands that outlive a run."""


class SuperLinkProcess:
    """One ``flower-superlink --simulation`` and all that it starts; made by :func:`superlink_process`.

    Every process below it inherits ``FLWR_HOME``, a folder that nobody else uses, and is found by it.

    Parameters
    ----------
    folder : Path
        A fresh folder for its configuration, its log files and Ray's files.
    settings : Mapping[str, str]
        Environment variables for the SuperLink, the ServerApp and the simulated nodes.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self._log_file = folder / "superlink.log"
        self._output_file = folder / "superlink.out"
        self._port = free_port()
        self._env = _environment(folder, settings)
        self.processes = MarkedProcesses("FLWR_HOME", self._env["FLWR_HOME"])
        self._process: subprocess.Popen[bytes] | None = None
        self._run_id: int | None = None

    def start(self) -> None:
        """Start the SuperLink in an empty directory, so that only the installed app's code is found, and wait for it.

        Raises
        ------
        PetalwiseError
            If it exits or does not answer in time; the message ends with the last lines of its output.
        """
        home, empty = self.folder / "home", self.folder / "empty"
        home.mkdir()
        empty.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n'
            f'[superlink.{CONNECTION}]\naddress = "{HOST}:{self._port}"\ninsecure = true\n'
        )
        command = [executable("flower-superlink"), "--insecure", "--simulation", "--host", HOST]
        command += ["--port", str(self._port), "--log-file", str(self._log_file)]
        with self._output_file.open("wb") as sink:
            self._process = subprocess.Popen(  # noqa: S603 - a command of this environment
                command, cwd=empty, env=self._env, stdout=sink, stderr=sink, start_new_session=True
            )
        self._wait_until_healthy(self._process)

    def submit(self, app: Path, run_config: Sequence[str], federation_config: str) -> int:
        """Submit `app` as the one active run; one that an exception left behind is stopped first.

        Parameters
        ----------
        app : Path
            The folder that holds the app's ``pyproject.toml``.
        run_config : Sequence[str]
            Values of ``flwr run --run-config``.
        federation_config : str
            Value of ``flwr run --federation-config``.

        Returns
        -------
        int
            The id of the run.

        Raises
        ------
        ConfigError
            If Flower refuses the run.
        """
        if self._run_id is not None:
            self.stop_run()
        options = ["--federation-config", federation_config]
        for pairs in run_config:
            options += ["--run-config", pairs]
        log_size = self._log_file.stat().st_size
        answer = self._flwr("run", str(app.resolve()), CONNECTION, *options)
        if not answer.get("success"):
            raise ConfigError(_refusal(app, str(answer.get("error-message", "")), self._errors_logged_since(log_size)))
        self._run_id = int(answer["run-id"])
        return self._run_id

    def status(self, run_id: int) -> tuple[str, str]:
        """Return Flower's status of a run, such as ``finished:failed``, and its details.

        Raises
        ------
        PetalwiseError
            If the SuperLink does not tell, or has died.
        """
        for _ in range(STATUS_ATTEMPTS):
            answer = self._flwr("ls", CONNECTION, "--run-id", str(run_id))
            if answer.get("success"):
                run = answer["runs"][0]
                return run["status"], "" if run["status-details"] == "N/A" else run["status-details"]
            time.sleep(1)
        raise PetalwiseError(f"Flower does not tell how run {run_id} is doing: {answer.get('error-message', '')}")

    def open_log(self, run_id: int) -> subprocess.Popen[str]:
        """Start ``flwr log --stream``, which prints the log of a run from its beginning and exits at its end."""
        with (self.folder / "stream.err").open("ab") as errors:
            return subprocess.Popen(  # noqa: S603 - a command of this environment
                [executable("flwr"), "log", str(run_id), CONNECTION, "--stream"],
                cwd=self.folder,
                env=self._env,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )

    def settle(self) -> None:
        """Wait until the finished run's processes have left, so that the next run does not share the machine."""
        self._run_id = None
        self.processes.wait_gone(SIMULATION, SETTLE_SECONDS)
        self._end_run_processes()

    def stop_run(self) -> None:
        """Stop the active run and its processes; the SuperLink stays."""
        run_id, self._run_id = self._run_id, None
        with suppress(PetalwiseError):  # a run that just finished cannot be stopped; its processes go all the same
            self._flwr("stop", str(run_id), CONNECTION)
        self._end_run_processes()

    def stop(self) -> None:
        """Stop the active run, if any, and the SuperLink."""
        if self._process is None or self._process.poll() is not None:
            return
        if self._run_id is not None:
            self.stop_run()
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)

    def kill(self) -> None:
        """Kill whatever is left of the SuperLink and its runs."""
        self.processes.kill()
        if self._process is not None:
            self._process.wait(KILL_SECONDS)

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(self._port):
            if process.poll() is not None:
                problem = f"exited with code {process.returncode} before it answered"
            elif time.monotonic() > deadline:
                problem = f"did not answer within {START_SECONDS:.0f} seconds"
            else:
                time.sleep(0.2)
                continue
            raise PetalwiseError(f"The SuperLink {problem}. The last lines of its output:\n{tail(self._output_file)}")

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """Run one ``flwr`` command and return the JSON that it prints."""
        if self._process is None or self._process.poll() is not None:
            raise PetalwiseError(f"The SuperLink has died. The last lines of its output:\n{tail(self._output_file)}")
        return flwr_answer(arguments, self._env, self.folder)

    def _errors_logged_since(self, size: int) -> list[str]:
        with self._log_file.open("rb") as log:
            log.seek(size)
            lines = log.read().decode(errors="replace").splitlines()
        return [line.partition(" | ")[2].partition(" | ")[2] for line in lines if line.startswith("ERROR")]

    def _end_run_processes(self) -> None:
        """Have ``flwr-simulation`` leave and take Ray with it: by itself it notices a stop after half a minute."""
        self.processes.terminate(SIMULATION)
        self.processes.wait_gone(SIMULATION, SETTLE_SECONDS)
        self.processes.kill(without=STAYING)


@contextmanager
def superlink_process(settings: Mapping[str, str], *, keep: bool = False) -> Iterator[SuperLinkProcess]:
    """Run a SuperLink of its own for the time of a ``with`` block.

    Parameters
    ----------
    settings : Mapping[str, str]
        Environment variables for the SuperLink, the ServerApp and the simulated nodes.
    keep : bool, default False
        Leave its folder with all log files in place and say on stderr where it is.

    Yields
    ------
    SuperLinkProcess
        The SuperLink, ready for runs.
    """
    parent = tempfile.gettempdir() if len(tempfile.gettempdir()) <= TEMPORARY_LENGTH else "/tmp"  # noqa: S108
    folder = Path(tempfile.mkdtemp(prefix="plw-", dir=parent)).resolve()
    with ExitStack() as cleanup:  # each step is taken even if an interrupt cuts the one before it short
        cleanup.callback(_dispose, folder, keep)
        process = SuperLinkProcess(folder, settings)
        cleanup.callback(process.kill)
        cleanup.callback(process.stop)
        process.start()
        yield process


def _dispose(folder: Path, keep: bool) -> None:
    if keep:
        print(f"The SuperLink's files are kept in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path, settings: Mapping[str, str]) -> dict[str, str]:
    env = flower_environment(folder / "home")
    env["RAY_TMPDIR"] = str(folder)
    env["RAY_USAGE_STATS_ENABLED"] = "0"
    env["SPT_NOENV"] = "1"  # else Ray's processes write their titles over the environment that they are found by
    env["PYTHONWARNINGS"] = ",".join(filter(None, [env.get("PYTHONWARNINGS"), RAY_TIP_IGNORED]))
    return {**env, **settings}


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


def _refusal(app: Path, said: str, logged: Sequence[str]) -> str:
    reason = re.sub(r"^Using SuperLink: .*\n", "", said, flags=re.MULTILINE).strip()
    message = f"Flower refused to run the app in {app.resolve()}: {reason}"
    if logged:
        message += f"\nThe SuperLink logged: {logged[0]}"
        message += "\nA run-config key must be declared in [tool.flwr.app.config] of the app's pyproject.toml."
    return message
