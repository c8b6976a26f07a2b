"""Rounds of a simulation against a plain loop, a bare Flower app, a tutorial's Flower app, and beside an empty one."""

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.speed.agreement import check_same
from benchmarks.speed.arm_run import ArmRun
from benchmarks.speed.arms import AppArm, Arm, BareArm, EmptyArm, FloorArm, TutorialArm, run_alone
from benchmarks.speed.processor import num_cores
from benchmarks.speed.ratios import Ratio
from benchmarks.speed.results import Found, Table
from benchmarks.speed.settings import SETTINGS, Setting
from benchmarks.speed.slices import run_in_slices
from tools.simulation import SimulationSuperLink

ALONE_ROUNDS = 4
SPEEDUP = 2.0
"""What is aimed at against the tutorial's app."""


def measure(repeats: int) -> Found:
    """Run all arms of all settings: in slices of time for the ratios, alone for the parts of a round.

    Parameters
    ----------
    repeats : int
        Runs of every arm in slices; every steady round of them is a pair.
    """
    found = [part for one in SETTINGS.values() for part in (efficiency(one, repeats), rounds_alone(one))]
    ratios = {key: ratio for part in found for key, ratio in part.ratios.items()}
    return Found(ratios, [table for part in found for table in part.tables])


def efficiency(setting: Setting, repeats: int) -> Found:
    """Compare the plain loop, the bare Flower app and this app in slices of time."""
    with SimulationSuperLink() as one, SimulationSuperLink() as other:
        floors, bares, apps = repeated((FloorArm(), BareArm(one), AppArm(other)), setting, repeats)
    return Found(
        {
            f"simulation_efficiency.{setting.name}": paired(floors, apps, setting.target),
            f"bare_flower_efficiency.{setting.name}": paired(floors, bares),
            f"app_by_bare_flower.{setting.name}": paired(bares, apps),
        }
    )


def rounds_alone(setting: Setting) -> Found:
    """Say where a few rounds go that have the machine to themselves; of one setting, also what a tutorial's app takes.

    That one builds everything anew for every message: in slices, the app would be stopped for too long meanwhile.
    """
    few = replace(setting, rounds=ALONE_ROUNDS + setting.one_phase)
    with SimulationSuperLink() as link:
        app, floor = run_alone(AppArm(link), few), run_alone(FloorArm(), few)
        empty = run_alone(EmptyArm(link, sum(value.numel() for value in app.adapter.values())), few)
        tables, ratios = [parts_table(setting, app, floor, empty), cores_table(setting, app, floor)], {}
        if setting.name == "overhead_bound":
            tutorial = run_alone(TutorialArm(link), few)
            check_same(tutorial.adapter, app.adapter)
            ratios["naive_speedup"] = paired([tutorial], [app], SPEEDUP)
    return Found(ratios, tables)


def repeated(arms: Sequence[Arm], setting: Setting, repeats: int) -> list[list[ArmRun]]:
    """Run arms in slices, several times; their final adapters must agree. Runs of each arm."""
    found: list[list[ArmRun]] = [[] for _ in arms]
    for _ in range(repeats):
        for runs, run in zip(found, run_in_slices(arms, setting), strict=True):
            runs.append(run)
            check_same(run.adapter, found[0][-1].adapter)
    return found


def paired(over: list[ArmRun], under: list[ArmRun], target: float | None = None) -> Ratio:
    """Divide round by round: the same round has the same cohort and the same batches in every arm."""
    return Ratio.between(
        [seconds for run in over for seconds in run.rounds],
        [seconds for run in under for seconds in run.rounds],
        target,
    )


def parts_table(setting: Setting, app: ArmRun, floor: ArmRun, empty: ArmRun) -> Table:
    """Say where the time of a steady round goes, in seconds and as a share of the app's round."""
    mine, loop, idle = with_round(app), with_round(floor), with_round(empty)
    other = "its other work: messages read and written, values copied into the model"
    evaluation = "evaluation by clients and server"
    if setting.one_phase:
        other, evaluation = f"{other}, evaluation", "evaluation by the server"
    rows = [
        ("batches and optimizer steps of the busiest worker", mine["steps"], None, None),
        (other, mine["train"] - mine["wait"] - mine["steps"], None, None),
        ("Flower's queues and transfers, and the end of the phase", mine["wait"], None, idle["train"]),
        ("training phase, all of the above", mine["train"], loop["train"], idle["train"]),
        ("checks and aggregation", mine["aggregate"], loop["aggregate"], None),
        (evaluation, mine["evaluate"], loop["evaluate"], idle["evaluate"]),
        ("metrics and checkpoint written", mine["keep"], None, None),
        ("round", mine["round"], loop["round"], idle["round"]),
    ]
    cells = [
        [
            what,
            f"{taken:.3f}",
            f"{100 * taken / mine['round']:.1f} %",
            *("" if v is None else f"{v:.3f}" for v in others),
        ]
        for what, taken, *others in rows
    ]
    columns = ["seconds per round", "`flwr run`", "share", "plain loop", "empty Flower app"]
    return Table(f"Where a round goes: {setting.shown}", columns, cells)


def cores_table(setting: Setting, app: ArmRun, floor: ArmRun) -> Table:
    """Say whose work keeps how many cores busy in a steady round, and how much of them is idle or other load's."""
    arms = (app.cores, floor.cores)
    rows = {whose: [used.get(whose, 0.0) for used in arms] for whose in arms[0]}
    rows["idle, or other load"] = [num_cores() - sum(used.values()) for used in arms]
    cells = [[what, *(f"{value:.3f}" for value in values)] for what, values in rows.items()]
    return Table(f"Whose work the cores do: {setting.shown}", ["cores", "`flwr run`", "plain loop"], cells)


def with_round(run: ArmRun) -> dict[str, float]:
    """Put the mean of the rounds beside the means of their parts."""
    return {**run.parts, "round": sum(run.rounds) / len(run.rounds)}
