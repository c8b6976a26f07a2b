"""The server's side of differential privacy: Flower's strategy wrappers around a mean that is there already."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    Strategy,
)

from strategies.replies import Update
from task.arrays import FLAT
from task.errors import MessageError
from task.messages import METRICS
from task.privacy import CLIPPING_NORM, DELTA, EPSILON, NORM_BIT, PRIVACY, PrivacyConfig

SLACK = 1e-3
"""By how much an update may exceed the norm, relatively: it was clipped in float32."""


class Merged(Strategy):
    """What Flower's wrappers wrap: it has merged already, and only hands out the result."""

    def __init__(self, arrays: ArrayRecord) -> None:
        self.arrays = arrays

    def aggregate_train(self, server_round: int, replies: Any) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hand out the result."""
        return self.arrays, MetricRecord()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Make no messages."""
        return []

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Make no messages."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Any) -> MetricRecord | None:
        """Have nothing to average."""
        return None

    def summary(self) -> None:
        """Say nothing."""


class Privacy:
    """Clipping norm and noise of one run.

    Flower's wrappers skip a round in which any client fails, and take its mean by numbers of examples, for which their
    noise is not made. Here they get the good replies alone, and a mean in which all clients count alike.

    Parameters
    ----------
    config : PrivacyConfig
        The options.
    """

    def __init__(self, config: PrivacyConfig) -> None:
        self.config = config
        self.clipping_norm = config.clipping_norm

    def train_config(self) -> dict[str, str | float]:
        """Say what clients are to do, as entries of a train message's config; empty where nothing."""
        c = self.config
        if c.name == "none":
            return {}
        if c.masked:
            return {PRIVACY: c.name}
        numbers = {EPSILON: c.epsilon, DELTA: c.delta} if c.name == "local" else {}
        return {PRIVACY: c.name, CLIPPING_NORM: self.clipping_norm, **numbers}

    def check(self, update: Update, received: torch.Tensor) -> None:
        """Refuse an update that was not clipped, or does not say whether it had to be, by a MessageError."""
        if not self.config.central:
            return
        norm = float((update.flat - received).norm())
        if norm > self.clipping_norm * (1 + SLACK):
            raise MessageError(
                f"its change has norm {norm:.4g}, more than privacy.clipping_norm={self.clipping_norm:.4g}."
            )
        if self.config.name == "central_adaptive" and update.metrics.get(NORM_BIT) not in (0, 1):
            raise MessageError(f"it does not say by {NORM_BIT!r} whether it was within the norm.")

    def counted(self, updates: Sequence[Update]) -> Sequence[Update]:
        """Let all clients count alike where the noise supposes it."""
        return [replace(update, num_examples=1) for update in updates] if self.config.central else updates

    def released(self, server_round: int, merged: torch.Tensor, updates: Sequence[Update]) -> torch.Tensor:
        """Add the noise to a merged model, and let the norm adapt; draws are fresh, whatever the run's seed.

        Returns
        -------
        Tensor, float32, [n]
            The model that may be shown.
        """
        if not self.config.central:
            return merged
        np.random.seed()  # Flower draws from this generator; a seed that others know would undo the noise
        inner = Merged(ArrayRecord({FLAT: Array(merged.numpy())}))
        replies = [Message(RecordDict({METRICS: update.metrics}), 1, MessageType.TRAIN) for update in updates]
        multiplier, norm = self.config.noise_multiplier, self.clipping_norm
        if self.config.name == "central_adaptive":
            multiplier = self._adapt(server_round, inner, replies)
        wrapper = DifferentialPrivacyClientSideFixedClipping(inner, multiplier, norm, len(updates))
        arrays, _ = wrapper.aggregate_train(server_round, replies)
        assert arrays is not None
        return torch.from_numpy(arrays[FLAT].numpy())

    def _adapt(self, server_round: int, inner: Merged, replies: list[Message]) -> float:
        """Let the norm follow for the next round; return the multiplier that is left for the noise in the mean.

        Flower's wrapper takes the new norm for the noise as well, which does not cover updates clipped to a larger old
        one; so its noise is left aside. Its noise on the clients' bits, clients / 20, is too little for few clients.
        """
        c, clients = self.config, len(replies)
        bits = max(clients / 20, c.noise_multiplier) if c.noise_multiplier else 0.0
        wrapper = DifferentialPrivacyClientSideAdaptiveClipping(
            inner, c.noise_multiplier, clients, self.clipping_norm, c.target_quantile, c.clip_norm_lr, bits
        )
        wrapper.aggregate_train(server_round, replies)
        self.clipping_norm = float(wrapper.clipping_norm)
        return float(wrapper.noise_multiplier)
