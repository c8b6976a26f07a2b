"""The processes of a deployment, SuperLink and SuperNodes: started, watched, disturbed and ended one by one."""

import json
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from client_app.kept import STATE_VARIABLE
from task.backbone import BACKBONES_VARIABLE
from task.data.sources import DATA_VARIABLE
from task.errors import PetalwiseError
from tools.certificates import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY
from tools.commands import HOST, executable, flower_environment, free_port, tail, without_colours
from tools.processes import KILL_SECONDS, MarkedProcesses

START_SECONDS = 120.0
"""How long a process may take until it is ready; 3 to 5 seconds on an idle machine."""
STOP_SECONDS = 20.0
"""How long a process may take to leave after SIGTERM; some 2 seconds on an idle machine."""
LINK_READY = "Application startup complete"
NODE_READY = "SuperNode ID: "
OWN_FOLDERS = (DATA_VARIABLE, BACKBONES_VARIABLE)
"""What whoever runs this has set for other runs."""
CLIENT_APP = "flwr-clientapp"
SERVER_APP = "flwr-serverapp"


@dataclass(frozen=True)
class Place:
    """Where a process runs."""

    host: str = HOST
    """The address of the place, at which a SuperLink listens."""
    prefix: tuple[str, ...] = ()
    """Words before every command, such as ``ip netns exec site-1``; they must pass environment and signals on."""


@dataclass(frozen=True)
class Site:
    """One SuperNode to be."""

    name: str
    """Its name: in Flower's register, in its node config, and of its key."""
    config: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """More of its node config, such as ``data``."""
    place: Place = field(default_factory=Place)
    """Where it runs."""


class FlowerProcess:
    """One lasting Flower command with all that it starts, its ``FLWR_HOME``, and its output.

    Parameters
    ----------
    folder : Path
        A fresh folder for its files.
    place : Place
        Where it runs.
    hosts : Sequence[str]
        Addresses that it speaks to, without a proxy.
    settings : Mapping[str, str]
        Environment variables for it and all that it starts.
    ready : str
        What it prints when it is ready.
    """

    def __init__(
        self, folder: Path, place: Place, hosts: Sequence[str], settings: Mapping[str, str], ready: str
    ) -> None:
        self.folder, self.place = folder, place
        self.command: list[str] = []
        self._ready = ready
        self._output_file = folder / "output.txt"
        self._offset = 0
        home, state = folder / "home", folder / "state"
        for new in (home, state, folder / "empty"):
            new.mkdir(parents=True)
        inherited = {k: v for k, v in flower_environment(home, [HOST, *hosts]).items() if k not in OWN_FOLDERS}
        self._env = {**inherited, STATE_VARIABLE: str(state), **settings}
        self._all = MarkedProcesses("FLWR_HOME", self._env["FLWR_HOME"])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> str:
        """What it and all that it started have printed since its last start."""
        if not self._output_file.exists():
            return ""
        with self._output_file.open("rb") as file:
            file.seek(self._offset)
            return without_colours(file.read().decode(errors="replace"))

    @property
    def alive(self) -> bool:
        """Whether it runs; also true while it is stopped by SIGSTOP."""
        return self._process is not None and self._process.poll() is None

    def launch(self) -> None:
        """Start it, in an empty directory, and do not wait."""
        if self.alive:
            raise PetalwiseError(f"{self.command[0]} in {self.folder} runs already.")
        self._offset = self._output_file.stat().st_size if self._output_file.exists() else 0
        words = [*self.place.prefix, executable(self.command[0]), *self.command[1:]]
        with self._output_file.open("ab") as sink:
            self._process = subprocess.Popen(  # noqa: S603 - a command of this environment
                words,
                cwd=self.folder / "empty",
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until it is ready.

        Raises
        ------
        PetalwiseError
            If it exits or is not ready in time; the message ends with the last lines of its output.
        """
        self.wait_for(self._ready, START_SECONDS)

    def start(self) -> None:
        """Start it, anew if it ended before, and wait until it is ready."""
        self.launch()
        self.wait_ready()

    def wait_for(self, text: str, seconds: float) -> None:
        """Wait until it has printed `text` since its last start; otherwise as :meth:`wait_ready`."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            if not self.alive:
                problem = f"ended with code {self.exit_code()}"
            elif time.monotonic() > deadline:
                problem = f"did not say {text!r} within {seconds:.0f} seconds"
            else:
                time.sleep(0.2)
                continue
            raise PetalwiseError(f"{self.command[0]} {problem}. Its last lines:\n{tail(self._output_file)}")

    def exit_code(self, seconds: float = 0.0) -> int | None:
        """Return its exit code, after at most `seconds`; None if it still runs."""
        if self._process is None:
            return None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kill it and all that it started, with SIGKILL."""
        self._all.kill()
        self.exit_code(KILL_SECONDS)

    def terminate(self) -> None:
        """Send SIGTERM to it alone, wait until it has left, and kill what it may have left behind."""
        if self._process is not None and self.alive:
            self._process.send_signal(signal.SIGTERM)
            self.exit_code(STOP_SECONDS)
        self.kill()

    def pause(self) -> None:
        """Freeze it and all that it started (SIGSTOP); connections stay open."""
        self._all.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        self._all.signal(signal.SIGCONT)


class DeployedSuperLink(FlowerProcess):
    """A ``flower-superlink`` with TLS, SuperNode authentication and a database that outlives it.

    Parameters
    ----------
    folder : Path
        A fresh folder for its files.
    place : Place
        Where it runs, and the address at which it listens.
    certificates : Path
        The folder that ``tools.certificates`` made.
    settings : Mapping[str, str]
        Environment variables for it and the ServerApp, such as ``PETALWISE_DATA``.
    """

    def __init__(self, folder: Path, place: Place, certificates: Path, settings: Mapping[str, str]) -> None:
        super().__init__(folder, place, [place.host], settings, LINK_READY)
        self.certificates = certificates
        port = free_port() if place.prefix else free_port(place.host)
        self.address = f"{place.host}:{port}"
        self.command = ["flower-superlink", "--host", place.host, "--port", str(port)]
        self.command += ["--ssl-ca-certfile", str(certificates / CA_CERTIFICATE)]
        self.command += ["--ssl-certfile", str(certificates / SERVER_CERTIFICATE)]
        self.command += ["--ssl-keyfile", str(certificates / SERVER_KEY), "--enable-supernode-auth"]
        self.command += ["--database", str(folder / "state.db"), "--disable-runtime-dependency-installation"]

    def kill_server_app(self) -> int:
        """Kill the ServerApp's process alone; return how many there were."""
        return self._all.signal(signal.SIGKILL, SERVER_APP)


class DeployedSuperNode(FlowerProcess):
    """A ``flower-supernode`` with a key of its own.

    Parameters
    ----------
    folder : Path
        A fresh folder for its files.
    site : Site
        Its name, node config and place.
    superlink : str
        Address of the SuperLink.
    root_certificates : Path
        The certificate of the authority that it trusts.
    key : Path
        Its private key.
    settings : Mapping[str, str]
        Environment variables for it and its ClientApps.
    """

    def __init__(
        self, folder: Path, site: Site, superlink: str, root_certificates: Path, key: Path, settings: Mapping[str, str]
    ) -> None:
        super().__init__(folder, site.place, [superlink.rpartition(":")[0]], settings, NODE_READY)
        self.site = site
        config = " ".join(f"{name}={json.dumps(value)}" for name, value in {"name": site.name, **site.config}.items())
        self.command = ["flower-supernode", "--superlink", superlink, "--root-certificates", str(root_certificates)]
        self.command += ["--auth-supernode-private-key", str(key), "--port", str(free_port()), "--node-config", config]

    @property
    def working(self) -> bool:
        """Whether a ClientApp of it runs."""
        return self._all.signal(0, CLIENT_APP) > 0

    def kill_client_app(self) -> int:
        """Kill its ClientApp processes alone; return how many there were."""
        return self._all.signal(signal.SIGKILL, CLIENT_APP)
