"""What strategies share whose clients keep some units as their own from one of their rounds to the next."""

from collections.abc import Iterable
from typing import Any, ClassVar

from flwr.app import ArrayRecord, Message, MetricRecord

from strategies.base import LayerwiseStrategy
from task.messages import NOT_KEPT


class KeepingStrategy(LayerwiseStrategy):
    """Knows in which round each client last took part, which is where it goes on from."""

    lora_merges: ClassVar[tuple[str, ...]] = ("factors",)
    plans_exchanges: ClassVar[bool] = True

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.last_round: dict[str, int] = {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge, and note who took part; a client that has lost what it kept starts afresh the next time."""
        result = super().aggregate_train(server_round, replies)
        self.last_round |= dict.fromkeys(self.report.clients_used, server_round)
        for client, reason in self.report.clients_dropped.items():
            if NOT_KEPT in reason:
                self.last_round.pop(client, None)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, and when each client last took part."""
        return super().state_dict() | {"last_round": dict(self.last_round)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.last_round = dict(state["last_round"])
