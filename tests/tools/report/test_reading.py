"""What becomes of run folders that are whole, unfinished, old or damaged."""

import json

import pytest

from task.errors import ConfigError, DataError
from tools.report.__main__ import main
from tools.report.page import render
from tools.report.reading import read_runs


def test_a_real_run_is_read_whole(folders):
    [run] = read_runs([folders["livar"]])
    assert [report.server_round for report in run.reports] == [0, 1, 2, 3]
    assert run.notes == ()
    assert run.clients == ["0", "1", "2", "3"]
    assert run.units == ["blocks.0", "blocks.1", "head"]
    lines = (folders["livar"] / "metrics.jsonl").read_text().splitlines()
    assert [report.to_dict() for report in run.reports] == [json.loads(line) for line in lines]


def test_a_run_that_is_going_on_is_read_up_to_the_half_written_line(written):
    path = written({"central": {"accuracy": 0.1}}, {"central": {"accuracy": 0.2}})
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"server_round": 2, "central": {"accu')
    [run] = read_runs([path])
    assert [report.server_round for report in run.reports] == [0, 1]
    assert [note.split(":")[0] for note in run.notes] == [
        "The last line of metrics.jsonl is half written and left out; its round is being recorded.",
        "1 of 5 rounds are recorded",
    ]
    assert "is half written" in render([run])


def test_missing_rounds_are_named_and_one_that_is_there_twice_counts_as_last_written(written):
    path = written({}, {"server_round": 2, "bytes_up": 1}, {"server_round": 2, "bytes_up": 7}, {"server_round": 5})
    [run] = read_runs([path])
    assert [(report.server_round, report.bytes_up) for report in run.reports] == [(0, 0), (2, 7), (5, 0)]
    assert run.notes[0].startswith("Rounds that are missing: 1, 3, 4. ")


def test_a_run_without_any_round_has_a_page_that_says_so(written):
    [run] = read_runs([written()])
    assert run.notes[0].startswith("There are no rounds: metrics.jsonl cannot be read")
    assert "No run has recorded any." in render([run])


ODD = [
    {"server_round": 1},
    {"server_round": 1, "key of another version": 1},
    {"server_round": 1, "central": {"accuracy": None}, "clients_accuracy": {"0": None, "1": "?"}},
    {"server_round": 1, "central": 3, "details": [], "clients_used": "0", "seconds": None, "bytes_up": "many"},
    {"server_round": 1, "clients_used": [1, 2], "details": {"alpha": [[1], [2, 3]], "head_weights": [[1.0]]}},
    {"server_round": 1, "details": {"schedule": {"due": 7, "discrepancy": "x", "change": [None, None]}}},
    {"server_round": 1, "clients_used": ["0"], "details": {"alpha": [[[None]]], "layers": 4, "adapter_weights": [[]]}},
    {"server_round": 1, "clients_used": ["0"], "details": {"head_weights": [[None, None]], "layers": {}}},
    {"server_round": 1, "clients_partition": {"0": "partition 7 of 3"}, "seconds": {"total": 1.0}},
    {"server_round": 1, "bytes_down": 10**400, "clients_accuracy_mean": 0.5},
]


@pytest.mark.parametrize("record", ODD, ids=str)
def test_records_of_other_versions_and_damaged_ones_still_make_a_page(written, record):
    path = written({})
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    [run] = read_runs([path])
    assert len(run.reports) == 2
    assert "<h1>" in render([run])


@pytest.mark.parametrize(
    "line", ["", "7", "[]", "{}", '{"server_round": "1"}', '{"server_round": 1e9}', "\x00", "[" * 9999]
)
def test_a_line_that_is_no_record_is_named(written, line):
    path = written({})
    with (path / "metrics.jsonl").open("a") as file:
        file.write(line + '\n{"server_round": 1}\n')
    [run] = read_runs([path])
    assert [report.server_round for report in run.reports] == [0, 1]
    assert run.notes[0] == "Line 2 of metrics.jsonl is no record of a round and left out."


def test_runs_of_one_name_are_told_apart_and_one_named_twice_counts_once(written, tmp_path):
    path = written({})
    twin = tmp_path / "elsewhere" / path.name
    twin.parent.mkdir()
    path.rename(twin)
    again = written({})
    again = again.rename(again.with_name(path.name))
    assert [run.name for run in read_runs([again, twin, again])] == [f"runs/{path.name}", f"elsewhere/{path.name}"]


def test_a_folder_that_is_no_run_ends_in_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "report.html")]) == 1
    assert capsys.readouterr().err == f"No report is made: {str(tmp_path)!r} is no run folder: it has no config.yaml.\n"
    with pytest.raises(ConfigError):
        read_runs([tmp_path / "gone"])


@pytest.mark.parametrize("config", ["a: [", "- 1", "7", "\x00", "a: ${"])
def test_a_config_that_cannot_be_read_ends_in_one_sentence(tmp_path, config):
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(DataError, match=r"config\.yaml"):
        read_runs([tmp_path])


def test_a_page_that_cannot_be_written_ends_in_one_sentence(written, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(written({})), "--out", str(tmp_path / "file" / "report.html")]) == 1
    assert "cannot be written" in capsys.readouterr().err
