"""When each layer unit travels: the part of a strategy that decides *which* units move, whatever rule merges them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from strategies.replies import Update
from task.exchange import EVERYTHING, Exchange
from task.units import Layout

DrawCohort = Callable[[int], list[str]]


@dataclass
class ScheduleConfig:
    """Options of a schedule."""

    name: str = "every_round"
    """Name of the schedule in the registry."""


class Schedule:
    """Every unit travels both ways in every round; a subclass has units wait.

    Parameters
    ----------
    config : ScheduleConfig, optional
        Options; default those of :attr:`Config`.
    """

    Config: ClassVar[type[ScheduleConfig]] = ScheduleConfig

    def __init__(self, config: ScheduleConfig | None = None) -> None:
        self.config = self.Config() if config is None else config
        self.layout = Layout(())
        self.num_rounds = 0
        self.seed = 0

    @classmethod
    def check_merge(cls, lora_merge: str, merges_products: bool) -> None:
        """Refuse a way of merging adapters that the schedule does not go with, by a ConfigError; all do by default.

        Parameters
        ----------
        lora_merge : str
            The run's ``lora.merge``.
        merges_products : bool
            Whether the strategy merges products B A of its own accord.
        """

    def begin(self, layout: Layout, num_rounds: int, seed: int) -> None:
        """Prepare for a run over a layout's units."""
        self.layout, self.num_rounds, self.seed = layout, num_rounds, seed

    def exchange(self, server_round: int) -> Exchange:
        """Say which units travel in a round, and what clients keep."""
        return EVERYTHING

    def cohort(self, server_round: int, present: Sequence[str], draw: DrawCohort) -> list[str]:
        """Choose the clients of a round of those that are there; ``draw`` draws those of the round that it is given."""
        return draw(server_round)

    def merged(self, server_round: int, before: Tensor, after: Tensor, updates: Sequence[Update]) -> dict[str, Any]:
        """Complete a merged model and learn from the round.

        Parameters
        ----------
        server_round : int
            Server round.
        before : Tensor, float32, [n]
            The model before the round.
        after : Tensor, float32, [n]
            The merged model; units that clients did not send are to be written.
        updates : Sequence[Update]
            The clients' models, where units that they did not send are those of ``before``.

        Returns
        -------
        dict[str, Any]
            What is told of it in the round's report, JSON-serialisable.
        """
        return {}

    def failed(self, server_round: int) -> None:
        """Learn that a round did not change the model."""

    @property
    def complete(self) -> bool:
        """Whether every unit of the global model is as new as the last round."""
        return True

    @property
    def span(self) -> int:
        """Rounds between the last two complete models."""
        return 1

    def state_dict(self) -> dict[str, Any]:
        """Return all state as one dict of numbers, strings, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned."""


def keep_unsent(layout: Layout, exchange: Exchange, before: Tensor, after: Tensor) -> None:
    """Give units that clients did not send back their values of before, bit for bit."""
    if exchange.up is not None:
        for unit, part in layout.slices.items():
            if unit not in exchange.up:
                after[part] = torch.clone(before[part])
