"""The floor of a simulation: the same clients, batches, model and evaluation in plain PyTorch, without a framework.

Worker processes of one thread each keep model and images in memory; the adapters lie in memory that all share.
"""

import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.speed.arm_run import ArmRun, append_round, mean_of_each
from benchmarks.speed.processor import ProcessorTime, cores_used
from benchmarks.speed.settings import NUM_WORKERS, Setting
from client_app.node import Node
from client_app.worker import Worker
from strategies.cohort import draw_cohort
from task.config import task_from_json, task_to_json
from task.data.batches import Normaliser, train_batches
from task.data.images import decode
from task.data.sources import load_split
from task.evaluation import evaluate
from task.model import build_model
from task.seeding import derive_seed, generator_for

ACTORS_NICENESS = 15
"""That of Ray's workers, so that other load on the machine hinders both alike."""


class FloorWorker:
    """One worker process: its model, and all clients' images.

    Parameters
    ----------
    task : str
        The task config as JSON.
    clients : int
        Number of clients.
    received : Tensor, shared, [n]
        Adapter and head that every client starts from.
    trained : Tensor, shared, [clients, n]
        Where a client's row takes what it has trained.
    """

    def __init__(self, task: str, clients: int, received: Tensor, trained: Tensor) -> None:
        self.received, self.trained = received, trained
        self.worker = Worker(task_from_json(task), None, None)
        configs = [{"partition-id": index, "num-partitions": clients} for index in range(clients)]
        self.nodes = [Node.from_config(config, index) for index, config in enumerate(configs)]
        self.data = [self.worker.client_data(node) for node in self.nodes]
        self.model = self.worker.model

    def train(self, client: int, server_round: int, evaluating: bool) -> int:
        """Train one client for a round in a plain loop, perhaps evaluate before; return how many images it has."""
        task, model, node = self.worker.task, self.model, self.nodes[client]
        model.flat.detach().copy_(self.received)
        if evaluating:
            evaluate(model, self.data[client].test, self.worker.normaliser)
        model.module.train()
        options = task.train
        optimizer = torch.optim.AdamW([model.flat], lr=options.lr, weight_decay=options.weight_decay, fused=True)
        for images, labels in train_batches(
            self.data[client].train,
            options.batch_size,
            options.local_epochs,
            options.max_steps,
            options.augment,
            self.worker.normaliser,
            generator_for(task.seed, "batches", server_round, node.name),
        ):
            optimizer.zero_grad(set_to_none=False)
            loss = F.cross_entropy(model(images), labels)
            torch.autograd.backward(loss)
            optimizer.step()
        self.trained[client].copy_(model.flat.detach())
        return len(self.data[client].train)

    def evaluate(self, client: int) -> float:
        """Evaluate the received model on a client's test images; return its accuracy."""
        self.model.flat.detach().copy_(self.received)
        return evaluate(self.model, self.data[client].test, self.worker.normaliser).accuracy


_worker: FloorWorker


def start_worker(task: str, clients: int, received: Tensor, trained: Tensor) -> None:
    """Make this process's worker."""
    global _worker
    _worker = FloorWorker(task, clients, received, trained)


def start_process(task: str, clients: int, received: Tensor, trained: Tensor) -> None:
    """Make this process a worker process, of one thread and as patient as Ray's."""
    torch.set_num_threads(1)
    os.nice(ACTORS_NICENESS)
    start_worker(task, clients, received, trained)


def train_client(client: int, server_round: int, evaluating: bool) -> int:
    """Train one client in this process; see :meth:`FloorWorker.train`."""
    return _worker.train(client, server_round, evaluating)


def evaluate_client(client: int) -> float:
    """Evaluate on one client's test images in this process."""
    return _worker.evaluate(client)


class Floor:
    """Federated averaging over worker processes; every round is timed.

    Parameters
    ----------
    setting : Setting
        What is simulated.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.run_config, self.clients = setting, setting.compose(), setting.clients
        task = self.run_config.settings
        split = load_split(task.dataset, "test", None, derive_seed(task.seed, "dataset"))
        self.test = decode(split, task.backbone.image_size)
        self.model = build_model(task, len(split.features["label"].names))
        self.normaliser = Normaliser.of(task.backbone.mean, task.backbone.std)
        self.received = torch.from_numpy(self.model.read()).share_memory_()
        self.trained = torch.zeros(setting.clients, len(self.received)).share_memory_()

    @property
    def arguments(self) -> tuple[str, int, Tensor, Tensor]:
        """What a worker is made from."""
        return task_to_json(self.run_config.settings), self.clients, self.received, self.trained

    def run(self, pool: Executor, folder: Path) -> ArmRun:
        """Run all rounds over a pool of workers; tell in a folder when each ends, and keep times of the steady ones."""
        taken, noted, processor = [], [], ProcessorTime()
        append_round(folder, {})
        for server_round in range(1, self.setting.rounds + 1):
            taken.append(self._round(pool, server_round))
            append_round(folder, taken[-1])
            noted.append(processor.note_here())
        taken, cores = taken[self.setting.steady], cores_used(noted[0], noted[self.setting.steady][-1])
        views = self.model.layout.views(self.received)
        adapter = {name: value.clone() for name, value in views.items()}
        return ArmRun([sum(parts.values()) for parts in taken], mean_of_each(taken), adapter, cores)

    def _round(self, pool: Executor, server_round: int) -> dict[str, float]:
        """Train the cohort, average, let clients and the server evaluate; seconds by part."""
        task, strategy = self.run_config.settings, self.run_config.strategy
        along = self.setting.one_phase and server_round < self.setting.rounds
        everyone = [str(client) for client in range(self.clients)]
        drawn = draw_cohort(everyone, strategy.fraction_train, strategy.min_clients, task.seed, server_round)
        cohort, marks = [int(client) for client in drawn], [time.perf_counter()]
        counts = list(pool.map(train_client, cohort, repeat(server_round), repeat(along)))
        marks.append(time.perf_counter())
        self.received.copy_(weighted_mean(self.trained[cohort], counts))
        marks.append(time.perf_counter())
        evaluating = pool.map(evaluate_client, [] if along else range(self.clients))
        self.model.flat.detach().copy_(self.received)
        evaluate(self.model, self.test, self.normaliser)  # while the clients do, as in the app
        list(evaluating)
        marks.append(time.perf_counter())
        names = ("train", "aggregate", "evaluate")
        return {name: marks[number + 1] - marks[number] for number, name in enumerate(names)}


def weighted_mean(rows: Tensor, counts: Iterable[int]) -> Tensor:
    """Average rows [clients, n], weighted by numbers of images."""
    weights = torch.tensor(list(counts), dtype=torch.float32)
    return (weights / weights.sum()) @ rows


def main(argv: Sequence[str]) -> None:
    """Run a setting, given as JSON, over worker processes; leave in a folder what it gave."""
    setting, folder = Setting.from_json(argv[0]), Path(argv[1])
    floor = Floor(setting)
    with ProcessPoolExecutor(NUM_WORKERS, get_context("spawn"), start_process, floor.arguments) as pool:
        floor.run(pool, folder).write(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
