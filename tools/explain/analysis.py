"""The whole analysis: from run folders to a table, plots and a summary."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from task.config import bounded
from task.device import choose_device
from task.extras import require_extra
from tools.explain.forest import explain
from tools.explain.learning import LearnOptions
from tools.explain.plots import draw_plots
from tools.explain.progress import LearningProgress
from tools.explain.records import Run, read_runs
from tools.explain.rows import check_signals, make_rows
from tools.explain.summary import Findings, records_of, summary, write_rows
from tools.explain.table import QUANTILES, derive_table, write_table
from tools.explain.targets import Learner, Target, TargetStore

EXTRA = ("shap", "matplotlib")
"""Packages of the extra ``explain``."""


@dataclass
class ComputeOptions:
    """What changes results by rounding only, and the forest's seed."""

    batch_size: int = bounded(64, at_least=1)
    """Images per forward pass."""
    device: str = bounded("auto", choices=("auto", "cpu", "cuda"))
    """Where to learn targets."""
    seed: int = bounded(0, at_least=0)
    """Seed of the forest."""


def explain_runs(
    folders: Sequence[Path], out: Path, learning: LearnOptions, compute: ComputeOptions, command: Sequence[str] = ()
) -> Findings:
    """Do the whole analysis: targets, forest, SHAP values, table, plots, summary.

    Parameters
    ----------
    folders : Sequence[Path]
        Folders of runs with ``record_updates=true``.
    out : Path
        Gets ``table.yaml``, ``summary.md``, ``rows.csv``, the plots and ``targets/``; made if it is not there.
    learning : LearnOptions
        How target weights are learned.
    compute : ComputeOptions
        Device, batch size, seed.
    command : Sequence[str]
        The command that does it, for the summary.

    Returns
    -------
    Findings
        What was found.

    Raises
    ------
    PetalwiseError
        If the runs, their data or their signals do not allow it.
    """
    require_extra("explain", EXTRA)
    runs = read_runs(folders)
    check_signals(runs)
    out.mkdir(parents=True, exist_ok=True)
    targets = learn_targets(runs, TargetStore(out / "targets", learning), compute)
    rows = make_rows(runs, {digest: target.weights for digest, target in targets.items()}, QUANTILES)
    print(f"Explaining {len(rows.target)} rows", flush=True)
    explanation = explain(rows, compute.seed)
    offsets = dict(zip(rows.names, explanation.values.T, strict=True))
    derived = derive_table(explanation.base, offsets["s_A"], offsets["s_B"], rows.bins)
    path = out / "table.yaml"
    r2 = f"R2 on {rows.grouped_by} left out: {explanation.r2:.3f}"
    write_table(path, derived.table, f"{records_of(runs)}; {r2}")
    plots = draw_plots(out, rows, explanation, QUANTILES)
    findings = Findings(runs, targets, learning, rows, explanation, derived, path, plots, command)
    write_rows(out / "rows.csv", rows, explanation)
    (out / "summary.md").write_text(summary(findings), encoding="utf-8")
    return findings


def learn_targets(runs: Sequence[Run], store: TargetStore, compute: ComputeOptions) -> dict[str, Target]:
    """Learn the target of every record, or read it where it was learned before; a line each.

    Parameters
    ----------
    runs : Sequence[Run]
        Runs with their records.
    store : TargetStore
        Keeps every target as soon as it is learned.
    compute : ComputeOptions
        Device and batch size.

    Returns
    -------
    dict[str, Target]
        Targets by the digest of their record.
    """
    device, found = choose_device(compute.device), {}
    pairs = [(run, record) for run in runs for record in run.records]
    missing = sum(not store.path(run, record).is_file() for run, record in pairs)
    progress = LearningProgress([record.label for _, record in pairs], missing, store.options.steps)
    for run in runs:
        learner = Learner(run, store.options, device, compute.batch_size)
        for record in run.records:
            began = time.perf_counter()
            target = store.read(run, record)
            seconds = None
            if target is None:
                target = learner.learn(record, progress.show_step)
                store.keep(run, record, target)
                seconds = time.perf_counter() - began
            found[record.digest] = target
            print(progress.line(record.label, target, seconds), flush=True)
    return found
