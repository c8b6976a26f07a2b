"""Check a node's own data, device and folders as the server's first question does, without joining a federation.

Run: ``python -m tools.check_node --data /srv/images dataset.classes=[rose,tulip]`` (any Hydra overrides). Unless
``--run-config`` or an override says otherwise, with ``--data`` the data set is ``image_folder``, all of it this node's.
"""

import argparse
import os
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
from click import ClickException
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.config import parse_config_args

from client_app.app import app
from client_app.node import NODE_KEYS, Node, unknown_keys
from client_app.worker import ClientData, Worker, worker_of
from server_app.compose import compose_run
from strategies.loop import MAX_QUERY_SECONDS
from task.config import task_to_json
from task.data.images import open_stored
from task.data.readers import IMAGE_SUFFIXES
from task.errors import ConfigError, MessageError, PetalwiseError, StateError, shortened
from task.messages import CONFIG, IDENTIFY, received_config, text_field
from tools.debug import InProcessGrid

NODE_ID = 1
NodeConfig = Mapping[str, bool | float | int | str]


def check_node(task: str, node_config: NodeConfig) -> str:
    """Ask a node who it is, as a server does, and look at what it has loaded for the answer.

    Parameters
    ----------
    task : str
        The federation's task config as JSON.
    node_config : Mapping
        The node's own config.

    Returns
    -------
    str
        An account for people, of several lines.

    Raises
    ------
    PetalwiseError
        With the sentence that the server would show.
    """
    began = time.perf_counter()
    _identify(task, node_config)
    seconds = time.perf_counter() - began
    node = Node.from_config(node_config, NODE_ID)
    check_state(node.state)
    worker = worker_of(node, task)
    data = worker.client_data(node)
    lines = [*_head(node_config, node), *_images(worker, node, data), *_classes(worker, data), *_machine(worker, node)]
    if seconds > MAX_QUERY_SECONDS / 2:
        lines.append(f"Attention     this took {seconds:.0f} s; a server waits {MAX_QUERY_SECONDS:.0f} s for it")
    return "\n".join(lines)


def _identify(task: str, node_config: NodeConfig) -> None:
    """Ask the ClientApp who it is, and pass on why it cannot take part."""
    grid = InProcessGrid(app, [node_config])  # before the message: it gives this process a task's identity
    query = RecordDict({CONFIG: ConfigRecord({"task": task, "layout": ""})})
    [reply] = grid.send_and_receive([Message(query, NODE_ID, IDENTIFY)])
    if reply.has_error():
        raise MessageError(str(reply.error.reason))
    answer = received_config(reply)
    if "error" in answer:
        raise PetalwiseError(f"client {text_field(answer, 'client')}: {text_field(answer, 'error')}")


def check_state(folder: Path) -> None:
    """Write into the folder for state, and take it away again.

    Raises
    ------
    StateError
        If that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StateError(
            f"This node cannot write to its state folder {folder} ({reason}), in which some strategies keep what a "
            'client needs in later rounds; name another by state="/path" in the node config.'
        ) from error


def _head(node_config: NodeConfig, node: Node) -> list[str]:
    named = bool(node_config.get("name") or "partition-id" in node_config)
    lines = [
        f"The node {node.name!r} can take part." if named else "The node can take part, but has no name of its own."
    ]
    if unknown := unknown_keys(node_config):
        lines.append(f"Not read here are its keys: {', '.join(unknown)}.")
    return [*lines, ""]


def _images(worker: Worker, node: Node, data: ClientData) -> list[str]:
    config, side = worker.task.dataset, worker.task.backbone.image_size
    where = f" in {node.data}" if node.data and config.source in ("folder", "parquet") else ""
    lines = [
        f"Data set      {config.name} ({config.source}){where}",
        f"Images        {len(data.train)} to train on, {len(data.test)} to test on; "
        f"{data.nbytes / 1e6:.1f} MB of memory at {side} x {side} pixels",
        f"Pictures      {_pictures(worker.dataset)}",
    ]
    if not config.test_split and config.source != "packaged":
        share = f"{config.central_test_fraction:.0%}"
        lines.insert(
            2, f"              {share} of all are held out for a server's test, since dataset.test_split is empty"
        )
    if others := _other_files(worker, node):
        lines.append(f"Not read      {others}")
    return lines


def _pictures(dataset: datasets.Dataset) -> str:
    """Say which modes and sizes the images have, from their headers."""
    modes, sizes = Counter[str](), []
    for record in dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False)):
        with open_stored(record["image"]) as image:
            modes[image.mode] += 1
            sizes.append(image.size)
    found = ", ".join(f"{mode} {count}" for mode, count in modes.most_common())
    smallest, largest = (f"{width} x {height}" for width, height in (min(sizes, key=np.prod), max(sizes, key=np.prod)))
    return f"{found}; {smallest} pixels" + (f" to {largest}" if smallest != largest else "")


def _other_files(worker: Worker, node: Node) -> str:
    """Count the files in a folder of images that are none, by their suffix."""
    if worker.task.dataset.source != "folder" or node.data is None:
        return ""
    names = (Path(name) for _, _, files in os.walk(node.data) for name in files)
    others = Counter(name.suffix.lower() or name.name for name in names if name.suffix.lower() not in IMAGE_SUFFIXES)
    found = shortened([f"{suffix} {count}" for suffix, count in others.most_common()])
    return f"files without an image's suffix: {found}" if others else ""


def _classes(worker: Worker, data: ClientData) -> list[str]:
    names = worker.class_names
    train, test = (part.labels.bincount(minlength=len(names)).tolist() for part in (data.train, data.test))
    source = (
        "dataset.classes"
        if worker.task.dataset.classes
        else "this node's data; where nodes differ, set dataset.classes"
    )
    width = max(map(len, names))
    rows = [
        f"  {name:{width}}  {train[code]:7} {test[code]:7}"
        for code, name in enumerate(names)
        if train[code] + test[code] > 0
    ]
    absent = [name for code, name in enumerate(names) if train[code] + test[code] == 0]
    lines = [f"Classes       {len(names)}, named by {source}", f"  {'':{width}}    train    test", *rows]
    return [*lines, f"  without images: {shortened(absent, 20)}"] if absent else lines


def _machine(worker: Worker, node: Node) -> list[str]:
    model, train = worker.model, worker.task.train
    size = model.layout.size
    return [
        f"Device        {worker.device}",
        f"Batch size    {train.batch_size}",
        f"Model         {worker.task.backbone.name}",
        f"Adapter       and head: {size:,} values, {size * 4 / 1e6:.1f} MB as float32",
        f"Frozen hash   {model.base}",
        f"State         {node.state} can be written",
    ]


def _task(run_config: Path | None, node_config: NodeConfig, overrides: Sequence[str]) -> str:
    """Compose the federation's config and serialise what a client is told of it."""
    if run_config is None:
        own = ["dataset=image_folder", "partition=whole"] if "data" in node_config else []
        return task_to_json(compose_run({}, [*own, *overrides]).settings)
    try:
        given = tomllib.loads(run_config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The run config {run_config} cannot be read: {error}.") from error
    return task_to_json(compose_run(given, overrides).settings)


def _node_config(arguments: argparse.Namespace) -> NodeConfig:
    """Read a node config as a SuperNode does; options of single keys win."""
    try:
        given = parse_config_args([arguments.node_config] if arguments.node_config else None)
    except (ClickException, OSError, ValueError) as error:
        raise ConfigError(f"The node config cannot be read: {error}.") from error
    options = {key: getattr(arguments, key.replace("-", "_")) for key in NODE_KEYS}
    return {**given, **{key: value for key, value in options.items() if value is not None}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the node; return 0, or 1 after saying why it cannot take part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the federation, such as dataset.classes=[a,b]")
    parser.add_argument("--run-config", type=Path, metavar="FILE", help="a TOML file with the federation's run config")
    parser.add_argument("--node-config", metavar="CONFIG", help="as given to flower-supernode: 'key=\"text\" key=1'")
    for key in NODE_KEYS:
        parser.add_argument(f"--{key}", help=f"the node config's {key}")
    given = parser.parse_args(arguments)
    try:
        node_config = _node_config(given)
        print(check_node(_task(given.run_config, node_config, given.overrides), node_config))
    except PetalwiseError as error:
        print(f"This node cannot take part: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
