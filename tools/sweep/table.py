"""The table of a sweep, in Markdown."""

from collections.abc import Callable, Sequence
from statistics import mean

from tools.results import RunResult
from tools.sweep.jobs import JobResult
from tools.tables import NOTHING, markdown, spread

SEED = "seed="
HEAD = ("accuracy, %", "clients' mean, %", "worst client, %", "s per round", "MB per round")


def sweep_table(results: Sequence[JobResult]) -> str:
    """Write a row for all jobs that differ in their seed alone, named by what tells rows apart, and notes.

    Parameters
    ----------
    results : Sequence[JobResult]
        All jobs, in their order.

    Returns
    -------
    str
        Markdown.
    """
    common = set.intersection(*(set(result.overrides) for result in results)) if results else set()
    rows: dict[str, list[JobResult]] = {}
    for result in results:
        own = [one for one in result.overrides if one not in common and not one.startswith(SEED)]
        rows.setdefault(" ".join(own) or "all", []).append(result)
    table = markdown(["run", *HEAD], [[name.replace("|", r"\|"), *_cells(row)] for name, row in rows.items()])
    return "\n\n".join([table, "\n".join(f"- {note}" for note in _notes(results, common))])


def _cells(row: Sequence[JobResult]) -> list[str]:
    """Write the measures of a row's finished runs."""
    done = [result for result in row if result.finished]
    accuracies: list[Callable[[RunResult], float | None]] = [
        lambda result: result.final,
        lambda result: result.clients_mean,
        lambda result: result.clients_worst,
    ]
    shares = [[value for result in done if (value := measure(result)) is not None] for measure in accuracies]
    seconds = [result.round_seconds for result in done if result.round_seconds is not None]
    traffic = [(result.bytes_down + result.bytes_up) / result.rounds / 1e6 for result in done if result.rounds]
    costs = [f"{mean(found):.1f}" if found else NOTHING for found in (seconds, traffic)]
    return [*(spread([100 * value for value in found]) for found in shares), *costs]


def _notes(results: Sequence[JobResult], common: set[str]) -> list[str]:
    notes = ["Mean ± sample standard deviation over seeds (number of runs); a round's seconds include its evaluation."]
    notes += [f"All with: {' '.join(sorted(common))}."] if common else []
    notes += [
        f"Missing, {result.status}: {' '.join(result.overrides)}: {result.reason.splitlines()[0].rstrip('.')}."
        for result in results
        if not result.finished
    ]
    return notes
