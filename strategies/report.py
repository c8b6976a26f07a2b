"""What is recorded of every round."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from logging import WARNING
from statistics import pstdev
from typing import Any

from flwr.app import MetricRecord
from flwr.common.logger import log

from strategies.cohort import grouped
from strategies.replies import Evaluation


@dataclass
class RoundReport:
    """The record of one server round; round 0 is the evaluation of the initial model."""

    server_round: int
    """Server round, from 0."""
    merged: bool = False
    """Whether enough good replies came for the model to change."""
    complete: bool = True
    """Whether every unit of the model is as new as the round that changed it last; inside a window of FedLAMA, where
    nobody evaluates the model, not."""
    central: dict[str, float] = field(default_factory=dict)
    """Accuracy in [0, 1] and loss on the server's own test images; empty where not evaluated."""
    clients_accuracy: dict[str, float] = field(default_factory=dict)
    """Accuracy by client on its own test images."""
    clients_accuracy_mean: float | None = None
    """Mean of the above over clients, unweighted."""
    clients_accuracy_worst: float | None = None
    """Lowest of the above."""
    clients_accuracy_deviation: float | None = None
    """Standard deviation over clients (divided by their number)."""
    tuned_accuracy: dict[str, float] = field(default_factory=dict)
    """Accuracy by client after a further round of its own training, where ``strategy.evaluate_tuned`` asks for it."""
    tuned_accuracy_mean: float | None = None
    """Mean of the above over clients, unweighted."""
    tuned_accuracy_worst: float | None = None
    """Lowest of the above."""
    tuned_accuracy_deviation: float | None = None
    """Standard deviation over clients (divided by their number)."""
    clients_evaluated_round: int | None = None
    """The round whose model the clients evaluated."""
    train_loss: float | None = None
    """Mean training loss over the used clients, weighted by their examples."""
    clients_used: list[str] = field(default_factory=list)
    """Clients whose update was merged, in identity order."""
    clients_dropped: dict[str, str] = field(default_factory=dict)
    """Reason by client whose train or evaluate reply was missing or refused."""
    clients_refused: dict[str, str] = field(default_factory=dict)
    """Reason by client that cannot take part at all: another base model, other classes, no usable data."""
    clients_partition: dict[str, str] = field(default_factory=dict)
    """By client, the part of a data set that it holds, such as ``partition 3 of 10``, where no report before has named
    it; a client whose images are its own is not named."""
    bytes_down: int = 0
    """Bytes of message contents sent to clients, the question who they are included."""
    bytes_up: int = 0
    """Bytes of message contents received from clients."""
    bytes_down_by_unit: dict[str, int] = field(default_factory=dict)
    """Bytes of adapter and head sent, by layer unit."""
    bytes_up_by_unit: dict[str, int] = field(default_factory=dict)
    """Bytes of adapter and head received, by layer unit."""
    details: dict[str, Any] = field(default_factory=dict)
    """What a strategy tells of its round, such as LIVAR's ``head_weights`` [clients used, classes] and
    ``adapter_weights`` [clients used, ``layers``], pFedLA's ``alpha`` [clients used, units, ``alpha_clients``], or the
    ``product_residual`` [layers] of ``lora.merge=product_svd``."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock: ``train`` (phase), ``evaluate`` (clients' and central), ``aggregate``, ``calibrate``, ``total``;
    ``wait``: the part of the train phase not explained by the busiest worker's own work, and ``steps``: the part of it
    in which the busiest worker took batches and optimizer steps; ``keep``: what recording the round before took,
    outside of ``total``."""

    cohort: int = 0
    """Number of clients that were asked to train."""

    def drop(self, what: str, reasons: dict[str, str]) -> None:
        """Record and log whose reply does not count, and why; ``what`` leads the reasons."""
        for client, reason in reasons.items():
            earlier = self.clients_dropped.get(client, "")
            self.clients_dropped[client] = f"{earlier}; {what}{reason}" if earlier else f"{what}{reason}"
        if reasons:
            log(WARNING, "Round %d: dropped: %s%s", self.server_round, what, grouped(reasons))

    def evaluated(self, evaluations: Sequence[Evaluation], server_round: int) -> MetricRecord | None:
        """Record what clients measured of the model of a round; returns the mean, None if nobody measured."""
        if not evaluations:
            return None
        self.clients_accuracy = {evaluation.client: evaluation.accuracy for evaluation in evaluations}
        self.clients_accuracy_mean = sum(self.clients_accuracy.values()) / len(evaluations)
        self.clients_accuracy_worst = min(self.clients_accuracy.values())
        self.clients_accuracy_deviation = pstdev(self.clients_accuracy.values())
        self.clients_evaluated_round = server_round
        self.tuned_accuracy = {e.client: e.tuned_accuracy for e in evaluations if e.tuned_accuracy is not None}
        if self.tuned_accuracy:
            self.tuned_accuracy_mean = sum(self.tuned_accuracy.values()) / len(self.tuned_accuracy)
            self.tuned_accuracy_worst = min(self.tuned_accuracy.values())
            self.tuned_accuracy_deviation = pstdev(self.tuned_accuracy.values())
        return MetricRecord({"accuracy": self.clients_accuracy_mean, "num-clients": len(evaluations)})

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        return asdict(self)
