"""The Flower ClientApp: says who it is, trains, evaluates, measures."""

import time
from collections.abc import Callable, Iterator
from functools import wraps
from logging import ERROR

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import ErrorCode
from flwr.common.logger import log

from client_app.exchanging import Exchanger
from client_app.kept import Keeper
from client_app.measuring import Recorder, class_signals, last_epoch_start, packed
from client_app.node import Node, node_name
from client_app.privacy import private
from client_app.training import TrainOutcome, train
from client_app.worker import Worker, worker_name, worker_of
from task.arrays import FLAT, flat_to_array
from task.data.batches import train_batches
from task.delivery import delivered_folder, keep_delivered
from task.errors import MessageError, PetalwiseError
from task.evaluation import Score, evaluate
from task.folders import reason_of
from task.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    SIGNALS,
    Instruction,
    classes_digest,
    received_config,
    text_field,
)
from task.seeding import derive_seed, generator_for, seed_device
from task.units import HEAD

app = ClientApp()
Handler = Callable[[Message, Context], Message]
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def explained_to_server(handler: Handler) -> Handler:
    """Turn errors into Flower error replies that carry one sentence; of those nobody foresaw, the log has the rest."""

    @wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _told(error)), reply_to=message)

    return handle


def _told(error: Exception) -> str:
    """Say an error in one line; of a fault of this app or of a library, the rest goes to the log."""
    if isinstance(error, PetalwiseError):
        return str(error)
    log(ERROR, "This client fails.", exc_info=error)
    return f"{type(error).__name__}: {reason_of(error).splitlines()[0]}"


def explained_mod(mod: Mod) -> Mod:
    """Do the same for a mod."""

    @wraps(mod)
    def handle(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        return explained_to_server(lambda m, c: mod(m, c, call_next))(message, context)

    return handle


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Answer with this client's name and the hash of its frozen weights, or with why it cannot take part."""
    answer: dict[str, str | int] = {"client": node_name(context.node_config, context.node_id)}
    try:
        node = Node.from_config(context.node_config, context.node_id)
        worker = worker_of(node, text_field(received_config(message), "task"))
        answer["examples"] = len(worker.client_data(node).train)
        if worker.lacks_backbone:
            answer["lacks"] = worker.task.backbone.checkpoint
        else:
            answer |= {
                "base": worker.model.base,
                "layout": worker.model.layout.digest,
                "classes": classes_digest(worker.class_names),
                "share": worker.share(node),
            }
    except Exception as error:
        answer["error"] = _told(error)
    return Message(RecordDict({CONFIG: ConfigRecord(dict(answer))}), reply_to=message)


@app.query("backbone")
@explained_to_server
def keep_backbone(message: Message, context: Context) -> Message:
    """Keep the frozen backbone that this client said it lacks."""
    node = Node.from_config(context.node_config, context.node_id)
    record = message.content.array_records.get(ARRAYS, ArrayRecord())
    keep_delivered(record, text_field(received_config(message), "name"), delivered_folder(node.state))
    return Message(RecordDict({CONFIG: ConfigRecord({"client": node.name})}), reply_to=message)


@app.train(mods=[explained_mod(private)])
@explained_to_server
def train_round(message: Message, context: Context) -> Message:
    """Train on this client's images and answer with adapter and head."""
    began = time.perf_counter()
    node, worker, instruction = _prepare(message, context)
    data, task = worker.client_data(node), worker.task
    exchanger = _exchanger(node, worker, instruction)
    optimizer_state = exchanger.receive(message)
    metrics: dict[str, int | float] = {}
    if instruction.evaluate == "received":
        score = evaluate(worker.model, data.test, worker.normaliser)
        metrics |= {f"test-{key}": value for key, value in _score_metrics(score).items()}
    started = time.perf_counter()
    _train_head(worker, node, instruction, "")
    since = last_epoch_start(len(data.train), task.train)
    with Recorder(instruction.signals, worker.model, worker.optimizer, since) as recorder:
        outcome = _train(worker, node, instruction, "", recorder, optimizer_state)
        metrics["train-seconds"] = time.perf_counter() - started
    arrays = {ARRAYS: exchanger.send(worker.optimizer)}
    if instruction.signals.anything:
        generator = generator_for(task.seed, "signals", instruction.server_round, node.name)
        arrays[SIGNALS] = _record(recorder.signals(data.train, worker.normaliser, generator))
    metrics |= {"num-examples": len(data.train), "train-loss": outcome.loss, "steps": outcome.steps}
    metrics["seconds"] = time.perf_counter() - began
    return _reply(message, node, worker, metrics, arrays)


@app.query("measure")
@explained_to_server
def measure(message: Message, context: Context) -> Message:
    """Measure the class signals of the received model on this client's training images, without training."""
    began = time.perf_counter()
    node, worker, instruction = _prepare(message, context)
    _exchanger(node, worker, instruction).receive(message)
    request, data = instruction.signals, worker.client_data(node).train
    if not request.without_training:
        raise MessageError("Without training only class signals, taken=after, can be measured.")
    found = class_signals(request, worker.model, data, worker.normaliser)
    signals = packed(found, request, worker.model)
    metrics = {"num-examples": len(data), "seconds": time.perf_counter() - began}
    return _reply(message, node, worker, metrics, {SIGNALS: _record(signals)})


@app.evaluate()
@explained_to_server
def evaluate_round(message: Message, context: Context) -> Message:
    """Evaluate the received model on this client's own test images; where asked, also after a round of training."""
    began = time.perf_counter()
    node, worker, instruction = _prepare(message, context)
    _exchanger(node, worker, instruction).receive(message)
    test = worker.client_data(node).test
    metrics = _score_metrics(evaluate(worker.model, test, worker.normaliser))
    if instruction.evaluate == "tuned":
        _train_head(worker, node, instruction, "tuning-")
        _train(worker, node, instruction, "tuning-")
        score = evaluate(worker.model, test, worker.normaliser)
        metrics |= {f"tuned-{key}": value for key, value in _score_metrics(score).items()}
    metrics["seconds"] = time.perf_counter() - began
    return _reply(message, node, worker, metrics)


def _prepare(message: Message, context: Context) -> tuple[Node, Worker, Instruction]:
    """Find this process's worker for what the message asks."""
    instruction = Instruction.from_record(received_config(message))
    node = Node.from_config(context.node_config, context.node_id)
    worker = worker_of(node, instruction.task)
    layout = worker.model.layout
    if instruction.layout != layout.digest:
        raise MessageError("The server's adapter has another layout than this client's (rank, targets or classes).")
    return node, worker, instruction


def _exchanger(node: Node, worker: Worker, instruction: Instruction) -> Exchanger:
    keeper = Keeper(node.state, instruction.exchange.run, node.name)
    return Exchanger(worker.model, instruction.exchange, keeper, instruction.server_round)


def _train_head(worker: Worker, node: Node, instruction: Instruction, purpose: str) -> None:
    """Train the head alone for as many epochs as are asked for; the adapter is frozen."""
    if epochs := instruction.head_epochs:
        adapter = [unit for unit in worker.model.layout.units if unit != HEAD]
        batches = _batches(worker, node, instruction, f"{purpose}head-", epochs)
        train(worker.model, worker.optimizer, batches, frozen=adapter)


def _train(
    worker: Worker,
    node: Node,
    instruction: Instruction,
    purpose: str,
    recorder: Recorder | None = None,
    optimizer_state: dict[str, torch.Tensor] | None = None,
) -> TrainOutcome:
    """Train for a round; ``purpose`` leads the names of its draws."""
    batches = _batches(worker, node, instruction, purpose, worker.task.train.local_epochs)
    frozen = [HEAD] if instruction.head_epochs else []
    return train(
        worker.model, worker.optimizer, batches, instruction.proximal_mu, recorder, optimizer_state, frozen=frozen
    )


def _batches(worker: Worker, node: Node, instruction: Instruction, purpose: str, epochs: int) -> Batches:
    """Draw the batches of a round's training, and seed its dropout."""
    task = worker.task
    seed_device(worker.device, derive_seed(task.seed, f"{purpose}dropout", instruction.server_round, node.name))
    return train_batches(
        worker.client_data(node).train,
        batch_size=task.train.batch_size,
        epochs=epochs,
        max_steps=task.train.max_steps,
        augment=task.train.augment,
        normaliser=worker.normaliser,
        generator=generator_for(task.seed, f"{purpose}batches", instruction.server_round, node.name),
    )


def _score_metrics(score: Score) -> dict[str, int | float]:
    return {"num-examples": score.num_examples, "accuracy": score.accuracy, "loss": score.loss}


def _record(values: np.ndarray) -> ArrayRecord:
    return ArrayRecord({FLAT: flat_to_array(values)})


def _reply(
    message: Message,
    node: Node,
    worker: Worker,
    metrics: dict[str, int | float],
    arrays: dict[str, ArrayRecord] | None = None,
) -> Message:
    config = {
        "client": node.name,
        "base": worker.model.base,
        "layout": worker.model.layout.digest,
        "worker": worker_name(),
    }
    content = RecordDict({CONFIG: ConfigRecord(dict(config)), METRICS: MetricRecord(dict(metrics))})
    for name, record in (arrays or {}).items():
        content[name] = record
    return Message(content, reply_to=message)
