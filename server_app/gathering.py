"""A grid that fetches replies as they come, and tells how many have."""

import time
from collections.abc import Callable, Iterable

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

OnReplies = Callable[[list[Message], int], None]
SHORTEST, LONGEST = 0.02, 1.0
"""Seconds between two looks for replies."""
SHARE = 0.01
"""Look again after this part of the time waited so far: what a phase loses by it stays below."""


class GatheringGrid(Grid):
    """Flower's grid, which in a deployment looks for replies every 3 seconds, with shorter waits.

    Parameters
    ----------
    grid : Grid
        Does all the rest.
    on_replies : callable
        Is given the messages of a phase and the number of replies so far: before the first, and when there are more.
    """

    def __init__(self, grid: Grid, on_replies: OnReplies) -> None:
        self._grid, self._on_replies = grid, on_replies

    def set_run(self, run: Run) -> None:
        """Leave it to Flower's grid, as all that follows."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run record."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message; Flower's own grids deprecate this."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """List all nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """List what is known of all nodes."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return their replies, as soon as all are there or the time is over.

        Parameters
        ----------
        messages : Iterable[Message]
            Of one phase.
        timeout : float, optional
            Seconds to wait from the beginning of the sending; None: as long as it takes.

        Returns
        -------
        list[Message]
            In the order in which they came.
        """
        messages, replies, began = list(messages), list[Message](), time.monotonic()
        if not messages:
            return replies
        self._on_replies(messages, 0)
        waiting = {message_id for message_id in self.push_messages(messages) if message_id}
        while waiting:
            found = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            replies += found
            if found:
                self._on_replies(messages, len(replies))
            waited = time.monotonic() - began
            if not waiting or (timeout is not None and waited >= timeout):
                break
            pause = min(LONGEST, max(SHORTEST, SHARE * waited))
            time.sleep(pause if timeout is None else min(pause, timeout - waited))
        return replies
