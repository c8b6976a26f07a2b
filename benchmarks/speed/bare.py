"""The overhead-bound rounds of this app against those of a bare Flower app: which part of what is lost is Flower's."""

from benchmarks.speed.arms import AppArm, BareArm, FloorArm
from benchmarks.speed.ratios import Ratio
from benchmarks.speed.results import Found
from benchmarks.speed.settings import SETTINGS
from benchmarks.speed.simulation import in_turn, paired
from tools.simulation import SimulationSuperLink

NAMES = ("overhead_bound", "overhead_bound_one_phase")


def measure(repeats: int) -> Found:
    """Run the plain loop, the bare Flower app and this app in turn."""
    ratios: dict[str, Ratio] = {}
    with SimulationSuperLink() as link:
        arms = (FloorArm(), BareArm(link), AppArm(link))
        for name in NAMES:
            floors, bares, apps = in_turn(arms, SETTINGS[name], repeats)
            ratios[f"bare_flower_efficiency.{name}"] = paired(floors, bares)
            ratios[f"app_by_bare_flower.{name}"] = paired(bares, apps)
    return Found(ratios)
