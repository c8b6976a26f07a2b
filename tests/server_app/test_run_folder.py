"""The folder of a run."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from safetensors import safe_open

from server_app.run_folder import RunFolder
from strategies import STRATEGIES, TaskContext
from strategies.report import RoundReport
from task.arrays import FLAT, flat_to_array
from task.errors import ConfigError
from task.signals import signal_layout
from tests.strategies.scripted import (
    BASE,
    CLASSES,
    LAYOUT,
    Script,
    ShufflingGrid,
    final_flat,
    initial_arrays,
    scripted_app,
)


def test_a_folder_is_named_by_time_and_strategy_and_holds_the_config(tmp_path):
    folder = RunFolder.new(tmp_path / "new" / "runs", "fedavg", "seed: 0\n")
    assert folder.path.parent == tmp_path / "new" / "runs"
    assert re.fullmatch(r"\d{8}-\d{6}-fedavg", folder.path.name)
    assert (folder.path / "config.yaml").read_text() == "seed: 0\n"
    assert folder.adapter.parent == folder.metrics.parent == folder.path


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20300101-000000")
    folders = [RunFolder.new(tmp_path, "fedavg", f"run: {run}\n") for run in range(3)]
    assert [folder.path.name for folder in folders] == [
        "20300101-000000-fedavg",
        "20300101-000000-fedavg-2",
        "20300101-000000-fedavg-3",
    ]
    assert [(folder.path / "config.yaml").read_text() for folder in folders] == [f"run: {run}\n" for run in range(3)]


def test_a_relative_parent_is_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunFolder.new(Path("runs"), "fedavg", "").path.parent == tmp_path / "runs"


def test_a_file_in_the_way_is_not_overwritten(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match="runs_dir=.*cannot be written"):
        RunFolder.new(tmp_path / "runs", "fedavg", "")
    assert (tmp_path / "runs").read_text() == "a file"


def test_every_line_of_the_metrics_is_one_round(tmp_path):
    folder = RunFolder.new(tmp_path, "fedavg", "")
    reports = [
        RoundReport(0, central={"accuracy": 0.1, "loss": 2.3}),
        RoundReport(1, merged=True, clients_used=["a"], clients_dropped={"b": "said\n“no”"}, train_loss=0.5),
    ]
    for report in reports:
        folder.append(report)
    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    assert [RoundReport(**json.loads(line)) for line in lines] == reports


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    folder = RunFolder.new(tmp_path, "fedavg", "")
    folder.append(RoundReport(1, central={"accuracy": 0.5, "loss": float("nan")}, train_loss=float("inf")))
    (line,) = folder.metrics.read_text().splitlines()
    report = json.loads(line, parse_constant=pytest.fail)
    assert report["central"] == {"accuracy": 0.5, "loss": None}
    assert report["train_loss"] is None


def read(path):
    """Tensors and client names of a recorded round."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["clients"])  # noqa: SIM118


def update_of(name, server_round):
    return np.random.default_rng([server_round, int(name)]).normal(size=LAYOUT.size).astype(np.float32)


def signals_of(name, server_round, size):
    return np.random.default_rng([5, server_round, int(name)]).random(size).astype(np.float32)


@pytest.mark.parametrize("name", ["fedavg", "livar", "fisher"])
def test_updates_and_signals_of_the_clients_used_are_kept_round_by_round(tmp_path, name):
    def edit(client, server_round, content):
        return content if (client, server_round) != ("1", 2) else type(content)()

    asked = set()

    def signals(client, instruction):
        asked.add(instruction.signals)
        size = signal_layout(instruction.signals, LAYOUT).size
        return ArrayRecord({FLAT: flat_to_array(signals_of(client, instruction.server_round, size))})

    script = Script(values=lambda client, n, received: update_of(client, n), edit=edit, signals=signals)
    kind = STRATEGIES[name]
    strategy = kind(kind.Config(name=name), TaskContext("{}", LAYOUT, BASE, CLASSES, 0), keep_updates=True)
    folder, models = RunFolder.new(tmp_path, name, ""), [final_flat(initial_arrays())]

    def note(report):
        if report.merged:
            folder.record(report.server_round, strategy.received, strategy.updates)
            models.append(strategy.flat.numpy().copy())

    strategy.start(ShufflingGrid(scripted_app(script), ["10", "2", "1"], 0), initial_arrays(), 2, on_round=note)
    assert [path.name for path in sorted((folder.path / "updates").iterdir())] == [
        "round-0001.safetensors",
        "round-0002.safetensors",
    ]
    (request,) = asked
    layout = signal_layout(request, LAYOUT)
    explained = {"class-count", "class-variance", "score-a", "score-b", "norm-a", "norm-b", "norm-product"}
    assert explained <= {spec.name for spec in layout.tensors}
    for server_round, used in ((1, ["1", "2", "10"]), (2, ["2", "10"])):
        tensors, clients = read(folder.path / "updates" / f"round-{server_round:04d}.safetensors")
        assert clients == used
        assert set(tensors) == {"received", "updates", "num-examples", *(spec.name for spec in layout.tensors)}
        np.testing.assert_array_equal(tensors["received"].numpy(), models[server_round - 1])
        np.testing.assert_array_equal(tensors["updates"].numpy(), [update_of(client, server_round) for client in used])
        assert tensors["num-examples"].tolist() == [10 * (int(client) + 1) for client in used]
        for row, client in enumerate(used):
            sent = torch.from_numpy(signals_of(client, server_round, layout.size))
            for key, view in layout.views(sent).items():
                assert torch.equal(tensors[key][row], view), key


def test_a_failed_round_keeps_nothing_and_the_updates_before_it_stay(tmp_path):
    def edit(client, server_round, content):
        return type(content)() if server_round == 2 else content

    kind = STRATEGIES["fedavg"]
    strategy = kind(kind.Config(name="fedavg"), TaskContext("{}", LAYOUT, BASE, CLASSES, 0), keep_updates=True)
    held = []
    strategy.start(
        ShufflingGrid(scripted_app(Script(edit=edit)), ["0", "1"]),
        initial_arrays(),
        2,
        on_round=lambda report: held.append((report.merged, list(strategy.updates))),
    )
    assert [merged for merged, _ in held] == [False, True, False]
    assert held[2][1] == held[1][1]


def test_without_being_asked_a_strategy_holds_no_updates():
    kind = STRATEGIES["fedavg"]
    strategy = kind(kind.Config(name="fedavg"), TaskContext("{}", LAYOUT, BASE, CLASSES, 0))
    strategy.start(ShufflingGrid(scripted_app(Script()), ["0", "1"]), initial_arrays(), 1)
    assert strategy.updates == []
    assert strategy.received.numel() == 0
