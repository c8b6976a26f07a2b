"""The client's side of secure aggregation: Flower's SecAgg+ mod around this app's training."""

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_STATE
from flwr.compat.common.recorddict_compat import fitres_to_recorddict

from task.errors import MessageError
from task.messages import ARRAYS, CONFIG, METRICS, number_field, received_metrics
from task.privacy import MASKED_RANGE


def masked(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Take part in a stage of SecAgg+: give keys, give shares of keys, train and mask, give shares to unmask the sum.

    Raises
    ------
    MessageError
        If training fails, or its outcome does not fit into the range that is masked.
    """
    np.random.seed()  # the mod rounds at random; a seed that others know would show what was rounded
    return secaggplus_mod(message, context, lambda m, c: _to_mask(call_next(m, c), _max_weight(c)))


def _max_weight(context: Context) -> float:
    """Read the largest weight that the server has announced, from what the mod keeps between stages."""
    weight = context.state.config_records[RECORD_KEY_STATE]["max_weight"]
    return float(weight) if isinstance(weight, int | float) else 0.0


def _to_mask(reply: Message, max_weight: float) -> Message:
    """Put a train reply into the form that the mod masks: a ``FitRes`` beside this app's own records."""
    if reply.has_error():
        raise MessageError(reply.error.reason)
    (array,) = reply.content.array_records[ARRAYS].values()
    flat, metrics = array.numpy(), received_metrics(reply)
    if not np.abs(flat).max() <= MASKED_RANGE:
        raise MessageError(f"its update is not within -{MASKED_RANGE} to {MASKED_RANGE}, which is what is masked.")
    examples = int(number_field(metrics, "num-examples"))
    if examples > max_weight:
        raise MessageError(
            f"it has {examples} images, more than the {max_weight:g} that secure aggregation carries in this round."
        )
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([flat]), examples, {})
    content: RecordDict = fitres_to_recorddict(result, keep_input=False)
    content[CONFIG], content[METRICS] = reply.content.config_records[CONFIG], metrics
    reply.content = content
    return reply
