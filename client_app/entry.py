"""The ClientApp that Flower loads. It imports none of the large libraries: a SuperNode starts a process per message."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client_app.resident import ask_resident, connected, wants_resident
from task.errors import ConfigError
from task.ray_settings import set_up_ray


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


set_up_ray()
app = EntryApp()
