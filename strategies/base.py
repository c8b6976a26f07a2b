"""The strategy that all others refine: stable identities, checked replies, one flat model, serialisable state."""

import dataclasses
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR, INFO, WARNING
from typing import Any, ClassVar, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from strategies.codec import Codec
from strategies.cohort import ClientDirectory, draw_cohort, refusal_summary
from strategies.replies import Collected, Evaluation, Update, check_evaluation, check_update, replies_by_client
from strategies.report import RoundReport
from task.config import bounded
from task.errors import MessageError, TooFewClientsError
from task.messages import ARRAYS, CONFIG, Instruction, content_bytes
from task.units import Layout

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
OnRound = Callable[[RoundReport], None]
NODE_POLL_SECONDS = 1.0
R = TypeVar("R")


@dataclass
class StrategyConfig:
    """Options that every strategy has."""

    name: str = ""
    """Name of the strategy in the registry."""
    fraction_train: float = bounded(1.0, above=0.0, at_most=1.0)
    """Share of the clients in a round's cohort."""
    min_clients: int = bounded(2, at_least=1)
    """Fewest clients in a cohort, and fewest good replies for a round to change the model."""
    max_failed_rounds: int = bounded(3, at_least=1)
    """End the run after so many successive rounds with too few good replies."""
    evaluate_clients: str = bounded("phase", choices=("phase", "train", "off"))
    """Evaluate on the clients' own test images in a phase of its own, along with training (of the model a client
    receives, so one round late, and in a phase after the last round), or not at all."""
    evaluate_every: int = bounded(1, at_least=1)
    """Evaluate every so many rounds, and after the last."""


@dataclass(frozen=True)
class TaskContext:
    """What a strategy knows of the task; all of it optional in a Flower app of another make."""

    task: str = ""
    """The task config as JSON, sent to clients."""
    layout: Layout | None = None
    """Index of the flat array; without it the initial arrays' names and shapes are the index."""
    base: str = ""
    """Hash of the frozen weights that every client must have; empty: not checked."""
    seed: int = 0
    """Seed of the cohorts."""


class LayerwiseStrategy(Strategy):
    """Base class of the strategies; a subclass says how updates merge.

    Parameters
    ----------
    config : StrategyConfig, optional
        Options; default those of :attr:`Config`.
    context : TaskContext, optional
        The task; without it the strategy works with any Flower app that exchanges float32 arrays.
    """

    Config: ClassVar[type[StrategyConfig]] = StrategyConfig

    def __init__(self, config: StrategyConfig | None = None, context: TaskContext | None = None) -> None:
        self.config = self.Config() if config is None else config
        self.context = TaskContext() if context is None else context
        self.directory = ClientDirectory()
        self.flat = torch.empty(0)
        self.server_round = 0
        self.failed_rounds = 0
        self.merged_rounds = 0
        self._report = RoundReport(0)

    # --- What a strategy decides ---------------------------------------------------------------------------

    @abstractmethod
    def merge(self, server_round: int, updates: Sequence[Update]) -> torch.Tensor:
        """Merge the clients' updates (in identity order, at least one) into the next global model, float32 [n]."""

    def instruction(self, server_round: int) -> Instruction:
        """Say what clients shall do in a round."""
        evaluate = self.config.evaluate_clients == "train" and self._evaluates(server_round - 1)
        return Instruction(
            server_round, self.context.task, self.codec.layout.digest, evaluate="received" if evaluate else "none"
        )

    def content_for(self, client: str, shared: ArrayRecord) -> ArrayRecord:
        """Choose the arrays that a client is sent; the global model, serialised once for all, by default."""
        return shared

    def state_dict(self) -> dict[str, Any]:
        """Return all state as one dict of tensors, numbers, strings, lists and dicts."""
        return {
            "flat": self.flat.clone(),
            "server_round": self.server_round,
            "failed_rounds": self.failed_rounds,
            "merged_rounds": self.merged_rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned."""
        self.flat = state["flat"].clone()
        self.server_round = state["server_round"]
        self.failed_rounds = state["failed_rounds"]
        self.merged_rounds = state["merged_rounds"]

    # --- Flower's interface --------------------------------------------------------------------------------

    def summary(self) -> None:
        """Log the strategy and its options."""
        options = {key: value for key, value in dataclasses.asdict(self.config).items() if key != "name"}
        log(INFO, "Strategy %s: %s", type(self).__name__, ", ".join(f"{k}={v}" for k, v in options.items()))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Make the messages that ask this round's cohort to train."""
        cohort = draw_cohort(
            self.directory.identities,
            self.config.fraction_train,
            self.config.min_clients,
            self.context.seed,
            server_round,
        )
        return self._messages(MessageType.TRAIN, cohort, server_round, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies and merge the good ones; (None, None) leaves the model as it was."""
        collected = self._collect_updates(replies)
        updates, report = collected.good, self._report
        report.clients_dropped.update(collected.dropped)
        for client, reason in collected.dropped.items():
            log(WARNING, "Round %d: client %s is dropped: %s", server_round, client, reason)
        if len(updates) < self.config.min_clients:
            self._note_failed_round(server_round, len(updates), list(collected.dropped.values()))
            return None, None
        merged = self.merge(server_round, updates)
        self.flat, self.failed_rounds, self.merged_rounds = merged, 0, self.merged_rounds + 1
        report.merged, report.clients_used = True, [update.client for update in updates]
        report.train_loss = _mean_metric(updates, "train-loss")
        metrics = {"num-examples": sum(update.num_examples for update in updates)}
        loss = {} if report.train_loss is None else {"train-loss": report.train_loss}
        return self.codec.encode(merged), MetricRecord({**metrics, **loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Make the messages that ask every client to evaluate, in rounds where clients evaluate."""
        mode, last = self.config.evaluate_clients, server_round == self._num_rounds
        due = (mode == "phase" and self._evaluates(server_round)) or (mode == "train" and last)
        if not due:
            return []
        return self._messages(MessageType.EVALUATE, self.directory.identities, server_round, arrays, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Check the evaluations and take their unweighted mean."""
        answered, failed = replies_by_client(replies, self.directory, self._expected)
        evaluations = _checked(answered, failed, check_evaluation)
        self._report.clients_dropped.update({name: f"evaluation: {why}" for name, why in evaluations.dropped.items()})
        for client, reason in evaluations.dropped.items():
            log(WARNING, "Round %d: evaluation of client %s is dropped: %s", server_round, client, reason)
        return self._note_evaluations(evaluations.good, server_round)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
        on_round: OnRound | None = None,
    ) -> Result:
        """Run the rounds; see :meth:`flwr.serverapp.strategy.Strategy.start`.

        Parameters
        ----------
        grid : Grid
            Connection to the nodes.
        initial_arrays : ArrayRecord
            The initial model: one flat array, or float32 arrays by name.
        num_rounds : int
            Number of rounds.
        timeout : float
            Seconds to wait for the replies of a phase; later replies are not used.
        train_config, evaluate_config : ConfigRecord, optional
            Further entries of the messages' config.
        evaluate_fn : callable, optional
            Evaluates the global model on the server, before round 1 and after every round.
        on_round : callable, optional
            Is given the :class:`~strategies.report.RoundReport` after every round, round 0 included.

        Returns
        -------
        Result
            The final arrays and the metrics of all rounds.

        Raises
        ------
        TooFewClientsError
            If fewer than ``min_clients`` clients can take part, too many successive rounds had too few good
            replies, or no round had enough.
        """
        self.codec = Codec(initial_arrays, self.context.layout)
        self.flat, self._num_rounds = self.codec.decode(initial_arrays).clone(), num_rounds
        result = Result(arrays=initial_arrays)
        self.summary()
        self._discover(grid, timeout)
        for server_round in range(num_rounds + 1):
            self._report = RoundReport(server_round)
            with self._timed("total"):
                if server_round:
                    self._train_round(server_round, grid, train_config or ConfigRecord(), timeout, result)
                    self._evaluate_round(server_round, grid, evaluate_config or ConfigRecord(), timeout, result)
                self._evaluate_centrally(server_round, evaluate_fn, result)
            if on_round:
                on_round(self._report)
            self._stop_if_hopeless()
        return result

    # --- The round -----------------------------------------------------------------------------------------

    def _discover(self, grid: Grid, timeout: float) -> None:
        """Wait until enough clients have said who they are."""
        deadline = time.monotonic() + timeout
        while True:
            self.directory.discover(grid, self.context.task, self.codec.layout.digest, self.context.base, timeout)
            found, refused = len(self.directory.nodes), list(self.directory.refused.values())
            if found >= self.config.min_clients:
                return
            if time.monotonic() > deadline or refused:
                break
            time.sleep(NODE_POLL_SECONDS)
        raise TooFewClientsError(
            f"{found} client(s) can take part, strategy.min_clients={self.config.min_clients} are needed. "
            f"Refused: {refusal_summary(refused) or 'none'}"
        )

    def _train_round(self, server_round: int, grid: Grid, config: ConfigRecord, timeout: float, result: Result) -> None:
        """Discover clients that joined, send the model and let the cohort train, merge the replies."""
        self.server_round = server_round
        self.directory.discover(grid, self.context.task, self.codec.layout.digest, self.context.base, timeout)
        with self._timed("train"):
            replies = self._exchange(grid, self.configure_train(server_round, result.arrays, config, grid), timeout)
        busy = _busiest_worker_seconds(replies)
        self._report.seconds["wait"] = round(max(0.0, self._report.seconds["train"] - busy), 4)
        with self._timed("aggregate"):
            arrays, metrics = self.aggregate_train(server_round, replies)
        if arrays is not None and metrics is not None:
            result.arrays, result.train_metrics_clientapp[server_round] = arrays, metrics

    def _evaluate_round(
        self, server_round: int, grid: Grid, config: ConfigRecord, timeout: float, result: Result
    ) -> None:
        messages = self.configure_evaluate(server_round, result.arrays, config, grid)
        if not messages:
            return
        with self._timed("evaluate"):
            metrics = self.aggregate_evaluate(server_round, self._exchange(grid, messages, timeout))
        if metrics is not None:
            result.evaluate_metrics_clientapp[server_round] = metrics

    def _evaluate_centrally(self, server_round: int, evaluate_fn: EvaluateFn | None, result: Result) -> None:
        if evaluate_fn is None or not self._evaluates(server_round):
            return
        with self._timed("evaluate"):
            metrics = evaluate_fn(server_round, result.arrays)
        if metrics is not None:
            result.evaluate_metrics_serverapp[server_round] = metrics
            self._report.central = {key: float(value) for key, value in metrics.items() if not isinstance(value, list)}

    def _exchange(self, grid: Grid, messages: list[Message], timeout: float) -> list[Message]:
        """Send messages and wait for the replies, counting the bytes of both."""
        self._report.bytes_down += sum(content_bytes(message.content) for message in messages)
        replies = list(grid.send_and_receive(messages, timeout=timeout))
        for message, client in zip(messages, self._expected, strict=True):
            self.directory.remember(message, client)
        self._report.bytes_up += sum(content_bytes(reply.content) for reply in replies if reply.has_content())
        return replies

    def _messages(
        self, kind: str, clients: Sequence[str], server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        self._expected = list(clients)
        instruction = ConfigRecord({**config, **self.instruction(server_round).to_record()})
        return [
            Message(
                RecordDict({ARRAYS: self.content_for(client, arrays), CONFIG: instruction}),
                self.directory.nodes[client],
                kind,
                group_id=str(server_round),
            )
            for client in clients
        ]

    def _collect_updates(self, replies: Iterable[Message]) -> Collected[Update]:
        """Check train replies, and the evaluations that came with them."""
        answered, failed = replies_by_client(replies, self.directory, self._expected)
        updates = _checked(
            answered, failed, lambda reply, client: check_update(reply, client, self.codec, self.context.base)
        )
        good = {update.client for update in updates.good}
        with_test = {c: r for c, r in answered.items() if c in good and "test-accuracy" in _first_metrics(r)}
        if with_test:
            evaluations = _checked(with_test, {}, lambda reply, client: check_evaluation(reply, client, "test-"))
            self._note_evaluations(evaluations.good, self.server_round - 1)
        return updates

    def _note_evaluations(self, evaluations: Sequence[Evaluation], server_round: int) -> MetricRecord | None:
        if not evaluations:
            return None
        report = self._report
        report.clients_accuracy = {evaluation.client: evaluation.accuracy for evaluation in evaluations}
        report.clients_accuracy_mean = sum(report.clients_accuracy.values()) / len(evaluations)
        report.clients_evaluated_round = server_round
        return MetricRecord({"accuracy": report.clients_accuracy_mean, "num-clients": len(evaluations)})

    def _note_failed_round(self, server_round: int, found: int, reasons: list[str]) -> None:
        self.failed_rounds += 1
        log(
            ERROR,
            "Round %d: %d good replies, strategy.min_clients=%d are needed; the model stays as it was. %s",
            server_round,
            found,
            self.config.min_clients,
            refusal_summary(reasons),
        )

    def _stop_if_hopeless(self) -> None:
        finished = self._report.server_round == self._num_rounds > 0
        if self.failed_rounds >= self.config.max_failed_rounds or (finished and not self.merged_rounds):
            raise TooFewClientsError(
                f"{self.failed_rounds} successive round(s) up to round {self._report.server_round} had fewer than "
                f"strategy.min_clients={self.config.min_clients} good replies. "
                f"Last reasons: {refusal_summary(list(self._report.clients_dropped.values())) or 'none given'}"
            )

    def _evaluates(self, server_round: int) -> bool:
        return server_round % self.config.evaluate_every == 0 or server_round == self._num_rounds

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """Add the wall-clock seconds of a step to the round's report."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = self._report.seconds
            seconds[step] = round(seconds.get(step, 0.0) + time.perf_counter() - began, 4)


def _checked(answered: dict[str, Message], failed: dict[str, str], check: Callable[[Message, str], R]) -> Collected[R]:
    """Apply a check to every reply, in identity order."""
    collected: Collected[R] = Collected(dropped=dict(failed))
    for client, reply in answered.items():
        try:
            collected.good.append(check(reply, client))
        except MessageError as error:
            collected.dropped[client] = str(error)
    return collected


def _first_metrics(reply: Message) -> MetricRecord:
    return next(iter(reply.content.metric_records.values()), MetricRecord())


def _mean_metric(updates: Sequence[Update], key: str) -> float | None:
    """Mean of a metric over the updates that have it, weighted by examples."""
    pairs = [(u.num_examples, float(value)) for u in updates if isinstance(value := u.metrics.get(key), int | float)]
    return sum(n * value for n, value in pairs) / sum(n for n, _ in pairs) if pairs else None


def _busiest_worker_seconds(replies: Iterable[Message]) -> float:
    """Seconds that the busiest worker process spent on its clients, by the clients' own account."""
    busy: dict[str, float] = {}
    for reply in replies:
        if reply.has_content():
            worker = str(
                reply.content.config_records.get(CONFIG, ConfigRecord()).get("worker", reply.metadata.src_node_id)
            )
            seconds = _first_metrics(reply).get("seconds", 0.0)
            busy[worker] = busy.get(worker, 0.0) + (float(seconds) if isinstance(seconds, int | float) else 0.0)
    return max(busy.values(), default=0.0)
