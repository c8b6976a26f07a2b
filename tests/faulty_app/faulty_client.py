"""The real ClientApp, whose replies to TRAIN are then spoiled, in a way of its own for each partition."""

from collections.abc import Callable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable

from client_app.app import app as honest
from task.arrays import FLAT, array_to_flat, flat_to_array
from task.messages import ARRAYS, CONFIG, METRICS

OVERSIZED = 50_000_000


def with_values(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    def spoil(content: RecordDict) -> None:
        array = content[ARRAYS][FLAT]
        content[ARRAYS] = ArrayRecord({FLAT: flat_to_array(change(array_to_flat(array, array.shape[0])))})

    return spoil


def with_examples(count: float) -> Callable[[RecordDict], None]:
    def spoil(content: RecordDict) -> None:
        content[METRICS]["num-examples"] = count

    return spoil


def without(record: str, key: str = "") -> Callable[[RecordDict], None]:
    def spoil(content: RecordDict) -> None:
        if key:
            del content[record][key]
        else:
            del content[record]

    return spoil


def raising(_: RecordDict) -> None:
    raise RuntimeError("out of memory, say")


def another_base(content: RecordDict) -> None:
    content[CONFIG] = ConfigRecord({**content[CONFIG], "base": "0" * 64})


FAULTS: dict[int, Callable[[RecordDict], None]] = {
    2: with_values(lambda flat: flat * np.nan),
    3: with_values(lambda flat: flat[:-1]),
    4: with_values(lambda flat: np.zeros(OVERSIZED, np.float32)),
    5: without(ARRAYS),
    6: without(METRICS, "num-examples"),
    7: with_examples(0),
    8: with_examples(-5),
    9: with_examples(10**15),
    10: raising,
    11: another_base,
}


def spoiling(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Pass on what the honest app answers, or a spoiled version of it."""
    reply = call_next(message, context)
    spoil = FAULTS.get(int(context.node_config["partition-id"]))
    if spoil and message.metadata.message_type == MessageType.TRAIN:
        spoil(reply.content)
    return reply


def answer(message: Message, context: Context) -> Message:
    """Have the honest app answer."""
    return honest(message, context)


app = ClientApp(mods=[spoiling])
app.train()(answer)
app.evaluate()(answer)
app.query("identify")(answer)
app.query("measure")(answer)
