"""What grows on the server with the number of clients, ten of which train in a round.

Each number of clients is run in a process of its own by the machinery of ``tools.debug``, with clients that answer at
once without images: the server does all it does in ``flwr run``, and its memory is not mixed with theirs.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.speed.ratios import Ratio
from benchmarks.speed.results import Found, Table
from client_app.node import node_name
from server_app.app import run_federation
from server_app.compose import ComposedRun, compose_run
from task.arrays import FLAT, flat_to_array
from task.messages import ARRAYS, CONFIG, IDENTIFY, METRICS, SIGNALS, Instruction, classes_digest
from task.model import build_model
from task.signals import signal_layout
from tools.debug import InProcessGrid, simulated_nodes

APP = Path(__file__).resolve().parents[2]
CLIENTS, MANY, COHORT, ROUNDS = (10, 100, 1_000), 10_000, 10, 4
STRATEGIES = {"fedavg": (*CLIENTS, MANY), "livar": (*CLIENTS, MANY), "fedlama": CLIENTS, "pfedla": CLIENTS}
OVERRIDES = (
    "backbone=vit_pico_random",
    "backbone.arguments={patch_size:8,embed_dim:32,depth:2,num_heads:2}",
    "dataset.max_test_samples=20",
    "strategy.evaluate_clients=off",
)
FIGURES = {
    "seconds": "seconds per round",
    "first_seconds": "seconds to meet all clients",
    "memory_mb": "memory of the process in the last round, MB",
    "added_mb": "of it, what the run added, MB",
    "checkpoint_kb": "checkpoint, kB",
    "metrics_kb": "metrics.jsonl, kB per round",
    "cohort_kb": "sent to the cohort and back, kB per round",
}


class Answering(ClientApp):
    """Clients that answer with seeded values, of the right shape, as fast as they can.

    Parameters
    ----------
    run : ComposedRun
        Whose model they have.
    class_names : Sequence[str]
        Names of its classes.
    """

    def __init__(self, run: ComposedRun, class_names: Sequence[str]) -> None:
        super().__init__()
        model = build_model(run.settings, len(class_names))
        self.layout = model.layout
        self.said = {"base": model.base, "layout": model.layout.digest}
        self.classes, self.memory = classes_digest(class_names), 0

    def __call__(self, message: Message, context: Context) -> Message:
        """Say who one is, or answer a round."""
        name = node_name(context.node_config, context.node_id)
        said = {"client": name, **self.said}
        if message.metadata.message_type == IDENTIFY:
            share = f"partition {name} of {context.node_config['num-partitions']}"
            known: dict[str, str | int] = {**said, "examples": 20, "classes": self.classes, "share": share}
            return Message(RecordDict({CONFIG: ConfigRecord(dict(known))}), reply_to=message)
        self.memory = psutil.Process().memory_info().rss
        instruction = Instruction.from_record(message.content.config_records[CONFIG])
        values = np.random.default_rng([instruction.server_round, int(name)])
        sizes = {ARRAYS: self.layout.part(instruction.exchange.up).size}
        if instruction.signals.anything:
            sizes[SIGNALS] = signal_layout(instruction.signals, self.layout).size
        metrics = {"num-examples": 20, "train-loss": 1.0, "steps": 1, "train-seconds": 0.0, "seconds": 0.0}
        if SIGNALS in sizes:
            metrics["refused-scores"] = 0
        content = RecordDict({CONFIG: ConfigRecord({**said, "worker": "1"}), METRICS: MetricRecord(dict(metrics))})
        for record, size in sizes.items():
            content[record] = ArrayRecord({FLAT: flat_to_array(values.random(size, np.float32))})
        return Message(content, reply_to=message)


def grow(strategy: str, clients: int) -> dict[str, float]:
    """Run a strategy over so many clients in this process; return :data:`FIGURES`."""
    fraction = f"strategy.fraction_train={COHORT / clients}"
    run = compose_run({}, [f"strategy={strategy}", *OVERRIDES, fraction, f"num_server_rounds={ROUNDS}"])
    client = Answering(run, [str(digit) for digit in range(10)])
    grid, before = InProcessGrid(client, simulated_nodes(clients)), psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory(prefix="plw-") as scratch:
        run.settings.runs_dir = scratch
        folder = run_federation(grid, run)
        reports = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines = (folder / "metrics.jsonl").stat().st_size
        checkpoint = max(file.stat().st_size for file in folder.rglob("round-*.safetensors"))
    steady = reports[2:]
    return {
        "seconds": float(np.median([report["seconds"]["total"] + report["seconds"]["keep"] for report in steady])),
        "first_seconds": reports[0]["seconds"]["total"],
        "memory_mb": client.memory / 1e6,
        "added_mb": (client.memory - before) / 1e6,
        "checkpoint_kb": checkpoint / 1e3,
        "metrics_kb": lines / 1e3 / len(reports),
        "cohort_kb": float(np.mean([report["bytes_down"] + report["bytes_up"] for report in steady])) / 1e3,
    }


def in_own_process(strategy: str, clients: int) -> dict[str, float]:
    """Do the same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed.growth", strategy, str(clients)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=APP).stdout
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


def exponent(values: Mapping[int, float]) -> float:
    """Fit values by clients^e; return e."""
    return statistics.linear_regression(
        [math.log(clients) for clients in values], [math.log(value) for value in values.values()]
    ).slope


def per_client(values: Mapping[int, float]) -> float:
    """Return what a further client adds, between the fewest and the most."""
    few, many = min(values), max(values)
    return (values[many] - values[few]) / (many - few)


def measure(repeats: int) -> Found:
    """Run all strategies over growing numbers of clients."""
    ratios, rows = {}, []
    for strategy, numbers in STRATEGIES.items():
        found = [{clients: in_own_process(strategy, clients) for clients in numbers} for _ in range(repeats)]
        figures = {key: [{n: run[n][key] for n in numbers} for run in found] for key in FIGURES}
        ratios[f"growth.{strategy}.seconds_exponent"] = Ratio.of(map(exponent, figures["seconds"]))
        for key, unit in (("added_mb", "memory_kb"), ("checkpoint_kb", "checkpoint_kb")):
            factor = 1e3 if key == "added_mb" else 1.0
            ratios[f"growth.{strategy}.{unit}_per_client"] = Ratio.of(factor * per_client(run) for run in figures[key])
        rows += [[strategy, str(n), *(f"{found[-1][n][key]:.3g}" for key in FIGURES)] for n in numbers]
    columns = ["strategy", "clients", *FIGURES.values()]
    return Found(ratios, [Table(f"Growth: {COHORT} of so many clients train in a round, tiny adapter", columns, rows)])


def main() -> None:
    """Print the figures of one strategy and number of clients as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategy", choices=sorted(STRATEGIES))
    parser.add_argument("clients", type=int)
    arguments = parser.parse_args()
    began = time.perf_counter()
    found = grow(arguments.strategy, arguments.clients)
    print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
