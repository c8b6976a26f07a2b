"""A round of LIVAR over three SuperNodes on this machine, and where its time goes, with residents and without."""

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.speed.arms import APP, RUN_SECONDS, SHARED, write_app
from benchmarks.speed.ratios import Ratio
from benchmarks.speed.results import Found, Table
from task.backbone import BACKBONES_VARIABLE
from task.errors import PetalwiseError
from tools.deployed import Site
from tools.deployment import Deployment, deployment

SITES, IMAGES, ROUNDS = 3, 40, 3
NOTES_VARIABLE = "PETALWISE_BENCH"
"""Tells :mod:`benchmarks.speed.apps.timed_client` and ``timed_entry`` where to write."""
AIM = 4.0
"""Seconds of a round that are neither Flower's nor training, at most."""
CLASSES = ("dark", "light")
BACKBONES = {
    "vit_pico": ("vit_pico", ""),
    "dinov2_s_file": ("dinov2_small_file", "backbone.image_size=56"),
}
OVERRIDES = "strategy.evaluate_clients=train train.max_steps=5 dataset.classes=[dark,light] dataset.test_split=test"
PARTS = {
    "polls": "Flower: until the client's process has been started",
    "flower": "Flower: Python, its imports, the message fetched from the SuperNode",
    "torch": "torch imported",
    "timm": "timm and peft imported",
    "app": "the app and what else it needs imported (datasets)",
    "data": "images read and decoded",
    "model": "model built and its weights hashed",
    "steps": "training",
    "other": "the rest of the client's work: handed on, evaluation, values copied, signals, reply made",
    "back": "Flower: the reply's way to the ServerApp",
}
OURS = ("torch", "timm", "app", "data", "model", "other")


def measure(repeats: int) -> Found:
    """Run the app, and an empty one for what Flower takes by itself, over SuperNodes with residents and without."""
    found = Found({}, [])
    for resident in (True, False):
        part = _measured(repeats, resident)
        found = Found(found.ratios | part.ratios, [*found.tables, *part.tables])
    return found


def _measured(repeats: int, resident: bool) -> Found:
    ratios, tables = {}, []
    how = "resident" if resident else "fresh"
    with tempfile.TemporaryDirectory(prefix="plw-") as scratch:
        notes = Path(scratch, "notes")
        notes.mkdir()
        sites = [
            Site(
                f"site-{number}", {"data": str(_images(Path(scratch, f"data-{number}"), number)), "resident": resident}
            )
            for number in range(SITES)
        ]
        settings = {"OMP_NUM_THREADS": "1", NOTES_VARIABLE: str(notes)}
        settings |= {name: os.environ[name] for name in (BACKBONES_VARIABLE,) if name in os.environ}
        with deployment(sites, settings=settings) as running:
            for name, (backbone, more) in BACKBONES.items():
                if backbone.endswith("_file") and BACKBONES_VARIABLE not in settings:
                    continue
                runs = [part for _ in range(repeats) for part in run_app(running, notes, backbone, more)]
                empty = [part for _ in range(repeats) for part in run_empty(running)]
                overhead = [sum(parts[part] for part in OURS) for parts in runs]
                aim = AIM if resident else None
                ratios[f"deployed.{name}.{how}_other_seconds"] = Ratio.of(overhead, aim, at_most=True)
                ratios[f"deployed.{name}.{how}_round_by_empty_app"] = Ratio.between(
                    [sum(parts.values()) for parts in runs], empty[: len(runs)]
                )
                tables.append(parts_table(f"{name}, resident={str(resident).lower()}", runs, empty))
    return Found(ratios, tables)


def run_app(running: Deployment, notes: Path, backbone: str, more: str) -> list[dict[str, float]]:
    """Run the app with the client that takes notes; return the parts of every round but the first."""
    for old in notes.iterdir():
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="plw-") as scratch:
        app, out = timed_app(Path(scratch, "app")), Path(scratch, "runs")
        config = f'strategy="livar" backbone="{backbone}" dataset="image_folder" partition="whole"'
        config += f' num-server-rounds={ROUNDS} runs-dir="{out}" overrides="{OVERRIDES} {more}"'
        _finish(running, app, config)
        (folder,) = out.iterdir()
        reports = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = {
        str(report["server_round"]): report["seconds"]["train"] for report in reports if report["server_round"] > 1
    }
    lines = joined_notes(notes)
    by_round = {key: [note for note in lines if note["kind"] == "train" and note["round"] == key] for key in train}
    return [round_parts(by_round[key], seconds) for key, seconds in train.items()]


def joined_notes(folder: Path) -> list[dict[str, Any]]:
    """Put together what was noted of each message where Flower handed it over and where it was answered."""
    by_message: dict[str, dict[str, Any]] = {}
    for line in (line for file in folder.iterdir() for line in file.read_text().splitlines()):
        note = json.loads(line)
        by_message.setdefault(note["id"], {}).update(note)
    return list(by_message.values())


def run_empty(running: Deployment) -> list[float]:
    """Run an empty app over the same nodes; return the seconds of the training phases but the first."""
    with tempfile.TemporaryDirectory(prefix="plw-") as scratch:
        out = Path(scratch, "out")
        out.mkdir()
        config: dict[str, str | float] = {
            "size": 100_000,
            "rounds": ROUNDS,
            "clients": SITES,
            "cohort": SITES,
            "runs-dir": str(out),
        }
        app = write_app("empty", config, Path(scratch, "app"))
        _finish(running, app, f'runs-dir="{out}"')
        return [taken["train"] for taken in json.loads((out / "rounds.json").read_text())[1:]]


def timed_app(folder: Path) -> Path:
    """Write the app with :mod:`benchmarks.speed.apps.timed_entry` before it and ``timed_client`` in it."""
    for package in (*SHARED, "client_app", "server_app"):
        shutil.copytree(APP / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("LICENSE", "README.md"):
        shutil.copy(APP / file, folder)
    for file in ("timed_client.py", "timed_entry.py"):
        shutil.copy(Path(__file__).parent / "apps" / file, folder)
    client = folder / "client_app" / "app.py"
    own = client.read_text(encoding="utf-8")
    client.write_text(f"import timed_client\n{own}\n\napp = timed_client.timed_app(app)\n", encoding="utf-8")
    described = (APP / "pyproject.toml").read_text(encoding="utf-8")
    for old, new in (("client_app.entry:app", "timed_entry:client"), ("fab-include = [", 'fab-include = ["*.py",')):
        if described.count(old) != 1:
            raise PetalwiseError(f"The app's pyproject.toml says {old!r} {described.count(old)} times, not once.")
        described = described.replace(old, new)
    (folder / "pyproject.toml").write_text(described, encoding="utf-8")
    return folder


def round_parts(notes: Sequence[dict[str, Any]], phase: float) -> dict[str, float]:
    """Split a training phase into :data:`PARTS`, mean over its clients; they add up to the phase.

    Parameters
    ----------
    notes : Sequence[dict]
        What the clients wrote down.
    phase : float
        Seconds that the server waited.

    Raises
    ------
    PetalwiseError
        If a client failed, or not all of them wrote anything.
    """
    if len(notes) != SITES or any(note["failed"] for note in notes):
        raise PetalwiseError(f"{len(notes)} of {SITES} clients took part in a round, or one of them failed.")
    return {part: statistics.fmean(_parts(note, phase)[part] for note in notes) for part in PARTS}


def _parts(note: dict[str, Any], phase: float) -> dict[str, float]:
    """Split the phase as one client saw it; what a resident had imported before counts nothing."""
    taken, loaded = note["taken"], note["loaded"]
    arrived = {name: max(loaded, note["arrived"][name]) for name in ("torch", "timm", "app")}
    inside = {name: taken.get(name, 0.0) for name in ("data", "model", "steps")}
    return {
        "polls": note["started"] - note["created"],
        "flower": loaded - note["started"],
        "torch": arrived["torch"] - loaded,
        "timm": arrived["timm"] - arrived["torch"],
        "app": arrived["app"] - arrived["timm"],
        **inside,
        "other": note["ended"] - arrived["app"] - sum(inside.values()),
        "back": note["created"] + phase - note["ended"],
    }


def parts_table(name: str, runs: Sequence[dict[str, float]], empty: Iterable[float]) -> Table:
    """List the parts of a round, mean over rounds and clients."""
    mean = {part: statistics.fmean(parts[part] for parts in runs) for part in PARTS}
    whole = sum(mean.values())
    rows = [[PARTS[part], f"{value:.2f}", f"{100 * value / whole:.0f} %"] for part, value in mean.items()]
    rows.append(["training phase of a round", f"{whole:.2f}", "100 %"])
    rows.append(["the same of an empty Flower app", f"{statistics.fmean(empty):.2f}", ""])
    return Table(f"A deployed round: {SITES} SuperNodes on this machine, {name}", ["part", "seconds", "share"], rows)


def _finish(running: Deployment, app: Path, config: str) -> None:
    outcome = running.finish(running.submit(app, [config]), RUN_SECONDS)
    if not outcome.completed:
        raise PetalwiseError(outcome.summary)


def _images(folder: Path, seed: int) -> Path:
    """Write the images of a site, dark and light ones."""
    values = np.random.default_rng(seed)
    for split, count in (("train", IMAGES), ("test", 4)):
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = values.integers(0, 128, (64, 64, 3)) + 127 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    return folder
