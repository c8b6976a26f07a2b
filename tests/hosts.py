"""Hosts of their own on one machine: network namespaces with addresses, joined by a switch, with slow links."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from tools.deployed import Place

NETWORK = "10.77.0"
PREFIX = "plw"
SWITCH = f"{PREFIX}-switch"


def why_not() -> str:
    """Say why this machine cannot have network namespaces; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "there is no `ip` command"
    probe = subprocess.run(["ip", "netns", "add", f"{PREFIX}-probe"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"no network namespace can be made: {probe.stderr.strip()}"
    with suppress(subprocess.CalledProcessError):
        _ip("link", "add", f"{PREFIX}-p0", "type", "veth", "peer", "name", f"{PREFIX}-p1")
        _ip("link", "del", f"{PREFIX}-p0")
        _ip("netns", "del", f"{PREFIX}-probe")
        return ""
    _ip("netns", "del", f"{PREFIX}-probe")
    return "no veth pair can be made"


@contextmanager
def hosts(names: Sequence[str]) -> Iterator[dict[str, Place]]:
    """Make hosts that reach each other, and nobody else, for the time of a ``with`` block."""
    made: list[str] = []
    try:
        _make(SWITCH, made)
        _in(SWITCH, "ip", "link", "add", "bridge", "type", "bridge")
        _in(SWITCH, "ip", "link", "set", "bridge", "up")
        yield {name: _host(name, number, made) for number, name in enumerate(names, start=1)}
    finally:
        for space in made:
            _ip("netns", "del", space)


def slow_down(place: Place, delay: str, rate: str) -> str:
    """Give a host's link a delay and a bandwidth in both directions; say which of them this machine's ``tc`` can."""
    for what, shaping in (
        ("delay and bandwidth", ["netem", "delay", delay, "rate", rate]),
        ("bandwidth", ["tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]),
    ):
        if all(_shaped(space, device, shaping) for space, device in _ends(place)):
            return what
    return "nothing"


def _ends(place: Place) -> list[tuple[str, str]]:
    """The two ends of a host's link: namespace and device."""
    return [(place.prefix[3], "eth"), (SWITCH, _port(place.prefix[3]))]


def _shaped(space: str, device: str, shaping: list[str]) -> bool:
    command = ["ip", "netns", "exec", space, "tc", "qdisc", "replace", "dev", device, "root", *shaping]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _port(space: str) -> str:
    """Name the switch's end of a host's link, in the 15 characters that the system allows."""
    return f"to-{space}"[:15]


def carried(place: Place) -> tuple[int, int]:
    """Count the bytes that a host's link has carried from it and to it, all protocols' own included."""
    command = ["ip", "netns", "exec", place.prefix[3], "cat"]
    counters = [f"/sys/class/net/eth/statistics/{way}_bytes" for way in ("tx", "rx")]
    read = subprocess.run([*command, *counters], check=True, capture_output=True, text=True)
    sent, received = (int(line) for line in read.stdout.split())
    return sent, received


def cut(place: Place) -> None:
    """Take a host's link down."""
    _in(place.prefix[3], "ip", "link", "set", "eth", "down")


def mend(place: Place) -> None:
    """Bring a host's link up again."""
    _in(place.prefix[3], "ip", "link", "set", "eth", "up")


def _host(name: str, number: int, made: list[str]) -> Place:
    """Make one host with an address of its own, joined to the switch."""
    space, address = f"{PREFIX}-{name}", f"{NETWORK}.{number}"
    _make(space, made)
    port = _port(space)
    _in(space, "ip", "link", "add", "eth", "type", "veth", "peer", "name", port, "netns", SWITCH)
    _in(space, "ip", "address", "add", f"{address}/24", "dev", "eth")
    for device in ("lo", "eth"):
        _in(space, "ip", "link", "set", device, "up")
    _in(SWITCH, "ip", "link", "set", port, "master", "bridge", "up")
    return Place(address, ("ip", "netns", "exec", space))


def _make(space: str, made: list[str]) -> None:
    subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)  # of a run that was killed
    _ip("netns", "add", space)
    made.append(space)


def _in(space: str, *command: str) -> None:
    _ip("netns", "exec", space, *command)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
