"""From ``flwr run``, and from ``tools.debug``, to the first optimizer step of the first client."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.arms import APP, RUN_SECONDS, run_other_app
from benchmarks.speed.deployed import NOTES_VARIABLE, joined_notes, timed_app
from benchmarks.speed.ratios import Ratio
from benchmarks.speed.results import Found, Table
from task.errors import PetalwiseError
from tools.simulation import SimulationSuperLink

CLIENTS, SIZE = 10, 100_000
AIM = 5.0
"""Seconds from ``tools.debug``'s imports to the first step, at most."""
SMALL = "dataset.max_test_samples=100 train.max_steps=1 strategy.evaluate_clients=off"
DEBUG = """
import json, os, sys, time
import psutil
started = psutil.Process().create_time()
from client_app import app as own
from server_app.app import run_federation
from server_app.compose import compose_run
from tools.debug import InProcessGrid, simulated_nodes
imported = time.time()
def first_step(*_, **__):
    print(json.dumps({"imports": imported - started, "first_step": time.time() - imported}), flush=True)
    os._exit(0)
own.train = first_step
run = compose_run({}, sys.argv[2:])
run.settings.runs_dir = sys.argv[1]
run_federation(InProcessGrid(own.app, simulated_nodes(10)), run)
"""
"""What ``tools.debug`` does, until the first step."""


def measure(repeats: int) -> Found:
    """Start the app and an empty one in turn, and the debugger's path."""
    ours, empty, debug = [], [], []
    with tempfile.TemporaryDirectory(prefix="plw-") as notes:
        os.environ[NOTES_VARIABLE] = notes
        try:
            with SimulationSuperLink() as link:
                for _ in range(repeats):
                    ours.append(app_start(link, Path(notes)))
                    empty.append(empty_start(link))
        finally:
            del os.environ[NOTES_VARIABLE]
    for _ in range(repeats):
        debug.append(debug_start())
    totals = [sum(parts.values()) for parts in ours]
    ratios = {
        "startup.flwr_run_seconds": Ratio.of(totals),
        "startup.empty_app_seconds": Ratio.of(empty),
        "startup.by_empty_app": Ratio.between(totals, empty),
        "startup.debug_imports_seconds": Ratio.of(parts["imports"] for parts in debug),
        "startup.debug_first_step_seconds": Ratio.of((parts["first_step"] for parts in debug), AIM, at_most=True),
    }
    mean = {part: sum(parts[part] for parts in ours) / len(ours) for part in ours[0]}
    rows = [[part, f"{seconds:.2f}"] for part, seconds in mean.items()]
    rows += [["all of it", f"{sum(mean.values()):.2f}"], ["an empty Flower app", f"{sum(empty) / len(empty):.2f}"]]
    return Found(ratios, [Table("From `flwr run` to the first client's first step", ["part", "seconds"], rows)])


def app_start(link: SimulationSuperLink, notes: Path) -> dict[str, float]:
    """Run the app for one round; return the seconds to the first step by part."""
    for old in notes.iterdir():
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="plw-") as scratch:
        app, out = timed_app(Path(scratch, "app")), Path(scratch, "runs")
        began = time.time()
        outcome = link.run(
            app,
            run_config=[f'num-server-rounds=1 overrides="{SMALL}"'],
            clients=CLIENTS,
            runs_dir=out,
            timeout=RUN_SECONDS,
            output=None,
        )
    if not outcome.completed:
        raise PetalwiseError(outcome.summary)
    return start_parts(joined_notes(notes), began)


def start_parts(notes: Sequence[dict[str, Any]], began: float) -> dict[str, float]:
    """Split the time from ``began`` to the first step that any client took; the parts add up to it."""
    note = min((note for note in notes if "steps" in note["arrived"]), key=lambda note: note["arrived"]["steps"])
    first: dict[str, float] = note["arrived"]
    marks = {
        "Flower's start, Ray, the ServerApp's imports, model and data": note["loaded"],
        "torch imported by a client's process": first["torch"],
        "timm, peft, the app and what else it needs imported": first["app"],
        "clients asked who they are: images read and decoded, model built; the cohort's first message": first["steps"],
    }
    ends = list(marks.values())
    return {part: end - start for part, start, end in zip(marks, [began, *ends], ends, strict=False)}


def empty_start(link: SimulationSuperLink) -> float:
    """Do the same with the empty app; its first step is the first message that a client gets."""
    config: dict[str, str | float] = {"size": SIZE, "rounds": 1, "clients": CLIENTS, "cohort": CLIENTS}
    with tempfile.TemporaryDirectory(prefix="plw-") as scratch:
        began = time.time()
        out = run_other_app(link, "empty", config, CLIENTS, Path(scratch))
        return float((out / "first").read_text()) - began


def debug_start() -> dict[str, float]:
    """Start what ``tools.debug`` does in a process of its own; seconds of imports, and from there to the first step."""
    with tempfile.TemporaryDirectory(prefix="plw-") as scratch:
        command = [sys.executable, "-c", DEBUG, scratch, *SMALL.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=APP, env=environment).stdout
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found
