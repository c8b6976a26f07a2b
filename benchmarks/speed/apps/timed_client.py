"""The app's own client, which writes down when it reached what: one JSON object per message."""

import time

ARRIVED = {"flower": time.time()}

import json  # noqa: E402 - what comes before is measured
import os  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import wraps  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import psutil  # noqa: E402
import torch  # noqa: E402, F401

ARRIVED["torch"] = time.time()

import task.libraries  # noqa: E402, F401

ARRIVED["timm"] = time.time()

from flwr.app import Context, Message  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

from client_app import app as own  # noqa: E402
from client_app import worker  # noqa: E402

ARRIVED["app"] = time.time()
NOTES_VARIABLE = "PETALWISE_BENCH"
"""Names the folder in which the objects are written."""
TAKEN: dict[str, float] = {}


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
    """Hands every message to the app's client."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as the app does."""
        TAKEN.clear()
        began = time.time()
        reply = own.app(message, context)
        note = {
            "kind": message.metadata.message_type,
            "round": message.metadata.group_id,
            "created": message.metadata.created_at,
            "started": psutil.Process().create_time(),
            "arrived": ARRIVED,
            "began": began,
            "ended": time.time(),
            "taken": TAKEN,
            "failed": reply.has_error(),
        }
        with Path(os.environ[NOTES_VARIABLE], f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        return reply


for place, name, what in (
    (worker, "build_model", "model"),
    (worker, "load_split", "data"),
    (worker, "partition_indices", "data"),
    (worker, "decode", "data"),
    (own, "train", "steps"),
):
    setattr(place, name, timed(what, getattr(place, name)))
client = TimedClient()
