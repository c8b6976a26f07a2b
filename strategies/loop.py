"""The rounds of a strategy: discover, train, merge, evaluate, report."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from logging import INFO
from typing import TYPE_CHECKING, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from strategies.ccvr.phase import calibrate, calibration_messages
from strategies.cohort import grouped
from strategies.replies import first_metrics
from strategies.report import RoundReport
from task.errors import OtherClientsError, TooFewClientsError
from task.exchange import EVERYTHING
from task.messages import ARRAYS, CONFIG, content_bytes
from task.wire import num_bytes

if TYPE_CHECKING:
    from strategies.base import LayerwiseStrategy

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
OnRound = Callable[[RoundReport], None]
NODE_POLL_SECONDS = 1.0
SECONDS_BETWEEN_NOTES = 10.0
MAX_QUERY_SECONDS = 300.0


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
    first_round: int = 0
    """Where to begin: 0, or behind the rounds of a strategy that goes on."""
    _evaluator: ThreadPoolExecutor = field(init=False, default_factory=lambda: ThreadPoolExecutor(1))
    """One thread for the server's evaluations: a new one would bring new threads and buffers of torch every time."""

    def run(self) -> Result:
        """Find the clients and run the rounds; round 0 evaluates the initial model."""
        with self._evaluator:
            return self._run()

    def _run(self) -> Result:
        result = Result(arrays=self.arrays)
        if 0 < self.first_round <= self.num_rounds:
            self.strategy.report = RoundReport(self.first_round - 1)
            self._wait_for_clients()
        kept: dict[str, float] = {}
        for server_round in range(self.first_round, self.num_rounds + 1):
            self.strategy.report = RoundReport(server_round, seconds=kept)
            with self._timed("total"):
                if server_round == 0:
                    self._wait_for_clients()
                else:
                    self._train(server_round, result)
                    self._calibrate(server_round, result)
                self._evaluate(server_round, result)
            began = time.perf_counter()
            self.strategy.directory.named |= self.strategy.report.clients_partition
            if self.on_round:
                self.on_round(self.strategy.report)
                kept = {"keep": round(time.perf_counter() - began, 4)}
            self._stop_if_hopeless(server_round)
        if self.first_round > self.num_rounds:  # all rounds were done before, well or badly
            self._stop_if_hopeless(self.num_rounds)
        return result

    def _wait_for_clients(self) -> None:
        """Wait until enough clients have said who they are; give up at once if as many are here but all refused."""
        directory, config = self.strategy.directory, self.strategy.config
        needed = max(config.min_available_clients, config.min_clients)
        began = last_said = time.monotonic()
        while True:
            self._discover()
            found, now = len(directory.nodes), time.monotonic()
            if self._others_are_here(needed):
                why = grouped(directory.refusals)
                raise OtherClientsError(f"No client of this run is here as it was. {why} (in simulation: --clients).")
            if found >= needed:
                return
            if now - began > config.wait_for_clients or (len(directory.refused) >= needed and not found):
                break
            if now - last_said >= SECONDS_BETWEEN_NOTES:
                log(INFO, "Waiting for clients: %d of %d are here.", found, needed)
                last_said = now
            time.sleep(NODE_POLL_SECONDS)
        raise TooFewClientsError(
            f"{found} client(s) can take part, {needed} are needed (strategy.min_available_clients, "
            f"strategy.min_clients). Refused: {grouped(directory.refusals) or 'none'}"
        )

    def _others_are_here(self, needed: int) -> bool:
        """Tell whether all clients of earlier rounds have moved, or all that are here: their number is another."""
        directory = self.strategy.directory
        moved = directory.moved
        return bool(moved) and (moved >= directory.named.keys() or (not directory.nodes and len(moved) >= needed))

    def _discover(self) -> None:
        """Ask new nodes who they are, and count the bytes of it."""
        strategy, report = self.strategy, self.strategy.report
        timeout = min(self.timeout, MAX_QUERY_SECONDS)
        messages = strategy.directory.discover(self.grid, strategy.context, strategy.codec.layout.digest, timeout)
        for message in messages:
            if message.metadata.reply_to_message_id:
                report.bytes_up += content_bytes(message.content) if message.has_content() else 0
            else:
                report.bytes_down += content_bytes(message.content)
        report.clients_refused = strategy.directory.refusals
        here, named = strategy.directory.partitions, strategy.directory.named
        report.clients_partition = {client: share for client, share in here.items() if named.get(client) != share}

    def _train(self, server_round: int, result: Result) -> None:
        """Discover clients that joined, send the model and let the cohort train, merge the replies."""
        strategy, seconds = self.strategy, self.strategy.report.seconds
        strategy.server_round = server_round
        self._discover()
        with self._timed("train"):
            messages = strategy.configure_train(server_round, result.arrays, self.train_config, self.grid)
            replies = self._exchange_masked(messages) if strategy.privacy.config.masked else self._exchange(messages)
        busy, steps = (_busiest_worker_seconds(replies, metric) for metric in ("seconds", "train-seconds"))
        seconds["wait"] = round(max(0.0, seconds["train"] - busy), 4)
        seconds["steps"] = round(min(max(0.0, steps), seconds["train"]), 4)
        with self._timed("aggregate"):
            arrays, metrics = strategy.aggregate_train(server_round, replies)
        strategy.report.complete = strategy.schedule.complete
        if arrays is not None and metrics is not None:
            result.arrays, result.train_metrics_clientapp[server_round] = arrays, metrics

    def _calibrate(self, server_round: int, result: Result) -> None:
        """Let clients measure the merged model and recalibrate the head, in rounds where that is due."""
        messages = calibration_messages(self.strategy, server_round, result.arrays)
        if not messages:
            return
        self.strategy.report.details["calibrated"] = False
        with self._timed("calibrate"):
            arrays = calibrate(self.strategy, server_round, self._exchange(messages))
        if arrays is not None:
            result.arrays = arrays
            self.strategy.report.details["calibrated"] = True

    def _evaluate(self, server_round: int, result: Result) -> None:
        """Let clients evaluate, in rounds where they do so in a phase of its own, and the server meanwhile."""
        strategy, config = self.strategy, self.evaluate_config
        messages = strategy.configure_evaluate(server_round, result.arrays, config, self.grid) if server_round else []
        central = self._central(server_round, result.arrays)
        if not messages and central is None:
            return
        with self._timed("evaluate"):
            pending = self._evaluator.submit(central) if central else None
            found = strategy.aggregate_evaluate(server_round, self._exchange(messages)) if messages else None
            scored = pending.result() if pending else None
        if found is not None:
            result.evaluate_metrics_clientapp[server_round] = found
        if scored is not None:
            result.evaluate_metrics_serverapp[server_round] = scored
            strategy.report.central = {k: float(v) for k, v in scored.items() if not isinstance(v, list)}

    def _central(self, server_round: int, arrays: ArrayRecord) -> Callable[[], MetricRecord | None] | None:
        """Bind what evaluates the model on the server; None where that is not due."""
        if self.evaluate_fn is None or not self.strategy.evaluates_after(server_round):
            return None
        return partial(self.evaluate_fn, server_round, self.strategy.evaluation_arrays(arrays))

    def _exchange(self, messages: list[Message]) -> list[Message]:
        """Send messages and wait for the replies, counting the bytes of both."""
        strategy, report = self.strategy, self.strategy.report
        report.bytes_down += sum(content_bytes(message.content) for message in messages)
        self._count_units(report.bytes_down_by_unit, zip(strategy.asked, messages, strict=True), "down")
        replies = list(self.grid.send_and_receive(messages, timeout=self.timeout))
        strategy.directory.remember(messages, strategy.asked)
        received = [reply for reply in replies if reply.has_content()]
        report.bytes_up += sum(content_bytes(reply.content) for reply in received)
        from_whom = [(strategy.directory.identity_of(reply), reply) for reply in received]
        self._count_units(report.bytes_up_by_unit, from_whom, "up")
        return replies

    def _exchange_masked(self, messages: list[Message]) -> list[Message]:
        """Do the same for training of which the server is to see only the sum."""
        from strategies.secagg import masked_phase  # brings in Flower's older server, which other runs don't need

        strategy, report = self.strategy, self.strategy.report
        examples = [strategy.directory.examples.get(client, 0) for client in strategy.asked]
        phase = masked_phase(self.grid, messages, strategy.codec.layout.size, examples, self.timeout)
        report.bytes_down += phase.bytes_down
        report.bytes_up += phase.bytes_up
        nodes = [message.metadata.dst_node_id for message in messages]
        by_node = dict(zip(nodes, strategy.asked, strict=True))
        report.drop("", {client: phase.lost[node] for node, client in by_node.items() if node in phase.lost})
        sent = [message for message in messages if message.metadata.dst_node_id not in phase.lost]
        strategy.asked = [by_node[message.metadata.dst_node_id] for message in sent]
        strategy.directory.remember(sent, strategy.asked)
        return phase.replies

    def _count_units(
        self, total: dict[str, int], messages: Iterable[tuple[str | None, Message]], way: Literal["down", "up"]
    ) -> None:
        """Add the bytes of every unit that travels, for each message that carries the model."""
        codec = self.strategy.codec
        size = {unit: num_bytes(codec.layout.part([unit]), codec.wire) for unit in codec.layout.units}
        for client, message in messages:
            exchange = self.strategy.exchanges.get(client or "", EVERYTHING)
            units = exchange.down if way == "down" else exchange.up
            if ARRAYS in message.content.array_records:
                for unit in codec.layout.units if units is None else units:
                    total[unit] = total.get(unit, 0) + size[unit]

    def _stop_if_hopeless(self, server_round: int) -> None:
        """Raise where the run cannot be called a success: too many failed rounds, or not one good one."""
        strategy = self.strategy
        nothing_merged = 0 < server_round == self.num_rounds and not strategy.merged_rounds
        if strategy.failed_rounds < strategy.config.max_failed_rounds and not nothing_merged:
            return
        reasons = grouped(strategy.report.clients_dropped)
        raise TooFewClientsError(
            f"{strategy.failed_rounds} successive round(s) up to round {server_round} did not change the model. "
            f"The last: {strategy.last_failure}. Replies that did not count: {reasons or 'none'}"
        )

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """Add the wall-clock seconds of a step to the round's report."""
        began = time.perf_counter()
        yield
        seconds = self.strategy.report.seconds
        seconds[step] = round(seconds.get(step, 0.0) + time.perf_counter() - began, 4)


def _busiest_worker_seconds(replies: Iterable[Message], metric: str) -> float:
    """Seconds that the busiest worker process spent on its clients, by a metric of the clients' own account."""
    busy: dict[str, float] = {}
    for reply in replies:
        if reply.has_content():
            config = reply.content.config_records.get(CONFIG, ConfigRecord())
            worker = str(config.get("worker", reply.metadata.src_node_id))
            seconds = first_metrics(reply).get(metric, 0.0)
            busy[worker] = busy.get(worker, 0.0) + (float(seconds) if isinstance(seconds, int | float) else 0.0)
    return max(busy.values(), default=0.0)
