"""Explain which merge weights clients should have had by the signals they sent, and derive a LIVAR table from it.

Run: ``python -m tools.explain RUN [RUN ...] --out FOLDER`` over folders of runs with ``record_updates=true``. What was
learned of a record is kept in ``FOLDER/targets`` and not learned again; ``FOLDER/summary.md`` says what was found.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from task.config import typed
from task.errors import PetalwiseError
from tools.explain.analysis import ComputeOptions, explain_runs
from tools.explain.learning import LearnOptions
from tools.explain.summary import Findings, verdict


def main() -> None:
    """Read the command line, explain the runs, and say in a few lines what was found."""
    arguments = vars(_parser().parse_args())
    runs, out = arguments.pop("runs"), arguments.pop("out")
    try:
        learning = typed(LearnOptions, {name: arguments[name] for name in asdict(LearnOptions())}, "--")
        compute = typed(ComputeOptions, {name: arguments[name] for name in asdict(ComputeOptions())}, "--")
        command = ["python", "-m", "tools.explain", *sys.argv[1:]]
        print(_closing(explain_runs(runs, out, learning, compute, command)))
    except PetalwiseError as error:
        sys.exit(f"Nothing is explained: {error}")
    except OSError as error:
        sys.exit(f"Nothing is explained: {error}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    learning, compute = LearnOptions(), ComputeOptions()
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run with record_updates=true")
    add("--out", type=Path, required=True, help="folder for targets, table, plots and summary")
    add("--calibration-images", type=int, default=learning.calibration_images, help="server images to learn on")
    add("--steps", type=int, default=learning.steps, help="steps of Adam per record")
    add("--learning-rate", type=float, default=learning.learning_rate, help="of the logits of the weights")
    add("--pull", type=float, default=learning.pull, help="pull of the logits towards uniform weights")
    add("--batch-size", type=int, default=compute.batch_size, help="images per forward pass")
    add("--device", default=compute.device, help="auto, cpu or cuda")
    add("--seed", type=int, default=compute.seed, help="seed of the forest")
    return parser


def _closing(findings: Findings) -> str:
    found, grouped_by = findings.explanation, findings.rows.grouped_by
    return (
        f"R2 on {grouped_by} left out: {found.r2:.3f}. {verdict(found)}\n"
        f"Table: {findings.table_path}\nSummary: {findings.table_path.parent / 'summary.md'}"
    )


if __name__ == "__main__":
    main()
