"""A client's side of the exchange: what it starts a round from, sends back, and keeps."""

from contextlib import suppress

import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor

from client_app.kept import Keeper
from task.errors import MessageError
from task.exchange import Exchange
from task.messages import ARRAYS, NOT_KEPT
from task.model import AdaptedModel
from task.wire import decode, encode

OPTIMIZER = "optimizer."


class Exchanger:
    """Brings the model to where a round starts, and gives what is sent after it.

    Parameters
    ----------
    model : AdaptedModel
        The worker's model.
    exchange : Exchange
        What the server asks for.
    keeper : Keeper
        Where this client keeps things.
    server_round : int
        The round.

    Raises
    ------
    MessageError
        If the exchange names units that the model does not have.
    """

    def __init__(self, model: AdaptedModel, exchange: Exchange, keeper: Keeper, server_round: int) -> None:
        exchange.check(model.layout)
        self._model, self._exchange, self._keeper, self._round = model, exchange, keeper, server_round
        self._kept: dict[str, Tensor] = {}
        self._received = torch.empty(0)

    def receive(self, message: Message) -> dict[str, Tensor]:
        """Copy what is kept and what came into the model; return the optimizer's state to go on from, empty for none.

        Raises
        ------
        MessageError
            If the message's arrays are not as announced, or nothing is kept where something should be.
        """
        model, exchange = self._model, self._exchange
        if exchange.start:
            self._kept = self._keeper.load(exchange.start, model.layout.size)
            needed = {"flat", "received"} if exchange.wire.lossy else {"flat"}
            if not needed <= self._kept.keys():
                raise MessageError(f"This client {NOT_KEPT} {exchange.start} as it is to go on from it.")
            model.flat.detach().copy_(self._kept["flat"])
        values = received_values(message, model, exchange)
        model.put(values, exchange.down)
        if exchange.wire.lossy:
            self._received = self._kept.get("received", torch.empty(model.layout.size))
            model.layout.put(self._received, exchange.down, values)
        if not exchange.moments:
            return {}
        return {name.removeprefix(OPTIMIZER): v for name, v in self._kept.items() if name.startswith(OPTIMIZER)}

    def send(self, optimizer: torch.optim.Optimizer) -> ArrayRecord:
        """Keep what later rounds need, and return the units asked for."""
        model, exchange, layout = self._model, self._exchange, self._model.layout
        part, keep = layout.part(exchange.up), {}
        values = layout.take(model.flat.detach(), exchange.up).cpu()
        if exchange.wire.lossy:
            error = self._error()
            values = values - layout.take(self._received, exchange.up) + layout.take(error, exchange.up)
        record = encode(values, part, exchange.wire)
        if exchange.wire.lossy:
            left = values - decode(record, part, exchange.wire)
            layout.put(error, exchange.up, left.nan_to_num(0.0, 0.0, 0.0))
            keep["error"] = error
        if exchange.keep:
            state = optimizer.state[model.flat] if exchange.moments else {}
            keep |= {"flat": model.flat.detach().cpu()} | {f"{OPTIMIZER}{name}": v.cpu() for name, v in state.items()}
            if exchange.wire.lossy:  # what was sent up, the server has from now on
                layout.put(self._received, exchange.up, layout.take(model.flat.detach(), exchange.up).cpu())
                keep["received"] = self._received
        if keep:
            self._keeper.save(self._round, keep, exchange.start)
        elif exchange.start:  # the server may ask for this round again
            self._keeper.clear(but=exchange.start)
        return record

    def _error(self) -> Tensor:
        """Read the rounding error of the last round in which this client took part; zero before the first."""
        size = self._model.layout.size
        kept, last = self._kept, self._keeper.last_before(self._round)
        if not kept and last:
            with suppress(MessageError):  # a file that cannot be read costs one rounding error
                kept = self._keeper.load(last, size)
        return kept.get("error", torch.zeros(size)).clone()


def received_values(message: Message, model: AdaptedModel, exchange: Exchange) -> Tensor:
    """Decode the units that a message carries, float32, one after another.

    Raises
    ------
    MessageError
        If its arrays are not as announced.
    """
    record = message.content.array_records.get(ARRAYS)
    if record is None:
        raise MessageError(f"The message has no array record {ARRAYS!r}.")
    return decode(record, model.layout.part(exchange.down), exchange.wire)
