"""A hypernetwork for every client, all of them one batch of tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from task.seeding import generator_for

EMBEDDING, HIDDEN, DEPTH = 100, 100, 3


class HypernetworkBank:
    """Hypernetworks HN_i with embeddings v_i, which weigh every client's model for every unit.

    A trunk of three fully connected layers with ReLU, and for each unit a linear layer with one output per client,
    made positive and summing to one.

    Parameters
    ----------
    num_clients : int
        Clients i, and as many weights for each unit.
    num_units : int
        Units l.
    positivity : {"softmax", "relu_sum"}
        How outputs become weights. With ``relu_sum`` output weights are drawn from [0, 1), and a row without a
        positive output weighs the client itself alone.
    self_bias : float
        Added to the output j = i before that; 0 starts near uniform weights.
    learning_rate : float
        beta.
    seed : int
        Seed of all draws; each client's are its own.

    References
    ----------
    Ma, Zhang, Guo, Xu, "Layer-wised Model Aggregation for Personalized Federated Learning", CVPR 2022, arXiv
    2205.03993; sizes as in public re-implementations, the paper does not give them.
    """

    def __init__(
        self,
        num_clients: int,
        num_units: int,
        positivity: str = "softmax",
        self_bias: float = 0.0,
        learning_rate: float = 5e-3,
        seed: int = 0,
    ) -> None:
        self.num_units, self.positivity, self.self_bias = num_units, positivity, self_bias
        self.learning_rate, self.seed = learning_rate, seed
        self.parameters: dict[str, Tensor] = {}
        self.grow(num_clients)

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.parameters["embedding"]) if self.parameters else 0

    def grow(self, num_clients: int) -> None:
        """Make room for more clients; those that are there keep their parameters and get outputs for the new ones."""
        before = self.num_clients
        wider = {**self.parameters, **(self._wider(before, num_clients) if before < num_clients else {})}
        for client in range(before, num_clients):
            for name, value in self._drawn(client, num_clients).items():
                if client == before:
                    wider[name] = _with_rows(wider.get(name), num_clients, value.shape)
                wider[name][client] = value
        self.parameters = wider

    def weights(self, clients: Sequence[int], among: Tensor | None = None) -> Tensor:
        """Compute alpha_i = HN_i(v_i) of some clients, float32 [len(clients), units, clients]; rows sum to one.

        Parameters
        ----------
        clients : Sequence[int]
            The i.
        among : Tensor, bool, [len(clients), clients], optional
            The j that may have weight for each i, at least one, else i itself; all by default.
        """
        chosen = torch.tensor(clients, dtype=torch.int64)
        return self._forward({name: value[chosen] for name, value in self.parameters.items()}, chosen, among)

    def step(self, clients: Sequence[int], gain: Tensor, among: Tensor | None = None) -> None:
        """Take one gradient step up sum_{l,j} alpha_i[l,j] G_i[l,j], for every client i apart.

        One after another, in place: all parameters and gradients of a cohort at once would be larger than the store.

        Parameters
        ----------
        clients : Sequence[int]
            The i, distinct.
        gain : Tensor, float32, [len(clients), units, clients]
            G_i[l,j] = <theta_j^l, Delta_i^l>, held constant; 0 where a unit gives no gradient.
        among : Tensor, bool, [len(clients), clients], optional
            As in :meth:`weights`.
        """
        for row, client in enumerate(clients):
            own = {
                name: value[client : client + 1].detach().requires_grad_() for name, value in self.parameters.items()
            }
            allowed = None if among is None else among[row : row + 1]
            objective = (self._forward(own, torch.tensor([client]), allowed) * gain[row]).sum()
            gradients = torch.autograd.grad(objective, list(own.values()))
            with torch.no_grad():
                for mine, gradient in zip(own.values(), gradients, strict=True):
                    mine.add_(gradient, alpha=self.learning_rate)

    def _forward(self, own: dict[str, Tensor], clients: Tensor, among: Tensor | None) -> Tensor:
        hidden = own["embedding"]
        for depth in range(DEPTH):
            weight, bias = own[f"trunk.{depth}.weight"], own[f"trunk.{depth}.bias"]
            hidden = F.relu(torch.einsum("koi,ki->ko", weight, hidden) + bias)
        logits = torch.einsum("kunh,kh->kun", own["output.weight"], hidden) + own["output.bias"]
        itself = F.one_hot(clients, logits.shape[-1]).to(logits.dtype)[:, None, :]
        logits = logits + self.self_bias * itself
        if among is not None:
            logits = logits.masked_fill(~among[:, None, :], -math.inf)
        return logits.softmax(-1) if self.positivity == "softmax" else relu_sum(logits, itself)

    def _drawn(self, client: int, num_clients: int) -> dict[str, Tensor]:
        """Draw the parameters of a client: embedding from N(0, 1), the others as PyTorch's linear layers have them."""
        generator = generator_for(self.seed, "hypernetwork", client)
        found = {"embedding": torch.randn(EMBEDDING, generator=generator)}
        width = EMBEDDING
        for depth in range(DEPTH):
            bound = 1 / math.sqrt(width)
            found[f"trunk.{depth}.weight"] = _uniform((HIDDEN, width), -bound, bound, generator)
            found[f"trunk.{depth}.bias"] = _uniform((HIDDEN,), -bound, bound, generator)
            width = HIDDEN
        found["output.weight"] = self._outputs(num_clients, generator)
        found["output.bias"] = torch.zeros(self.num_units, num_clients)
        return found

    def _outputs(self, count: int, generator: torch.Generator) -> Tensor:
        low, high = (-1 / math.sqrt(HIDDEN), 1 / math.sqrt(HIDDEN)) if self.positivity == "softmax" else (0.0, 1.0)
        return _uniform((self.num_units, count, HIDDEN), low, high, generator)

    def _wider(self, before: int, num_clients: int) -> dict[str, Tensor]:
        """Give the clients that are there outputs for new ones."""
        if not before:
            return {}
        added = num_clients - before
        weights = torch.stack(
            [self._outputs(added, generator_for(self.seed, "hypernetwork", i, before)) for i in range(before)]
        )
        bias = torch.zeros(before, self.num_units, added)
        return {
            "output.weight": torch.cat([self.parameters["output.weight"], weights], 2),
            "output.bias": torch.cat([self.parameters["output.bias"], bias], 2),
        }


def relu_sum(logits: Tensor, itself: Tensor) -> Tensor:
    """Divide positive parts by their sum; a row without any is one at the client itself.

    Parameters
    ----------
    logits : Tensor, [k, units, clients]
        Outputs.
    itself : Tensor, [k, 1, clients]
        One-hot of each client's own place.

    Returns
    -------
    Tensor, [k, units, clients]
        Weights; rows sum to one.
    """
    positive = F.relu(logits)
    total = positive.sum(-1, keepdim=True)
    return torch.where(total > 0, positive / total.clamp_min(torch.finfo(logits.dtype).tiny), itself)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _with_rows(values: Tensor | None, count: int, shape: torch.Size) -> Tensor:
    """Make room for so many rows, the first of which are there already."""
    roomy = torch.empty(count, *shape)
    if values is not None:
        roomy[: len(values)] = values
    return roomy
