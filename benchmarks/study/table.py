"""The tables of a study in Markdown, with all that a reader must know of them."""

from collections.abc import Callable, Sequence
from statistics import mean

from benchmarks.study.cells import Cell, compared_cells, shown
from benchmarks.study.ledger import Choice, Ledger
from benchmarks.study.results import CellResult
from benchmarks.study.study import Study
from tools.tables import NOTHING, markdown, spread

Measure = Callable[[CellResult], float | None]


def study_tables(ledger: Ledger) -> str:
    """Write the tables of a study: accuracy and differences, accuracy of the clients, costs, and notes.

    Parameters
    ----------
    ledger : Ledger
        The study and its results; cells that are not finished are named in the notes.

    Returns
    -------
    str
        Markdown.
    """
    study = ledger.study
    results, unfinished = _sorted_out(ledger)
    first = study.methods[0].name
    parts = [
        f"Final accuracy on the server's test images, %, and difference to {first}:",
        accuracy_table(study, results, lambda result: result.final),
        f"Final accuracy on the clients' own test images, mean over clients, %, and difference to {first}:",
        accuracy_table(study, results, lambda result: result.clients_mean),
        *_tuned_tables(study, results),
        *_schedule_tables(study, results),
        "Seconds per round, and MB per round sent and received by the server:",
        cost_table(study, results),
        "\n".join(f"- {note}" for note in _notes(ledger, results, unfinished)),
    ]
    return "\n\n".join(parts)


def _tuned_tables(study: Study, results: Sequence[CellResult]) -> list[str]:
    """Write, where clients also evaluated after tuning, mean, worst client and deviation before and after it."""
    if not any(result.tuned_mean is not None for result in results):
        return []
    return [
        "The same after a further round of each client's own training:",
        accuracy_table(study, results, lambda result: result.tuned_mean),
        "Lowest accuracy of a client, before that:",
        accuracy_table(study, results, lambda result: result.clients_worst),
        "And after it:",
        accuracy_table(study, results, lambda result: result.tuned_worst),
        "Standard deviation over clients, points, before that:",
        accuracy_table(study, results, lambda result: result.clients_deviation),
        "And after it:",
        accuracy_table(study, results, lambda result: result.tuned_deviation),
    ]


def _schedule_tables(study: Study, results: Sequence[CellResult]) -> list[str]:
    """Write, where a schedule chose units that wait longer, their share of all values."""
    if not any(result.lengthened_share is not None for result in results):
        return []
    return [
        "Share of the values whose units were lengthened (lambda*), mean over windows, %:",
        accuracy_table(study, results, lambda result: result.lengthened_share),
    ]


def accuracy_table(study: Study, results: Sequence[CellResult], measure: Measure) -> str:
    """Write a row per method and two columns per setting: mean ± deviation (n), and difference to the first method.

    Parameters
    ----------
    study : Study
        Names the rows and columns.
    results : Sequence[CellResult]
        Finished cells.
    measure : callable
        Maps a result to an accuracy in [0, 1], or None.

    Returns
    -------
    str
        A Markdown table, in %.
    """
    first = study.methods[0].name
    head = [cell for setting in study.settings for cell in (setting.name, "difference")]
    rows = []
    for method in study.methods:
        row = [method.name]
        for setting in study.settings:
            own = by_seed(results, setting.name, method.name, measure)
            base = by_seed(results, setting.name, first, measure)
            paired = [own[seed] - base[seed] for seed in own if seed in base and method.name != first]
            row += [spread([100 * value for value in own.values()]), spread([100 * d for d in paired], sign="+")]
        rows.append(row)
    return markdown(["method", *head], rows)


def cost_table(study: Study, results: Sequence[CellResult]) -> str:
    """Write mean seconds and megabytes of a round of training, a row per method and two columns per setting."""
    head = [cell for setting in study.settings for cell in (f"{setting.name}, s", "MB")]
    rows = []
    for method in study.methods:
        row = [method.name]
        for setting in study.settings:
            seconds = by_seed(results, setting.name, method.name, lambda result: result.round_seconds)
            traffic = by_seed(results, setting.name, method.name, _megabytes)
            row += [f"{mean(found.values()):.1f}" if found else NOTHING for found in (seconds, traffic)]
        rows.append(row)
    return markdown(["method", *head], rows)


def by_seed(results: Sequence[CellResult], setting: str, method: str, measure: Measure) -> dict[int, float]:
    """Pick the values of a measure for a setting and method."""
    own = [result for result in results if (result.setting, result.method) == (setting, method)]
    return {result.seed: value for result in own if (value := measure(result)) is not None}


def _megabytes(result: CellResult) -> float | None:
    return (result.bytes_down + result.bytes_up) / result.rounds / 1e6 if result.rounds else None


def _sorted_out(ledger: Ledger) -> tuple[list[CellResult], list[tuple[Cell, str]]]:
    """Return the finished results of the compared cells, and why each of the others is not among them."""
    finished: list[CellResult] = []
    unfinished: list[tuple[Cell, str]] = []
    for cell in compared_cells(ledger.study):
        known = ledger.resolved(cell)
        result = None if known is None else ledger.result(known)
        if result is not None and result.finished:
            finished.append(result)
        elif result is not None:
            unfinished.append((cell, f"{result.status}: {result.reason.splitlines()[0]}"))
        elif known is None:
            unfinished.append((cell, "not tuned yet"))
        else:
            unfinished.append((cell, "its config has changed" if ledger.store.read(cell.key) else "not run yet"))
    return finished, unfinished


def _notes(ledger: Ledger, results: Sequence[CellResult], unfinished: Sequence[tuple[Cell, str]]) -> list[str]:
    study = ledger.study
    notes = [
        "Mean ± sample standard deviation over seeds (number of seeds); differences are paired by seed; seeds "
        f"{', '.join(map(str, study.seeds))}; a round's seconds include its evaluation."
    ]
    notes += _tuning_notes(ledger)
    dropped = [f"{result.key} {result.dropped}" for result in results if result.dropped]
    notes += [f"Replies that did not count: {', '.join(dropped)}."] if dropped else []
    versions = sorted({f"{result.commit[:10]}{' with changes' if result.dirty else ''}" for result in results})
    notes += [f"Code: {', '.join(versions)}."] if versions else []
    for reason in dict.fromkeys(reason for _, reason in unfinished):
        cells = [cell for cell, why in unfinished if why == reason]
        notes.append(f"Missing, {reason.rstrip('.')}: {_listed(study, cells)}.")
    return notes


def _listed(study: Study, cells: Sequence[Cell]) -> str:
    """Name cells shortly: by setting and method with their seeds."""
    if len(cells) == len(compared_cells(study)):
        return f"all {len(cells)} cells"
    pairs = dict.fromkeys((cell.setting, cell.method) for cell in cells)
    seeds = {pair: [str(cell.seed) for cell in cells if (cell.setting, cell.method) == pair] for pair in pairs}
    return "; ".join(f"{setting} {method} seed {', '.join(found)}" for (setting, method), found in seeds.items())


def _tuning_notes(ledger: Ledger) -> list[str]:
    study, tuning = ledger.study, ledger.study.tuning
    tuned = [method.name for method in study.methods if study.grid_of(method.name)]
    if not tuned:
        return []
    further = f" and {' '.join(tuning.overrides)}" if tuning.overrides else ""
    choices = {method: ledger.choice(method) for method in tuned}
    pending = [method for method, choice in choices.items() if choice is None]
    return [
        f"Tuned for each method on setting {tuning.setting} with seed {tuning.seed}{further}, by final accuracy on "
        "the server's images of those runs; what is chosen there holds for all settings and seeds.",
        *(_choice_note(method, choice) for method, choice in choices.items() if choice is not None),
        *([f"Not tuned yet: {', '.join(pending)}."] if pending else []),
    ]


def _choice_note(method: str, choice: Choice) -> str:
    tried = [f"{shown(values)} {_percent(final)}" for values, final in choice.tried]
    edge = f"; {', '.join(choice.edges)} is at the edge of the grid" if choice.edges else ""
    return f"{method}: {shown(choice.values)} of {', '.join(tried)}{edge}."


def _percent(value: float | None) -> str:
    return "did not finish" if value is None else f"{100 * value:.1f} %"
