"""Flower's commands: where they are, what they need around them, what they answer."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from task.errors import PetalwiseError

CALL_SECONDS = 120.0
"""How long one ``flwr`` command may take; 1 to 3 seconds on an idle machine."""
TAIL_LINES = 20
"""How much of a process's output is shown when it fails."""
HOST = "127.0.0.1"


def executable(name: str) -> str:
    """Find a command of this Python's environment.

    Raises
    ------
    PetalwiseError
        If there is none of this name.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise PetalwiseError(f"There is no {name} beside {sys.executable}: install flwr[simulation] for this Python.")
    return str(path)


def flower_environment(home: Path, hosts: Sequence[str] = (HOST,)) -> dict[str, str]:
    """Make the environment variables of a Flower process.

    Parameters
    ----------
    home : Path
        Its ``FLWR_HOME``: the folder of its configuration and of the apps that it installs.
    hosts : Sequence[str], default ("127.0.0.1",)
        Addresses that no proxy is to be asked for.
    """
    env = dict(os.environ)
    binaries = str(Path(sys.executable).parent)
    env["PATH"] = os.pathsep.join([binaries, env.get("PATH", os.defpath)])  # Flower starts its helpers by name
    env["FLWR_HOME"] = str(home)
    env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    env["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    env["FLWR_TELEMETRY_ENABLED"] = "0"
    env["PYTHONUNBUFFERED"] = "1"
    without_proxy = [env.get("no_proxy") or env.get("NO_PROXY"), *dict.fromkeys(hosts)]
    env["NO_PROXY"] = env["no_proxy"] = ",".join(filter(None, without_proxy))
    return env


def flwr_answer(
    arguments: Sequence[str], env: Mapping[str, str], folder: Path, prefix: Sequence[str] = ()
) -> dict[str, Any]:
    """Run one ``flwr`` command and return the JSON that it prints.

    Parameters
    ----------
    arguments : Sequence[str]
        Its arguments, without ``--format``.
    env : Mapping[str, str]
        Its environment variables.
    folder : Path
        The directory that it runs in.
    prefix : Sequence[str], default ()
        Words before the command, such as ``ip netns exec site-1``.

    Raises
    ------
    PetalwiseError
        If it takes too long or prints no JSON.
    """
    shown = f"`flwr {arguments[0]}`"
    try:
        result = subprocess.run(  # noqa: S603 - a command of this environment
            [*prefix, executable("flwr"), *arguments, "--format", "json"],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=CALL_SECONDS,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PetalwiseError(f"{shown} did not answer within {CALL_SECONDS:.0f} seconds.") from None
    try:
        answer: dict[str, Any] = json.loads(result.stdout)
    except json.JSONDecodeError:
        said = (result.stdout + result.stderr).strip()
        raise PetalwiseError(f"{shown} exited with {result.returncode} and without an answer:\n{said}") from None
    return answer


def free_port(host: str = HOST) -> int:
    """Return a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def without_colours(text: str) -> str:
    """Remove what colours text on a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def tail(path: Path) -> str:
    """Return the last lines of a file, without colours."""
    return "\n".join(without_colours(path.read_text(errors="replace")).splitlines()[-TAIL_LINES:])
