"""The ClientApp that Flower loads. It imports none of the large libraries: a SuperNode starts a process per message."""

import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.resident import ask_resident, connected, wants_resident
from task.errors import ConfigError

RAY_SETTINGS = {
    "RAY_max_direct_call_object_size": str(2**24),
    "RAY_task_rpc_inlined_bytes_limit": str(2**26),
}
"""Bytes up to which Ray sends a message along with the call of a simulated client, and all of a call together. By
itself it puts what has more than 100 kB into its object store, which takes several exchanges between processes."""


class EntryApp(ClientApp):
    """Has messages answered by ``client_app.app``: in this process or, with ``resident=true``, in a resident's fork."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        if _wanted(context) and (resident := connected()) is not None:
            return ask_resident(resident, message, context)
        from client_app.app import app  # its imports take seconds

        return app(message, context)


def _wanted(context: Context) -> bool:
    try:
        return wants_resident(context.node_config)
    except ConfigError:  # which the app tells, as of any other key
        return False


def set_up_ray() -> None:
    """Set Ray's environment variables, where the user has not; Flower's engine loads this before it starts Ray."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)


set_up_ray()
app = EntryApp()
