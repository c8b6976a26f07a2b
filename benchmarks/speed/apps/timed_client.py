"""Stands at the head of the app's own client: notes when libraries had arrived, and what each message took where."""

import json
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - what comes before is measured

ARRIVED = {"torch": time.time()}

import task.libraries  # noqa: E402, F401

ARRIVED["timm"] = time.time()

from flwr.app import Context, Message  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

NOTES_VARIABLE = "PETALWISE_BENCH"
"""Names the folder in which the objects are written."""
TAKEN: dict[str, float] = {}


def note(values: dict[str, Any]) -> None:
    """Write down a JSON object."""
    with Path(os.environ[NOTES_VARIABLE], f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that the seconds it takes are added up, and its first start is noted."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        began = time.time()
        ARRIVED.setdefault(what, began)
        found = function(*arguments, **options)
        TAKEN[what] = TAKEN.get(what, 0.0) + time.time() - began
        return found

    return run


class TimedClient(ClientApp):
    """Hands every message to the app's client, and notes what it took."""

    def __init__(self, own: ClientApp) -> None:
        super().__init__()
        self._own = own

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as the app does."""
        TAKEN.clear()
        reply = self._own(message, context)
        note({"id": message.metadata.message_id, "arrived": ARRIVED, "taken": TAKEN})
        return reply


def timed_app(app: ClientApp) -> ClientApp:
    """Take the time of the app's own parts; everything that it needs has been imported."""
    from client_app import app as own
    from client_app import worker

    for place, name, what in (
        (worker, "build_model", "model"),
        (worker, "load_split", "data"),
        (worker, "partition_indices", "data"),
        (worker, "decode", "data"),
        (own, "train", "steps"),
    ):
        setattr(place, name, timed(what, getattr(place, name)))
    ARRIVED["app"] = time.time()
    return TimedClient(app)
