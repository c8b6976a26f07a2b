"""A Flower app whose clients answer by a script, and a grid whose replies come in any order."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from strategies import STRATEGIES, LayerwiseStrategy, Schedule, TaskContext
from task.arrays import FLAT, flat_to_array
from task.messages import ARRAYS, CONFIG, METRICS, SIGNALS, Instruction, received_config
from task.signals import signal_layout
from task.units import Layout, make_layout
from task.wire import EXACT, WireConfig, decode, encode
from tools.debug import InProcessGrid

BASE = "ab" * 32
CLASSES = "12" * 32
LAYOUT = make_layout(
    {
        "blocks.0.attn.qkv.lora_A.weight": (2, 4),
        "blocks.0.attn.qkv.lora_B.weight": (6, 2),
        "blocks.1.attn.qkv.lora_A.weight": (2, 4),
        "blocks.1.attn.qkv.lora_B.weight": (6, 2),
        "head.weight": (3, 4),
        "head.bias": (3,),
    }
)


@dataclass
class Script:
    """What each client answers, by its name; every field maps (name, round, received) to a part of the reply."""

    values: Callable[[str, int, np.ndarray], np.ndarray] = lambda name, server_round, received: received + int(name) + 1
    num_examples: Callable[[str], int] = lambda name: 10 * (int(name) + 1)
    edit: Callable[[str, int, RecordDict], RecordDict] = lambda name, server_round, content: content
    base: Callable[[str], str] = lambda name: BASE
    classes: Callable[[str], str] = lambda name: CLASSES
    share: Callable[[str], str] = lambda name: ""
    silent: Callable[[str], bool] = lambda name: False
    layout: Layout = LAYOUT
    signals: Callable[[str, Instruction], ArrayRecord] = lambda name, instruction: scripted_signals(name, instruction)
    heard: list[tuple[str, Instruction, np.ndarray]] = field(default_factory=list)
    kept: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def start(self, name: str, instruction: Instruction, message: Message) -> torch.Tensor:
        """Where a client starts from: what it received, and of other units what it kept."""
        exchange, layout = instruction.exchange, self.layout
        exchange.check(layout)
        flat = self.kept[name]["flat"].clone() if exchange.start else torch.full((layout.size,), torch.nan)
        values = decode(message.content[ARRAYS], layout.part(exchange.down), exchange.wire)
        layout.put(flat, exchange.down, values)
        received = self.kept[name]["received"] if exchange.start else torch.empty(layout.size)
        layout.put(received, exchange.down, values)
        self.kept.setdefault(name, {"error": torch.zeros(layout.size)})["received"] = received
        return flat

    def reply(self, name: str, instruction: Instruction, values: np.ndarray) -> ArrayRecord:
        """What a client sends back, keeping its values, and the rounding error where they are rounded."""
        exchange, kept, layout = instruction.exchange, self.kept[name], self.layout
        part, sent = layout.part(exchange.up), layout.take(torch.tensor(values), exchange.up)
        kept["flat"] = torch.tensor(values)
        if exchange.wire.lossy:
            sent = sent - layout.take(kept["received"], exchange.up) + layout.take(kept["error"], exchange.up)
        record = encode(sent, part, exchange.wire)
        if exchange.wire.lossy:
            layout.put(kept["error"], exchange.up, sent - decode(record, part, exchange.wire))
            layout.put(kept["received"], exchange.up, layout.take(kept["flat"], exchange.up))
        return record


def scripted_signals(name: str, instruction: Instruction) -> ArrayRecord:
    """Signals that a real client could send, differing by client and round: positive, with Gram matrices of inputs."""
    generator = np.random.default_rng([int(name), instruction.server_round])
    layout = signal_layout(instruction.signals, LAYOUT)
    values = generator.uniform(0.1, 1.0, layout.size).astype(np.float32)
    for spec in layout.tensors:
        part = slice(spec.offset, spec.offset + spec.size)
        if spec.name == "class-count":
            values[part] = generator.integers(2, 9, spec.size)
        if spec.name.startswith("gram:"):
            width = int((2 * spec.size) ** 0.5)
            inputs = generator.normal(size=(20, width))
            values[part] = (inputs.T @ inputs)[np.triu_indices(width)]
    return ArrayRecord({FLAT: flat_to_array(values)})


def scripted_app(script: Script) -> ClientApp:
    """Make a ClientApp that keeps to the message contract and answers by the script."""
    app = ClientApp()

    @app.query("identify")
    def identify(message: Message, context: Context) -> Message:
        name = str(context.node_config["name"])
        if script.silent(name):
            raise RuntimeError("starting up")
        held = {"base": script.base(name), "layout": script.layout.digest, "classes": script.classes(name)}
        held["share"] = script.share(name)
        record = ConfigRecord({"client": name, **held})
        return Message(RecordDict({CONFIG: record}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        name = str(context.node_config["name"])
        instruction = Instruction.from_record(received_config(message))
        start = script.start(name, instruction, message)
        received = start.numpy().copy()
        script.heard.append((name, instruction, received))
        values = script.values(name, instruction.server_round, received).astype(np.float32)
        metrics = MetricRecord(
            {"num-examples": script.num_examples(name), "train-loss": 1.0, "seconds": 0.0, "steps": 5}
        )
        if instruction.evaluate == "received":
            accuracy = float(received[0] + 1) / 10
            metrics.update({"test-num-examples": 5, "test-accuracy": accuracy, "test-loss": 1.0})
        config = ConfigRecord({"client": name, "base": script.base(name), "layout": script.layout.digest})
        content = RecordDict({ARRAYS: script.reply(name, instruction, values), METRICS: metrics, CONFIG: config})
        if instruction.signals.anything:
            content[SIGNALS] = script.signals(name, instruction)
        return Message(script.edit(name, instruction.server_round, content), reply_to=message)

    @app.query("measure")
    def measure(message: Message, context: Context) -> Message:
        name = str(context.node_config["name"])
        instruction = Instruction.from_record(received_config(message))
        config = ConfigRecord({"client": name, "base": script.base(name), "layout": script.layout.digest})
        content = RecordDict({SIGNALS: script.signals(name, instruction), CONFIG: config})
        return Message(script.edit(name, instruction.server_round, content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        accuracy = (int(context.node_config["name"]) + 1) / 100
        metrics = MetricRecord({"num-examples": 5, "accuracy": accuracy, "loss": 1.0, "seconds": 0.0})
        if Instruction.from_record(received_config(message)).evaluate == "tuned":
            metrics["tuned-accuracy"] = 2 * accuracy
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    return app


class ShufflingGrid(InProcessGrid):
    """Gives nodes their names in a shuffled order and returns replies in another."""

    def __init__(self, client_app: ClientApp, names: Iterable[str], shuffle: int | None = None) -> None:
        self.random = random.Random(shuffle)
        order = list(names)
        if shuffle is not None:
            self.random.shuffle(order)
        super().__init__(client_app, [{"name": name} for name in order])
        self.shuffled = shuffle is not None

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        if self.shuffled:
            self.random.shuffle(replies)
        return replies


def make_strategy(
    name: str,
    seed: int = 0,
    lora_merge: str = "factors",
    schedule: Schedule | None = None,
    wire: WireConfig = EXACT,
    **options: object,
) -> LayerwiseStrategy:
    """Make a registered strategy for the scripted clients."""
    kind = STRATEGIES[name]
    context = TaskContext("{}", LAYOUT, BASE, CLASSES, seed, lora_merge, wire)
    return kind(kind.Config(name=name, **options), context, schedule=schedule)


def initial_arrays() -> ArrayRecord:
    """Initial values that differ in every element."""
    return ArrayRecord({FLAT: flat_to_array(np.linspace(-1, 1, LAYOUT.size, dtype=np.float32))})


def final_flat(arrays: ArrayRecord) -> np.ndarray:
    """Values of a final flat record."""
    return arrays[FLAT].numpy()
