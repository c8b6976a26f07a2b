"""FedLAMA: units whose clients agree are synchronised less often."""

from collections.abc import Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any, ClassVar

import torch
from flwr.common.logger import log
from torch import Tensor

from strategies.arithmetic import sample_weights, weighted_sum
from strategies.replies import Update
from strategies.schedule import DrawCohort, Schedule, ScheduleConfig, keep_unsent
from task.config import bounded
from task.exchange import Exchange, units_or_none
from task.units import HEAD, Layout


@dataclass
class FedLamaConfig(ScheduleConfig):
    """Options of :class:`FedLama`."""

    name: str = "fedlama"
    """Name of the schedule in the registry."""
    interval: int = bounded(1, at_least=1)
    """Rounds between synchronisations of a unit that is not lengthened (tau')."""
    factor: int = bounded(2, at_least=1)
    """How many times as long a lengthened unit waits (phi); 1: all units every ``interval`` rounds."""
    head: str = bounded("free", choices=("free", "always"))
    """``always``: the head is never lengthened, and plays no part in the choice of the others."""


class FedLama(Schedule):
    """Synchronise each unit every tau' or phi tau' rounds, as its clients disagree much or little.

    A window is phi tau' rounds. The cohort is fixed inside a window; a client that drops out comes back with the next
    one, and a round that fails ends it. Inside a window clients go on from their own values of the units that are not
    due, with their own optimizer's state. The last round of a run synchronises all.

    References
    ----------
    Lee, Zhang, He, Avestimehr, "Layer-wise Adaptive Model Aggregation for Scalable Federated Learning", AAAI 2023,
    arXiv 2110.10302, Algorithms 1 and 2; the stopping rule of Algorithm 2 as in the authors' code.
    """

    Config: ClassVar[type[ScheduleConfig]] = FedLamaConfig
    config: FedLamaConfig

    def begin(self, layout: Layout, num_rounds: int, seed: int) -> None:
        """Start with tau' for every unit."""
        super().begin(layout, num_rounds, seed)
        self.intervals = dict.fromkeys(layout.units, self.config.interval)
        self.window_start = 1
        self.members: list[str] | None = None
        self._synchronised, self._complete_round, self._span = True, 0, 1

    @property
    def window(self) -> int:
        """Rounds in a window: phi tau'."""
        return self.config.interval * self.config.factor

    def ends_window(self, server_round: int) -> bool:
        """Tell whether the current window ends with a round."""
        return server_round == self.num_rounds or server_round + 1 - self.window_start == self.window

    def due(self, server_round: int) -> tuple[str, ...]:
        """Name the units that are synchronised at the end of a round of the current window."""
        if self.ends_window(server_round):
            return self.layout.units
        position = server_round + 1 - self.window_start
        return tuple(unit for unit in self.layout.units if position % self.intervals[unit] == 0)

    def exchange(self, server_round: int) -> Exchange:
        """Let due units travel: up at the end of their round, down with the next; everything down in a new window."""
        first = server_round == self.window_start
        return Exchange(
            down=None if first else units_or_none(self.due(server_round - 1), self.layout),
            up=units_or_none(self.due(server_round), self.layout),
            start=0 if first else server_round - 1,
            keep=not self.ends_window(server_round),
            moments=True,
        )

    def cohort(self, server_round: int, present: Sequence[str], draw: DrawCohort) -> list[str]:
        """Draw in a window's first round; in later ones, take those who are in the window and still there."""
        if self.members is None:
            return draw(server_round)
        return [client for client in present if client in self.members]

    def merged(self, server_round: int, before: Tensor, after: Tensor, updates: Sequence[Update]) -> dict[str, Any]:
        """Keep units that are not due; where all are, choose the intervals anew."""
        due, exchange = self.due(server_round), self.exchange(server_round)
        keep_unsent(self.layout, exchange, before, after)
        found: dict[str, Any] = {"due": list(due)}
        self.members, self._synchronised = [update.client for update in updates], self.ends_window(server_round)
        if self.ends_window(server_round):
            discrepancy = self._discrepancies(updates)
            self._choose_intervals(discrepancy)
            self._span, self._complete_round = server_round - self._complete_round, server_round
            self._new_window(server_round)
            found["discrepancy"] = discrepancy.tolist()
            found |= self._lengthened() if self.config.factor > 1 else {}
        return {"schedule": found}

    def failed(self, server_round: int) -> None:
        """End the window: the next begins from the model as it is, with everything sent to everyone."""
        if not self._synchronised:
            log(
                WARNING, "Round %d: the window ends early; some units of the model are of earlier rounds.", server_round
            )
        self._new_window(server_round)

    @property
    def complete(self) -> bool:
        """Whether the last round that counted synchronised all units."""
        return self._synchronised

    @property
    def span(self) -> int:
        """Rounds between the last two ends of windows."""
        return self._span

    def state_dict(self) -> dict[str, Any]:
        """Return intervals, place in the window, and who is in it."""
        return {
            "intervals": dict(self.intervals),
            "window_start": self.window_start,
            "members": None if self.members is None else list(self.members),
            "complete": [self._synchronised, self._complete_round, self._span],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned."""
        self.intervals, self.window_start = dict(state["intervals"]), state["window_start"]
        self.members = None if state["members"] is None else list(state["members"])
        self._synchronised, self._complete_round, self._span = state["complete"]

    def _lengthened(self) -> dict[str, Any]:
        """Name the units that are lengthened from now on, and their share of all values (lambda*)."""
        units = [unit for unit, rounds in self.intervals.items() if rounds > self.config.interval]
        size = {unit: part.stop - part.start for unit, part in self.layout.slices.items()}
        return {"lengthened": units, "lengthened_share": sum(size[unit] for unit in units) / sum(size.values())}

    def _new_window(self, server_round: int) -> None:
        self.window_start, self.members = server_round + 1, None

    def _discrepancies(self, updates: Sequence[Update]) -> Tensor:
        """Discrepancy of every unit, float64 [units]."""
        weights = sample_weights([update.num_examples for update in updates])
        return torch.stack(
            [
                unit_discrepancy([update.flat[part] for update in updates], weights, self.intervals[unit])
                for unit, part in self.layout.slices.items()
            ]
        )

    def _choose_intervals(self, discrepancy: Tensor) -> None:
        """Lengthen the units that :func:`lengthened_units` names; a head that is always due is left out."""
        units = [unit for unit in self.layout.units if self.config.head == "free" or unit != HEAD]
        chosen = [self.layout.units.index(unit) for unit in units]
        size = torch.tensor([part.stop - part.start for part in self.layout.slices.values()])
        self.intervals = dict.fromkeys(self.layout.units, self.config.interval)
        if units:
            longer = lengthened_units(discrepancy[chosen], size[chosen]).tolist()
            self.intervals |= {unit: self.window for unit, yes in zip(units, longer, strict=True) if yes}


def unit_discrepancy(values: Sequence[Tensor], weights: Sequence[float], interval: int) -> Tensor:
    """Measure how far clients are apart in a unit: d_l = sum_i p_i ||u_l - x_i,l||^2 / (tau_l dim_l).

    Parameters
    ----------
    values : Sequence[Tensor], float32, each [dim]
        The x_i,l, before the mean u_l = sum_i p_i x_i,l overwrites them.
    weights : Sequence[float]
        The p_i, which sum to one.
    interval : int
        Rounds since the unit was last synchronised (tau_l).

    Returns
    -------
    Tensor, float64, []
        d_l.

    References
    ----------
    Lee et al. 2023 (FedLAMA), Eq. 2.
    """
    mean = weighted_sum(values, weights)
    apart = torch.stack([w * (x.double() - mean).square().sum() for x, w in zip(values, weights, strict=True)])
    return apart.sum() / (interval * mean.numel())


def lengthened_units(discrepancy: Tensor, size: Tensor) -> Tensor:
    """Choose the units that may wait: by ascending d, until 1 - lambda_l < delta_l, that unit included.

    delta_l = sum_{j<=l} d_j dim_j / sum_j d_j dim_j and lambda_l = sum_{j<=l} dim_j / sum_j dim_j are what lengthening
    units up to l adds to the discrepancy and takes from the traffic.

    Parameters
    ----------
    discrepancy : Tensor, [units]
        d_l, not negative. If all are zero, units count by their size; if their sum is not finite, none may wait.
    size : Tensor, [units]
        dim_l, positive.

    Returns
    -------
    Tensor, bool, [units]
        Whether a unit waits phi tau' rounds. At least one does, if the sum is finite.

    References
    ----------
    Lee et al. 2023 (FedLAMA), Algorithm 2, with the rule by which its figures come about (the line printed there,
    delta_l < lambda_l, holds for nearly every unit).
    """
    order = torch.argsort(discrepancy, stable=True)
    dim = size[order].double()
    mass = discrepancy[order].double() * dim
    if not bool(torch.isfinite(mass.sum())):
        return torch.zeros(len(size), dtype=torch.bool)
    if not bool(mass.any()):
        mass = dim
    delta, lam = mass.cumsum(0) / mass.sum(), dim.cumsum(0) / dim.sum()
    crossing = int(torch.nonzero(1 - lam < delta)[0])
    lengthened = torch.zeros(len(size), dtype=torch.bool)
    lengthened[order[: crossing + 1]] = True
    return lengthened
