"""The whole analysis and its command line, on fabricated records and on a real run."""

import csv
import io
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.common.config import parse_config_args

from client_app.app import app as client_app
from server_app.app import run_federation
from server_app.compose import compose_run
from strategies.livar import read_table
from task.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.tools.explain.recorded import record_run
from tools.debug import InProcessGrid, simulated_nodes
from tools.explain import analysis
from tools.explain.__main__ import main
from tools.explain.analysis import ComputeOptions, explain_runs
from tools.explain.forest import Explanation
from tools.explain.learning import LearnOptions
from tools.explain.summary import run_config, verdict

QUICK = ["--calibration-images", "10", "--steps", "2", "--device", "cpu"]


def command(*arguments):
    """Call the command line in this process; returns what it printed, or the sentence it ended with."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", ["explain", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return str(end.code)
    return printed.getvalue()


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """A run, the folder it was explained in, and what was printed."""
    parent = tmp_path_factory.mktemp("explained")
    folder, out = record_run(parent, clients=3), parent / "out with a blank"
    return folder, out, command(folder, "--out", out, *QUICK)


def test_what_is_left_behind(explained):
    _, out, printed = explained
    assert "[2/2]" in printed
    assert f"Table: {out / 'table.yaml'}" in printed
    names = {path.name for path in out.iterdir()}
    plots = {"beeswarm.png", "dependence-s_A.png", "dependence-s_B.png"}
    assert names == plots | {"table.yaml", "summary.md", "rows.csv", "targets"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in plots)
    assert len(read_table(str(out / "table.yaml")).weights) == 3
    with (out / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 8
    assert {"record", "client", "layer", "s_A", "target", "shap_s_A"} <= rows[0].keys()


def test_the_summary_says_what_was_found(explained):
    folder, out, _ = explained
    text = (out / "summary.md").read_text()
    for part in (
        "2 records of 1 run, 48 rows",
        "R2 on rounds left out: ",
        "| s_A | ",
        "left out: clients.",
        "![beeswarm](beeswarm.png)",
        " / 1.931 (",
        f"| {folder.name} round 1 | 3 | 10 | ",
        f"python -m tools.explain {folder} --out '{out}'",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("r2", "scores", "parts"),
    [
        (0.5, 0.25, ["together explain 50.0 % ", "by, explain 25.0 % "]),
        (0.5, -0.1, ["together explain 50.0 % ", "by, predict the target no better", "Take the table for noise."]),
        (-0.2, 0.0, ["together predict the target no better", "Take the table for noise."]),
    ],
)
def test_a_negative_finding_is_said_as_it_is(r2, scores, parts):
    told = verdict(Explanation(r2, (), scores, 0.9, 1.0, np.zeros((1, 1))))
    assert all(part in told for part in parts)
    assert told.endswith("noise.") == (scores <= 0)


def test_the_command_that_is_printed_reads_the_table(explained):
    _, out, _ = explained
    [line] = [line for line in (out / "summary.md").read_text().splitlines() if "tools.launch" in line]
    config = parse_config_args([shlex.split(line)[-1]])
    assert compose_run(config).strategy.table == str(out / "table.yaml")


def test_a_plain_path_needs_no_further_quotes():
    assert run_config(Path("/srv/table.yaml")) == '\'strategy="livar" overrides="strategy.table=/srv/table.yaml"\''


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "--steps=0 must be at least 1."),
        (["--pull", "-1"], "--pull=-1.0 must be at least 0.0."),
        (["--device", "tpu"], "--device='tpu' is not one of: auto, cpu, cuda."),
    ],
)
def test_wrong_options_end_in_one_sentence(tmp_path, arguments, sentence):
    assert command(tmp_path, "--out", tmp_path / "out", *arguments) == f"Nothing is explained: {sentence}"


def test_an_out_folder_that_cannot_be_made_ends_in_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    told = command(record_run(tmp_path), "--out", tmp_path / "file" / "out", *QUICK)
    assert told.startswith("Nothing is explained: ")
    assert "file" in told


def test_a_missing_extra_is_refused_before_anything_is_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "EXTRA", ("shap_that_is_not_there", "matplotlib"))
    with pytest.raises(ConfigError, match=r"^shap_that_is_not_there must be installed: pip install .*\[explain\]"):
        explain_runs([tmp_path], tmp_path / "out", LearnOptions(), ComputeOptions())


def test_signals_that_explain_nothing_are_refused_before_anything_is_learned(tmp_path):
    def spoil(server_round, name, signal):
        return torch.zeros_like(signal) if name == "score-a" else signal

    told = command(record_run(tmp_path, edit=spoil), "--out", tmp_path / "out", *QUICK)
    assert told.startswith("Nothing is explained: The signal score-a is constant in ")
    assert told.endswith("or record it anew with A and B trained (lora.freeze_a=false).")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_refusal_is_a_sentence_and_exit_code_1(tmp_path):
    told = subprocess.run(
        [sys.executable, "-m", "tools.explain", str(tmp_path), "--out", str(tmp_path / "out")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1] == (
        f"Nothing is explained: '{tmp_path}' is no run folder: it has no config.yaml."
    )
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_real_run_is_explained_and_its_table_used(tmp_path):
    tiny = [
        "strategy=livar",
        "backbone=vit_pico_random",
        "backbone.image_size=16",
        "backbone.arguments={patch_size:4,embed_dim:32,depth:2,num_heads:2}",
        "dataset.max_train_samples=120",
        "dataset.max_test_samples=40",
        "train.max_steps=3",
        "num_server_rounds=2",
        f"runs_dir={tmp_path / 'runs'}",
    ]

    def run(*overrides):
        grid = InProcessGrid(client_app, simulated_nodes(3))
        return run_federation(grid, compose_run({}, [*tiny, *overrides]))

    folders = [run("record_updates=true", f"seed={seed}") for seed in (0, 1)]
    printed = command(*folders, "--out", tmp_path / "out", *QUICK)
    assert "R2 on federations left out: " in printed
    table = tmp_path / "out" / "table.yaml"
    used = run(f"strategy.table={table}")
    assert f"table: {table}" in (used / "config.yaml").read_text()
    assert (used / "adapter").is_dir()
