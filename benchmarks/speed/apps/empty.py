"""A Flower app that does nothing: what Flower itself takes for the phases of a round, by its polls and queues."""

import json
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from task.ray_settings import set_up_ray

set_up_ray()
client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Send back what came; the first note when."""
    with suppress(FileExistsError), Path(str(context.run_config["runs-dir"]), "first").open("x") as file:
        file.write(str(time.time()))
    return Message(message.content, reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Answer with nothing."""
    return Message(RecordDict(), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Let the cohort answer, then all nodes, round after round; write the seconds of both phases."""
    config = context.run_config
    arrays = ArrayRecord([np.zeros(int(config["size"]), np.float32)])
    while len(nodes := list(grid.get_node_ids())) < int(config["clients"]):
        time.sleep(0.1)
    cohort = nodes[: int(config["cohort"])]
    rounds = []
    for _ in range(int(config["rounds"])):
        marks = [time.perf_counter()]
        for kind, asked in ((MessageType.TRAIN, cohort), (MessageType.EVALUATE, nodes)):
            content = RecordDict({"arrays": arrays})
            replies = list(grid.send_and_receive([Message(content, node, kind) for node in asked]))
            assert all(reply.has_content() for reply in replies)
            assert len(replies) == len(asked)
            marks.append(time.perf_counter())
        rounds.append({"train": marks[1] - marks[0], "evaluate": marks[2] - marks[1]})
    Path(str(config["runs-dir"]), "rounds.json").write_text(json.dumps(rounds))
