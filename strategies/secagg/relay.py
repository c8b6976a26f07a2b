"""Between Flower's SecAgg+ workflow and the grid: sends the phase's own messages, lets no bad reply through."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import WARNING

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.serverapp import Grid

from strategies.secagg.checks import check_stage
from task.errors import MessageError
from task.messages import content_bytes


@dataclass
class Relay:
    """What the workflow takes for the grid."""

    grid: Grid
    """Connection to the nodes."""
    messages: dict[int, Message]
    """The train message of each node of the cohort."""
    size: int
    """Number of values of an update."""
    trained: dict[int, Message] = field(default_factory=dict)
    """Reply to the train message by node, an error where it was none or a bad one."""
    lost: dict[int, str] = field(default_factory=dict)
    """Reason by node that fell out, in any stage."""
    bytes_down: int = 0
    """Bytes of message contents sent."""
    bytes_up: int = 0
    """Bytes of message contents received."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send the messages of a stage; return the good replies alone."""
        messages = list(messages)
        stage = str(messages[0].content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])
        sent = [self._own(message, stage) for message in messages]
        named = [_named(stage, message) for message in sent]
        self.bytes_down += sum(content_bytes(message.content) for message in sent)
        found = list(self.grid.send_and_receive(sent, timeout=timeout))
        self.bytes_up += sum(content_bytes(reply.content) for reply in found if reply.has_content())
        by_id = {reply.metadata.reply_to_message_id: reply for reply in found}
        replies = [
            self._checked(stage, message, by_id.get(message.metadata.message_id), others)
            for message, others in zip(sent, named, strict=True)
        ]
        return [reply for reply in replies if reply is not None and not reply.has_error()]

    def _own(self, message: Message, stage: str) -> Message:
        """Take the phase's own message to train; any gets a record of its own, since Flower's mod takes things out."""
        config = ConfigRecord(dict(message.content.config_records[RECORD_KEY_CONFIGS]))
        trains = stage == Stage.COLLECT_MASKED_VECTORS
        own = self.messages[message.metadata.dst_node_id] if trains else message
        own.content = RecordDict({**(own.content if trains else {}), RECORD_KEY_CONFIGS: config})
        return own

    def _checked(self, stage: str, message: Message, reply: Message | None, named: set[int]) -> Message | None:
        """Note why a node falls out; a bad reply becomes an error."""
        node = message.metadata.dst_node_id
        if reply is None:
            reason = "no reply within the timeout"
        elif reply.has_error():
            reason = f"error {reply.error.code}: {reply.error.reason}"
        else:
            reason = _problem(stage, reply, named, self.size)
            if reason:
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        if reason:
            self.lost[node] = f"in the stage {stage!r} of secure aggregation: {reason}"
            log(WARNING, "Node %d falls out %s", node, self.lost[node])
        if reply is not None and stage == Stage.COLLECT_MASKED_VECTORS:
            self.trained[node] = reply
        return reply


def _named(stage: str, message: Message) -> set[int]:
    """Tell of which nodes a message speaks, for each of which its reply must have a share."""
    config = message.content.config_records[RECORD_KEY_CONFIGS]
    if stage == Stage.SHARE_KEYS:
        return {int(key) for key in config if key != Key.STAGE} - {message.metadata.dst_node_id}
    lists = [config.get(key) for key in (Key.ACTIVE_NODE_ID_LIST, Key.DEAD_NODE_ID_LIST)]
    return {int(node) for nodes in lists if isinstance(nodes, list) for node in nodes}


def _problem(stage: str, reply: Message, named: set[int], size: int) -> str:
    try:
        check_stage(stage, reply.content, named, size)
    except MessageError as error:
        return str(error)
    return ""
