"""A whole deployment on this machine: SuperLink and SuperNodes as real processes, with TLS and keys.

For tests, of faults among others: each process can be killed, frozen and started again by itself.
"""

import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from task.errors import ConfigError, PetalwiseError
from tools.certificates import CA_CERTIFICATE, make_certificates
from tools.commands import CALL_SECONDS, executable, flower_environment, flwr_answer, without_colours
from tools.deployed import DeployedSuperLink, DeployedSuperNode, Place, Site
from tools.node_key import make_node_key
from tools.simulation import RunOutcome

CONNECTION = "prod"
POLL_SECONDS = 1.0
"""Time between two looks at a run whose log has ended."""


class Deployment:
    """A SuperLink and its SuperNodes; made by :func:`deployment`.

    Parameters
    ----------
    folder : Path
        A fresh folder for all files.
    place : Place
        Where the SuperLink and the operator's commands run.
    certificates : Path | None
        A folder that ``tools.certificates`` made; None to make one.
    settings : Mapping[str, str]
        Environment variables for all processes.
    """

    def __init__(
        self, folder: Path, place: Place, certificates: Path | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self._settings = folder, dict(settings or {})
        self.keys = certificates or folder / "keys"
        if certificates is None:
            make_certificates([place.host], self.keys)
        self.link = DeployedSuperLink(folder / "superlink", place, self.keys, self._settings)
        self.nodes: dict[str, DeployedSuperNode] = {}
        self.node_ids: dict[str, int] = {}
        operator = folder / "operator"
        operator.mkdir()
        (operator / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "{self.link.address}"\nroot-certificates = "{self.keys / CA_CERTIFICATE}"\n'
        )
        self._operator_env = flower_environment(operator, [place.host])

    def add_node(
        self, site: Site, *, registered: bool = True, root_certificates: Path | None = None, superlink: str = ""
    ) -> DeployedSuperNode:
        """Make a SuperNode with a key of its own; it is yet to be started.

        Parameters
        ----------
        site : Site
            Its name, node config and place.
        registered : bool, default True
            Whether its key is registered at the SuperLink, which must run then.
        root_certificates : Path | None, default None
            The authority that it trusts; by default the SuperLink's.
        superlink : str, default ""
            The address that it connects to; by default the SuperLink's own, not that of something before it.

        Returns
        -------
        DeployedSuperNode
            The node, which is also in ``nodes``.
        """
        key = make_node_key(site.name, self.folder / "node-keys")
        if registered:
            self.register(Path(f"{key}.pub"), site.name)
        authority = root_certificates or self.keys / CA_CERTIFICATE
        folder = self.folder / f"node-{site.name}"
        node = DeployedSuperNode(folder, site, superlink or self.link.address, authority, key, self._settings)
        self.nodes[site.name] = node
        return node

    def register(self, public_key: Path, name: str) -> int:
        """Register a node's public key under a name; return the node's id.

        Raises
        ------
        PetalwiseError
            If Flower refuses.
        """
        answer = self.flwr("supernode", "register", str(public_key), CONNECTION, "--name", name)
        if not answer.get("success"):
            raise PetalwiseError(f"Flower did not register {name}: {answer.get('error-message', '')}")
        self.node_ids[name] = int(answer["node-id"])
        return self.node_ids[name]

    def online(self) -> dict[str, str]:
        """Return the status of every registered node, such as ``online``, by its name."""
        answer = self.flwr("supernode", "list", CONNECTION)
        names = {node_id: name for name, node_id in self.node_ids.items()}
        return {names[id_]: node["status"] for node in answer["nodes"] if (id_ := int(node["node-id"])) in names}

    def submit(self, app: Path, run_config: Sequence[str] = ()) -> int:
        """Submit `app` and return the run's id; ``runs-dir`` is the folder's unless `run_config` says otherwise.

        Raises
        ------
        ConfigError
            If Flower refuses the run.
        """
        pairs = list(run_config)
        if not any("runs-dir=" in given for given in pairs):
            pairs.append(f'runs-dir="{self.folder / "runs"}"')
        options = [word for given in pairs for word in ("--run-config", given)]
        answer = self.flwr("run", str(app.resolve()), CONNECTION, *options)
        if not answer.get("success"):
            raise ConfigError(f"Flower refused to run the app: {answer.get('error-message', '')}")
        return int(answer["run-id"])

    def status(self, run_id: int) -> tuple[str, str]:
        """Return Flower's status of a run, such as ``finished:failed``, and its details.

        Raises
        ------
        PetalwiseError
            If the SuperLink does not tell.
        """
        answer = self.flwr("ls", CONNECTION, "--run-id", str(run_id))
        if not answer.get("success"):
            raise PetalwiseError(f"Flower does not tell how run {run_id} is doing: {answer.get('error-message', '')}")
        run = answer["runs"][0]
        return run["status"], "" if run["status-details"] == "N/A" else run["status-details"]

    def log(self, run_id: int) -> str:
        """Return what a run has logged so far, without colours."""
        return self._read_log(run_id, "--show", CALL_SECONDS)

    def wait_for(self, run_id: int, text: str, seconds: float) -> None:
        """Wait until a run has logged `text`.

        Raises
        ------
        PetalwiseError
            If it ends without, or `seconds` pass.
        """
        self._follow(run_id, seconds, text)

    def finish(self, run_id: int, seconds: float) -> RunOutcome:
        """Wait until a run has ended, well or badly.

        Raises
        ------
        PetalwiseError
            If it has not after `seconds`.
        """
        began = time.monotonic()
        self._follow(run_id, seconds)
        lasted = time.monotonic() - began
        return RunOutcome(run_id, *self.status(run_id), lasted, self.log(run_id))

    def _follow(self, run_id: int, seconds: float, until: str = "") -> None:
        """Follow a run's log until it says `until`, or, where that is empty, until the run has ended."""
        deadline = time.monotonic() + seconds
        while True:
            log = self._read_log(run_id, "--stream", deadline - time.monotonic(), until)
            if until and until in log:
                return
            status, details = self.status(run_id)
            ended = status.startswith("finished")
            if ended and not until:
                return
            if ended or time.monotonic() > deadline:
                missed = f"not said {until!r}" if until else "not ended"
                raise PetalwiseError(
                    f"Run {run_id} has {missed}, within at most {seconds:.0f} s; it is {status}. {details}\n{log}"
                )
            time.sleep(POLL_SECONDS)

    def _read_log(self, run_id: int, how: str, seconds: float, until: str = "") -> str:
        """Read a run's log from its beginning, at most for `seconds` and until a line has `until`."""
        stream = subprocess.Popen(  # noqa: S603 - a command of this environment
            [*self.link.place.prefix, executable("flwr"), "log", str(run_id), CONNECTION, how],
            cwd=self.folder,
            env=self._operator_env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
        )
        timer = threading.Timer(max(0.0, seconds), stream.kill)
        timer.start()
        lines = []
        try:
            for line in stream.stdout or ():
                lines.append(without_colours(line))
                if until and until in lines[-1]:
                    break
        finally:
            timer.cancel()
            stream.kill()
            stream.wait()
        return "".join(lines)

    def stop_run(self, run_id: int) -> bool:
        """Have Flower stop a run; return whether it did."""
        return bool(self.flwr("stop", str(run_id), CONNECTION).get("success"))

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run one of the operator's ``flwr`` commands at the SuperLink's place and return the JSON that it prints."""
        return flwr_answer(arguments, self._operator_env, self.folder, self.link.place.prefix)

    def end(self) -> None:
        """Kill all processes."""
        for process in (*self.nodes.values(), self.link):
            process.kill()


@contextmanager
def deployment(
    sites: Sequence[Site] = (),
    *,
    place: Place | None = None,
    certificates: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Deployment]:
    """Run a SuperLink and registered SuperNodes for the time of a ``with`` block.

    Parameters
    ----------
    sites : Sequence[Site], default ()
        The SuperNodes.
    place : Place | None, default None
        Where the SuperLink runs; by default on the loopback address.
    certificates : Path | None, default None
        A folder that ``tools.certificates`` made; None to make one.
    settings : Mapping[str, str] | None, default None
        Environment variables for all processes.

    Yields
    ------
    Deployment
        All processes ready.
    """
    folder = Path(tempfile.mkdtemp(prefix="plw-")).resolve()
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        running = Deployment(folder, place or Place(), certificates, settings)
        cleanup.callback(running.end)
        running.link.start()
        nodes = [running.add_node(site) for site in sites]
        for node in nodes:
            node.launch()
        for node in nodes:
            node.wait_ready()
        yield running
