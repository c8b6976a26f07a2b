"""A process of a SuperNode that keeps the libraries imported: every message is answered by a fork of it.

Flower starts a process for every message, and importing torch, timm and peft anew takes longer than many a round's
training. With ``resident=true`` in the node config the first such process starts a *resident*, which imports
``client_app.app`` and waits. Each message is handed to it through a socket that its user alone can open, and answered
by a child that lives for this message: as in a process of its own, nothing is kept between messages, and one that
crashes takes nothing with it. Where there can be no resident, messages are answered without.
"""

import gc
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
from logging import WARNING
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage

from task.errors import ConfigError

RESIDENT = "resident"
"""Key of the node config that asks for it."""
IDLE_SECONDS = 1800.0
"""A resident without messages leaves after this."""
LOOK_SECONDS = 1.0
"""How often a resident looks whether it is still wanted."""
MAX_BYTES = 2**31 - 1
"""Most bytes of a message, as Protocol Buffers have it."""
CODE = Path(__file__).resolve().parents[1]
"""Folder of the code that answers."""
RUNTIME_ENVIRONMENTS = "runtime-envs"
"""Part of the path where Flower installs an app's dependencies for the time of one message, if it is told to."""
ENDED = "The process that answered ended without a reply (out of memory?); its node's log may have more."


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


# --- Where Flower hands a message over ---------------------------------------------------------------------


def connected() -> Connection | None:
    """Connect to this SuperNode's resident, which is started if there is none; warn and return None if it cannot be."""
    try:
        if sys.platform != "linux":
            raise OSError("it needs Linux")
        if RUNTIME_ENVIRONMENTS in os.environ.get("VIRTUAL_ENV", ""):
            raise OSError("the app's dependencies are installed anew for every message")
        return _connected(os.getppid())
    except OSError as error:
        log(WARNING, "resident=true: no resident, the libraries are imported for this message: %s.", error)
        return None


def ask_resident(resident: Connection, message: Message, context: Context) -> Message:
    """Have a message answered by a fork of the resident.

    Parameters
    ----------
    resident : Connection
        From :func:`connected`; it is closed.
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
        with resident:
            resident.send_bytes(os.fsencode(Path.cwd()))
            resident.send_bytes(message_to_proto(message).SerializeToString())
            resident.send_bytes(context_to_proto(context).SerializeToString())
            reply = message_from_proto(ProtoMessage.FromString(resident.recv_bytes(MAX_BYTES)))
            context.state = context_from_proto(ProtoContext.FromString(resident.recv_bytes(MAX_BYTES))).state
            return reply
    except (EOFError, OSError):
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ENDED), reply_to=message)


def private_folder() -> Path:
    """Return the folder of the sockets, which this user alone can enter.

    Raises
    ------
    OSError
        If it is somebody else's, or open to others.
    """
    folder = Path(tempfile.gettempdir(), f"petalwise-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OSError(f"{folder} must be a folder that its user alone can enter; delete it, or set TMPDIR")
    return folder


def started_at(pid: int) -> str | None:
    """Return when a process began, in ticks since the machine's start; None if it is gone, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _connected(owner: int) -> Connection:
    """Connect to the resident of a process, that which starts Flower's ClientApps."""
    import fcntl  # of Linux alone

    if (began := started_at(owner)) is None:
        raise ProcessLookupError("the process that starts ClientApps cannot be seen")
    name = hashlib.sha256(f"{CODE}:{owner}:{began}".encode()).hexdigest()[:20]
    address = private_folder() / f"{name}.socket"
    with suppress(FileNotFoundError, ConnectionRefusedError):
        return _connect(address)
    with (address.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another message of this node may be starting it
        with suppress(FileNotFoundError, ConnectionRefusedError):
            return _connect(address)
        _remove_dead(address.parent)
        _start(address, owner)
        return _connect(address)


def _connect(address: Path) -> Connection:
    found = socket.socket(socket.AF_UNIX)
    try:
        found.connect(str(address))
    except OSError:
        found.close()
        raise
    return Connection(found.detach())


def _remove_dead(folder: Path) -> None:
    """Remove the sockets of residents that were killed."""
    for address in folder.glob("*.socket"):
        try:
            _connect(address).close()
        except ConnectionRefusedError:
            address.unlink(missing_ok=True)


def _start(address: Path, owner: int) -> None:
    """Start a resident with a socket on which messages can wait already while it imports."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        subprocess.Popen(  # noqa: S603 - this module
            [sys.executable, "-m", "client_app.resident", str(listener.fileno()), str(address), str(owner)],
            cwd=CODE,
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )


# --- The resident ------------------------------------------------------------------------------------------


def serve(listener: socket.socket, address: Path, owner: int) -> None:
    """Answer messages, each in a fork, as long as the owner lives, the socket is there, and not too long without any.

    Importing starts no thread of Python's, and the native ones (of OpenBLAS, jemalloc) are ready to be forked.
    """
    began, own = started_at(owner), _file(address)
    wanted = began is not None and own is not None
    import client_app.app  # noqa: F401 - what all this is for

    gc.freeze()  # else collections in the forks would write to, and so copy, every page that they share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no child is waited for
    listener.settimeout(LOOK_SECONDS)
    asked = time.monotonic()
    while wanted and time.monotonic() < asked + IDLE_SECONDS:
        if _hand_on(listener):
            asked = time.monotonic()
        wanted = started_at(owner) == began and _file(address) == own
    if own is not None and _file(address) == own:  # who asks from now on starts another one
        address.unlink(missing_ok=True)
    listener.settimeout(0.0)
    while _hand_on(listener):  # who has asked already is answered
        pass


def _file(address: Path) -> int | None:
    """Return a number that another file of this name would not have."""
    try:
        return address.stat().st_ino
    except OSError:
        return None


def _hand_on(listener: socket.socket) -> bool:
    """Take the next message, if one comes, and have a child answer it."""
    try:
        taken, _ = listener.accept()
    except (TimeoutError, BlockingIOError):
        return False
    with taken:
        try:
            if os.fork() == 0:
                _be_child(listener, taken)
        except OSError as error:
            log(WARNING, "resident=true: no process can be started for a message: %s.", error)
    return True


def _be_child(listener: socket.socket, taken: socket.socket) -> NoReturn:
    """Answer one message and end."""
    try:
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        taken.setblocking(True)
        with Connection(taken.detach()) as asking:
            answer(asking)
    except BaseException:
        with suppress(Exception):
            sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def answer(asking: Connection) -> None:
    """Answer one message as a process of its own would; end at once when who asked is gone."""
    from client_app.app import app

    try:
        folder, *protos = (asking.recv_bytes(MAX_BYTES) for _ in range(3))
    except (EOFError, OSError):  # nobody asks, or not any more
        return
    with suppress(OSError):  # its process may be in a folder that is gone, too
        os.chdir(os.fsdecode(folder))
    message = message_from_proto(ProtoMessage.FromString(protos[0]))
    context = context_from_proto(ProtoContext.FromString(protos[1]))
    threading.Thread(target=_end_with, args=(asking,), daemon=True).start()
    reply = app(message, context)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    with suppress(OSError):
        asking.send_bytes(message_to_proto(reply).SerializeToString())
        asking.send_bytes(context_to_proto(context).SerializeToString())


def _end_with(asking: Connection) -> None:
    with suppress(OSError):
        asking.poll(None)  # nothing more is sent, so this is the end of the connection
    os._exit(1)


def main() -> None:
    """Be a resident: ``python -m client_app.resident SOCKET ADDRESS OWNER``, as :func:`connected` starts it."""
    number, address, owner = sys.argv[1:]
    with socket.socket(fileno=int(number)) as listener:
        serve(listener, Path(address), int(owner))


if __name__ == "__main__":
    main()
