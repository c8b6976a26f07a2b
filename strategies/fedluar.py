"""FedLUAR: units that hardly change are not uploaded; the server repeats their last update."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from strategies.replies import Update
from strategies.schedule import Schedule, ScheduleConfig
from task.config import bounded
from task.errors import ConfigError
from task.exchange import Exchange, units_or_none
from task.seeding import derive_seed
from task.units import Layout


@dataclass
class FedLuarConfig(ScheduleConfig):
    """Options of :class:`FedLuar`."""

    name: str = "fedluar"
    """Name of the schedule in the registry."""
    recycled: int = bounded(3, at_least=0)
    """Number of units that are not uploaded in a round; fewer than there are."""
    choice: str = bounded("change", choices=("change", "random"))
    """Draw them by their relative change in the last round, or, for comparison, all alike."""


class FedLuar(Schedule):
    """Recycle last round's global update of some units instead of uploading them.

    Clients keep nothing and receive all units; only the way up is shorter. The first round uploads all. What is
    repeated is the change of A and of B, so that no merge may give them another basis in between.

    References
    ----------
    "Layer-wise Update Aggregation with Recycling for Communication-Efficient Federated Learning", arXiv 2503.11146.
    """

    Config: ClassVar[type[ScheduleConfig]] = FedLuarConfig
    config: FedLuarConfig

    @classmethod
    def check_merge(cls, lora_merge: str, merges_products: bool) -> None:
        """Refuse merges of products: their SVD gives other factors in every round, and the difference is no update.

        Raises
        ------
        ConfigError
            If products are merged.
        """
        if merges_products or lora_merge == "product_svd":
            which = "a strategy that merges products of its own accord" if merges_products else "lora.merge=product_svd"
            raise ConfigError(
                f"schedule=fedluar repeats the last change of A and B: it does not go with {which}, whose SVD gives "
                "them another basis in every round."
            )

    def begin(self, layout: Layout, num_rounds: int, seed: int) -> None:
        """Start without anything to recycle.

        Raises
        ------
        ConfigError
            If nothing would be uploaded.
        """
        super().begin(layout, num_rounds, seed)
        if self.config.recycled >= len(layout.units):
            raise ConfigError(
                f"schedule.recycled={self.config.recycled} must be less than the number of units, {len(layout.units)}."
            )
        self.last_update = torch.empty(0)
        self.recycled: tuple[str, ...] = ()

    def exchange(self, server_round: int) -> Exchange:
        """Send everything down; up, all but the recycled units."""
        sent = [unit for unit in self.layout.units if unit not in self.recycled]
        return Exchange(up=units_or_none(sent, self.layout))

    def merged(self, server_round: int, before: Tensor, after: Tensor, updates: Sequence[Update]) -> dict[str, Any]:
        """Repeat the last update of recycled units, and draw those of the next round."""
        for unit in self.recycled:
            part = self.layout.slices[unit]
            after[part] = before[part] + self.last_update[part]
        found = {"recycled": list(self.recycled)}
        self.last_update = after - before
        scores = relative_changes(self.last_update, before, self.layout)
        chances = scores if self.config.choice == "change" else torch.ones_like(scores)
        generator = np.random.default_rng(derive_seed(self.seed, "recycled", server_round))
        drawn = draw_recycled(chances, self.config.recycled, generator)
        self.recycled = tuple(self.layout.units[index] for index in drawn)
        return {"schedule": {**found, "change": scores.tolist()}}

    def state_dict(self) -> dict[str, Any]:
        """Return the last global update and the units to be recycled."""
        return {"last_update": self.last_update.clone(), "recycled": list(self.recycled)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned."""
        self.last_update, self.recycled = state["last_update"].clone(), tuple(state["recycled"])


def relative_changes(update: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """Measure how much each unit changed: s_l = ||Delta_l|| / ||x_l||.

    Parameters
    ----------
    update : Tensor, float32, [n]
        Delta, the last global update.
    values : Tensor, float32, [n]
        x, the model that it was added to.
    layout : Layout
        Index of both.

    Returns
    -------
    Tensor, float64, [units]
        s_l; infinite for a unit that was zero and no longer is, 0 for one that did not change.

    References
    ----------
    arXiv 2503.11146 (FedLUAR), the score that layers are drawn by.
    """
    rows = zip(layout.unit_views(update).values(), layout.unit_views(values).values(), strict=True)
    norms = torch.tensor([[float(u.double().norm()), float(x.double().norm())] for u, x in rows], dtype=torch.float64)
    changed, size = norms.reshape(-1, 2).T
    return torch.where(changed == 0, 0.0, changed / size)


def draw_recycled(scores: Tensor, count: int, generator: np.random.Generator) -> list[int]:
    """Draw units without replacement, with chances proportional to 1/s_l.

    Parameters
    ----------
    scores : Tensor, [units]
        s_l, not negative. A unit with s_l = 0 goes before all others; one with an infinite s_l comes last.
    count : int
        How many.
    generator : Generator
        Draws.

    Returns
    -------
    list[int]
        Indices, ascending.
    """
    # Exponential races: the smallest Exp(1) * s win, which is drawing one by one with chances 1/s.
    race = generator.exponential(size=len(scores)) * scores.numpy()
    return sorted(np.argsort(race, kind="stable")[:count].tolist())
