"""Reading run folders, those of runs that are still going on or of earlier versions among them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from server_app.resuming import flat
from strategies.cohort import identity_order
from strategies.report import RoundReport
from task.config import first_line
from task.errors import ConfigError, DataError, shortened

MAX_ROUNDS = 1_000_000
LARGEST = 1e300
"""What is beyond is damage."""
_EMPTY = RoundReport(0)
_OF_NUMBERS = ("central", "clients_accuracy", "tuned_accuracy", "bytes_down_by_unit", "bytes_up_by_unit", "seconds")


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds."""

    name: str
    """By which people know it: the folder's name, with that of its parent where two runs share it."""
    folder: Path
    """The folder, absolute."""
    yaml: str
    """Its config.yaml, to the letter."""
    config: dict[str, Any]
    """The same, nested."""
    reports: tuple[RoundReport, ...]
    """Its rounds, ascending; some may be missing."""
    notes: tuple[str, ...]
    """What is missing or wrong in the folder, in sentences for people."""

    @cached_property
    def options(self) -> dict[str, Any]:
        """The config's values by their whole keys, such as ``lora.rank``."""
        return dict(flat(self.config))

    @cached_property
    def clients(self) -> list[str]:
        """All clients that its rounds name, in identity order."""
        named: set[str] = set()
        for report in self.reports:
            named.update(report.clients_used, report.clients_dropped, report.clients_refused)
            named.update(report.clients_accuracy, report.clients_partition)
        return sorted(named, key=identity_order)

    @cached_property
    def units(self) -> list[str]:
        """The layer units, in the order of the model; empty where no round names them all."""
        return max((list(report.bytes_down_by_unit) for report in self.reports), key=len, default=[])


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; one that is named twice counts once.

    Raises
    ------
    ConfigError
        If a folder is no run folder.
    DataError
        If its config cannot be read.
    """
    paths = list(dict.fromkeys(folder.expanduser().resolve() for folder in folders))
    names = [path.name for path in paths]
    return [
        read_run(path, path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}")
        for path in paths
    ]


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder; raises as :func:`read_runs`."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{str(folder)!r} is no run folder: it has no config.yaml.")
    try:
        yaml = path.read_text(encoding="utf-8")
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise DataError(f"{str(path)!r} cannot be read: {first_line(error)}.") from error
    if not isinstance(config, dict):
        raise DataError(f"{str(path)!r} is not the config of a run.")
    plain = {str(key): value for key, value in config.items()}
    reports, notes = _read_metrics(folder / "metrics.jsonl")
    return Run(name, folder, yaml, plain, reports, (*notes, *_gaps(plain, reports)))


def _read_metrics(path: Path) -> tuple[tuple[RoundReport, ...], list[str]]:
    """Read the rounds; of one that is there twice the later counts."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        return (), [f"There are no rounds: metrics.jsonl cannot be read ({error.strerror})."]
    reports: dict[int, RoundReport] = {}
    notes = []
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        report = _report(line)
        if report is not None:
            reports[report.server_round] = report
        elif number == len(lines) and not text.endswith("\n"):
            notes.append("The last line of metrics.jsonl is half written and left out; its round is being recorded.")
        else:
            notes.append(f"Line {number} of metrics.jsonl is no record of a round and left out.")
    return tuple(reports[key] for key in sorted(reports)), notes


def _report(line: str) -> RoundReport | None:
    """Take what a line tells of a round; keys that are unknown or of another type than theirs are passed over."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        return None
    server_round = given.get("server_round") if isinstance(given, dict) else None
    if type(server_round) is not int or not 0 <= server_round <= MAX_ROUNDS:
        return None
    known: dict[str, Any] = {}
    for item in dataclasses.fields(RoundReport):
        value, usual = given.get(item.name), getattr(_EMPTY, item.name)
        if item.name in _OF_NUMBERS:
            known[item.name] = _numbers(value)
        elif is_number(value) if usual is None or is_number(usual) else isinstance(value, type(usual)):
            known[item.name] = value
    known["clients_used"] = [str(client) for client in known.get("clients_used", [])]
    return RoundReport(**known)


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _numbers(value: object) -> dict[str, float]:
    """Take the entries of a dict that are finite numbers."""
    return {key: entry for key, entry in value.items() if is_number(entry)} if isinstance(value, dict) else {}


def _gaps(config: dict[str, Any], reports: Sequence[RoundReport]) -> Iterator[str]:
    """Say which rounds are not there."""
    numbers = [report.server_round for report in reports]
    last, planned = max(numbers, default=0), config.get("num_server_rounds")
    missing = [str(number) for number in range(last) if number not in numbers]
    if missing:
        yield (
            f"Rounds that are missing: {shortened(missing, 10)}. Sums over rounds, such as traffic, do not count them."
        )
    if type(planned) is int and last < planned:
        yield f"{last} of {planned} rounds are recorded: the run is going on, or was cut short."
