"""Stands before the app's own entry: notes of every message when its process began, had loaded the app, and ended."""

import time

LOADED = time.time()

import json  # noqa: E402 - what comes before is measured
import os  # noqa: E402
from pathlib import Path  # noqa: E402

import psutil  # noqa: E402
from flwr.app import Context, Message  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

from client_app.entry import app  # noqa: E402


class TimedEntry(ClientApp):
    """Hands every message to the app's entry."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as the app does."""
        reply = app(message, context)
        values = {
            "id": message.metadata.message_id,
            "kind": message.metadata.message_type,
            "round": message.metadata.group_id,
            "created": message.metadata.created_at,
            "started": psutil.Process().create_time(),
            "loaded": LOADED,
            "ended": time.time(),
            "failed": reply.has_error(),
        }
        with Path(os.environ["PETALWISE_BENCH"], f"entry-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
        return reply


client = TimedEntry()
