"""The contract of messages between strategy and client.

A message carries one flat array (adapter and head, or some of their units, in the order of the layout, as
:mod:`task.wire` writes them), a config and, in replies, metrics. Both sides derive the index of the array from the same
:class:`~task.units.Layout` and compare its digest. Nothing received is unpickled; sizes are checked before any value is
read.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from task.arrays import FLAT, array_to_flat
from task.errors import MessageError
from task.exchange import EVERYTHING, Exchange
from task.signals import NOTHING, SignalRequest, request_from_json

ARRAYS, CONFIG, METRICS, SIGNALS = "arrays", "config", "metrics", "signals"
IDENTIFY = "query.identify"
MEASURE = "query.measure"
BACKBONE = "query.backbone"
NOT_KEPT = "has not kept round"
"""Stands in the answer of a client that is to go on from where it no longer can."""
EVALUATIONS = ("none", "received", "tuned")
MAX_HEAD_EPOCHS = 1000


@dataclass(frozen=True)
class Instruction:
    """What a strategy asks of a client: all a client ever learns of the strategy."""

    server_round: int
    """Server round, from 1."""
    task: str
    """The task config as JSON."""
    layout: str
    """Digest of the layout that indexes the flat array."""
    proximal_mu: float = 0.0
    """Weight of the proximal term mu/2 ||w - w_received||^2 added to the local loss."""
    head_epochs: int = 0
    """Epochs in which the head alone is trained first; the local epochs after them then train the adapter alone."""
    evaluate: str = "none"
    """Along with training, ``received``: also evaluate the received model on the client's test images, before it. In an
    evaluation, ``tuned``: also train for a round from there, evaluate that too, and forget it."""
    signals: SignalRequest = NOTHING
    """What to measure and send along."""
    exchange: Exchange = EVERYTHING
    """Which units travel, and what the client keeps."""

    def to_record(self) -> ConfigRecord:
        """Write the instruction as a Flower record."""
        return ConfigRecord(
            {
                "server-round": self.server_round,
                "task": self.task,
                "layout": self.layout,
                "proximal-mu": self.proximal_mu,
                "evaluate": self.evaluate,
                "signals": self.signals.to_json(),
                **({"head-epochs": self.head_epochs} if self.head_epochs else {}),
                **self.exchange.to_fields(),
            }
        )

    @staticmethod
    def from_record(record: ConfigRecord) -> "Instruction":
        """Read an instruction.

        Raises
        ------
        MessageError
            If a field is missing or of the wrong type.
        ConfigError
            If the request for signals cannot be followed.
        """
        evaluate, mu = text_field(record, "evaluate"), float(number_field(record, "proximal-mu"))
        if evaluate not in EVALUATIONS or mu < 0:
            raise MessageError(f"The instruction has evaluate={evaluate!r} and proximal-mu={mu}; it is not followed.")
        head_epochs = record.get("head-epochs", 0)
        if type(head_epochs) is not int or not 0 <= head_epochs <= MAX_HEAD_EPOCHS:
            raise MessageError(f"The instruction has head-epochs={head_epochs!r}; it is not followed.")
        return Instruction(
            server_round=int(number_field(record, "server-round")),
            task=text_field(record, "task"),
            layout=text_field(record, "layout"),
            proximal_mu=mu,
            head_epochs=head_epochs,
            evaluate=evaluate,
            signals=request_from_json(text_field(record, "signals")),
            exchange=Exchange.from_record(record),
        )


def classes_digest(names: Sequence[str]) -> str:
    """Digest class names in their order; heads can be merged only where these agree."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def text_field(record: ConfigRecord, key: str) -> str:
    """Read a text field of a config record; MessageError if it is missing or no text."""
    value = record.get(key)
    if not isinstance(value, str):
        raise MessageError(f"The message's config has no text under {key!r}.")
    return value


def number_field(record: ConfigRecord | MetricRecord, key: str) -> float:
    """Read a number; MessageError if it is missing, no number, or not finite."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MessageError(f"{key!r} is {value!r}, not a finite number.")
    return value


def flat_content(array: Array, instruction: Instruction) -> RecordDict:
    """Put an array and an instruction into the content of a message; the array is shared, not copied."""
    return RecordDict({ARRAYS: ArrayRecord({FLAT: array}), CONFIG: instruction.to_record()})


def received_flat(message: Message, size: int, record_name: str = ARRAYS) -> np.ndarray:
    """View the flat array of a message's record; see :func:`array_to_flat`.

    Raises
    ------
    MessageError
        If the record does not carry exactly one array named ``flat``, or it does not fit.
    """
    record = message.content.array_records.get(record_name)
    if record is None or list(record) != [FLAT]:
        found = "none" if record is None else ", ".join(list(record)[:5])
        raise MessageError(f"Expected one array named {FLAT!r} in {record_name!r}, got: {found}.")
    return array_to_flat(record[FLAT], size)


def received_config(message: Message) -> ConfigRecord:
    """Read the config record of a message; MessageError if there is none."""
    record = message.content.config_records.get(CONFIG)
    if record is None:
        raise MessageError(f"The message has no config record {CONFIG!r}.")
    return record


def received_metrics(message: Message) -> MetricRecord:
    """Read the metric record of a message; MessageError if there is none."""
    record = message.content.metric_records.get(METRICS)
    if record is None:
        raise MessageError(f"The message has no metric record {METRICS!r}.")
    return record


def content_bytes(content: RecordDict) -> int:
    """Count the bytes of a message's content: array data as sent, other records as Flower serialises them."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    others = [*content.config_records.values(), *content.metric_records.values()]
    return arrays + sum(len(record.deflate()) for record in others)
