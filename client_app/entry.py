"""The ClientApp that Flower loads. It imports next to nothing, since a SuperNode starts a process for every message."""

from contextlib import suppress

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.resident import ask_resident, wants_resident
from task.errors import ConfigError


class EntryApp(ClientApp):
    """Has messages answered by ``client_app.app``: in this process or, with ``resident=true``, in a resident's fork."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        with suppress(ConfigError):  # which the app tells, as of any other key
            if wants_resident(context.node_config):
                return ask_resident(message, context)
        from client_app.app import app  # its imports take seconds

        return app(message, context)


app = EntryApp()
