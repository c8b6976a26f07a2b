"""What a case of the benchmark found, and how it is written down: JSON for programs, Markdown for people."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speed.ratios import Ratio

MARKER = "<!-- Below: written by python -m benchmarks.speed. -->"
"""Text of the Markdown file above this line is kept."""


@dataclass(frozen=True)
class Table:
    """A table of absolute figures, which hold for the machine they were taken on."""

    title: str
    """What it shows."""
    columns: list[str]
    """Heads of the columns."""
    rows: list[list[str]]
    """Its cells."""


@dataclass(frozen=True)
class Found:
    """What one case found."""

    ratios: dict[str, Ratio]
    """The figures by their key, such as ``simulation_efficiency.overhead_bound``."""
    tables: list[Table] = field(default_factory=list)
    """What explains them."""


def write(
    file: Path, document: Path, case: str, found: Found, machine: Mapping[str, str], known: Collection[str]
) -> None:
    """Put what a case found beside what other cases found before, and write the document anew.

    Parameters
    ----------
    file : Path
        JSON: ``cases``, and every ratio's median under its key, nested at the dots.
    document : Path
        Markdown, kept above :data:`MARKER`.
    case : str
        Name of the case.
    found : Found
        Its figures.
    machine : Mapping[str, str]
        What they were taken on.
    known : Collection[str]
        Names of all cases; what the file has of others is dropped.
    """
    before = json.loads(file.read_text(encoding="utf-8"))["cases"] if file.exists() else {}
    cases = {name: values for name, values in before.items() if name in known}
    cases[case] = {"machine": dict(machine), **asdict(found)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**nested_medians(cases), "cases": cases}, indent=1) + "\n", encoding="utf-8")
    text = document.read_text(encoding="utf-8") if document.exists() else "# Speed\n\n"
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(f"{text.partition(MARKER)[0]}{MARKER}\n\n{markdown(cases)}", encoding="utf-8")


def nested_medians(cases: Mapping[str, Any]) -> dict[str, Any]:
    """Nest the medians of all cases by their keys."""
    nested: dict[str, Any] = {}
    for case in cases.values():
        for key, ratio in case["ratios"].items():
            *groups, name = key.split(".")
            inner = nested
            for group in groups:
                inner = inner.setdefault(group, {})
            inner[name] = ratio["median"]
    return nested


def markdown(cases: Mapping[str, Any]) -> str:
    """Format all cases: first the ratios, then each case's tables, then the machine."""
    rows = [
        [f"`{key}`", *(f"{ratio[name]:.3f}" for name in ("median", "min", "max")), str(ratio["pairs"]), _aim(ratio)]
        for case in cases.values()
        for key, ratio in case["ratios"].items()
    ]
    parts = [_table(["ratio", "median", "min", "max", "pairs", "aim"], rows)]
    for case in cases.values():
        for table in case["tables"]:
            parts += [f"## {table['title']}", _table(table["columns"], table["rows"])]
    parts.append("## Machine")
    machines: dict[str, list[str]] = {}
    for name, case in cases.items():
        machines.setdefault(json.dumps(case["machine"]), []).append(name)
    for machine, names in machines.items():
        described = [[key, value] for key, value in json.loads(machine).items()]
        parts.append(_table(["cases", ", ".join(names)], described))
    return "\n\n".join(parts) + "\n"


def _aim(ratio: Mapping[str, Any]) -> str:
    """Say what was aimed at and, by the median, whether it was met."""
    if ratio["target"] is None:
        return ""
    met = (ratio["median"] <= ratio["target"]) if ratio["at_most"] else (ratio["median"] >= ratio["target"])
    sign = "at most" if ratio["at_most"] else "at least"
    return f"{sign} {ratio['target']:g}: {'met' if met else 'missed'}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])
