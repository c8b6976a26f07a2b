"""What mixed precision, compilation and channels-last gain in a training step on this machine's device."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.speed.ratios import Ratio, in_turn, seconds_of
from benchmarks.speed.results import Found
from benchmarks.speed.settings import SETTINGS
from benchmarks.speed.step import NUM_CLASSES, PAIRS, Client, step_task
from client_app.training import make_optimizer, train
from task.config import TaskConfig
from task.device import choose_device
from task.model import build_model

WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {"precision": "bfloat16"},
    "compile": {"compile": True},
    "channels_last": {"channels_last": True},
}


def measure(repeats: int) -> Found:
    """Measure the compute-bound setting's step in each way, by that of plain float32; a CPU takes one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task, device = step_task(SETTINGS["compute_bound"]), choose_device("auto")
        tasks = [task, *(replace(task, train=replace(task.train, **options)) for options in WAYS.values())]
        plain, *others = in_turn([round_of(task, device) for task in tasks], PAIRS * repeats)
    finally:
        torch.set_num_threads(threads)
    taken = zip(WAYS, others, strict=True)
    return Found({f"computing.{way}.{device.type}": Ratio.between(plain, seconds) for way, seconds in taken})


def round_of(task: TaskConfig, device: torch.device) -> Callable[[], float]:
    """Make a client's round of steps, which returns its seconds: on a CPU of processor time."""
    client, model = Client(task, device), build_model(task, NUM_CLASSES)
    model.to(device)
    optimizer = make_optimizer(model, task.train)
    return partial(seconds_of, lambda: train(model, optimizer, client.batches()), device)
