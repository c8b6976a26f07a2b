"""Rounds of a simulation against a plain loop, against a tutorial's Flower app, and beside an empty one."""

from collections.abc import Sequence

from benchmarks.speed.agreement import check_same
from benchmarks.speed.arms import AppArm, Arm, EmptyArm, FloorArm, TutorialArm
from benchmarks.speed.floor import ArmRun, mean_of_each
from benchmarks.speed.processor import num_cores
from benchmarks.speed.ratios import Ratio
from benchmarks.speed.results import Found, Table
from benchmarks.speed.settings import SETTINGS, Setting
from tools.simulation import SimulationSuperLink

SPEEDUP = 2.0
"""What is aimed at against the tutorial's app."""


def measure(repeats: int) -> Found:
    """Run all arms of all settings, in turn.

    Parameters
    ----------
    repeats : int
        Runs of the floor and of the app in each setting; every steady round of them is a pair. The tutorial's app is
        run once, since it builds everything anew for every message.
    """
    ratios, tables = {}, []
    with SimulationSuperLink() as link:
        for setting in SETTINGS.values():
            floors, apps = in_turn((FloorArm(), AppArm(link)), setting, repeats)
            ratios[f"simulation_efficiency.{setting.name}"] = paired(floors, apps, setting.target)
            size = sum(value.numel() for value in apps[0].adapter.values())
            empty = EmptyArm(link, size).run(setting)
            tables += [parts_table(setting, apps, floors, empty), cores_table(setting, apps, floors)]
            if setting.name == "overhead_bound":
                tutorial = TutorialArm(link).run(setting)
                check_same(tutorial.adapter, apps[0].adapter)
                ratios["naive_speedup"] = paired([tutorial] * len(apps), apps, SPEEDUP)
    return Found(ratios, tables)


def in_turn(arms: Sequence[Arm], setting: Setting, repeats: int) -> list[list[ArmRun]]:
    """Run arms in turn, every other time in reverse order; their final adapters must agree. Runs of each arm."""
    found: list[list[ArmRun]] = [[] for _ in arms]
    for repeat in range(repeats):
        order = range(len(arms))
        for number in reversed(order) if repeat % 2 else order:
            found[number].append(arms[number].run(setting))
        for runs in found[1:]:
            check_same(runs[-1].adapter, found[0][-1].adapter)
    return found


def paired(over: list[ArmRun], under: list[ArmRun], target: float | None = None) -> Ratio:
    """Divide round by round: the same round has the same cohort and the same batches in every arm."""
    return Ratio.between(
        [seconds for run in over for seconds in run.rounds],
        [seconds for run in under for seconds in run.rounds],
        target,
    )


def parts_table(setting: Setting, apps: list[ArmRun], floors: list[ArmRun], empty: ArmRun) -> Table:
    """Say where the time of a steady round goes, in seconds and as a share of the app's round."""
    app, floor = mean_parts(apps), mean_parts(floors)
    received = app["train"] - app["wait"] - app["steps"]
    other = "its other work: messages read and written, values copied into the model"
    evaluation = "evaluation by clients and server"
    if setting.one_phase:
        other, evaluation = f"{other}, evaluation", "evaluation by the server"
    rows = [
        ("batches and optimizer steps of the busiest worker", app["steps"], None, None),
        (other, received, None, None),
        ("Flower's queues and transfers, and the end of the phase", app["wait"], None, empty.parts["train"]),
        ("training phase, all of the above", app["train"], floor["train"], empty.parts["train"]),
        ("checks and aggregation", app["aggregate"], floor["aggregate"], None),
        (evaluation, app["evaluate"], floor["evaluate"], empty.parts["evaluate"]),
        ("metrics and checkpoint written", app["keep"], None, None),
    ]
    rows.append(("round", app["round"], floor["round"], sum(empty.parts.values())))
    cells = [
        [what, f"{mine:.3f}", f"{100 * mine / app['round']:.1f} %", *("" if v is None else f"{v:.3f}" for v in others)]
        for what, mine, *others in rows
    ]
    columns = ["seconds per round", "`flwr run`", "share", "plain loop", "empty Flower app"]
    return Table(f"Where a round goes: {setting.shown}", columns, cells)


def cores_table(setting: Setting, apps: list[ArmRun], floors: list[ArmRun]) -> Table:
    """Say whose work keeps how many cores busy in a steady round, and how much of them is idle or other load's."""
    arms = [mean_of_each([run.cores for run in runs]) for runs in (apps, floors)]
    rows = {whose: [used.get(whose, 0.0) for used in arms] for whose in arms[0]}
    rows["idle, or other load"] = [num_cores() - sum(used.values()) for used in arms]
    cells = [[what, *(f"{value:.3f}" for value in values)] for what, values in rows.items()]
    return Table(f"Whose work the cores do: {setting.shown}", ["cores", "`flwr run`", "plain loop"], cells)


def mean_parts(runs: list[ArmRun]) -> dict[str, float]:
    """Average the parts of a round over runs, and the round itself."""
    rounds = [seconds for run in runs for seconds in run.rounds]
    return {**mean_of_each([run.parts for run in runs]), "round": sum(rounds) / len(rounds)}
