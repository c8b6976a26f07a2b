"""The server's side of a phase: the messages to a cohort, and what its replies become."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from torch import Tensor

from strategies.replies import Collected, Update, check_all, check_evaluation, check_update, replies_by_client
from task.exchange import Exchange
from task.messages import ARRAYS, CONFIG, Instruction

if TYPE_CHECKING:
    from strategies.base import LayerwiseStrategy

Packed = dict[tuple[str, ...] | None, ArrayRecord]


def phase_messages(
    strategy: "LayerwiseStrategy",
    kind: str,
    clients: Sequence[str],
    arrays: ArrayRecord,
    config: ConfigRecord,
    instruction: Instruction,
) -> list[Message]:
    """Make a message for each client, each with its own exchange and model.

    Parameters
    ----------
    strategy : LayerwiseStrategy
        Says what each client is sent; ``asked`` and ``exchanges`` are noted in it.
    kind : str
        Flower's type of the messages.
    clients : Sequence[str]
        To whom, in identity order.
    arrays : ArrayRecord
        The global model as it is, which clients share where it travels whole and unrounded.
    config : ConfigRecord
        Further entries of the messages' config.
    instruction : Instruction
        What the clients shall do.

    Returns
    -------
    list[Message]
        In the order of the clients; equal contents are shared.
    """
    codec, strategy.asked = strategy.codec, list(clients)
    strategy.exchanges = {client: _exchange(strategy, kind, instruction.server_round, client) for client in clients}
    records: dict[Exchange, ConfigRecord] = {}
    packed: Packed = {} if codec.wire.lossy else {None: arrays}
    messages = []
    for (client, exchange), model in zip(strategy.exchanges.items(), strategy.models_for(clients), strict=True):
        if exchange not in records:
            records[exchange] = ConfigRecord({**config, **replace(instruction, exchange=exchange).to_record()})
        content = RecordDict({ARRAYS: _arrays_for(strategy, model, exchange, packed), CONFIG: records[exchange]})
        group = str(instruction.server_round)
        messages.append(Message(content, strategy.directory.nodes[client], kind, group_id=group))
    return messages


def collect_updates(strategy: "LayerwiseStrategy", replies: Iterable[Message]) -> Collected[Update]:
    """Check the replies of a train phase, and the evaluations that came with them."""
    answered, failed = replies_by_client(replies, strategy.directory, strategy.asked)
    partial = any(strategy.exchanges[client].up is not None for client in answered)
    completed = strategy.codec.wire.lossy or partial
    received = iter(strategy.models_for(list(answered))) if completed else repeat(None)
    updates = check_all(answered, failed, lambda reply, client: _update(strategy, reply, client, next(received)))
    if strategy.instruction(strategy.server_round).evaluate == "received":
        with_test = {update.client: answered[update.client] for update in updates.good}
        evaluations = check_all(with_test, {}, lambda reply, client: check_evaluation(reply, client, "test-"))
        strategy.report.drop("evaluation: ", evaluations.dropped)
        strategy.report.evaluated(evaluations.good, strategy.server_round - 1)
    return updates


def _exchange(strategy: "LayerwiseStrategy", kind: str, server_round: int, client: str) -> Exchange:
    """Complete a client's exchange by how values travel, and by the run's name where clients keep anything."""
    trains = kind == MessageType.TRAIN
    exchange = strategy.exchange(server_round, client) if trains else strategy.exchange_without_training(client)
    wire = strategy.codec.wire
    return replace(exchange, run=strategy.run if exchange.start or exchange.keep or wire.lossy else "", wire=wire)


def _arrays_for(strategy: "LayerwiseStrategy", model: Tensor, exchange: Exchange, packed: Packed) -> ArrayRecord:
    """Write the units that a client is sent; those of the global model once for all."""
    if model is not strategy.flat:
        return strategy.codec.to_send(model, exchange.down)
    if exchange.down not in packed:
        packed[exchange.down] = strategy.codec.to_send(model, exchange.down)
    return packed[exchange.down]


def _update(strategy: "LayerwiseStrategy", reply: Message, client: str, received: Tensor | None) -> Update:
    """Check a reply; units that it was not asked for are those of the model that the client was to receive.

    Rounded values are changes, and are added to the server's own values, which are not rounded.
    """
    codec, units = strategy.codec, strategy.exchanges[client].up
    update = check_update(reply, client, codec, strategy.context.base, strategy.asked_signals, units)
    if received is not None:
        flat, sent = received.clone(), update.flat
        if codec.wire.lossy:
            sent = sent + codec.layout.take(flat, units)
        codec.layout.put(flat, units, sent)
        update = replace(update, flat=flat)
    strategy.privacy.check(update, strategy.flat)
    strategy.check(update)
    return update
