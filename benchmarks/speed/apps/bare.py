"""A Flower app with nothing around training but Flower: the plain loop, its processes exchanged for Flower's clients.

What is between it and the plain loop is what Flower takes, and Ray, set up as by the app; what is between it and the
app is the app's own.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from benchmarks.speed.apps.tutorial import identify, named_nodes
from benchmarks.speed.floor import Floor, FloorWorker, train_client
from benchmarks.speed.settings import Setting
from task.ray_settings import set_up_ray

POLL_SECONDS = 0.02
set_up_ray()
client = ClientApp()
client.query()(identify)
server = ServerApp()


@lru_cache(maxsize=1)
def kept_worker(setting: str) -> FloorWorker:
    """Make this process's worker, of the plain loop's kind, at its first message."""
    floor = Floor(Setting.from_json(setting))
    task, clients, received, trained = floor.arguments
    return FloorWorker(task, clients, received, trained)


@client.train()
def train_round(message: Message, context: Context) -> Message:
    """Train as a process of the plain loop does."""
    worker, number = receiving_worker(message, context), int(context.node_config["partition-id"])
    asked = message.content.config_records["config"]
    count = worker.train(number, int(str(asked["server-round"])), bool(asked["evaluating"]))
    arrays, metrics = ArrayRecord([worker.trained[number].numpy()]), MetricRecord({"num-examples": count})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate_round(message: Message, context: Context) -> Message:
    """Evaluate as a process of the plain loop does."""
    score = receiving_worker(message, context).evaluate(int(context.node_config["partition-id"]))
    return Message(RecordDict({"metrics": MetricRecord({"accuracy": score})}), reply_to=message)


def receiving_worker(message: Message, context: Context) -> FloorWorker:
    """Return this process's worker with the values that a message brings."""
    worker = kept_worker(str(context.run_config["setting"]))
    (values,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    worker.received.copy_(torch.from_numpy(values))
    return worker


class GridPool(Executor):
    """Stands for the plain loop's worker processes: what they are asked goes to Flower's clients as messages.

    Parameters
    ----------
    grid : Grid
        Flower's.
    nodes : dict[int, int]
        Node ids by client.
    floor : Floor
        Whose values are sent, and whose rows take what clients have trained.
    """

    def __init__(self, grid: Grid, nodes: dict[int, int], floor: Floor) -> None:
        self._grid, self._nodes, self._floor = grid, nodes, floor

    def map(self, fn: Callable[..., Any], *iterables: Any, **_: Any) -> Iterator[Any]:
        """Send messages at once, and wait for the replies when they are asked for."""
        kind = MessageType.TRAIN if fn is train_client else MessageType.EVALUATE
        asked = list(zip(*iterables, strict=False))
        arrays, messages = ArrayRecord([self._floor.received.numpy()]), []
        for number, *more in asked:
            config = ConfigRecord(dict(zip(("server-round", "evaluating"), more, strict=False)))
            content = RecordDict({"arrays": arrays, "config": config})
            messages.append(Message(content, self._nodes[number], kind))
        return self._answers(list(self._grid.push_messages(messages)), [number for number, *_ in asked])

    def _answers(self, ids: Sequence[str], clients: Sequence[int]) -> Iterator[int | float]:
        replies: dict[str, Message] = {}
        while waiting := [one for one in ids if one not in replies]:
            found = {reply.metadata.reply_to_message_id: reply for reply in self._grid.pull_messages(waiting)}
            replies |= found
            if len(found) < len(waiting):
                time.sleep(POLL_SECONDS)
        for one, number in zip(ids, clients, strict=True):
            content = replies[one].content
            for values in content.array_records.values():
                self._floor.trained[number].copy_(torch.from_numpy(values.to_numpy_ndarrays()[0]))
            (answer,) = content.metric_records["metrics"].values()
            yield answer  # type: ignore[misc]


def run_over(grid: Grid, floor: Floor, out: Path) -> None:
    """Run all rounds of the plain loop over Flower's clients; leave in a folder what it gave."""
    nodes = {int(name): node for name, node in named_nodes(grid, floor.clients).items()}
    floor.run(GridPool(grid, nodes, floor), out).write(out)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the setting that the run config names."""
    config = context.run_config
    run_over(grid, Floor(Setting.from_json(str(config["setting"]))), Path(str(config["runs-dir"])))
