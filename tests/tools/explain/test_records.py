"""Reading recorded runs, and what is refused of them."""

import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from task.errors import ConfigError, DataError
from task.units import lora_layers
from tests.tools.explain.recorded import record_run
from tools.explain.records import layer_place, read_run, read_runs


def test_a_record_holds_what_was_written(tmp_path):
    folder = record_run(tmp_path, clients=3, rounds=2)
    run = read_run(folder)
    assert [record.server_round for record in run.records] == [1, 2]
    record, written = run.records[1], load_file(folder / "updates" / "round-0002.safetensors")
    assert record.clients == ("0", "1", "2")
    assert record.label == f"{folder.name} round 2"
    assert record.num_examples == tuple(written["num-examples"].tolist())
    assert all(torch.equal(signal, written[name]) for name, signal in record.signals.items())
    assert torch.equal(record.updates(), written["updates"])
    assert len(lora_layers(run.layout)) == 8
    assert run.layout.size == written["received"].numel()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("blocks.3.attn.qkv", (3, "attn.qkv")),
        ("vision.blocks.11.mlp.fc1", (11, "mlp.fc1")),
        ("patch_embed.proj", (-1, "patch_embed.proj")),
    ],
)
def test_the_place_of_a_layer(name, place):
    assert layer_place(name) == place


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'.*' is no run folder: it has no config\.yaml"):
        read_runs([tmp_path])


def test_a_run_without_updates_is_told_how_to_have_them(tmp_path):
    folder = record_run(tmp_path)
    shutil.rmtree(folder / "updates")
    with pytest.raises(ConfigError, match=r"no recorded updates; run it again with record_updates=true"):
        read_runs([folder])


def test_a_single_record_is_too_few(tmp_path):
    with pytest.raises(ConfigError, match=r"There is 1 record and 2 are needed"):
        read_runs([record_run(tmp_path, rounds=1)])


def test_a_single_client_is_too_few(tmp_path):
    with pytest.raises(ConfigError, match=r"round 1 has 1 client and 2 are needed"):
        read_runs([record_run(tmp_path, clients=1)])


def test_runs_of_different_layouts_are_not_mixed(tmp_path):
    first, second = record_run(tmp_path), record_run(tmp_path, overrides=["lora.units=module"])
    with pytest.raises(ConfigError, match=rf"{first.name} and {second.name} have different adapters or heads"):
        read_runs([first, second])


def test_records_that_are_there_twice_count_once(tmp_path):
    """Round 1 of runs that differ in the strategy only; else it would be both fitted and left out."""
    first, second = record_run(tmp_path), record_run(tmp_path)
    again = second / "updates" / "round-0001.safetensors"
    shutil.copy(first / "updates" / "round-0001.safetensors", again)
    record = second / "updates" / "round-0002.safetensors"
    save_file(load_file(record) | {"label-entropy": torch.zeros(3, 1)}, record, metadata_of(record))
    runs = read_runs([first, second, first])
    assert [[record.server_round for record in run.records] for run in runs] == [[1, 2], [2]]


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_broken_record_is_named(tmp_path):
    folder = record_run(tmp_path)
    (folder / "updates" / "round-0002.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match=r"round-0002\.safetensors' is no intact record"):
        read_run(folder)


def test_a_record_without_a_signal_is_named(tmp_path):
    folder = record_run(tmp_path)
    path = folder / "updates" / "round-0001.safetensors"
    tensors = load_file(path)
    del tensors["norm-a"]
    save_file(tensors, path, metadata_of(path))
    with pytest.raises(DataError, match=r"round-0001\.safetensors' is no intact record .*norm-a"):
        read_run(folder)


def test_a_record_of_another_model_is_named(tmp_path):
    folder, other = record_run(tmp_path), record_run(tmp_path, overrides=["lora.rank=3"])
    shutil.copy(other / "config.yaml", folder / "config.yaml")
    with pytest.raises(DataError, match=r"does not fit the model of the config\.yaml beside it"):
        read_run(folder)


@pytest.mark.parametrize("text", ["seed: [", "seed: none", "unknown: 1", "- 1"])
def test_a_broken_config_is_refused(tmp_path, text):
    folder = record_run(tmp_path)
    (folder / "config.yaml").write_text(text)
    with pytest.raises((ConfigError, DataError)) as caught:
        read_run(folder)
    assert re.fullmatch(r"[^\n]+", str(caught.value))
