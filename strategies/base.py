"""The strategy that all others refine: stable identities, checked replies, one flat model, serialisable state."""

import dataclasses
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from logging import ERROR, INFO
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from strategies.ccvr import Calibration
from strategies.codec import Codec
from strategies.cohort import ClientDirectory, draw_cohort
from strategies.context import TaskContext
from strategies.exchanging import collect_updates, phase_messages
from strategies.loop import EvaluateFn, OnRound, RoundLoop
from strategies.merging import merge_adapter, merge_products
from strategies.options import StrategyConfig
from strategies.privacy import Privacy
from strategies.replies import (
    Update,
    check_all,
    check_evaluation,
    foreign_metrics,
    mean_metric,
    replies_by_client,
)
from strategies.report import RoundReport
from strategies.schedule import Schedule
from task.errors import ConfigError, StateError
from task.exchange import EVERYTHING, Exchange
from task.messages import Instruction
from task.signals import NOTHING, SignalRequest, signal_layout


class LayerwiseStrategy(Strategy):
    """Base class of the strategies; a subclass says how updates merge.

    Parameters
    ----------
    config : StrategyConfig, optional
        Options; default those of :attr:`Config`.
    context : TaskContext, optional
        The task; without it the strategy works with any Flower app that exchanges float32 arrays.
    calibration : Calibration, optional
        Recalibrates the head after the rounds in which it is due.
    schedule : Schedule, optional
        Says which units travel when; by default all in every round.
    keep_updates : bool
        Hold the last round's updates, and the model they started from, in :attr:`updates` and :attr:`received`.
    """

    Config: ClassVar[type[StrategyConfig]] = StrategyConfig
    lora_merges: ClassVar[tuple[str, ...]] = ("factors", "product_svd")
    """The values of ``lora.merge`` that the strategy can follow."""
    merges_products: ClassVar[bool] = False
    """Whether it merges products B A of its own accord, whose factors are then new in every round."""
    plans_exchanges: ClassVar[bool] = False
    """Whether the strategy itself says which units travel, so that no schedule and no calibration goes with it."""
    only_sums: ClassVar[bool] = False
    """Whether a mean of the clients' models is all that it needs, so that differential privacy goes with it."""
    freezes_a: ClassVar[bool] = False
    """Whether ``lora.freeze_a=true`` is part of the strategy."""

    def __init__(
        self,
        config: StrategyConfig | None = None,
        context: TaskContext | None = None,
        calibration: Calibration | None = None,
        schedule: Schedule | None = None,
        keep_updates: bool = False,
    ) -> None:
        self.config = self.Config() if config is None else config
        self.context = TaskContext() if context is None else context
        self.calibration = calibration
        self.schedule = Schedule() if schedule is None else schedule
        self.privacy = Privacy(self.context.privacy)
        self.keep_updates = keep_updates
        self.updates: list[Update] = []
        self.received = torch.empty(0)
        self.directory = ClientDirectory()
        self.flat = torch.empty(0)
        self.run = ""
        self.server_round = 0
        self.failed_rounds = 0
        self.last_failure = ""
        self.merged_rounds = 0
        self.num_rounds = 0
        self.asked: list[str] = []
        self.exchanges: dict[str, Exchange] = {}
        self.report = RoundReport(0)

    @classmethod
    def check_lora_merge(cls, lora_merge: str) -> None:
        """Refuse a value of ``lora.merge`` that the strategy cannot follow, by a ConfigError."""
        if lora_merge not in cls.lora_merges:
            raise ConfigError(
                f"{cls.__name__} merges adapters in its own way: lora.merge={lora_merge!r} is not one of: "
                f"{', '.join(cls.lora_merges)}. Set lora.merge={cls.lora_merges[0]}."
            )

    # --- What a strategy decides ---------------------------------------------------------------------------

    @abstractmethod
    def merge(self, server_round: int, updates: Sequence[Update]) -> torch.Tensor:
        """Merge the clients' updates (in identity order, at least one) into the next global model, float32 [n]."""

    def instruction(self, server_round: int) -> Instruction:
        """Say what clients shall do in a round."""
        along = self.config.evaluate_clients == "train" and server_round < self.num_rounds
        evaluate = along and self.evaluates_after(server_round - 1)
        return Instruction(
            server_round,
            self.context.task,
            self.codec.layout.digest,
            evaluate="received" if evaluate else "none",
            signals=self.asked_signals,
        )

    def exchange(self, server_round: int, client: str) -> Exchange:
        """Say which units travel to and from a client that trains, and what it keeps; by default the schedule does."""
        return self.schedule.exchange(server_round)

    def exchange_without_training(self, client: str) -> Exchange:
        """Say which units travel to a client that evaluates or measures; all by default."""
        return EVERYTHING

    def models_for(self, clients: Sequence[str]) -> Iterable[torch.Tensor]:
        """Give the models that clients are sent, float32 [n], one after another; the global one by default."""
        return (self.flat for _ in clients)

    def personal_models(self) -> dict[str, torch.Tensor]:
        """Return the models that clients would be sent next, where each has its own; else nothing."""
        return {}

    def without_training(self, server_round: int) -> Instruction:
        """Say what clients shall do in a phase that does not train."""
        return Instruction(server_round, self.context.task, self.codec.layout.digest)

    def request(self) -> SignalRequest:
        """Say what clients shall measure along with training; nothing by default."""
        return NOTHING

    @property
    def asked_signals(self) -> SignalRequest:
        """What clients are asked to measure: what the strategy wants, and for recording all that is explained.

        Nothing in a round in which no unit is due.
        """
        request = self.request()
        if self.schedule.exchange(self.server_round).up == ():
            return NOTHING
        if not self.keep_updates:
            return request
        return replace(request, class_variance=True, update_scores=True, update_norms=True)

    def check(self, update: Update) -> None:
        """Refuse an update that :meth:`merge` could not use, by a MessageError; all are fine by default."""

    def accept(self) -> None:
        """Take over what :meth:`merge` noted for later rounds; called once its result has become the model."""

    def evaluation_arrays(self, arrays: ArrayRecord) -> ArrayRecord:
        """Choose what the server evaluates; the global model by default."""
        return arrays

    @property
    def evaluated(self) -> str:
        """What the server evaluates, where it is not the model that the adapter holds; else empty."""
        return ""

    def merge_adapters(self, merged: torch.Tensor, vectors: Sequence[torch.Tensor], weights: torch.Tensor) -> None:
        """Overwrite the adapter in ``merged`` by the clients', weighted [clients, layers], as ``lora.merge`` says."""
        if self.context.lora_merge == "factors":
            merge_adapter(merged, vectors, weights, self.codec.layout)
        else:
            residual = merge_products(merged, vectors, weights, self.codec.layout)
            self.report.details["product_residual"] = [round(value, 6) for value in residual.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Return all state as one dict of tensors, numbers, strings, lists and dicts.

        Tensors may be the strategy's own, which the next round overwrites: whoever keeps them beyond it copies them.
        """
        return {
            "flat": self.flat.clone(),
            "server_round": self.server_round,
            "failed_rounds": self.failed_rounds,
            "merged_rounds": self.merged_rounds,
            "schedule": self.schedule.state_dict(),
            "clipping_norm": self.privacy.clipping_norm,
            "named": dict(self.directory.named),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state that :meth:`state_dict` returned."""
        self.flat = state["flat"].clone()
        self.server_round = state["server_round"]
        self.failed_rounds = state["failed_rounds"]
        self.merged_rounds = state["merged_rounds"]
        self.schedule.load_state_dict(state["schedule"])
        self.privacy.clipping_norm = float(state["clipping_norm"])
        self.directory.named = dict(state["named"])

    def evaluates_after(self, server_round: int) -> bool:
        """Tell whether the model of a round is evaluated: every so many, once all units are new; and the last."""
        every, before = self.config.evaluate_every, server_round - self.schedule.span
        due = server_round // every > before // every
        return (due and self.schedule.complete) or server_round == self.num_rounds

    # --- Flower's interface --------------------------------------------------------------------------------

    def summary(self) -> None:
        """Log the strategy and its options."""
        log(INFO, "Strategy %s: %s", type(self).__name__, _options(self.config))
        if self.context.lora_merge != "factors":
            log(INFO, "Adapters are merged by lora.merge=%s", self.context.lora_merge)
        if self.calibration is not None:
            log(INFO, "Calibration %s: %s", self.calibration.config.name, _options(self.calibration.config))
        if self.schedule.config.name != "every_round":
            log(INFO, "Schedule %s: %s", self.schedule.config.name, _options(self.schedule.config))
        if self.codec.wire.lossy:
            log(INFO, "On the wire: %s", self.codec.wire)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Make the messages that ask this round's cohort to train."""
        cohort = self.schedule.cohort(server_round, self.directory.identities, self._draw)
        self.report.cohort = len(cohort)
        config = ConfigRecord({**config, **self.privacy.train_config()})
        return phase_messages(self, MessageType.TRAIN, cohort, arrays, config, self.instruction(server_round))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies and merge the good ones; (None, None) leaves the model as it was."""
        collected = collect_updates(self, replies)
        updates, report = collected.good, self.report
        self.report.drop("", collected.dropped)
        if len(updates) < self.config.min_clients:
            reason = f"{len(updates)} good replies, strategy.min_clients={self.config.min_clients} are needed"
            self._note_failed_round(server_round, reason)
            return None, None
        nothing_due = self.schedule.exchange(server_round).up == ()
        try:
            merged = self.flat.clone() if nothing_due else self.merge(server_round, self.privacy.counted(updates))
        except RuntimeError as error:  # numerics that fail on values which are finite, such as a singular matrix
            self._note_failed_round(server_round, f"the updates cannot be merged ({error})")
            return None, None
        if not bool(torch.isfinite(merged).all()):
            self._note_failed_round(server_round, "the merged model is not finite")
            return None, None
        self.accept()
        merged = self.privacy.released(server_round, merged, updates)
        report.details |= self.schedule.merged(server_round, self.flat, merged, updates)
        if self.keep_updates:
            self.updates, self.received = updates, self.flat
        self.flat, self.failed_rounds, self.merged_rounds = merged, 0, self.merged_rounds + 1
        report.merged, report.clients_used = True, [update.client for update in updates]
        report.train_loss = mean_metric(updates, "train-loss")
        metrics = {"num-examples": sum(update.num_examples for update in updates)}
        loss = {} if report.train_loss is None else {"train-loss": report.train_loss}
        return self.codec.encode(merged), MetricRecord({**metrics, **loss})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Make the messages that ask every client to evaluate, in rounds where clients evaluate."""
        mode, last = self.config.evaluate_clients, server_round == self.num_rounds
        due = (mode == "phase" and self.evaluates_after(server_round)) or (mode == "train" and last)
        if not due:
            return []
        instruction = self.without_training(server_round)
        if self.config.evaluate_tuned:
            instruction = replace(instruction, evaluate="tuned")
        return phase_messages(self, MessageType.EVALUATE, self.directory.identities, arrays, config, instruction)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Check the evaluations and take their unweighted mean."""
        replies = list(replies)
        if not self.context.task:
            return foreign_metrics(replies)
        answered, failed = replies_by_client(replies, self.directory, self.asked)
        evaluations = check_all(answered, failed, check_evaluation)
        self.report.drop("evaluation: ", evaluations.dropped)
        return self.report.evaluated(evaluations.good, server_round)

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
        state: dict[str, Any] | None = None,
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
            Evaluates the global model on the server, before round 1 and after every round, in another thread:
            where clients evaluate too, meanwhile. What it raises ends the run, once the clients have answered.
        on_round : callable, optional
            Is given the :class:`~strategies.report.RoundReport` after every round, round 0 included.
        state : dict, optional
            What :meth:`state_dict` returned after one of the rounds, to go on with the next.

        Returns
        -------
        Result
            The final arrays and the metrics of all rounds.

        Raises
        ------
        StateError
            If ``state`` does not fit.
        TooFewClientsError
            If fewer than ``min_clients`` clients can take part, too many successive rounds had too few good
            replies, or no round had enough.
        """
        self.codec = Codec(initial_arrays, self.context.layout, self.context.wire)
        self.flat = self.codec.initial.clone()
        self.check_lora_merge(self.context.lora_merge)
        self.schedule.check_merge(self.context.lora_merge, self.merges_products)
        self.num_rounds = num_rounds
        self.run = self.context.run or uuid.uuid4().hex
        self.schedule.begin(self.codec.layout, num_rounds, self.context.seed)
        self.failed_rounds = self.merged_rounds = self.server_round = 0
        signal_layout(self.asked_signals, self.codec.layout)  # refuses a model that has not what the signals are of
        self.summary()
        if state is not None:
            self._resume(state)
        arrays, first = (initial_arrays, 0) if state is None else (self.codec.encode(self.flat), self.server_round + 1)
        configs = (train_config or ConfigRecord(), evaluate_config or ConfigRecord())
        return RoundLoop(self, grid, arrays, num_rounds, timeout, *configs, evaluate_fn, on_round, first).run()

    # --- Parts ----------------------------------------------------------------------------------------------

    def _resume(self, state: dict[str, Any]) -> None:
        """Take over a state that was saved, or refuse it by a StateError."""
        try:
            self.load_state_dict(state)
            fits = self.flat.shape == self.codec.initial.shape and self.flat.dtype == torch.float32
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise StateError(f"The saved state is none of {type(self).__name__}: {error!r}.") from error
        if not fits or self.server_round < 1:
            raise StateError("The saved state is of another model, or of no round.")

    def _draw(self, server_round: int) -> list[str]:
        """Draw the cohort of a round from the clients that are there."""
        share, least, seed = self.config.fraction_train, self.config.min_clients, self.context.seed
        return draw_cohort(self.directory.identities, share, least, seed, server_round)

    def _note_failed_round(self, server_round: int, reason: str) -> None:
        self.failed_rounds += 1
        self.last_failure = reason
        self.schedule.failed(server_round)
        log(ERROR, "Round %d: %s; the model stays as it was.", server_round, reason)


def _options(config: Any) -> str:
    """List the options of a config dataclass, without its name."""
    return ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(config).items() if key != "name")
