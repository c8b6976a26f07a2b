"""What one server can hold: pFedLA's step and the aggregation of many ViT-B adapters, as ratios taken in one run.

Run: ``python -m benchmarks.scale`` (``--json FILE``, ``--only NAME``), which prints a Markdown table. Each case is a
process of its own, so that its peak memory is its own. No network and no clients: what is measured is the server's
arithmetic on updates that are there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import ConfigRecord, MetricRecord

from strategies.arithmetic import sample_weights, weighted_sum
from strategies.context import TaskContext
from strategies.merging import merge_products, same_for_all_layers
from strategies.pfedla import PFedLa, PFedLaConfig
from strategies.replies import Update
from strategies.report import RoundReport
from task.units import Layout, make_layout

WIDTHS = {"vit_b": 768, "vit_ti": 192}
REPEATS = 3
SPREAD, DELTA = 0.05, 1e-3
"""Deviations of a client's values and of what a round changes: steps as in training, no weights run to one or NaN."""
APP = Path(__file__).resolve().parents[1]


def adapter_layout(model: str, rank: int, classes: int = 100) -> Layout:
    """Lay out a ViT's adapter of attn.qkv, attn.proj, mlp.fc1, mlp.fc2 in 12 blocks, and its head: 13 units."""
    d, shapes = WIDTHS[model], {}
    for block in range(12):
        for name, inputs, outputs in (
            ("attn.qkv", d, 3 * d),
            ("attn.proj", d, d),
            ("mlp.fc1", d, 4 * d),
            ("mlp.fc2", 4 * d, d),
        ):
            shapes[f"blocks.{block}.{name}.lora_A.weight"] = (rank, inputs)
            shapes[f"blocks.{block}.{name}.lora_B.weight"] = (outputs, rank)
    return make_layout({**shapes, "head.weight": (classes, d), "head.bias": (classes,)})


def peak_bytes(reset: bool = False) -> int:
    """Peak resident memory of this process since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def seconds(action: Callable[[], object]) -> list[float]:
    """Time an action, after once to warm up."""
    action()
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        found.append(time.perf_counter() - began)
    return found


def pfedla_step(model: str, rank: int, clients: int, selected: int) -> dict[str, float]:
    """Weigh and merge a round's updates, step the hypernetworks, and aggregate every selected client's next model."""
    strategy = prepared(adapter_layout(model, rank), clients)
    chosen, sent = strategy.clients[:selected], strategy.store.initial  # which all clients have before round 1
    changed = [sent + DELTA * torch.randn(len(sent)) for _ in chosen]
    updates = [
        Update(name, flat, 1, MetricRecord(), ConfigRecord()) for name, flat in zip(chosen, changed, strict=True)
    ]

    def merge() -> None:
        strategy._known.clear()  # once in a round the hypernetworks are evaluated: when models are sent, or here
        strategy.merge(1, updates)

    store = 4 * len(sent) * clients
    before = peak_bytes(reset=True)
    merging = seconds(merge)
    merged = peak_bytes() - before
    sending = seconds(lambda: [flat.sum() for flat in strategy.models_for(chosen)])
    return {
        "merge_seconds": statistics.median(merging),
        "models_seconds": statistics.median(sending),
        "store_gb": store / 1e9,
        "hypernetworks_gb": 4e-9 * sum(value.numel() for value in strategy.bank.parameters.values()),
        "extra_memory_by_store": merged / store,
        "extra_memory_with_models_by_store": (peak_bytes() - before) / store,
        "largest_weight": max(float(strategy.bank.weights([number]).max()) for number in range(selected)),
    }


def prepared(layout: Layout, clients: int) -> PFedLa:
    """Make the strategy with its store and hypernetworks, as it is once its clients are there."""
    strategy = PFedLa(PFedLaConfig(name="pfedla"), TaskContext(layout=layout))
    strategy.clients = [str(number) for number in range(clients)]
    strategy.codec = _Codec(layout)  # type: ignore[assignment]
    strategy.report = RoundReport(1)
    strategy._prepare(SPREAD * torch.randn(layout.size))
    return strategy


class _Codec:
    """Stands for a strategy's codec, of which only the layout is used here."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout


def aggregation(model: str, rank: int, clients: int) -> dict[str, float]:
    """Average adapters, against reading them once, and against a copy of as many bytes, in the same process."""
    size = adapter_layout(model, rank).size
    vectors = [torch.randn(size) for _ in range(clients)]
    weights = sample_weights(list(range(1, clients + 1)))
    merging = seconds(lambda: weighted_sum(vectors, weights))
    reading = seconds(lambda: [vector.sum() for vector in vectors])
    copies = [torch.empty(size) for _ in vectors]  # as many, so that none stays in the processor's cache
    copying = seconds(lambda: [copy.copy_(vector) for copy, vector in zip(copies, vectors, strict=True)])
    gigabytes = 4e-9 * size * clients
    copied = 2 * gigabytes / statistics.median(copying)
    return {
        "seconds": statistics.median(merging),
        "reading_gb_per_second": gigabytes / statistics.median(reading),
        "by_reading_once": statistics.median(merging) / statistics.median(reading),
        "by_reading_once_min": min(merging) / max(reading),
        "by_reading_once_max": max(merging) / min(reading),
        "copying_gb_per_second": copied,
        "by_copying": statistics.median(merging) * copied / gigabytes,
    }


def svd_merge(model: str, rank: int, clients: int) -> dict[str, float]:
    """Merge clients' products of factors in all layers of a model, by QR and SVD (``lora.merge=product_svd``)."""
    layout = adapter_layout(model, rank)
    vectors = [torch.randn(layout.size) for _ in range(clients)]
    weights = same_for_all_layers(sample_weights([1] * clients), layout)
    before = peak_bytes(reset=True)
    merging = seconds(lambda: merge_products(torch.zeros(layout.size), vectors, weights, layout))
    return {"seconds": statistics.median(merging), "extra_memory_gb": (peak_bytes() - before) / 1e9}


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "pfedla_vit_b_r16_100_of_100": lambda: pfedla_step("vit_b", 16, 100, 100),
    "pfedla_vit_ti_r8_50_of_1000": lambda: pfedla_step("vit_ti", 8, 1000, 50),
    "aggregation_100_vit_b_r16": lambda: aggregation("vit_b", 16, 100),
    "svd_merge_10_vit_b_r16": lambda: svd_merge("vit_b", 16, 10),
    "svd_merge_100_vit_b_r16": lambda: svd_merge("vit_b", 16, 100),
}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    case: str
    """Of :data:`CASES`."""
    key: str
    """Which of its figures."""
    text: str
    """What it is, for people; may hold other figures of the case in braces."""
    unit: str = ""
    """Of the figure."""
    aim: float | None = None
    """What it is to be at most, if anything."""


ROWS = (
    Row(
        "pfedla_vit_b_r16_100_of_100",
        "merge_seconds",
        "pFedLA, ViT-B, 100 clients, all selected: weights, merge and hypernetworks' step",
        " s",
        2.0,
    ),
    Row(
        "pfedla_vit_b_r16_100_of_100",
        "extra_memory_by_store",
        "its extra memory, as a share of the store ({store_gb:.2f} GB)",
        aim=0.25,
    ),
    Row("pfedla_vit_b_r16_100_of_100", "models_seconds", "aggregating the 100 next models on top, 16 at a time", " s"),
    Row(
        "pfedla_vit_ti_r8_50_of_1000",
        "merge_seconds",
        "pFedLA, ViT-Ti, 1,000 clients, 50 selected: weights, merge and step",
        " s",
    ),
    Row(
        "pfedla_vit_ti_r8_50_of_1000",
        "extra_memory_by_store",
        "its extra memory, as a share of the store ({store_gb:.2f} GB); hypernetworks take {hypernetworks_gb:.1f} GB",
        aim=0.25,
    ),
    Row(
        "aggregation_100_vit_b_r16",
        "by_reading_once",
        "FedAvg of 100 ViT-B adapters, by the time of reading them once ({reading_gb_per_second:.0f} GB/s); from "
        "{by_reading_once_min:.2f} to {by_reading_once_max:.2f}",
        aim=1.5,
    ),
    Row(
        "aggregation_100_vit_b_r16",
        "by_copying",
        "the same, by the time that `copy_` takes to move as many bytes ({copying_gb_per_second:.0f} GB/s, read and "
        "written)",
        aim=1.5,
    ),
    Row("svd_merge_10_vit_b_r16", "seconds", "`lora.merge=product_svd` of 10 ViT-B adapters", " s", 2.0),
    Row("svd_merge_100_vit_b_r16", "seconds", "the same of 100", " s"),
)


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Write the figures of the cases that were run as a Markdown table, with the aims and whether they are met.

    Parameters
    ----------
    found : Mapping[str, Mapping[str, float]]
        Figures by case.

    Returns
    -------
    str
        The table.
    """
    lines = ["| case | measured | aim |", "|---|---|---|"]
    for row in ROWS:
        if row.case in found:
            figures = found[row.case]
            value = figures[row.key]
            verdict = "" if row.aim is None else f"{row.aim:g}{row.unit}: {'met' if value <= row.aim else 'missed'}"
            lines.append(f"| {row.text.format(**figures)} | {value:.2f}{row.unit} | {verdict} |")
    return "\n".join(lines)


def in_own_process(name: str) -> dict[str, float]:
    """Run a case in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--here", "--only", name]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=APP).stdout
    found: dict[str, float] = json.loads(printed)
    return found


def main() -> None:
    """Run the cases, each in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(CASES))
    parser.add_argument("--here", action="store_true", help="run the case of --only in this process, JSON on stdout")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(CASES[arguments.only]()))
        return
    found = {}
    for name in [arguments.only] if arguments.only else CASES:
        found[name] = in_own_process(name)
    print(f"{torch.get_num_threads()} threads, medians of {REPEATS}\n\n{table(found)}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
