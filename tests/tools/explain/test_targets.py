"""Targets are learned once and kept."""

import os
from dataclasses import replace

import pytest
import torch

from strategies.livar import lora_merge_weights
from task.errors import DataError
from tests.tools.explain.recorded import record_run
from tools.explain.analysis import ComputeOptions, learn_targets
from tools.explain.learning import LearnOptions
from tools.explain.records import read_runs
from tools.explain.targets import Learner, TargetStore, known_weights

OPTIONS, COMPUTE = LearnOptions(calibration_images=10, steps=2), ComputeOptions(device="cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return read_runs([record_run(tmp_path_factory.mktemp("runs"), clients=2)])


@pytest.fixture(scope="module")
def learned(runs, tmp_path_factory):
    store = TargetStore(tmp_path_factory.mktemp("out") / "targets", OPTIONS)
    return store, learn_targets(runs, store, COMPUTE)


@pytest.fixture
def no_learning(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("learned anew")

    monkeypatch.setattr(Learner, "learn", refuse)


def times(store):
    return {path.name: os.stat(path).st_mtime_ns for path in store.folder.iterdir()}


def test_every_record_has_a_target(runs, learned):
    store, targets = learned
    assert targets.keys() == {record.digest for record in runs[0].records}
    for target in targets.values():
        assert target.weights.shape == (2, 8)
        assert target.images == 10
        assert target.losses["learned"][0] <= target.losses["uniform"][0]
        assert target.losses.keys() == {"uniform", "samples", "published", "learned"}
    assert len(times(store)) == 2


def test_a_second_call_learns_nothing_anew(runs, learned, no_learning, capsys):
    store, targets = learned
    before = times(store)
    again = learn_targets(runs, store, COMPUTE)
    assert times(store) == before
    for digest, target in targets.items():
        assert torch.equal(again[digest].weights, target.weights)
        assert again[digest].losses == target.losses
    assert capsys.readouterr().out.count("kept from before") == 2


def test_only_what_is_missing_is_learned(runs, learned, capsys):
    store, targets = learned
    first, second = (store.path(runs[0], record) for record in runs[0].records)
    kept = times(store)[second.name]
    first.unlink()
    again = learn_targets(runs, store, COMPUTE)
    assert times(store)[second.name] == kept
    digest = runs[0].records[0].digest
    assert torch.equal(again[digest].weights, targets[digest].weights), "equal records give equal weights"
    lines = capsys.readouterr().out.splitlines()
    assert "ETA 0:00" in lines[0]
    assert "kept from before" in lines[1]


def test_other_options_records_and_configs_have_files_of_their_own(runs, learned):
    store, _ = learned
    run, [record, other] = runs[0], runs[0].records
    paths = {store.path(run, record), store.path(run, other)}
    paths |= {TargetStore(store.folder, replace(OPTIONS, steps=3)).path(run, record)}
    changed = replace(run)
    changed.__dict__["config_digest"] = "another"
    paths |= {store.path(changed, record)}
    assert len(paths) == 4


def test_a_broken_file_is_named(runs, tmp_path):
    store = TargetStore(tmp_path, OPTIONS)
    store.path(runs[0], runs[0].records[0]).write_bytes(b"no tensors")
    with pytest.raises(DataError, match=r"is no intact target; delete it"):
        store.read(runs[0], runs[0].records[0])


def test_known_ways_of_weighing(runs):
    record = runs[0].records[0]
    ways = known_weights(record)
    assert torch.equal(ways["uniform"], torch.full((2, 8), 0.5, dtype=torch.float64))
    share = record.num_examples[0] / sum(record.num_examples)
    torch.testing.assert_close(ways["samples"][0], torch.full((8,), share, dtype=torch.float64))
    assert torch.equal(ways["published"], lora_merge_weights(record.signals["score-a"], record.signals["score-b"]))
