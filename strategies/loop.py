"""The rounds of a strategy: discover, train, merge, evaluate, report."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from strategies.cohort import refusal_summary
from strategies.replies import first_metrics
from strategies.report import RoundReport
from task.errors import TooFewClientsError
from task.messages import CONFIG, content_bytes

if TYPE_CHECKING:
    from strategies.base import LayerwiseStrategy

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
OnRound = Callable[[RoundReport], None]
NODE_POLL_SECONDS = 1.0


@dataclass
class RoundLoop:
    """One run of a strategy over a grid; the arguments are those of ``LayerwiseStrategy.start``."""

    strategy: "LayerwiseStrategy"
    grid: Grid
    arrays: ArrayRecord
    num_rounds: int
    timeout: float
    train_config: ConfigRecord = field(default_factory=ConfigRecord)
    evaluate_config: ConfigRecord = field(default_factory=ConfigRecord)
    evaluate_fn: EvaluateFn | None = None
    on_round: OnRound | None = None

    def run(self) -> Result:
        """Run round 0, which only evaluates, and all rounds after it."""
        result = Result(arrays=self.arrays)
        self._wait_for_clients()
        for server_round in range(self.num_rounds + 1):
            self.strategy.report = RoundReport(server_round)
            with self._timed("total"):
                if server_round:
                    self._train(server_round, result)
                    self._evaluate(server_round, result)
                self._evaluate_centrally(server_round, result)
            if self.on_round:
                self.on_round(self.strategy.report)
            self._stop_if_hopeless(server_round)
        return result

    def _wait_for_clients(self) -> None:
        """Wait until enough clients have said who they are."""
        needed, deadline = self.strategy.config.min_clients, time.monotonic() + self.timeout
        while True:
            self._discover()
            found, refused = len(self.strategy.directory.nodes), list(self.strategy.directory.refused.values())
            if found >= needed:
                return
            if refused or time.monotonic() > deadline:
                break
            time.sleep(NODE_POLL_SECONDS)
        raise TooFewClientsError(
            f"{found} client(s) can take part, strategy.min_clients={needed} are needed. "
            f"Refused: {refusal_summary(refused) or 'none'}"
        )

    def _discover(self) -> None:
        context, layout = self.strategy.context, self.strategy.codec.layout.digest
        self.strategy.directory.discover(self.grid, context.task, layout, context.base, self.timeout)

    def _train(self, server_round: int, result: Result) -> None:
        """Discover clients that joined, send the model and let the cohort train, merge the replies."""
        strategy, seconds = self.strategy, self.strategy.report.seconds
        strategy.server_round = server_round
        self._discover()
        with self._timed("train"):
            replies = self._exchange(
                strategy.configure_train(server_round, result.arrays, self.train_config, self.grid)
            )
        seconds["wait"] = round(max(0.0, seconds["train"] - _busiest_worker_seconds(replies)), 4)
        with self._timed("aggregate"):
            arrays, metrics = strategy.aggregate_train(server_round, replies)
        if arrays is not None and metrics is not None:
            result.arrays, result.train_metrics_clientapp[server_round] = arrays, metrics

    def _evaluate(self, server_round: int, result: Result) -> None:
        """Let clients evaluate, in rounds where they do so in a phase of its own."""
        messages = self.strategy.configure_evaluate(server_round, result.arrays, self.evaluate_config, self.grid)
        if not messages:
            return
        with self._timed("evaluate"):
            metrics = self.strategy.aggregate_evaluate(server_round, self._exchange(messages))
        if metrics is not None:
            result.evaluate_metrics_clientapp[server_round] = metrics

    def _evaluate_centrally(self, server_round: int, result: Result) -> None:
        if self.evaluate_fn is None or not self.strategy.evaluates_after(server_round):
            return
        with self._timed("evaluate"):
            metrics = self.evaluate_fn(server_round, result.arrays)
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics
            central = {key: float(value) for key, value in metrics.items() if not isinstance(value, list)}
            self.strategy.report.central = central

    def _exchange(self, messages: list[Message]) -> list[Message]:
        """Send messages and wait for the replies, counting the bytes of both."""
        report = self.strategy.report
        report.bytes_down += sum(content_bytes(message.content) for message in messages)
        replies = list(self.grid.send_and_receive(messages, timeout=self.timeout))
        self.strategy.directory.remember(messages, self.strategy.asked)
        report.bytes_up += sum(content_bytes(reply.content) for reply in replies if reply.has_content())
        return replies

    def _stop_if_hopeless(self, server_round: int) -> None:
        """Raise where the run cannot be called a success: too many failed rounds, or not one good one."""
        strategy = self.strategy
        nothing_merged = 0 < server_round == self.num_rounds and not strategy.merged_rounds
        if strategy.failed_rounds < strategy.config.max_failed_rounds and not nothing_merged:
            return
        reasons = refusal_summary(list(strategy.report.clients_dropped.values()))
        raise TooFewClientsError(
            f"{strategy.failed_rounds} successive round(s) up to round {server_round} had fewer than "
            f"strategy.min_clients={strategy.config.min_clients} good replies. Last reasons: {reasons or 'none given'}"
        )

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """Add the wall-clock seconds of a step to the round's report."""
        began = time.perf_counter()
        yield
        seconds = self.strategy.report.seconds
        seconds[step] = round(seconds.get(step, 0.0) + time.perf_counter() - began, 4)


def _busiest_worker_seconds(replies: Iterable[Message]) -> float:
    """Seconds that the busiest worker process spent on its clients, by the clients' own account."""
    busy: dict[str, float] = {}
    for reply in replies:
        if reply.has_content():
            config = reply.content.config_records.get(CONFIG, ConfigRecord())
            worker = str(config.get("worker", reply.metadata.src_node_id))
            seconds = first_metrics(reply).get("seconds", 0.0)
            busy[worker] = busy.get(worker, 0.0) + (float(seconds) if isinstance(seconds, int | float) else 0.0)
    return max(busy.values(), default=0.0)
