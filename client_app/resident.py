"""A process of a SuperNode that keeps the libraries imported: every message is answered by a fork of it.

Flower starts a process for every message, and importing torch, timm and peft anew takes longer than many a round's
training. With ``resident=true`` in the node config the first such process starts a *resident*, which imports
``client_app.app`` and waits. Each message is handed to it through a socket that its user alone can open, and answered
by a child that lives for this message: as in a process of its own, nothing is kept between messages, and one that
crashes takes nothing with it. The resident leaves with the process that starts Flower's, or after an hour without
messages.
"""

import fcntl
import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage

from task.errors import ConfigError, PetalwiseError

RESIDENT = "resident"
"""Key of the node config that asks for it."""
IDLE_SECONDS = 3600.0
"""A resident without messages leaves after this."""
LOOK_SECONDS = 1.0
"""How often a resident looks whether it is still wanted."""
MAX_BYTES = 2**31 - 1
"""Most bytes of a message, as Protocol Buffers have it."""
CODE = Path(__file__).resolve().parents[1]
"""Folder of the code that answers."""


def wants_resident(node_config: Mapping[str, object]) -> bool:
    """Tell whether a node asks for a resident, by ``true`` or ``"true"``.

    Raises
    ------
    ConfigError
        If what it says is neither that nor ``false``.
    """
    given = str(node_config.get(RESIDENT, False)).lower()
    if given not in ("true", "false"):
        raise ConfigError(f"The node config has resident={node_config[RESIDENT]!r}; it may be true or false.")
    return given == "true"


def ask_resident(message: Message, context: Context) -> Message:
    """Have a message answered by a fork of this SuperNode's resident, which is started if there is none.

    Parameters
    ----------
    message : Message
        The message.
    context : Context
        Its context; its state becomes what the answering process made of it.

    Returns
    -------
    Message
        The reply; an error in one sentence if the answering process ended without one.
    """
    try:
        with connected(psutil.Process(os.getppid())) as resident:
            resident.send_bytes(os.fsencode(Path.cwd()))
            resident.send_bytes(message_to_proto(message).SerializeToString())
            resident.send_bytes(context_to_proto(context).SerializeToString())
            reply = message_from_proto(ProtoMessage.FromString(resident.recv_bytes(MAX_BYTES)))
            context.state = context_from_proto(ProtoContext.FromString(resident.recv_bytes(MAX_BYTES))).state
            return reply
    except PetalwiseError as error:
        reason = str(error)
    except (EOFError, OSError):
        reason = "The process that answered ended without a reply (out of memory?); its node's log may have more."
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def connected(owner: psutil.Process) -> Connection:
    """Connect to the resident of a process, usually the one that starts Flower's ClientApps; start it if there is none.

    Raises
    ------
    PetalwiseError
        If the folder of its socket is open to others.
    """
    name = hashlib.sha256(f"{CODE}:{owner.pid}:{owner.create_time()}".encode()).hexdigest()[:20]
    address = private_folder() / f"{name}.socket"
    with suppress(FileNotFoundError, ConnectionRefusedError):
        return _connect(address)
    with (address.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another message of this node may be starting it
        with suppress(FileNotFoundError, ConnectionRefusedError):
            return _connect(address)
        address.unlink(missing_ok=True)
        _start(address, owner)
        return _connect(address)


def private_folder() -> Path:
    """Return the folder of the sockets, which this user alone can enter.

    Raises
    ------
    PetalwiseError
        If it is somebody else's, or open to others.
    """
    folder = Path(tempfile.gettempdir(), f"petalwise-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PetalwiseError(
            f"{folder}, where resident=true has its sockets, must be a folder that its user alone can enter; delete it."
        )
    return folder


def _connect(address: Path) -> Connection:
    found = socket.socket(socket.AF_UNIX)
    try:
        found.connect(str(address))
    except OSError:
        found.close()
        raise
    return Connection(found.detach())


def _start(address: Path, owner: psutil.Process) -> None:
    """Start a resident with a socket on which messages can wait already while it imports."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        subprocess.Popen(  # noqa: S603 - this module
            [sys.executable, "-m", "client_app.resident", str(listener.fileno()), str(address), str(owner.pid)],
            cwd=CODE,
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )


def serve(listener: socket.socket, address: Path, owner: int) -> None:
    """Answer messages, each in a fork, until the owner is gone or nobody has asked for :data:`IDLE_SECONDS`.

    Importing starts no thread of Python's, and the native ones (of OpenBLAS, jemalloc) are ready to be forked.
    """
    alive = psutil.Process(owner).is_running if psutil.pid_exists(owner) else lambda: False
    import client_app.app  # noqa: F401 - what all this is for

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child is waited for
    listener.settimeout(LOOK_SECONDS)
    asked = time.monotonic()
    while alive() and time.monotonic() < asked + IDLE_SECONDS:
        with suppress(TimeoutError):
            _hand_on(listener)
            asked = time.monotonic()
    address.unlink(missing_ok=True)  # who asks from now on starts another one
    listener.settimeout(0.0)
    with suppress(BlockingIOError):
        while True:
            _hand_on(listener)


def _hand_on(listener: socket.socket) -> None:
    """Take the next message and have a child answer it."""
    taken, _ = listener.accept()
    if os.fork():
        taken.close()
        return
    code = 1
    try:
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        taken.setblocking(True)
        with Connection(taken.detach()) as asking:
            answer(asking)
        code = 0
    except (EOFError, OSError):
        pass  # who asked is gone
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(asking: Connection) -> None:
    """Answer one message as a process of its own would; leave at once when who asked is gone."""
    from client_app.app import app

    os.chdir(os.fsdecode(asking.recv_bytes(MAX_BYTES)))
    message = message_from_proto(ProtoMessage.FromString(asking.recv_bytes(MAX_BYTES)))
    context = context_from_proto(ProtoContext.FromString(asking.recv_bytes(MAX_BYTES)))
    threading.Thread(target=_leave_with, args=(asking,), daemon=True).start()
    reply = app(message, context)
    asking.send_bytes(message_to_proto(reply).SerializeToString())
    asking.send_bytes(context_to_proto(context).SerializeToString())


def _leave_with(asking: Connection) -> None:
    with suppress(OSError):
        asking.poll(None)  # nothing more is sent, so this is the end of the connection
    os._exit(1)


def main() -> None:
    """Be a resident: ``python -m client_app.resident SOCKET ADDRESS OWNER``, as :func:`ask_resident` starts it."""
    number, address, owner = sys.argv[1:]
    with socket.socket(fileno=int(number)) as listener:
        serve(listener, Path(address), int(owner))


if __name__ == "__main__":
    main()
