"""Who takes part: stable identities of clients, and the cohort of a round."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from task.errors import MessageError
from task.messages import CONFIG, IDENTIFY, received_config, text_field
from task.seeding import derive_seed

MAX_NAME_LENGTH = 64


def identity_order(name: str) -> tuple[int, int, str]:
    """Sort key of identities: numbers by value, then names alphabetically."""
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)


def draw_cohort(identities: Iterable[str], fraction: float, minimum: int, seed: int, server_round: int) -> list[str]:
    """Draw the clients of a round, as a function of (seed, round, identities) alone.

    Parameters
    ----------
    identities : Iterable[str]
        The clients that can take part, in any order.
    fraction : float
        Share to draw, in (0, 1].
    minimum : int
        Draw at least so many, as far as there are.
    seed, server_round : int
        What the draw depends on.

    Returns
    -------
    list[str]
        The cohort in identity order.
    """
    pool = sorted(identities, key=identity_order)
    size = min(len(pool), max(minimum, round(fraction * len(pool))))
    generator = np.random.default_rng(derive_seed(seed, "cohort", server_round))
    return [pool[i] for i in sorted(generator.permutation(len(pool))[:size])]


@dataclass
class ClientDirectory:
    """Which identity each Flower node has; nodes are asked once, by a query message."""

    nodes: dict[str, int] = field(default_factory=dict)
    """Node id by identity."""
    refused: dict[int, str] = field(default_factory=dict)
    """Why a node takes no part, by node id."""
    _sent: dict[str, str] = field(default_factory=dict)

    def discover(self, grid: Grid, task: str, layout: str, base: str, timeout: float) -> None:
        """Ask nodes not met before who they are and what base model they hold; forget nodes that left.

        Parameters
        ----------
        grid : Grid
            Connection to the nodes.
        task, layout, base : str
            The task config as JSON, the digest of its layout, and the hash of the server's frozen weights; an
            empty ``base`` leaves the check out.
        timeout : float
            Seconds to wait for answers.
        """
        online = set(grid.get_node_ids())
        self.nodes = {name: node for name, node in self.nodes.items() if node in online}
        self.refused = {node: reason for node, reason in self.refused.items() if node in online}
        known = set(self.nodes.values()) | set(self.refused)
        content = RecordDict({CONFIG: ConfigRecord({"task": task, "layout": layout})})
        messages = [Message(content, node, IDENTIFY) for node in sorted(online - known)]
        if not messages:
            return
        for reply in sorted(grid.send_and_receive(messages, timeout=timeout), key=lambda m: m.metadata.src_node_id):
            self._admit(reply, base)
        log(INFO, "Clients: %s", ", ".join(self.identities) or "none")
        for node in sorted(self.refused.keys() - known):
            log(WARNING, "Node %d takes no part: %s", node, self.refused[node])

    @property
    def identities(self) -> list[str]:
        """The clients that can take part, in identity order."""
        return sorted(self.nodes, key=identity_order)

    def remember(self, messages: Sequence[Message], identities: Sequence[str]) -> None:
        """Note to whom the messages of a phase went, once the grid has given them their ids."""
        ids = [message.metadata.message_id for message in messages]
        self._sent = dict(zip(ids, identities, strict=True))

    def identity_of(self, reply: Message) -> str | None:
        """Tell whose reply this is, also of an error reply; None if it answers nothing that was sent."""
        sent_to = self._sent.get(reply.metadata.reply_to_message_id)
        if sent_to is not None:
            return sent_to
        return next((name for name, node in self.nodes.items() if node == reply.metadata.src_node_id), None)

    def _admit(self, reply: Message, base: str) -> None:
        node = reply.metadata.src_node_id
        if reply.has_error() and base:
            self.refused[node] = f"error {reply.error.code}: {reply.error.reason}"
            return
        if reply.has_error():
            log(WARNING, "Node %d does not say who it is (%s); its identity is its node id.", node, reply.error.reason)
            self.nodes[f"node-{node}"] = node
            return
        try:
            record = received_config(reply)
            name = text_field(record, "client")
            problem = str(record.get("error") or "") or _name_problem(name) or _base_problem(record, base)
        except MessageError as error:
            name, problem = "", str(error)
        if not problem and name in self.nodes:
            problem = f"another node already has the name {name!r}; give every node its own `name` or `partition-id`"
        if problem:
            self.refused[node] = f"client {name[:MAX_NAME_LENGTH]!r}: {problem}" if name else problem
        else:
            self.nodes[name] = node


def _name_problem(name: str) -> str:
    """Say why a name cannot be an identity, or nothing."""
    if name.isprintable() and 0 < len(name) <= MAX_NAME_LENGTH:
        return ""
    return f"a client's name must be 1 to {MAX_NAME_LENGTH} printable characters"


def _base_problem(record: ConfigRecord, base: str) -> str:
    """Say why a client's base model does not fit, or nothing."""
    theirs = text_field(record, "base") if base else ""
    if theirs == base:
        return ""
    return (
        f"its frozen backbone has hash {theirs[:12]}, the server's has {base[:12]}; "
        "adapters of different bases cannot be averaged. Give it the same backbone file"
    )


def refusal_summary(refused: Sequence[str]) -> str:
    """Join the distinct reasons for refusals, the most frequent first."""
    return " | ".join(sorted(set(refused), key=lambda reason: (-refused.count(reason), reason))[:5])
