"""Every reply is checked before it counts."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from typing import Generic, TypeVar

import torch
from flwr.app import ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from strategies.codec import Codec
from strategies.cohort import MAX_EXAMPLES, MAX_REASON_LENGTH, ClientDirectory, identity_order
from task.arrays import tensor_view
from task.errors import MessageError
from task.messages import (
    ARRAYS,
    CONFIG,
    SIGNALS,
    number_field,
    received_config,
    received_flat,
    received_metrics,
    text_field,
)
from task.signals import NOTHING, SignalRequest, signal_layout
from task.units import Layout


@dataclass(frozen=True)
class Update:
    """What one client sends back after local training."""

    client: str
    """The client's identity."""
    flat: torch.Tensor
    """Adapter and head after local training, float32 [layout.size]; read only."""
    num_examples: int
    """Number of training examples, positive."""
    metrics: MetricRecord
    """All metrics of the reply."""
    config: ConfigRecord
    """The reply's config record; empty where an app sends none."""
    signals: dict[str, torch.Tensor] = field(default_factory=dict)
    """What was asked for besides, by name (:func:`task.signals.signal_layout`), float32; read only, not checked for
    finite values."""


@dataclass(frozen=True)
class Evaluation:
    """What one client measured on its own test images."""

    client: str
    """The client's identity."""
    num_examples: int
    """Number of test images, positive."""
    accuracy: float
    """Share classified correctly, in [0, 1]."""
    loss: float
    """Mean cross-entropy."""
    tuned_accuracy: float | None = None
    """The same share after a further round of the client's own training, where it was asked for."""


R = TypeVar("R")


@dataclass
class Collected(Generic[R]):
    """Good replies in identity order, and why the others were dropped."""

    good: list[R] = field(default_factory=list)
    """Checked replies."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Reason by identity."""


def replies_by_client(
    replies: Iterable[Message], directory: ClientDirectory, expected: Iterable[str]
) -> tuple[dict[str, Message], dict[str, str]]:
    """Sort replies into those with content and the reasons of those without, missing ones included.

    Parameters
    ----------
    replies : Iterable[Message]
        In any order.
    directory : ClientDirectory
        Knows whose reply each is.
    expected : Iterable[str]
        The clients that were sent a message.

    Returns
    -------
    tuple[dict[str, Message], dict[str, str]]
        Replies by identity, in identity order, and reasons by identity.
    """
    asked = set(expected)
    answered: dict[str, Message] = {}
    failed: dict[str, str] = {}
    for reply in replies:
        client = directory.identity_of(reply)
        if client not in asked or client in answered or client in failed:
            log(WARNING, "A reply of node %d that nobody waits for is ignored.", reply.metadata.src_node_id)
        elif reply.has_error():
            failed[client] = f"error {reply.error.code}: {_last_line(reply.error.reason)}"[:MAX_REASON_LENGTH]
        else:
            answered[client] = reply
    missing = dict.fromkeys(asked - answered.keys() - failed.keys(), "no reply within the timeout")
    reasons = {**failed, **missing}
    in_order = sorted(asked, key=identity_order)
    return (
        {name: answered[name] for name in in_order if name in answered},
        {name: reasons[name] for name in in_order if name in reasons},
    )


def _last_line(reason: str | None) -> str:
    """Take what an error says from the end of the traceback that Flower may put before it."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def check_update(
    reply: Message,
    client: str,
    codec: Codec,
    base: str,
    request: SignalRequest = NOTHING,
    units: Sequence[str] | None = None,
) -> Update:
    """Check a train reply: keys, shapes, dtypes, finite values, number of examples, base model, shape of the signals.

    The update's ``flat`` holds only what was sent: the ``units`` asked for, or all (None).

    Raises
    ------
    MessageError
        Saying what is wrong with it.
    """
    arrays = [record for name, record in reply.content.array_records.items() if name != SIGNALS]
    if len(arrays) != 1:
        raise MessageError(f"the reply has {len(arrays)} array records, expected one ({ARRAYS!r}).")
    config = reply.content.config_records.get(CONFIG, ConfigRecord())
    check_base(reply, codec, base)
    metrics = _metrics(reply)
    flat = codec.decode(arrays[0], units)
    if not bool(torch.isfinite(flat).all()):
        raise MessageError(
            f"its update is not finite, in {', '.join(_not_finite(flat, codec.layout.part(units))[:3])}."
        )
    signals = check_signals(reply, codec, request)
    return Update(client, flat, _num_examples(metrics), metrics, config, signals)


def check_base(reply: Message, codec: Codec, base: str) -> None:
    """Compare the hash of the frozen weights and the layout, where the server knows a base.

    Raises
    ------
    MessageError
        If they are missing or others.
    """
    if base:
        record = received_config(reply)
        theirs, digest = text_field(record, "base"), text_field(record, "layout")
        if theirs != base:
            raise MessageError(f"its frozen backbone has hash {theirs[:12]}, the server's {base[:12]}.")
        if digest != codec.layout.digest:
            raise MessageError("its adapter has another layout (rank, targets or number of classes) than the server's.")


def check_signals(reply: Message, codec: Codec, request: SignalRequest) -> dict[str, torch.Tensor]:
    """View the signals of a reply by name, without copying; empty where none were asked for.

    Raises
    ------
    MessageError
        If they are missing, or not of the size asked for.
    """
    if not request.anything:
        return {}
    layout = signal_layout(request, codec.layout)
    return layout.views(tensor_view(received_flat(reply, layout.size, SIGNALS)))


def check_moments(reply: Message, codec: Codec, base: str, request: SignalRequest) -> dict[str, torch.Tensor]:
    """Check the class moments that a client measured: base model, counts whole and not negative, the rest finite.

    Raises
    ------
    MessageError
        Saying what is wrong with them.
    """
    check_base(reply, codec, base)
    signals = check_signals(reply, codec, request)
    for name, values in signals.items():
        if not bool(torch.isfinite(values).all()):
            raise MessageError(f"its {name} is not finite.")
    count = signals["class-count"]
    if bool(((count < 0) | (count != count.floor()) | (count > MAX_EXAMPLES)).any()):
        raise MessageError("its class counts are not whole numbers from 0 on.")
    return signals


def check_evaluation(reply: Message, client: str, prefix: str = "") -> Evaluation:
    """Check the evaluation in a reply; ``prefix`` leads its keys where it came along with training.

    Raises
    ------
    MessageError
        Saying what is wrong with it.
    """
    metrics = _metrics(reply)
    accuracy = _share(metrics, f"{prefix}accuracy")
    tuned = _share(metrics, "tuned-accuracy") if "tuned-accuracy" in metrics else None
    loss = float(number_field(metrics, f"{prefix}loss"))
    return Evaluation(client, _num_examples(metrics, f"{prefix}num-examples"), accuracy, loss, tuned)


def check_all(answered: dict[str, Message], failed: dict[str, str], check: Callable[[Message, str], R]) -> Collected[R]:
    """Apply a check to every reply, in identity order."""
    collected: Collected[R] = Collected(dropped=dict(failed))
    for client, reply in answered.items():
        try:
            collected.good.append(check(reply, client))
        except MessageError as error:
            collected.dropped[client] = str(error)
    return collected


def first_metrics(reply: Message) -> MetricRecord:
    """Take the first metric record of a reply, an empty one if there is none."""
    return next(iter(reply.content.metric_records.values()), MetricRecord())


def foreign_metrics(replies: Sequence[Message]) -> MetricRecord | None:
    """Average whatever metrics an app of another make reports, weighted by its examples, as Flower does.

    Replies without a positive number of examples, or with a number that is not finite, are left out.
    """
    contents = [reply.content for reply in replies if reply.has_content() and _countable(first_metrics(reply))]
    return aggregate_metricrecords(contents, "num-examples") if contents else None


def _countable(metrics: MetricRecord) -> bool:
    """Tell whether metrics have a positive ``num-examples`` and only finite numbers."""
    numbers = [value for value in metrics.values() if isinstance(value, int | float)]
    examples = metrics.get("num-examples")
    return isinstance(examples, int | float) and examples > 0 and all(math.isfinite(value) for value in numbers)


def mean_metric(updates: Sequence[Update], key: str) -> float | None:
    """Average a metric over the updates that have it as a finite number, weighted by examples."""
    values = ((u.num_examples, u.metrics.get(key)) for u in updates)
    pairs = [(n, value) for n, value in values if isinstance(value, int | float) and math.isfinite(value)]
    return sum(n * value for n, value in pairs) / sum(n for n, _ in pairs) if pairs else None


def _metrics(reply: Message) -> MetricRecord:
    """Take the reply's metrics; an app of other habits may name the record as it likes."""
    records = list(reply.content.metric_records.values())
    return records[0] if len(records) == 1 else received_metrics(reply)


def _share(metrics: MetricRecord, key: str) -> float:
    share = float(number_field(metrics, key))
    if not 0.0 <= share <= 1.0:
        raise MessageError(f"its accuracy is {share}, outside [0, 1].")
    return share


def _num_examples(metrics: MetricRecord, key: str = "num-examples") -> int:
    count = number_field(metrics, key)
    if count != int(count) or not 0 < count <= MAX_EXAMPLES:
        raise MessageError(f"its {key!r} is {count}, not a whole number from 1 to {MAX_EXAMPLES}.")
    return int(count)


def _not_finite(flat: torch.Tensor, layout: Layout) -> list[str]:
    """Name the units that hold NaN or infinity."""
    return [unit for unit, values in layout.unit_views(flat).items() if not bool(torch.isfinite(values).all())]
