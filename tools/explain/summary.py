"""What was found, for people (``summary.md``) and for programs (``rows.csv``)."""

import csv
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from strategies.livar import PUBLISHED_TABLE
from tools.explain.forest import Explanation
from tools.explain.learning import LearnOptions
from tools.explain.records import Run
from tools.explain.rows import FEATURES, Rows
from tools.explain.table import FLOOR, DerivedTable
from tools.explain.targets import Target

PUBLISHED_CLIENTS = 10
"""Clients behind the published table: times this its weights are in units of 1/number of clients."""
WAYS = {
    "uniform": "all clients alike",
    "samples": "by numbers of examples",
    "published": "by the published table",
    "learned": "the learned target",
}


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything that a summary tells."""

    runs: Sequence[Run]
    """The runs, with their records."""
    targets: dict[str, Target]
    """What was learned, by the digest of the record."""
    options: LearnOptions
    """How it was learned."""
    rows: Rows
    """Signals and targets."""
    explanation: Explanation
    """R2 and SHAP values."""
    derived: DerivedTable
    """The table."""
    table_path: Path
    """Its file."""
    plots: Sequence[Path]
    """Files beside it."""
    command: Sequence[str]
    """The command that found it."""


def records_of(runs: Sequence[Run]) -> str:
    """Say how many records of how many runs there are."""
    records = sum(len(run.records) for run in runs)
    return f"{records} records of {len(runs)} run{'s' if len(runs) > 1 else ''}"


def summary(findings: Findings) -> str:
    """Format the findings as Markdown."""
    sections = (_found, _importance, _table, _records, _method)
    return "\n\n".join(["# What the signals say about merge weights", *(part(findings) for part in sections)]) + "\n"


def write_rows(path: Path, rows: Rows, explanation: Explanation) -> None:
    """Write features, target and SHAP values of every row as CSV."""
    head = ["record", "client", "layer", *rows.names, "target", *(f"shap_{name}" for name in rows.names)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for origin, values, target, shap in zip(
            rows.origins, rows.features, rows.target, explanation.values, strict=True
        ):
            numbers = [*values.tolist(), float(target), *shap.tolist()]
            writer.writerow([*origin, *(f"{number:.6g}" for number in numbers)])


def verdict(found: Explanation) -> str:
    """Say in plain words what R2 means for the signals and for the table."""
    every, scores = (
        f"explain {100 * r2:.1f} % of the target's variance" if r2 > 0 else "predict the target no better than its mean"
        for r2 in (found.r2, found.r2_scores)
    )
    told = f"All signals together {every}; s_A and s_B alone, which are all that a table goes by, {scores}."
    return told if found.r2_scores > 0 else f"{told} Take the table for noise."


def _found(findings: Findings) -> str:
    rows, found = findings.rows, findings.explanation
    folds = ", ".join(f"{r2:.3f}" for r2 in found.r2_by_fold)
    left_out = f" {rows.not_finite} rows with signals that are not finite are left out." if rows.not_finite else ""
    return (
        f"{records_of(findings.runs)}, {len(rows.target)} rows (one per client and layer)."
        f"{left_out}\n\n"
        f"**R2 on {rows.grouped_by} left out: {found.r2:.3f}** (by part left out: {folds}; by s_A and s_B alone: "
        f"{found.r2_scores:.3f}; on the rows fitted: {found.r2_fitted:.3f}). {verdict(found)}"
    )


def _importance(findings: Findings) -> str:
    rows = findings.rows
    lines = [
        f"| {name} | {value:.4f} | {FEATURES[name]} |"
        for name, value in findings.explanation.importance(rows.names).items()
    ]
    constant = f"\n\nConstant in these records, and left out: {', '.join(rows.constant)}." if rows.constant else ""
    images = "\n".join(f"![{path.stem}]({path.name})" for path in findings.plots)
    head = "## Importance\n\n| signal | mean abs. SHAP value | what it is |\n|---|---|---|\n"
    return head + "\n".join(lines) + f"{constant}\n\n{images}"


def _table(findings: Findings) -> str:
    derived = findings.derived
    columns, names = _bin_names("s_A", PUBLISHED_TABLE.quantiles_a), _bin_names("s_B", PUBLISHED_TABLE.quantiles_b)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, name in enumerate(names):
        pairs = zip(derived.table.weights[row], PUBLISHED_TABLE.weights[row], derived.counts[row], strict=True)
        cells = [f"{ours:.3f} / {PUBLISHED_CLIENTS * theirs:.3f} ({count})" for ours, theirs, count in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = [f"Base value {findings.explanation.base:.4f}."]
    if derived.floored:
        notes.append(f"{derived.floored} weights were raised to {FLOOR}, as a table's weights must be positive.")
    if empty := int((derived.counts == 0).sum()):
        notes.append(f"{empty} bins have no rows; they get the mean offset of their column plus that of their row.")
    return (
        "## Table\n\nDerived / published (rows behind the derived weight), in units of 1/number of clients: 1 is a "
        f"uniform share.\n\n{chr(10).join(lines)}\n\n{' '.join(notes)}\n\nTo use it:\n\n"
        f"    python -m tools.launch . -c {run_config(findings.table_path.resolve())}\n\n"
        "Compare it, at the same seeds, with `strategy.table=published`, `strategy.adapter=uniform` and "
        "`strategy.adapter=samples`."
    )


def _bin_names(score: str, quantiles: list[float]) -> list[str]:
    between = [f"q{low:g} to q{up:g}" for low, up in itertools.pairwise(quantiles)]
    return [f"{score} < q{quantiles[0]:g}", *between, f"{score} > q{quantiles[-1]:g}"]


def run_config(path: Path) -> str:
    """Quote for the shell the run config that uses a table."""
    quoted = f'"strategy.table={path}"' if re.fullmatch(r"[\w./-]+", str(path)) else f"'strategy.table=\"{path}\"'"
    return shlex.quote(f'strategy="livar" overrides={quoted}')


def _records(findings: Findings) -> str:
    head = ["record", "clients", "images", *WAYS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for run in findings.runs:
        for record in run.records:
            target = findings.targets[record.digest]
            pairs = [target.losses[way] for way in WAYS]
            losses = [f"{learned_on:.4f} / {held_out:.4f}" for learned_on, held_out in pairs]
            lines.append(f"| {' | '.join([record.label, str(len(record.clients)), str(target.images), *losses])} |")
    mean = np.mean([[target.losses[way] for way in WAYS] for target in findings.targets.values()], axis=0)
    means = [f"{learned_on:.4f} / {held_out:.4f}" for learned_on, held_out in mean]
    lines.append(f"| **mean** | | | {' | '.join(means)} |")
    ways = "; ".join(f"{way}: {what}" for way, what in WAYS.items())
    return (
        "## Losses of the merged models\n\nMean cross-entropy (nats) on the calibration images, from which the target "
        f"is learned, / on as many others of the server's test images. Adapters are weighed in four ways ({ways}); "
        "the head is always the clients' mean by numbers of examples. What the target gains on the calibration images "
        f"and not on the others is fitted to the images.\n\n{chr(10).join(lines)}"
    )


def _method(findings: Findings) -> str:
    options = ", ".join(f"{name} {value}" for name, value in vars(findings.options).items())
    return (
        f"## How\n\nTargets: {options}. The calibration images are drawn from the server's test images by the run's "
        "seed; an accuracy on test images must not be reported of a model that was made with this table, unless it "
        f"leaves them out. `rows.csv` holds all rows; docs/explain.md says what was done.\n\n"
        f"    {shlex.join(findings.command)}"
    )
