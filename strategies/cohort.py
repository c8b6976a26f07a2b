"""Who takes part: stable identities of clients, and the cohort of a round."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from strategies.context import TaskContext
from task.arrays import FLAT
from task.errors import MessageError
from task.messages import ARRAYS, BACKBONE, CONFIG, IDENTIFY, received_config, text_field
from task.seeding import derive_seed

MAX_NAME_LENGTH = 64
MAX_REASON_LENGTH = 500
MAX_QUERIES = 3
MAX_GROUPS = 5
MAX_LISTED = 20
MAX_EXAMPLES = 10**9


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


@dataclass(frozen=True)
class Refusal:
    """Why a node takes no part."""

    client: str
    """The identity it gave, or its node id."""
    reason: str
    """A sentence for people."""
    name_taken: bool = False
    """Whether it would be welcome if no other node had its name; it is asked again once that node has left."""
    moved: bool = False
    """Whether it holds another part of the data than in earlier rounds."""


@dataclass
class ClientDirectory:
    """Which identity each Flower node has; a node is asked once by a query, and again while it does not answer."""

    nodes: dict[str, int] = field(default_factory=dict)
    """Node id by identity."""
    refused: dict[int, Refusal] = field(default_factory=dict)
    """Nodes that cannot take part, by node id."""
    unanswered: dict[int, int] = field(default_factory=dict)
    """How often each node has been asked without an answer."""
    shares: dict[str, str] = field(default_factory=dict)
    """Partition by identity, of clients that have one of a common data set."""
    examples: dict[str, int] = field(default_factory=dict)
    """Number of training images by identity, as far as clients say."""
    named: dict[str, str] = field(default_factory=dict)
    """The part of a data set that reports of earlier rounds have named, by identity; it stays a client's own."""
    _sent: dict[str, str] = field(default_factory=dict)
    _holders: dict[str, str] = field(default_factory=dict)

    def discover(self, grid: Grid, context: TaskContext, layout: str, timeout: float) -> list[Message]:
        """Ask nodes not met before who they are and what they hold; forget nodes that left.

        Parameters
        ----------
        grid : Grid
            Connection to the nodes.
        context : TaskContext
            The task; with an empty ``base`` any node is welcome.
        layout : str
            Digest of the layout that every client must have.
        timeout : float
            Seconds to wait for answers.

        Returns
        -------
        list[Message]
            The messages sent and received, for counting their bytes.
        """
        online = set(grid.get_node_ids())
        self.nodes = {name: node for name, node in self.nodes.items() if node in online}
        self._holders = {share: name for name, share in self.shares.items() if share and name in self.nodes}
        self.refused = {
            node: refusal
            for node, refusal in self.refused.items()
            if node in online and (refusal.client in self.nodes or not refusal.name_taken)
        }
        content = RecordDict({CONFIG: ConfigRecord({"task": context.task, "layout": layout})})
        waiting = sorted(online - set(self.nodes.values()) - set(self.refused))
        messages = [Message(content, node, IDENTIFY) for node in waiting]
        if not messages:
            return []
        answers, exchanged = _asked(grid, messages, timeout)
        if lacking := [node for node, reply in answers.items() if _lacks(reply, context)]:
            delivered, sent = _asked(grid, [_delivery(node, context) for node in lacking], timeout)
            again, asked = _asked(grid, [Message(content, node, IDENTIFY) for node in lacking], timeout)
            answers |= {**again, **{node: reply for node, reply in delivered.items() if reply.has_error()}}
            exchanged += sent + asked
        known = set(self.refused)
        for node in waiting:
            self._admit(node, answers.get(node), context, layout)
        log(INFO, "Clients: %s", self._listed() or "none")
        if news := {self.refused[node].client: self.refused[node].reason for node in self.refused.keys() - known}:
            log(WARNING, "Refused: %s", grouped(news))
        return exchanged

    def _listed(self) -> str:
        """Name the clients with their numbers of training images, as far as they say."""
        known = {name: self.examples.get(name, 0) for name in self.identities}
        shown = [f"{name} ({count} images)" if count else name for name, count in known.items()]
        more = f", ... ({len(shown)} in all, {sum(known.values())} images)" if len(shown) > MAX_LISTED else ""
        return ", ".join(shown[:MAX_LISTED]) + more

    @property
    def identities(self) -> list[str]:
        """The clients that can take part, in identity order."""
        return sorted(self.nodes, key=identity_order)

    @property
    def refusals(self) -> dict[str, str]:
        """Reason by client, of the nodes that cannot take part."""
        return {refusal.client: refusal.reason for refusal in self.refused.values()}

    @property
    def moved(self) -> set[str]:
        """Clients refused for holding another part of the data than in earlier rounds."""
        return {refusal.client for refusal in self.refused.values() if refusal.moved}

    @property
    def partitions(self) -> dict[str, str]:
        """The part of a data set that a client holds, by client, of those that hold one, in identity order."""
        shares = ((client, self.shares.get(client, "")) for client in self.identities)
        return {client: share for client, share in shares if 0 < len(share) <= MAX_NAME_LENGTH}

    def remember(self, messages: Sequence[Message], identities: Sequence[str]) -> None:
        """Note to whom the messages of a phase went, once the grid has given them their ids."""
        ids = [message.metadata.message_id for message in messages]
        self._sent = dict(zip(ids, identities, strict=True))

    def identity_of(self, reply: Message) -> str | None:
        """Tell whose reply this is, also of an error reply; None if it answers nothing that was sent."""
        return self._sent.get(reply.metadata.reply_to_message_id)

    def _admit(self, node: int, reply: Message | None, context: TaskContext, layout: str) -> None:
        if reply is None or reply.has_error():
            self._note_silence(node, "no answer" if reply is None else str(reply.error.reason), context)
            return
        share = ""
        try:
            record = received_config(reply)
            name, share = text_field(record, "client"), str(record.get("share") or "")
            problem = str(record.get("error") or "") or _name_problem(name) or _difference(record, context, layout)
            problem = problem or self._share_problem(name, share)
        except MessageError as error:
            name, problem = f"node-{node}", str(error)
        name_taken = not problem and name in self.nodes
        if name_taken:
            problem = f"another node has the name {name!r} already; give every node its own `name` or `partition-id`"
        if problem:
            shown, moved = repr(name[:MAX_NAME_LENGTH])[1:-1], self._has_moved(name, share)
            self.refused[node] = Refusal(shown, problem[:MAX_REASON_LENGTH], name_taken, moved)
        else:
            self.nodes[name], self.shares[name] = node, share
            if share:
                self._holders[share] = name
            examples = record.get("examples")
            self.examples[name] = examples if isinstance(examples, int) and 0 < examples <= MAX_EXAMPLES else 0

    def _share_problem(self, name: str, share: str) -> str:
        """Say which other images a client had before, or who has its images already, or nothing."""
        if self._has_moved(name, share):
            return f"{_moved(self.named[name], share)}; start it as then"
        holder = self._holders.get(share, name)
        return f"client {holder} has {share} already; give it a `partition-id` of its own" if holder != name else ""

    def _has_moved(self, name: str, share: str) -> bool:
        return self.named.get(name, share) != share

    def _note_silence(self, node: int, reason: str, context: TaskContext) -> None:
        """Count a query without a proper answer; an app without the query is known by its node id."""
        if not context.base:
            log(WARNING, "Node %d does not say who it is (%s); its identity is its node id.", node, reason)
            self.nodes[f"node-{node}"] = node
            return
        self.unanswered[node] = self.unanswered.get(node, 0) + 1
        if self.unanswered[node] >= MAX_QUERIES:
            self.refused[node] = Refusal(f"node-{node}", f"it did not say who it is: {reason[:MAX_REASON_LENGTH]}")


def _moved(was: str, share: str) -> str:
    """Say what has become of a client's part of a data set, such as ``partition 3 of 10``."""
    shown = repr(share[:MAX_NAME_LENGTH])[1:-1]
    then, now = was.rpartition(" of ")[2], shown.rpartition(" of ")[2]
    if now and then != now:
        return f"the images are shared by {now} clients, but by {then} in this run's earlier rounds"
    return f"it has {shown or 'images of its own'}, but had {was} in this run's earlier rounds"


def _asked(grid: Grid, messages: list[Message], timeout: float) -> tuple[dict[int, Message], list[Message]]:
    """Send messages; return the replies by node, and all messages of both ways."""
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    asked = [(nodes.get(reply.metadata.reply_to_message_id), reply) for reply in replies]
    return {node: reply for node, reply in asked if node is not None}, [*messages, *replies]


def _lacks(reply: Message, context: TaskContext) -> bool:
    """Tell whether a node asks for the backbone that there is."""
    config = reply.content.config_records.get(CONFIG) if reply.has_content() else None
    return context.backbone is not None and config is not None and config.get("lacks") == context.backbone_name


def _delivery(node: int, context: TaskContext) -> Message:
    """Make the message that brings a node the backbone; the array is shared, not copied."""
    assert context.backbone is not None
    log(INFO, "Node %d is sent the backbone, %.0f MB.", node, len(context.backbone.data) / 1e6)
    config = ConfigRecord({"name": context.backbone_name})
    return Message(RecordDict({ARRAYS: ArrayRecord({FLAT: context.backbone}), CONFIG: config}), node, BACKBONE)


def _name_problem(name: str) -> str:
    """Say why a name cannot be an identity, or nothing."""
    if name.isprintable() and 0 < len(name) <= MAX_NAME_LENGTH:
        return ""
    return f"a client's name must be 1 to {MAX_NAME_LENGTH} printable characters"


def _difference(record: ConfigRecord, context: TaskContext, layout: str) -> str:
    """Say what a client holds that does not fit the server's model, or nothing."""
    if not context.base:
        return ""
    base = text_field(record, "base")
    if base != context.base:
        return (
            f"its frozen backbone has hash {base[:12]}, the server's has {context.base[:12]}; "
            "adapters of different bases cannot be averaged. Give it the same backbone file"
        )
    if context.classes and text_field(record, "classes") != context.classes:
        return "its class names or their order are not the server's. Set dataset.classes for the whole federation"
    if text_field(record, "layout") != layout:
        return "its adapter has another layout (rank, targets or number of classes) than the server's"
    return ""


def grouped(reasons: Mapping[str, str]) -> str:
    """Join reasons, each once, behind the clients it holds for; the most frequent first."""
    clients: dict[str, list[str]] = {}
    for client in sorted(reasons, key=identity_order):
        clients.setdefault(reasons[client], []).append(client)
    ranked = sorted(clients.items(), key=lambda item: -len(item[1]))[:MAX_GROUPS]
    return "; ".join(f"{_listed(names)}: {reason}" for reason, names in ranked)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_GROUPS]) + (", ..." if len(names) > MAX_GROUPS else "")
    return f"client {shown}" if len(names) == 1 else f"{len(names)} clients ({shown})"
