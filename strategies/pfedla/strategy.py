"""The strategy pFedLA: a hypernetwork for each client weighs every layer unit of every client."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor
from torch.nn import functional

from strategies.keeping import KeepingStrategy
from strategies.options import StrategyConfig
from strategies.pfedla.hypernetwork import HypernetworkBank
from strategies.pfedla.store import ModelStore, exchange_unit
from strategies.replies import Update
from task.config import bounded
from task.errors import MessageError
from task.exchange import EVERYTHING, Exchange, units_or_none

MAX_REPORTED = 20_000
CLIENTS_AT_ONCE = 16
LIMITS = {"float32": 1e15, "float16": 65504.0}


@dataclass
class PFedLaConfig(StrategyConfig):
    """Options of :class:`PFedLa`."""

    positivity: str = bounded("softmax", choices=("softmax", "relu_sum"))
    """How a hypernetwork's outputs become weights."""
    self_bias: float = bounded(0.0)
    """Added to a client's output for itself; 0 starts near uniform weights, 5 near its own model (softmax)."""
    learning_rate: float = bounded(5e-3, above=0.0)
    """Step size of the hypernetworks (beta)."""
    gain: str = bounded("product", choices=("product", "cosine"))
    """What the hypernetworks climb: inner products of models and updates, or, our own variant, their cosines."""
    retained: int = bounded(0, at_least=0)
    """Units with the highest self weight that a client keeps as they are (k of HeurpFedLA); 0: none."""
    max_age: int = bounded(0, at_least=0)
    """Merged rounds for which a model counts in others' sums after its training, our own variant; 0: for ever."""
    store: str = bounded("float32", choices=("float32", "float16"))
    """How the server holds the clients' models."""


class PFedLa(KeepingStrategy):
    """Personal models, each a sum of all clients' models with weights of its own for every layer unit.

    The global model, which the server evaluates and saves, is the plain mean of the clients' models. A client that
    joins late starts from the initial model, with a hypernetwork drawn for it; one that is absent keeps its last model
    here, which goes on counting in the others' sums. With ``max_age`` it does not for long: sums are of a client's own
    model and those that have been trained of late, and the global model is the mean of these.

    References
    ----------
    Ma, Zhang, Guo, Xu, "Layer-wised Model Aggregation for Personalized Federated Learning", CVPR 2022, arXiv
    2205.03993. The update adds (d bar_theta / d psi)^T Delta: Delta is a descent move.
    """

    Config: ClassVar[type[StrategyConfig]] = PFedLaConfig
    config: PFedLaConfig

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.clients: list[str] = []
        self.trained: dict[str, int] = {}  # as last_round, but also of clients that have lost what they kept
        self._known: dict[str, tuple[Tensor, list[int]]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Make room for clients that joined, and ask the cohort to train."""
        self._admit()
        return super().configure_train(server_round, arrays, config, grid)

    def models_for(self, clients: Sequence[str]) -> Iterator[Tensor]:
        """Aggregate clients' personal models, some at a time: each pass reads the whole store once."""
        for first in range(0, len(clients), CLIENTS_AT_ONCE):
            yield from self.store.mixed(self._weights(clients[first : first + CLIENTS_AT_ONCE]))

    def personal_models(self) -> dict[str, Tensor]:
        """Return every client's personal model."""
        return dict(zip(self.clients, self.models_for(self.clients), strict=True))

    def exchange(self, server_round: int, client: str) -> Exchange:
        """Leave out the retained units on the way down, once the client has any of its own."""
        if not self.config.retained:
            return EVERYTHING
        start = self.last_round.get(client, 0)
        kept = self._retained_numbers(client)
        sent = [unit for number, unit in enumerate(self.codec.layout.units) if number not in kept]
        down = units_or_none(sent, self.codec.layout) if start else None
        return Exchange(down=down, start=start, keep=True)

    def check(self, update: Update) -> None:
        """Refuse values that the store cannot hold, or whose products would not be finite."""
        limit, largest = LIMITS[self.config.store], float(update.flat.abs().max())
        if largest > limit:
            raise MessageError(
                f"its largest value is {largest:.3g}; strategy.store={self.config.store} takes {limit:.3g}."
            )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge; what the next round sends is worked out anew."""
        result = super().aggregate_train(server_round, replies)
        self._known.clear()
        return result

    def merge(self, server_round: int, updates: Sequence[Update]) -> Tensor:
        """Step the hypernetworks by what training gained, put the clients' models into the store, return their mean."""
        chosen = [self.clients.index(update.client) for update in updates]
        alpha = self._weights([update.client for update in updates])
        gain = torch.empty_like(alpha)
        cosine = self.config.gain == "cosine"
        for number, (unit, part) in enumerate(self.codec.layout.slices.items()):
            new = [update.flat[part] for update in updates]
            gain[:, number] = exchange_unit(self.store.units[unit], new, chosen, alpha[:, number], cosine)
        for row, update in zip(gain, updates, strict=True):
            row[self._retained_numbers(update.client)] = 0.0
        self.bank.step(chosen, gain, self._counted(chosen))
        self.trained |= {update.client: server_round for update in updates}
        if alpha.numel() <= MAX_REPORTED:
            self.report.details["alpha"] = [[[round(w, 4) for w in row] for row in one] for one in alpha.tolist()]
            self.report.details["alpha_clients"] = list(self.clients)
        return self.store.mean(self._recent())

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, the store, the hypernetworks, and who is where; large tensors are not copied."""
        return super().state_dict() | {
            "clients": list(self.clients),
            "trained": dict(self.trained),
            "initial": self.store.initial,
            "store": dict(self.store.units),
            "hypernetworks": dict(self.bank.parameters),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.clients, self.trained = [], dict(state["trained"])
        self._prepare(state["initial"])
        self.clients += state["clients"]
        self.store.units = {unit: rows.clone() for unit, rows in state["store"].items()}
        self.bank.parameters = {name: value.clone() for name, value in state["hypernetworks"].items()}
        self._known.clear()

    def _admit(self) -> None:
        new = [client for client in self.directory.identities if client not in self.clients]
        self.clients += new
        if not hasattr(self, "store"):
            self._prepare(self.codec.initial)
        elif new:
            self.store.grow(len(self.clients))
            self.bank.grow(len(self.clients))
            self._known.clear()

    def _prepare(self, initial: Tensor) -> None:
        """Make store and hypernetworks for the clients known."""
        c, layout = self.config, self.codec.layout if self.context.layout is None else self.context.layout
        self.store = ModelStore(layout, initial, getattr(torch, c.store))
        self.store.grow(len(self.clients))
        units, seed = len(layout.units), self.context.seed
        self.bank = HypernetworkBank(len(self.clients), units, c.positivity, c.self_bias, c.learning_rate, seed)

    def _weights(self, clients: Sequence[str]) -> Tensor:
        """Weights [len(clients), units, clients], one-hot for what is retained; the same until the next step."""
        return torch.stack([self._weighing(client)[0] for client in clients])

    def _recent(self) -> Tensor | None:
        """Say whose models are not too old to count, bool [clients]; None: all, as while none has trained."""
        if not self.config.max_age or not self.trained:
            return None
        oldest = max(1, max(self.trained.values()) - self.config.max_age + 1)
        return torch.tensor([self.trained.get(client, 0) >= oldest for client in self.clients])

    def _counted(self, numbers: Sequence[int]) -> Tensor | None:
        """Say whose models count for some clients, bool [len(numbers), clients]: those of late, and their own."""
        recent = self._recent()
        if recent is None:
            return None
        itself = functional.one_hot(torch.tensor(numbers), len(recent)).bool()
        return recent | (itself & torch.tensor([client in self.trained for client in self.clients]))

    def _retained_numbers(self, client: str) -> list[int]:
        """Numbers of the units that a client keeps as they are, ascending."""
        return self._weighing(client)[1]

    def _weighing(self, client: str) -> tuple[Tensor, list[int]]:
        """Weights of a client and the numbers of its retained units."""
        if client not in self._known:
            number = self.clients.index(client)
            # One at a time: a batch would round in its own way.
            alpha, kept = self.bank.weights([number], self._counted([number]))[0], []
            if self.config.retained and self.last_round.get(client):
                kept = sorted(alpha[:, number].topk(min(self.config.retained, len(alpha))).indices.tolist())
                alpha[kept] = functional.one_hot(torch.tensor(number), alpha.shape[1]).float()
            self._known[client] = alpha, kept
        return self._known[client]
