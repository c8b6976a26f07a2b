"""The client's side of privacy: Flower's mods, as the message asks for them."""

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS

from task.errors import MessageError
from task.messages import number_field, received_config
from task.privacy import CLIPPING_NORM, DELTA, EPSILON, PRIVACY

MAX_EPSILON = 1.0
"""Up to here the Gaussian mechanism's usual noise, which Flower's mod adds, is enough."""


def private(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clip what the client sends and add noise to it, or mask it for secure aggregation, where the message says so.

    Of two updates that are clipped to a norm, the difference has twice that norm at most: this is the sensitivity that
    local noise is made for. Its draws are fresh, whatever the run's seed, which the server knows.

    Raises
    ------
    MessageError
        If there is no such kind of privacy, or its numbers are out of range.
    """
    if RECORD_KEY_CONFIGS in message.content.config_records:
        from client_app.secagg import masked  # brings in Flower's older client, which other runs don't need

        return masked(message, context, call_next)
    config = received_config(message)
    kind = config.get(PRIVACY, "none")
    if kind == "none":
        return call_next(message, context)
    if kind == "secagg":
        raise MessageError("The message asks for an update in the clear, with privacy=secagg; it is not followed.")
    if not number_field(config, CLIPPING_NORM) > 0:
        raise MessageError("The message asks for clipping to no positive norm; it is not followed.")
    if kind == "central_fixed":
        return fixedclipping_mod(message, context, call_next)
    if kind == "central_adaptive":
        return adaptiveclipping_mod(message, context, call_next)
    if kind != "local":
        raise MessageError(f"This client knows no privacy of the kind {kind!r}.")
    return _local(message)(message, context, call_next)


def _local(message: Message) -> LocalDpMod:
    config = received_config(message)
    norm, epsilon, delta = (float(number_field(config, key)) for key in (CLIPPING_NORM, EPSILON, DELTA))
    if not (0 < epsilon <= MAX_EPSILON and 0 < delta < 1):
        raise MessageError(f"Local privacy with epsilon={epsilon} and delta={delta} is none; it is not followed.")
    np.random.seed()
    return LocalDpMod(norm, 2 * norm, epsilon, delta)
