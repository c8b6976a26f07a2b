"""A train phase under SecAgg+, after which every good reply carries the mean of all."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from logging import ERROR
from math import ceil
from statistics import median
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid

from strategies.secagg.relay import Relay
from strategies.secagg.workflow import Outcome, Workflow, legacy_context
from task.arrays import FLAT
from task.messages import ARRAYS, CONFIG, METRICS
from task.privacy import MASKED_RANGE

MIN_SUMMED = 3
"""The sum of fewer clients would show one of two what the other sent."""
MAX_SUMMED = 1024
"""Sums of more clients would not fit into the 32 bits of what is masked."""
MOST_BY_MEDIAN = 20
"""A client may have so many times as many images as the median client."""
KEPT_SHARE = 2 / 3
"""Part of the cohort that must stay to the end for the sum to be unmasked."""
TOO_FEW = f"the sum was not unmasked: it takes two thirds of the clients asked, and {MIN_SUMMED} or more, to the end"


@dataclass
class MaskedPhase:
    """What became of a train phase under SecAgg+."""

    replies: list[Message] = field(default_factory=list)
    """Replies to the messages that were sent; the array of each good one is the mean of all, weighted by examples."""
    lost: dict[int, str] = field(default_factory=dict)
    """Reason by node of those that were never asked to train, since they fell out before."""
    bytes_down: int = 0
    """Bytes of message contents sent in all four stages."""
    bytes_up: int = 0
    """Bytes of message contents received in all four stages."""


def masked_phase(
    grid: Grid, messages: Sequence[Message], size: int, examples: Sequence[int], timeout: float
) -> MaskedPhase:
    """Let a cohort train, and learn of its updates only their weighted sum.

    Parameters
    ----------
    grid : Grid
        Connection to the nodes.
    messages : Sequence[Message]
        The train messages, one a node; those that are sent get their ids, and what SecAgg+ adds to their content.
    size : int
        Number of values of an update.
    examples : Sequence[int]
        Number of training images of each client, as it says; 0 where it does not. Weights are rounded in parts of the
        largest one, or of :data:`MOST_BY_MEDIAN` times the median where one client claims more.
    timeout : float
        Seconds to wait for the replies of each of the four stages.

    Returns
    -------
    MaskedPhase
        Replies that can be checked and merged as in any other phase.

    Notes
    -----
    SecAgg+ (Bell et al., ACM CCS 2020) as Flower has it, with all pairs of clients as neighbours.
    """
    relay = Relay(grid, {message.metadata.dst_node_id: message for message in messages}, size)
    if not MIN_SUMMED <= len(messages) <= MAX_SUMMED:
        reason = f"secure aggregation takes {MIN_SUMMED} to {MAX_SUMMED} clients; this round has {len(messages)}"
        return MaskedPhase(lost=dict.fromkeys(relay.messages, reason))
    outcome, failure = Outcome(list(relay.messages)), TOO_FEW
    workflow = Workflow(
        num_shares=1.0,
        reconstruction_threshold=_threshold(len(messages)),
        max_weight=_max_weight(examples),
        clipping_range=MASKED_RANGE,
        timeout=timeout,
    )
    try:
        workflow(cast(Grid, relay), legacy_context(outcome))
    except Exception as error:  # keys and shares of a client that lies fail in Flower's cryptography
        failure = f"the sum could not be unmasked: a client's keys or shares are wrong ({type(error).__name__})"
        log(ERROR, "Secure aggregation fails.", exc_info=error)
    if outcome.mean is not None and not np.isfinite(outcome.mean).all():
        outcome.mean, failure = None, "the sum of the updates has no weight"
    replies = [_with_mean(reply, outcome.mean, failure, relay) for reply in relay.trained.values()]
    lost = {node: relay.lost.get(node, failure) for node in relay.messages if node not in relay.trained}
    return MaskedPhase(replies, lost, relay.bytes_down, relay.bytes_up)


def _max_weight(examples: Sequence[int]) -> int:
    """Choose the weight that weights are parts of, so that no single claim makes all others too small to count."""
    known = [count for count in examples if count > 0] or [1]
    return min(max(known), ceil(MOST_BY_MEDIAN * median(known)))


def _threshold(clients: int) -> int:
    """How many of the clients must stay to the end."""
    return max(MIN_SUMMED, ceil(KEPT_SHARE * clients))


def _with_mean(reply: Message, mean: np.ndarray | None, failure: str, relay: Relay) -> Message:
    """Put the mean where a client's update would be; without one the reply becomes an error."""
    if reply.has_error():
        return reply
    if mean is None:
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, failure)
        return Message(error, reply_to=relay.messages[reply.metadata.src_node_id])
    config, metrics = reply.content.config_records[CONFIG], reply.content.metric_records[METRICS]
    reply.content = RecordDict({ARRAYS: ArrayRecord({FLAT: Array(mean)}), CONFIG: config, METRICS: metrics})
    return reply
