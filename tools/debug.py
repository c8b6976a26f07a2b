"""Run the app in one process, without Ray and without a SuperLink: for debuggers and tests.

Run: ``python -m tools.debug strategy=fedprox num_server_rounds=2 --clients 4`` (any Hydra overrides).
"""

import argparse
import itertools
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from task.errors import ConfigError, PetalwiseError


class InProcessGrid(Grid):
    """A Grid that calls a ClientApp directly, one message after another.

    Parameters
    ----------
    client_app : ClientApp
        The app every node runs.
    node_configs : Sequence[Mapping]
        The node config of each node; node ids count from 1.
    """

    def __init__(self, client_app: ClientApp, node_configs: Sequence[Mapping[str, bool | float | int | str]]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.client_app = client_app
        self.contexts = {
            node: Context(run_id=1, node_id=node, node_config=dict(config), state=RecordDict(), run_config={})
            for node, config in enumerate(node_configs, start=1)
        }
        self._message_ids = itertools.count(1)
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Run:
        """There is no run record."""
        raise NotImplementedError("The in-process grid has no run record.")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message; Flower's own grids deprecate this."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """List all nodes."""
        return list(self.contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Not offered; nodes are known by id."""
        raise NotImplementedError("Use get_node_ids.")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand every message to its node at once and keep the reply."""
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to the messages of these ids."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return their replies."""
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> str:
        message_id = f"message-{next(self._message_ids)}"
        message.metadata.__dict__["_message_id"] = message_id
        try:
            reply = self.client_app(message=message, context=self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # Flower's runtimes answer any client exception with an error reply
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
        self._replies[message_id] = reply
        return message_id


def simulated_nodes(num_clients: int) -> list[dict[str, int]]:
    """Node configs as Flower's simulation makes them."""
    return [{"partition-id": i, "num-partitions": num_clients} for i in range(num_clients)]


def main(argv: Sequence[str] | None = None) -> None:
    """Compose the overrides and run them in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as strategy=fedprox train.lr=3e-4")
    parser.add_argument("--clients", type=int, default=10, help="number of simulated clients")
    parser.add_argument("--run-config", type=Path, metavar="FILE", help="a TOML file with Flower's run config")
    parser.add_argument("--resume", default="", metavar="RUN", help="folder of a run to go on with")
    arguments = parser.parse_args(argv)

    from client_app.app import app
    from server_app.app import run_federation
    from server_app.compose import compose_run
    from tools.check import check_clients

    began = time.perf_counter()
    try:
        if arguments.clients < 1:
            raise ConfigError(f"A run needs at least 1 client, not {arguments.clients}.")
        given = {} if arguments.run_config is None else tomllib.loads(arguments.run_config.read_text(encoding="utf-8"))
        run = compose_run(given, arguments.overrides)
        check_clients(run.strategy, arguments.clients)
        folder = run_federation(InProcessGrid(app, simulated_nodes(arguments.clients)), run, arguments.resume)
    except PetalwiseError as error:
        sys.exit(f"The run stops: {error}")
    print(f"{folder} after {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
